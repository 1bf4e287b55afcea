"""The Qwen2 and Qwen2.5 families: a Llama whose queries, keys and values have biases.

Source: Qwen Team 2024, https://arxiv.org/abs/2412.15115, table 1.
"""

from dataclasses import replace
from typing import Any

from ..architecture import Architecture
from . import llama, qwen3
from .family import Family

FAMILY = Family(
    model_type="qwen2", class_name="Qwen2ForCausalLM",
    fields={**llama.FIELDS, "sliding_window": "window"}, names=llama.NAMES,
    defaults={**llama.DEFAULTS, "max_position_embeddings": 32_768, **qwen3.WINDOW},
    always={"qkv_bias": True},
    fixed={**llama.SILU, "use_mrope": ((None, False), "positions would have three parts")},
    ignored=("max_window_layers",), read=qwen3.refuse_unused, write=qwen3.windows,
)  # fmt: skip


def tiny() -> Architecture:
    """Return the tiny Llama with biases of queries, keys and values."""
    return replace(llama.tiny(), qkv_bias=True)


def _qwen2_5(*sizes: int, **outer: Any) -> Architecture:
    given = {"vocabulary": 152_064, "max_positions": 131_072, "norm_eps": 1e-5, **outer}
    return llama.sized(*sizes, **given, rope_base=1e6, qkv_bias=True)


def _small(*sizes: int) -> Architecture:
    outer: dict[str, Any] = {"vocabulary": 151_936, "max_positions": 32_768, "norm_eps": 1e-6}
    return _qwen2_5(*sizes, **outer, tied=True)


def qwen2_5_0_5b() -> Architecture:
    """Return Qwen2.5 0.5B: 494,032,768 parameters, tied embeddings."""
    return _small(24, 896, 14, 2, 4864)


def qwen2_5_1_5b() -> Architecture:
    """Return Qwen2.5 1.5B: 1,543,714,304 parameters, tied embeddings."""
    return _small(28, 1536, 12, 2, 8960)


def qwen2_5_3b() -> Architecture:
    """Return Qwen2.5 3B: 3,085,938,688 parameters, tied embeddings."""
    return _small(36, 2048, 16, 2, 11008)


def qwen2_5_7b() -> Architecture:
    """Return Qwen2.5 7B: 7,615,616,512 parameters."""
    return _qwen2_5(28, 3584, 28, 4, 18944, norm_eps=1e-6)


def qwen2_5_14b() -> Architecture:
    """Return Qwen2.5 14B: 14,770,033,664 parameters."""
    return _qwen2_5(48, 5120, 40, 8, 13824)


def qwen2_5_32b() -> Architecture:
    """Return Qwen2.5 32B: 32,763,876,352 parameters."""
    return _qwen2_5(64, 5120, 40, 8, 27648)


def qwen2_5_72b() -> Architecture:
    """Return Qwen2.5 72B: 72,706,203,648 parameters."""
    return _qwen2_5(80, 8192, 64, 8, 29568)
