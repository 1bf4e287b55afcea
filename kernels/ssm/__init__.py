"""State-space scans and the causal convolution before them (Mamba-2)."""

from .convolution import causal_convolution
from .scan import silu, softplus, state_space_scan

__all__ = ["causal_convolution", "silu", "softplus", "state_space_scan"]
