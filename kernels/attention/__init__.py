"""Softmax attention whose memory grows with the sequence, not with its square."""

from .flash import flash_attention, flash_attention_backward, flash_attention_varlen
from .merging import merge
from .paged import Decoding, paged_attention
from .scores import Scores

__all__ = [
    "Decoding", "Scores", "flash_attention", "flash_attention_backward", "flash_attention_varlen",
    "merge", "paged_attention",
]  # fmt: skip
