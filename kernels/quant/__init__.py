"""Quantisation."""

from .fp8 import Fp8, fp8_quantize, fp8_quantize_reference
from .nf4 import Nf4, nf4_dequantize, nf4_quantize

__all__ = [
    "Fp8",
    "Nf4",
    "fp8_quantize",
    "fp8_quantize_reference",
    "nf4_dequantize",
    "nf4_quantize",
]
