"""Activations."""

from .glu import swiglu, swiglu_reference
from .glu_linear import swiglu_linear, swiglu_linear_reference

__all__ = ["swiglu", "swiglu_linear", "swiglu_linear_reference", "swiglu_reference"]
