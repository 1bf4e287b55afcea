"""Tensor parallelism, with sequence parallelism between the sharded regions."""

from .fp8 import Fp8Product, check_widths, scale_entries, update_scales
from .linear import ColumnLinear, RowLinear
from .loss import linear_cross_entropy
from .vocabulary import VocabEmbedding, VocabHead

__all__ = [
    "ColumnLinear", "Fp8Product", "RowLinear", "VocabEmbedding", "VocabHead", "check_widths",
    "linear_cross_entropy", "scale_entries", "update_scales",
]  # fmt: skip
