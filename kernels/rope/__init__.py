"""Rotary position embeddings."""

from .rotate import rotary, rotary_reference, rotary_tables

__all__ = ["rotary", "rotary_reference", "rotary_tables"]
