"""Which scores attention has: how they are made of products, and which pairs have one.

    s = scale q k^T,    with a soft cap s = cap tanh(s / cap)

Query i stands at position i + offset among the keys, and sees those from `left` before that
position to `right` after it; -1 is no limit. Causal attention is right = 0. Without an offset the
last query stands at the last key, as in decoding after a prefix: offset = keys - queries.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Packed(NamedTuple):
    """Where documents lie in packed queries and keys.

    Attributes:
        q: `[N + 1]` int32: queries of document n are rows q[n] to q[n + 1].
        k: The same of its keys.
        max_q: Queries of the longest document, or more; None where nobody said.
        max_k: Keys of the longest document, or more.
    """

    q: Tensor
    k: Tensor
    max_q: int | None
    max_k: int | None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What makes the scores, beside queries and keys.

    Attributes:
        scale: Multiplies the products; positive.
        left: Keys before its own position that a query sees, -1 for all.
        right: Keys after it; 0 is causal, -1 all.
        offset: Position of query 0 among the keys; None puts the last query at the last key.
        softcap: Scores stay within it, by tanh; 0 is none.
    """

    scale: float
    left: int = -1
    right: int = -1
    offset: int | None = None
    softcap: float = 0.0

    @property
    def masked(self) -> bool:
        """Tell whether some pair may be masked."""
        return self.left >= 0 or self.right >= 0

    def first(self, queries: int, keys: int) -> int:
        """Return the position of query 0 among the keys."""
        return keys - queries if self.offset is None else self.offset

    def seen(self, start: int, stop: int, queries: int, keys: int) -> tuple[int, int]:
        """Return the range of keys that the queries from `start` to `stop` see, some or all."""
        at = self.first(queries, keys)
        low = 0 if self.left < 0 else max(0, start + at - self.left)
        high = keys if self.right < 0 else min(keys, stop - 1 + at + self.right + 1)
        return min(low, keys), max(high, min(low, keys))

    def seeing(self, queries: int, keys: int) -> tuple[int, int]:
        """Return the range of queries that see a key: they are neighbours."""
        at = self.first(queries, keys)
        low = 0 if self.right < 0 else max(0, -at - self.right)
        high = queries if self.left < 0 else min(queries, keys - at + self.left)
        if not keys or low >= high:
            return 0, 0
        return low, high

    def pairs(self, queries: int, keys: int) -> int:
        """Count the pairs of a query and a key that it sees."""
        (start, stop), at = self.seeing(queries, keys), self.first(queries, keys)
        total = keys * (stop - start)
        if self.left >= 0:
            total -= _positive(start + at - self.left, stop + at - self.left)
        if self.right >= 0:
            behind = keys - at - self.right  # those that query 0 does not see, and 1
            total -= _positive(behind - stop, behind - start)
        return total


def _positive(start: int, stop: int) -> int:
    """Add up the positive integers from `start` to `stop` - 1."""
    start = max(start, 1)
    return max(0, stop - start) * (stop + start - 1) // 2
