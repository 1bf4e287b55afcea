"""Quantisation."""

from .fp8 import Fp8, fp8_quantize, fp8_quantize_reference

__all__ = ["Fp8", "fp8_quantize", "fp8_quantize_reference"]
