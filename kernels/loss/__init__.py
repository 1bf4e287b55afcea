"""Losses over a vocabulary that never hold `[tokens, vocabulary]`."""

from .cross_entropy import cross_entropy_gradient_, cross_entropy_partials
from .linear import linear_cross_entropy, linear_log_probs

__all__ = [
    "cross_entropy_gradient_",
    "cross_entropy_partials",
    "linear_cross_entropy",
    "linear_log_probs",
]
