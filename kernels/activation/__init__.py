"""Activations."""

from .glu import geglu, geglu_reference, relu2, relu2_reference, swiglu, swiglu_reference
from .glu_fp8 import geglu_fp8, relu2_fp8, swiglu_fp8
from .glu_linear import swiglu_linear, swiglu_linear_reference

__all__ = [
    "geglu", "geglu_fp8", "geglu_reference", "relu2", "relu2_fp8", "relu2_reference", "swiglu",
    "swiglu_fp8", "swiglu_linear", "swiglu_linear_reference", "swiglu_reference",
]  # fmt: skip
