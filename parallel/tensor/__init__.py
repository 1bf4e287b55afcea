"""Tensor parallelism, with sequence parallelism between the sharded regions."""

from .linear import ColumnLinear, RowLinear
from .loss import linear_cross_entropy
from .vocabulary import VocabEmbedding, VocabHead

__all__ = ["ColumnLinear", "RowLinear", "VocabEmbedding", "VocabHead", "linear_cross_entropy"]
