"""The GPT-2 family: learned positions, layer norms, biases everywhere, no gate.

Weights are stored transposed, queries, keys and values beside each other. Its config.json says that
a tenth of many things is dropped while training: here nothing is, and so it is written.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3 and
table 2.
"""

from types import MappingProxyType
from typing import Any

from ..architecture import Architecture
from . import llama
from .family import Family

_DROPPED = MappingProxyType({"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0})
_SUMMARY = ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")
_BIASES = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True)
_PLAIN: dict[str, Any] = {"positions": "learned", "norm": "layer", "activation": "gelu", **_BIASES}


_H = "transformer.h.*"
FAMILY = Family(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    fields={
        "n_layer": "layers",
        "n_embd": "width",
        "n_head": "heads kv_heads",
        "n_inner": "hidden",
        "n_positions": "max_positions",
        "vocab_size": "vocabulary",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tied",
    },
    names={
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
        "blocks.*.attention_norm": f"{_H}.ln_1",
        **{
            f"blocks.*.attention.qkv.{part}.{leaf}": f"{_H}.attn.c_attn.{leaf}{index}"
            for n, part in enumerate("qkv")
            for leaf, index in (("weight", f"[:, +{n}].T"), ("bias", f"[+{n}]"))
        },
        "blocks.*.attention.out.weight": f"{_H}.attn.c_proj.weight.T",
        "blocks.*.attention.out.bias": f"{_H}.attn.c_proj.bias",
        "blocks.*.feed_forward_norm": f"{_H}.ln_2",
        "blocks.*.feed_forward.gate_up.up.weight": f"{_H}.mlp.c_fc.weight.T",
        "blocks.*.feed_forward.gate_up.up.bias": f"{_H}.mlp.c_fc.bias",
        "blocks.*.feed_forward.down.weight": f"{_H}.mlp.c_proj.weight.T",
        "blocks.*.feed_forward.down.bias": f"{_H}.mlp.c_proj.bias",
    },
    defaults={
        "n_inner": lambda config: 4 * config["n_embd"],
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    always=_PLAIN,
    fixed={
        "activation_function": (
            ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
            "the feed-forward would use another activation",
        ),
        "add_cross_attention": ((False,), "blocks would attend to an encoder"),
        "reorder_and_upcast_attn": ((False,), "scores would be rounded in another order"),
        "scale_attn_by_inverse_layer_idx": ((False,), "each block would scale its scores anew"),
        "scale_attn_weights": ((True,), "scores would not be scaled"),
    },
    ignored=("n_ctx", *_DROPPED, *(f"summary_{name}" for name in _SUMMARY)),
    rope="",
    read=lambda config: {"head_dim": config["n_embd"] // config["n_head"]},
    write=lambda architecture: dict(_DROPPED),
    prefix="transformer.",
    skipped=(".attn.bias", ".attn.masked_bias"),
)


def _gpt2(layers: int, width: int, heads: int, **outer: Any) -> Architecture:
    outer = {"vocabulary": 50_257, "max_positions": 1024, "tied": True, **_PLAIN, **outer}
    return llama.sized(layers, width, heads, heads, 4 * width, **outer)


def tiny() -> Architecture:
    """Return a GPT-2 of a tenth of a million parameters."""
    return _gpt2(2, 64, 4, vocabulary=256, max_positions=512)


def gpt2_small() -> Architecture:
    """Return GPT-2 small: 124,439,808 parameters, tied embeddings."""
    return _gpt2(12, 768, 12)


def gpt2_medium() -> Architecture:
    """Return GPT-2 medium: 354,823,168 parameters, tied embeddings."""
    return _gpt2(24, 1024, 16)


def gpt2_large() -> Architecture:
    """Return GPT-2 large: 774,030,080 parameters, tied embeddings."""
    return _gpt2(36, 1280, 20)


def gpt2_xl() -> Architecture:
    """Return GPT-2 XL: 1,557,611,200 parameters, tied embeddings."""
    return _gpt2(48, 1600, 25)
