"""Data parallelism: where gradients are kept, and how they are summed."""

from .gradients import Gradients

__all__ = ["Gradients"]
