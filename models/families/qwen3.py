"""The dense Qwen3 family: a Llama whose queries and keys are normalised head by head.

Source: Yang et al. 2025, https://arxiv.org/abs/2505.09388, table 1.
"""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ..architecture import Architecture
from . import llama
from .family import Family
from .fields import Config


def slides(config: Config) -> list[str]:
    """Name the kind of each block where config.json gives the first one with a window."""
    first = (
        config["max_window_layers"] if config["use_sliding_window"] else config["num_hidden_layers"]
    )
    return [
        "sliding_attention" if layer >= first else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]


def refuse_unused(config: Config) -> dict[str, Any]:
    """Refuse a list of blocks with a window beside the word that none is used."""
    if not config["use_sliding_window"] and "sliding_attention" in config["layer_types"]:
        config.refuse("use_sliding_window", False, "layer_types names blocks that have a window")
    return {}


def windows(architecture: Architecture) -> dict[str, Any]:
    """Say whether there are blocks with a window, beside their list."""
    return {
        "use_sliding_window": architecture.window is not None,
        "max_window_layers": architecture.layers,
    }


WINDOW = MappingProxyType(
    {
        "sliding_window": 4096,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "layer_types": slides,
    }
)
FAMILY = Family(
    model_type="qwen3", class_name="Qwen3ForCausalLM",
    fields={**llama.FIELDS, "attention_bias": "qkv_bias out_bias", "sliding_window": "window"},
    names=llama.NAMES,
    defaults={**llama.DEFAULTS, "head_dim": 128, "max_position_embeddings": 32_768, **WINDOW},
    always={"qk_norm": "head"}, fixed=llama.SILU,
    ignored=("max_window_layers",), read=refuse_unused, write=windows,
)  # fmt: skip


def tiny() -> Architecture:
    """Return the tiny Llama with norms of queries and keys."""
    return replace(llama.tiny(), qk_norm="head")


def _qwen3(layers: int, width: int, heads: int, hidden: int, *, tied: bool) -> Architecture:
    outer: dict[str, Any] = {"rope_base": 1e6, "norm_eps": 1e-6, "qk_norm": "head", "tied": tied}
    outer |= {"head_dim": 128, "vocabulary": 151_936, "max_positions": 40_960}
    return llama.sized(layers, width, heads, 8, hidden, **outer)


def qwen3_0_6b() -> Architecture:
    """Return Qwen3 0.6B: 596,049,920 parameters, tied embeddings."""
    return _qwen3(28, 1024, 16, 3072, tied=True)


def qwen3_1_7b() -> Architecture:
    """Return Qwen3 1.7B: 1,720,574,976 parameters, tied embeddings."""
    return _qwen3(28, 2048, 16, 6144, tied=True)


def qwen3_4b() -> Architecture:
    """Return Qwen3 4B: 4,022,468,096 parameters, tied embeddings."""
    return _qwen3(36, 2560, 32, 9728, tied=True)


def qwen3_8b() -> Architecture:
    """Return Qwen3 8B: 8,190,735,360 parameters."""
    return _qwen3(36, 4096, 32, 12288, tied=False)


def qwen3_14b() -> Architecture:
    """Return Qwen3 14B: 14,768,307,200 parameters."""
    return _qwen3(40, 5120, 40, 17408, tied=False)


def qwen3_32b() -> Architecture:
    """Return Qwen3 32B: 32,762,123,264 parameters."""
    return _qwen3(64, 5120, 64, 25600, tied=False)
