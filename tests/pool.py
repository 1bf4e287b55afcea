"""Ranks that live as long as the test session: `pool(size, fn, *args)` on a fresh gloo world.

The processes are those of `warploom verify` (recipes/verification/pool.py); their fresh memory is
poisoned, and a failure is the test's, with the rank's trace.
"""

import pytest
import torch

from warploom.recipes.verification.pool import Pool, RankError


def poison() -> None:
    """Fill what `torch.empty` returns with NaN, so that memory a kernel did not write is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


class TestPool(Pool):
    """A pool whose failures are told as a test's."""

    __test__ = False

    def __init__(self, most=8, preload=()):
        super().__init__(most, prepare=poison, preload=preload)

    def __call__(self, size, fn, *args, timeout_s=120.0):
        try:
            return super().__call__(size, fn, *args, timeout_s=timeout_s)
        except RankError as error:
            pytest.fail(str(error), pytrace=False)
