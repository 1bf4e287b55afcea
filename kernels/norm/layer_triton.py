"""Triton code of `layer_norm`: the kernels of `rms_norm`, which subtract the mean when asked."""

from .rms_triton import gradients, normalise

__all__ = ["gradients", "normalise"]
