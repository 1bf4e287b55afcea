"""Text to ids and back: byte-level BPE, its special tokens, and the store of ids on disk."""

from .fertility import Counts, FertilityReport, measure_fertility
from .special import SPECIAL_TOKENS
from .store import TokenSplit, TokenStore, open_store
from .tokenizer import Tokenizer
from .training import BPE, train_bpe

__all__ = [
    "BPE",
    "SPECIAL_TOKENS",
    "Counts",
    "FertilityReport",
    "TokenSplit",
    "TokenStore",
    "Tokenizer",
    "measure_fertility",
    "open_store",
    "train_bpe",
]
