"""The Bamba family: Mamba-2 blocks with a few of attention between, half of each head rotating.

Where there are several groups, `transformers` normalises by them, as here. `mamba_chunk_size` says
how its kernels cut a sequence, and changes no result.

Source: IBM, Princeton, CMU and UIUC 2024, https://huggingface.co/blog/bamba;
https://huggingface.co/ibm-ai-platform/Bamba-9B (9.78 billion parameters).
"""

from dataclasses import replace
from math import inf
from types import MappingProxyType
from typing import Any

from ..architecture import Architecture, Kind, StateSpace
from . import llama
from .family import Family
from .fields import Config

_MIXER = "blocks.*.attention"
_MAMBA = "model.layers.*.mamba"
_FIXED = MappingProxyType(
    {
        "mamba_conv_bias": ((True,), "the convolution would have no bias"),
        "mamba_proj_bias": ((False,), "the projections of Mamba-2 would have biases"),
        "time_step_limit": (
            (None, [0.0, inf], [0.0, {"__float__": "Infinity"}]),
            "time steps would be clamped",
        ),
        "z_loss_coefficient": ((0.0,), "the loss would have a term: pass z_loss to the model"),
    }
)


def _read(config: Config) -> dict[str, Any]:
    layers, heads = config["num_hidden_layers"], config["mamba_n_heads"]
    full, inner = config["attn_layer_indices"], config["mamba_expand"] * config["hidden_size"]
    each = config["mamba_d_head"]
    each = inner // heads if each == "auto" else each
    if heads * each != inner:
        config.refuse("mamba_expand", config["mamba_expand"], "heads would be of another size")
    part = config.get("partial_rotary_factor", 0.5)
    part = config.get("rope_parameters", {}).get("partial_rotary_factor", part)
    if part != 0.5:
        config.refuse("partial_rotary_factor", part, "transformers rotates half of a head")
    kinds: list[Kind] = ["full" if n in full else "ssm" for n in range(layers)]
    return {"ssm.head_dim": each, "rope_dim": config["head_dim"] // 2, "kinds": tuple(kinds)}


def _write(architecture: Architecture) -> dict[str, Any]:
    a, ssm = architecture, architecture.ssm
    assert ssm is not None
    return {
        "attn_layer_indices": [n for n in range(a.layers) if a.kind(n) == "full"],
        "mamba_expand": ssm.heads * ssm.head_dim // a.width,
        "pad_token_id": None,
    }


FAMILY = Family(
    model_type="bamba",
    class_name="BambaForCausalLM",
    fields={
        **llama.FAMILY.fields,
        "mamba_n_heads": "ssm.heads",
        "mamba_d_head": "ssm.head_dim",
        "mamba_n_groups": "ssm.groups",
        "mamba_d_state": "ssm.state",
        "mamba_d_conv": "ssm.convolution",
    },
    names={
        **{name: at.replace(".mlp.", ".feed_forward.") for name, at in llama.NAMES.items()},
        "norm": "model.final_layernorm",
        "blocks.*.feed_forward_norm": "model.layers.*.pre_ff_layernorm",
        **{
            f"{_MIXER}.in_proj.{part}.weight": f"{_MAMBA}.in_proj.weight[+{n}, :]"
            for n, part in enumerate(("z", "x", "b", "c", "dt"))
        },
        **{
            f"{_MIXER}.conv.{part}.{leaf}": f"{_MAMBA}.conv1d.{leaf}[+{n}{rest}]"
            for n, part in enumerate("xbc")
            for leaf, rest in (("weight", ", :, :"), ("bias", ""))
        },
        f"{_MIXER}.a_log": f"{_MAMBA}.A_log",
        f"{_MIXER}.d": f"{_MAMBA}.D",
        f"{_MIXER}.dt_bias": f"{_MAMBA}.dt_bias",
        f"{_MIXER}.norm": f"{_MAMBA}.norm",
        f"{_MIXER}.out_proj": f"{_MAMBA}.out_proj",
    },
    defaults={
        **llama.DEFAULTS,
        "num_key_value_heads": 8,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-5,
        "attn_layer_indices": (),
        "mamba_n_heads": 128,
        "mamba_d_head": "auto",
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
    },
    fixed={**llama.SILU, **_FIXED},
    ignored=(
        *("attn_rotary_emb", "mamba_chunk_size", "mamba_dt_rank", "num_logits_to_keep"),
        "use_mamba_kernels",
    ),
    rope="partial",
    read=_read,
    write=_write,
)


def tiny() -> Architecture:
    """Return the tiny Llama with two state-space blocks around one of attention."""
    ssm = StateSpace(heads=8, head_dim=16, state=16, groups=2)
    kinds: tuple[Kind, ...] = ("ssm", "full", "ssm")
    return replace(llama.tiny(), layers=3, kinds=kinds, rope_dim=8, tied=False, ssm=ssm)


def bamba_9b() -> Architecture:
    """Return Bamba 9B: 9,780,235,392 parameters."""
    return Architecture(
        layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, hidden=14336, vocabulary=128_256,
        max_positions=262_144,
        kinds=tuple("full" if n in (9, 18, 27) else "ssm" for n in range(32)), rope_dim=64,
        ssm=StateSpace(heads=128, head_dim=64, state=128),
    )  # fmt: skip
