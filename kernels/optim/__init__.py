"""Operators of the optimizer: AdamW over many tensors, the gradient's norm, orthogonal updates."""

from .adam import adamw_, adamw_reference, join_remainder, split_remainder
from .norm import (
    clip_by_global_norm_,
    clip_coefficient,
    global_norm,
    scale_,
    squared_norm,
    squared_norm_reference,
)
from .orthogonal import newton_schulz, newton_schulz_reference
from .table import Plan, plan

__all__ = [
    "Plan", "adamw_", "adamw_reference", "clip_by_global_norm_", "clip_coefficient", "global_norm",
    "join_remainder", "newton_schulz", "newton_schulz_reference", "plan", "scale_",
    "split_remainder", "squared_norm", "squared_norm_reference",
]  # fmt: skip
