"""Normalisation."""

from .rms import rms_norm, rms_norm_reference

__all__ = ["rms_norm", "rms_norm_reference"]
