"""Losses over a vocabulary that never hold `[tokens, vocabulary]`, unless they are given it."""

from .given import cross_entropy
from .linear import linear_cross_entropy, linear_log_probs, linear_top_k_kl
from .logits import cross_entropy_gradient_, cross_entropy_partials

__all__ = [
    "cross_entropy", "cross_entropy_gradient_", "cross_entropy_partials", "linear_cross_entropy",
    "linear_log_probs", "linear_top_k_kl",
]  # fmt: skip
