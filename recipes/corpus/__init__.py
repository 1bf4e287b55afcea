"""Text in, packed batches out."""

from .building import prepare_store
from .packing import PackedRows, heldout_batches
from .sampling import Batches, Sampler
from .sources import Document, Skips, TextSource, is_held_out, stdlib_sources

__all__ = [
    "Batches",
    "Document",
    "PackedRows",
    "Sampler",
    "Skips",
    "TextSource",
    "heldout_batches",
    "is_held_out",
    "prepare_store",
    "stdlib_sources",
]
