"""The Gemma 2 family: norms before and after, scales of 1 + weight, soft-caps, every other window.

Source: Gemma Team 2024, https://arxiv.org/abs/2408.00118, section 2 and table 1.
"""

from types import MappingProxyType
from typing import Any

from ..architecture import Architecture
from . import llama
from .family import Config, Family, Fixed

PLAIN: dict[str, Any] = {"norm": "rms_plus_one", "norm_at": "both", "activation": "geglu"}
FIELDS = MappingProxyType(
    {**llama.FIELDS, "attention_bias": "qkv_bias out_bias", "sliding_window": "window"}
)
DEFAULTS = MappingProxyType(
    {
        **llama.DEFAULTS,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    }
)
_OTHER = "the feed-forward would use another activation"
FIXED: Fixed = MappingProxyType(
    {
        "hidden_activation": (("gelu_pytorch_tanh",), _OTHER),
        "use_bidirectional_attention": ((None, False), "tokens would see those after them"),
    }
)
NAMES = MappingProxyType(
    {
        **llama.NAMES,
        "blocks.*.attention_post_norm": "model.layers.*.post_attention_layernorm",
        "blocks.*.feed_forward_norm": "model.layers.*.pre_feedforward_layernorm",
        "blocks.*.feed_forward_post_norm": "model.layers.*.post_feedforward_layernorm",
    }
)
_ATTENTION, _LOGITS = "attn_logit_softcapping", "final_logit_softcapping"


def read_scales(config: Config, *, attention: float = 0.0, logits: float = 0.0) -> dict[str, Any]:
    """Return scales and bounds; `attention` and `logits` are the bounds that absent fields mean."""
    return {
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        "embedding_scale": config["hidden_size"] ** 0.5,
        "softcap": config.get(_ATTENTION, 0.0 if _ATTENTION in config else attention),
        "logit_softcap": config.get(_LOGITS, 0.0 if _LOGITS in config else logits),
    }


def write_scales(a: Architecture) -> dict[str, Any]:
    """Say the same in fields of config.json, where null is no bound."""
    scale = a.attention_scale or a.head_dim**-0.5
    caps = {_ATTENTION: a.softcap or None, _LOGITS: a.logit_softcap or None}
    window = a.window or 4096  # which transformers wants even where no block has one
    return {"query_pre_attn_scalar": round(scale**-2), "sliding_window": window, **caps}


def alternate(config: Config, pattern: int = 2) -> list[str]:
    """Name the kind of each block: all but each last of `pattern` have a window."""
    layers = range(1, config["num_hidden_layers"] + 1)
    return ["sliding_attention" if n % pattern else "full_attention" for n in layers]


FAMILY = Family(
    model_type="gemma2", class_name="Gemma2ForCausalLM", fields=FIELDS, names=NAMES,
    defaults={**DEFAULTS, "max_position_embeddings": 8192, "layer_types": alternate}, always=PLAIN,
    fixed=FIXED, ignored=("hidden_act", "sliding_window_size"),
    read=lambda config: read_scales(config, attention=50.0, logits=30.0), write=write_scales,
)  # fmt: skip


def gemma(*sizes: int, **others: Any) -> Architecture:
    """Return an architecture with what all Gemmas share, and a window of 4096."""
    given = {"head_dim": 256, "max_positions": 8192, "window": 4096, **PLAIN, **others}
    given = {"attention_scale": 256**-0.5, "embedding_scale": sizes[1] ** 0.5, **given}
    return llama.sized(*sizes, **given, norm_eps=1e-6, tied=True)


def _gemma2(*sizes: int, **outer: Any) -> Architecture:
    kinds: dict[str, Any] = {"kinds": ("sliding", "full"), "softcap": 50.0, "logit_softcap": 30.0}
    return gemma(*sizes, **{"vocabulary": 256_000, **outer}, **kinds)


def tiny() -> Architecture:
    """Return a Gemma 2 of a fifth of a million parameters, with a window of 16."""
    outer = {"head_dim": 16, "vocabulary": 256, "max_positions": 512, "window": 16}
    return _gemma2(4, 64, 4, 2, 160, **outer, attention_scale=0.25)


def gemma2_2b() -> Architecture:
    """Return Gemma 2 2B: 2,614,341,888 parameters, tied embeddings."""
    return _gemma2(26, 2304, 8, 4, 9216)


def gemma2_9b() -> Architecture:
    """Return Gemma 2 9B: 9,241,705,984 parameters, tied embeddings."""
    return _gemma2(42, 3584, 16, 8, 14336)


def gemma2_27b() -> Architecture:
    """Return Gemma 2 27B: 27,227,128,320 parameters, tied embeddings."""
    return _gemma2(46, 4608, 32, 16, 36864, head_dim=128, attention_scale=144**-0.5)
