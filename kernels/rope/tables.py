"""Cosines and sines of rotary angles, and the known ways to stretch them over longer texts.

    angle of token t, pair j:  position_t f_j,    f_j = base^(-2j / K)

    Linear      f_j / s
    NtkAware    base s^(K / (K - 2)): the slowest pair is slowed s times, the fastest is left
    DynamicNtk  the same with s (length / original) - (s - 1), 1 at the length of the pretraining
    Yarn        between f_j / s and f_j, by how often pair j turns in the pretraining length
    Llama3      the same, between two wavelengths

Shapes: T tokens, K rotated dimensions of a head, J = K/2.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 34; Chen et al. 2023,
https://arxiv.org/abs/2306.15595, equation 3 (Linear); Peng et al. 2023,
https://arxiv.org/abs/2309.00071, equations 16 (NTK), 18 to 20, 23 and 25 (YaRN); Llama 3.1's
release (Llama3). Rounded as in the Hugging Face implementation, bit for bit.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..library import need_tensors


def _frequencies(head_dim: int, base: float, device: torch.device) -> Tensor:
    pairs_J = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    return 1.0 / base ** (pairs_J / head_dim)


@dataclass(frozen=True)
class Scaling(ABC):
    """A way to stretch the angles; factor 1 leaves them as they are.

    Args:
        factor: How many times longer the texts are than those of the pretraining; at least 1.

    Raises:
        ValueError: If a number is out of its range.
    """

    factor: float

    def __post_init__(self) -> None:
        """Check the numbers, of the subclasses too."""
        name = type(self).__name__
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"{name}: factor must be at least 1 and finite, got {self.factor}")
        for field in ("original", "length"):
            if getattr(self, field, 1) < 1:
                raise ValueError(f"{name}: {field} must be positive, got {getattr(self, field)}")

    @abstractmethod
    def frequencies(self, head_dim: int, base: float, device: torch.device) -> Tensor:
        """Return the angle a position of each pair, `[head_dim/2]`, float32.

        Args:
            head_dim: Rotated dimensions of a head, even.
            base: The base before the scaling.
            device: Where to.
        """

    @property
    def attention(self) -> float:
        """What cosines and sines are multiplied by; its square scales the attention's logits."""
        return 1.0


@dataclass(frozen=True)
class Linear(Scaling):
    """Position interpolation: every angle divided by `factor`."""

    def frequencies(self, head_dim: int, base: float, device: torch.device) -> Tensor:
        """Divide all frequencies."""
        return _frequencies(head_dim, base, device) / self.factor


@dataclass(frozen=True)
class NtkAware(Scaling):
    """A larger base: slow pairs are stretched by `factor`, fast ones are left."""

    def frequencies(self, head_dim: int, base: float, device: torch.device) -> Tensor:
        """Return the frequencies of the larger base; `head_dim` must be above 2."""
        return _larger_base(self.factor, head_dim, base, device)


def _larger_base(factor: float, head_dim: int, base: float, device: torch.device) -> Tensor:
    if head_dim <= 2:
        raise ValueError(f"rotary_tables: NTK scaling needs head_dim above 2, got {head_dim}")
    return _frequencies(head_dim, base * factor ** (head_dim / (head_dim - 2)), device)


@dataclass(frozen=True)
class DynamicNtk(Scaling):
    """NTK-aware scaling by as much as `length` asks for.

    The length is the caller's word, never read from the positions: so packed documents, the ranks
    of context parallelism and the steps of a generation agree on the angles, and nothing waits
    for the device. Whoever generates past it takes new tables (`dataclasses.replace`) and
    recomputes the cached keys.

    Args:
        original: Length of the pretraining, tokens.
        length: Longest sequence that the tables serve, tokens; up to `original` nothing changes.
    """

    original: int
    length: int

    def frequencies(self, head_dim: int, base: float, device: torch.device) -> Tensor:
        """Return the frequencies for `length`; `head_dim` must be above 2."""
        length = max(self.length, self.original)
        stretch = (self.factor * length / self.original) - (self.factor - 1)
        return _larger_base(stretch, head_dim, base, device)


