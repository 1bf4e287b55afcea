"""The learning rate of a step, as a pure function.

    warm-up   step t < W      (t + 1) / W
    cosine    t >= W          f + (1 - f) (1 + cos(pi p)) / 2          p = (t - W) / (S - W)
    WSD       W <= t < S - D  1
              t >= S - D      f + (1 - f) shape(p)                     p = (t - (S - D)) / D

Steps t count from 0, S is how many there are, and each value is a factor on the peak. The first
step of the warm-up is 1/W and its last the peak; the first step of the decay is still the peak and
its last is one step short of the final fraction f. So no step trains at a rate of 0.

Source: Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, equation 5 (cosine); Hu et al.
2024, https://arxiv.org/abs/2404.06395, section 4 (WSD); Hagele et al. 2024,
https://arxiv.org/abs/2405.18392, section 3 (1-sqrt).
"""

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError


def _check(warmup: int, final: float) -> None:
    if warmup < 0:
        raise UserError(f"warmup must be at least 0 steps, got {warmup}")
    if not 0 <= final <= 1:
        raise UserError(f"final must be a fraction of the peak, from 0 to 1, got {final}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cosine:
    """Warm-up, then half a cosine down to `final`."""

    warmup: int = 100
    """Steps over which the rate rises to its peak."""
    final: float = 0.1
    """Where the decay ends, as a fraction of the peak."""

    def __post_init__(self) -> None:
        _check(self.warmup, self.final)

    def factor(self, step: int, steps: int) -> float:
        """Return the fraction of the peak at `step` (from 0) of `steps`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / (steps - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True, slots=True)
class WSD:
    """Warm-up, a stable stretch at the peak, then a decay: stop anywhere, decay from there."""

    warmup: int = 100
    """Steps over which the rate rises to its peak."""
    decay: float = 0.2
    """Share of all steps that decay, at the end."""
    shape: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    """How it decays."""
    final: float = 0.0
    """Where the decay ends, as a fraction of the peak."""

    def __post_init__(self) -> None:
        _check(self.warmup, self.final)
        if not 0 < self.decay <= 1:
            raise UserError(f"decay must be a share of the steps, above 0 to 1, got {self.decay}")

    def factor(self, step: int, steps: int) -> float:
        """Return the fraction of the peak at `step` (from 0) of `steps`."""
        decaying = max(1, min(round(self.decay * steps), steps - self.warmup))
        start = steps - decaying
        if step < self.warmup:
            return (step + 1) / self.warmup
        if step < start:
            return 1.0
        progress = (step - start) / decaying
        value = {
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "1-sqrt": 1 - math.sqrt(progress),
        }[self.shape]
        return self.final + (1 - self.final) * value


Schedule = Cosine | WSD
