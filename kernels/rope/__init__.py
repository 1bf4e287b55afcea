"""Rotary position embeddings."""

from .rotate import rotary, rotary_reference
from .tables import DynamicNtk, Linear, Llama3, NtkAware, Scaling, Yarn, rotary_tables

__all__ = [
    "DynamicNtk", "Linear", "Llama3", "NtkAware", "Scaling", "Yarn", "rotary", "rotary_reference",
    "rotary_tables",
]  # fmt: skip