@dataclass(frozen=True)
class Yarn(Scaling):
    """YaRN: pairs that turn often are left, those that turn rarely are interpolated.

    Args:
        original: Length of the pretraining, tokens.
        beta_fast: Pairs that turn more often than this in `original` are left.
        beta_slow: Pairs that turn less often are divided by `factor`.
        attention_factor: Multiplies cosines and sines; None takes 0.1 ln(factor) + 1, or what the
            next two say.
        mscale: With `mscale_all_dim`, the numerator of DeepSeek's ratio.
        mscale_all_dim: Its denominator.
        truncate: Whether the borders are rounded to whole pairs.
    """

    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        if not self.beta_fast >= self.beta_slow > 0:
            raise ValueError(
                f"Yarn: beta_fast ({self.beta_fast}) must be at least beta_slow "
                f"({self.beta_slow}), which must be above 0"
            )

    def frequencies(self, head_dim: int, base: float, device: torch.device) -> Tensor:
        """Blend interpolated and unchanged frequencies, pair by pair."""

        def border(turns: float) -> float:
            """Return the pair, a real number, that turns so often in the pretraining length."""
            wavelength = self.original / (turns * 2 * math.pi)
            return (head_dim * math.log(wavelength)) / (2 * math.log(base))

        low, high = border(self.beta_fast), border(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high += 0.001 if low == high else 0  # a step, without a division by zero
        pairs_J = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
        unchanged_J = 1 - ((pairs_J - low) / (high - low)).clamp(0, 1)
        powers_J = base ** (2 * pairs_J / head_dim)
        return (1.0 / (self.factor * powers_J)) * (1 - unchanged_J) + (1.0 / powers_J) * unchanged_J

    @property
    def attention(self) -> float:
        """What cosines and sines are multiplied by."""

        def temperature(mscale: float) -> float:
            return 0.1 * mscale * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return temperature(self.mscale) / temperature(self.mscale_all_dim)
        return temperature(1.0)


@dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1: long wavelengths divided, short ones left, those between blended.

    Args:
        low: Wavelengths longer than original / low are divided by `factor`.
        high: Wavelengths shorter than original / high are left; above `low`.
        original: Length of the pretraining, tokens.
    """

    low: float
    high: float
    original: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        if not self.high > self.low > 0:
            raise ValueError(
                f"Llama3: high ({self.high}) must be above low ({self.low}), low above 0"
            )

    def frequencies(self, head_dim: int, base: float, device: torch.device) -> Tensor:
        """Blend by wavelength."""
        plain_J = _frequencies(head_dim, base, device)
        wavelengths_J = 2 * math.pi / plain_J
        divided_J = plain_J / self.factor
        share_J = (self.original / wavelengths_J - self.low) / (self.high - self.low)
        between_J = (1 - share_J) * plain_J / self.factor + share_J * plain_J
        scaled_J = torch.where(wavelengths_J < self.original / self.high, plain_J, between_J)
        return torch.where(wavelengths_J > self.original / self.low, divided_J, scaled_J)


def rotary_tables(
    positions: Tensor, head_dim: int, *, base: float, scaling: Scaling | None = None
) -> tuple[Tensor, Tensor]:
    """Tabulate cosine and sine of every angle, rounded as in the Hugging Face implementation.

    Args:
        positions: Position of each token in its document, `[T]`, integers.
        head_dim: K, even; for partial rotary the dimensions that turn.
        base: The longest wavelength is about 2 pi times this many positions.
        scaling: How the angles are stretched; None leaves them.

    Returns:
        cos and sin, `[T, K/2]`, float32, multiplied by `scaling.attention`.

    Raises:
        ValueError: If `head_dim` is odd or not positive (with NTK not above 2), `base` is not above
            0 and finite (with YaRN above 1), or the positions are not integers.
    """
    least = 1 if isinstance(scaling, Yarn) else 0
    if not least < base < math.inf:
        raise ValueError(f"rotary_tables: base must be above {least} and finite, got {base}")
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"rotary_tables: head_dim must be even and positive, got {head_dim}")
    need_tensors("rotary_tables", positions=positions)
    if scaling is not None and not isinstance(scaling, Scaling):
        raise TypeError(
            f"rotary_tables: scaling must be Linear, NtkAware, DynamicNtk, Yarn or Llama3, "
            f"got {type(scaling).__name__}"
        )
    if positions.is_floating_point() or positions.is_complex():
        raise ValueError(f"rotary_tables: positions must be integers, got {positions.dtype}")
    if scaling is None:
        frequencies_J = _frequencies(head_dim, base, positions.device)
    else:
        frequencies_J = scaling.frequencies(head_dim, base, positions.device)
    angles_TJ = positions.float().unsqueeze(-1) * frequencies_J
    if scaling is None or scaling.attention == 1:
        return angles_TJ.cos(), angles_TJ.sin()
    return angles_TJ.cos() * scaling.attention, angles_TJ.sin() * scaling.attention
