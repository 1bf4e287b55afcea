"""Activations."""

from .glu import swiglu, swiglu_reference

__all__ = ["swiglu", "swiglu_reference"]
