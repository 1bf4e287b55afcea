"""Which rows a step trains on: a pure function of (seed, step), in constant time and memory.

The rows are numbered through all epochs; row k of epoch e is the e-th permutation's k-th. The
permutation is a Feistel network over the next even number of bits, walked until it falls below the
number of rows (on average at most four times): nothing is stored, so a run resumes at any step at
no cost, and any layout of ranks reads the same global batch.

Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002), sections 3 and 4; the round
function is the finaliser of SplitMix64 (Steele, Lea, Flood, 2014).
"""

from dataclasses import dataclass

import numpy as np

from warploom.models.batch import Batch

from ..errors import UserError
from .packing import PackedRows

_ROUNDS = 6
_MASK = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def permute(indices: np.ndarray, size: int, *, key: tuple[int, int]) -> np.ndarray:
    """Map indices through a pseudo-random permutation of 0 .. size - 1.

    Args:
        indices: `[N]` integers in 0 .. size - 1.
        size: Length of the permutation.
        key: What chooses the permutation: seed and epoch.

    Returns:
        `[N]` int64.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low, bits = np.uint64((1 << half) - 1), np.uint64(half)
    seed = _mix(np.array([key[0] & _MASK], np.uint64))
    seed = _mix(seed + np.uint64(key[1] * 0x9E3779B97F4A7C15 & _MASK))
    rounds = [_mix(seed + np.uint64((i + 1) * 0xD1B54A32D192ED03 & _MASK)) for i in range(_ROUNDS)]
    x = np.array(indices, np.uint64)
    todo = np.ones(len(x), bool)
    while todo.any():
        left, right = x[todo] >> bits, x[todo] & low
        for key_of_round in rounds:
            left, right = right, left ^ (_mix(right + key_of_round) & low)
        x[todo] = left << bits | right
        todo = x >= size
    return x.astype(np.int64)


@dataclass(frozen=True)
class Sampler:
    """The order of rows.

    Args:
        rows: Number of rows to draw from; each comes once an epoch.
        sequences: Rows of a step over all ranks, B.
        seed: Chooses the order.

    Raises:
        UserError: If there is no row, or `sequences` is not positive.
    """

    rows: int
    sequences: int
    seed: int

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UserError(
                f"the corpus must fill at least one sequence, it fills {self.rows}: shorten the "
                "sequence, or add text"
            )
        if self.sequences < 1:
            raise UserError(f"sequences a step ({self.sequences}) must be at least 1")

    def rows_at(self, step: int) -> np.ndarray:
        """Return the rows of a step's global batch: `[B]` int64."""
        if step < 0:
            raise ValueError(f"step ({step}) must not be negative")
        drawn = step * self.sequences + np.arange(self.sequences, dtype=np.int64)
        epochs = drawn // self.rows
        rows = np.empty_like(drawn)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = (self.seed, int(epoch))
            rows[here] = permute(drawn[here] % self.rows, self.rows, key=key)
        return rows

    def rows_of(self, step: int, *, rank: int, ranks: int, micro: int) -> np.ndarray:
        """Return one rank's rows of a step, by micro-batch.

        Args:
            step: The step, from 0.
            rank: This rank among those that see different tokens.
            ranks: Their number R.
            micro: Rows a micro-batch, b.

        Returns:
            `[B / (R b), b]` int64. All ranks' rows together, in order, are `rows_at(step)`.

        Raises:
            UserError: If R x b does not divide B.
        """
        if min(ranks, micro) < 1 or self.sequences % (ranks * micro):
            raise UserError(
                f"sequences a step ({self.sequences}) must be divisible by ranks x micro-batch "
                f"({ranks} x {micro})"
            )
        if not 0 <= rank < ranks:
            raise ValueError(f"rank ({rank}) must lie in 0 .. {ranks - 1}")
        rows: np.ndarray = self.rows_at(step).reshape(ranks, -1, micro)[rank]
        return rows

    def epoch(self, step: int) -> float:
        """Return how often the rows have been gone through before a step."""
        return step * self.sequences / self.rows

    def seen(self, steps: int) -> np.ndarray:
        """Return the rows that steps 0 .. steps - 1 read, each once, sorted."""
        if steps * self.sequences >= self.rows:
            return np.arange(self.rows)
        return np.unique(permute(np.arange(steps * self.sequences), self.rows, key=(self.seed, 0)))


@dataclass(frozen=True)
class Batches:
    """Batches of a run: where the rows lie, and in which order they come.

    Args:
        rows: The rows of the split to train on.
        sequences: Rows of a step over all ranks.
        seed: Chooses the order.

    Raises:
        UserError: If the split does not fill one row.
    """

    rows: PackedRows
    sequences: int
    seed: int

    def __post_init__(self) -> None:
        if not self.rows.full:
            raise UserError(
                f"the corpus must fill one sequence of {self.rows.sequence} tokens, it has "
                f"{len(self.rows.split.ids)}: shorten the sequence, or add text"
            )
        _ = self.sampler

    @property
    def sampler(self) -> Sampler:
        """The order alone."""
        return Sampler(self.rows.full, self.sequences, self.seed)

    def global_batch(self, step: int) -> Batch:
        """Return the whole batch of a step: `[B, S]`."""
        return self.rows.read(self.sampler.rows_at(step))

    def micro_batches(self, step: int, *, rank: int, ranks: int, micro: int) -> list[Batch]:
        """Return one rank's micro-batches of a step, each `[micro, S]`, as `Sampler.rows_of`."""
        chosen = self.sampler.rows_of(step, rank=rank, ranks=ranks, micro=micro)
        return [self.rows.read(rows) for rows in chosen]
