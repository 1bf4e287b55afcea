"""Mixture of experts: their choice, tokens sorted by them, and the experts as one operator."""

from .block import moe_block, moe_block_reference
from .permutation import permute, permute_fp8, permute_reference, unpermute, unpermute_reference
from .router import SCORES, check_routing, route, route_reference

__all__ = [
    "SCORES", "check_routing", "moe_block", "moe_block_reference", "permute", "permute_fp8",
    "permute_reference", "route", "route_reference", "unpermute", "unpermute_reference",
]  # fmt: skip
