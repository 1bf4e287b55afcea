"""Mixture of experts: the choice of experts, and tokens sorted by them."""

from .permutation import permute, permute_fp8, permute_reference, unpermute, unpermute_reference
from .router import SCORES, check_routing, route, route_reference

__all__ = [
    "SCORES",
    "check_routing",
    "permute",
    "permute_fp8",
    "permute_reference",
    "route",
    "route_reference",
    "unpermute",
    "unpermute_reference",
]
