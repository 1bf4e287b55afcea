"""The Qwen3-MoE family: a Qwen3 whose feed-forward blocks are mixtures of experts, none shared.

A token's weights are the softmax over all experts, made to sum to 1. The balancing loss is weighted
as in `mixtral`.

Source: Yang et al. 2025, https://arxiv.org/abs/2505.09388, section 2 and table 2.
"""

from dataclasses import replace
from typing import Any

from ..architecture import Architecture, Experts
from . import mixtral, qwen2_moe, qwen3
from .family import Family

FAMILY = Family(
    model_type="qwen3_moe", class_name="Qwen3MoeForCausalLM",
    fields={**qwen2_moe.FIELDS, "attention_bias": "qkv_bias out_bias"}, names=qwen2_moe.NAMES,
    defaults=qwen2_moe.DEFAULTS, always={"qk_norm": "head"}, fixed=qwen2_moe.FIXED,
    ignored=qwen2_moe.IGNORED, read=mixtral.read_balance, write=mixtral.write_balance,
)  # fmt: skip


def tiny() -> Architecture:
    """Return the tiny Qwen3 with four experts, two of them for each token."""
    return replace(qwen3.tiny(), tied=False, experts=Experts(count=4, top_k=2, hidden=48))


def _qwen3_moe(layers: int, width: int, heads: int, hidden: int, expert: int) -> Architecture:
    sizes: dict[str, Any] = {"layers": layers, "width": width, "heads": heads, "hidden": hidden}
    experts = Experts(count=128, top_k=8, hidden=expert)
    return replace(qwen3.qwen3_8b(), **sizes, kv_heads=4, experts=experts)


def qwen3_30b_a3b() -> Architecture:
    """Return Qwen3 30B-A3B: 30,532,122,624 parameters, 3.3 billion of them for a token."""
    return _qwen3_moe(48, 2048, 32, 6144, 768)


def qwen3_235b_a22b() -> Architecture:
    """Return Qwen3 235B-A22B: 235,093,634,560 parameters, 22 billion of them for a token."""
    return _qwen3_moe(94, 4096, 64, 12_288, 1536)
