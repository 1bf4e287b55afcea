"""The dense Qwen3 family: a Llama whose queries and keys are normalised head by head.

Source: Yang et al. 2025, https://arxiv.org/abs/2505.09388, table 1.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..architecture import Architecture
from . import llama

MODEL_TYPE = "qwen3"
CLASS_NAME = "Qwen3ForCausalLM"

rename = llama.rename
unsupported = llama.unsupported


def writes(architecture: Architecture) -> bool:
    """Say whether a config.json of this family can describe an architecture."""
    return architecture.experts is None and architecture.qk_norm == "head"


def read(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture that a config.json describes.

    Raises:
        KeyError: If a size is missing.
    """
    defaults = {"head_dim": 128, "max_position_embeddings": 32_768}
    return replace(llama.read({**defaults, **config}), qk_norm="head")


def write(architecture: Architecture) -> dict[str, Any]:
    """Return the fields of a config.json that transformers 4 and 5 both read."""
    names = {"architectures": [CLASS_NAME], "model_type": MODEL_TYPE}
    return {**llama.write(architecture), **names, "use_sliding_window": False}


def tiny() -> Architecture:
    """Return the tiny Llama with norms of queries and keys."""
    return replace(llama.tiny(), qk_norm="head")


def _qwen3(layers: int, width: int, heads: int, hidden: int, *, tied: bool) -> Architecture:
    sizes: dict[str, Any] = {
        "layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": 8,
        "hidden": hidden,
    }
    outer: dict[str, Any] = {"rope_base": 1e6, "norm_eps": 1e-6, "qk_norm": "head", "tied": tied}
    return Architecture(**sizes, **outer, head_dim=128, vocabulary=151_936, max_positions=40_960)


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
