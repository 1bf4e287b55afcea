"""Quantisation."""

from .fp8 import Fp8, fp8_quantize, fp8_quantize_reference
from .mx import Mx, mx_quantize, mx_quantize_reference
from .nf4 import Nf4, nf4_dequantize, nf4_quantize

__all__ = [
    "Fp8", "Mx", "Nf4", "fp8_quantize", "fp8_quantize_reference", "mx_quantize",
    "mx_quantize_reference", "nf4_dequantize", "nf4_quantize",
]  # fmt: skip
