"""Normalisation."""

from .layer import layer_norm, layer_norm_fp8, layer_norm_reference
from .qk_rotary import qk_norm_rotary, qk_norm_rotary_reference
from .rms import rms_norm, rms_norm_fp8, rms_norm_reference

__all__ = [
    "layer_norm", "layer_norm_fp8", "layer_norm_reference", "qk_norm_rotary",
    "qk_norm_rotary_reference", "rms_norm", "rms_norm_fp8", "rms_norm_reference",
]  # fmt: skip
