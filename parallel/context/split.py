"""Which tokens of the flat batch each context-parallel rank holds.

    balance       a member holds, of the flat token axis (or, with `rows`, of each row)
    contiguous    chunk m of M
    zigzag        chunks m and 2M - 1 - m of 2M: equal work where one document fills the axis
    document      long documents zigzag, each by itself; short ones whole, dealt by work and tokens

A member of the ring is `ulysses` neighbouring ranks, each of which holds an equal, contiguous part
of the member's tokens. A member's tokens lie in the order of the flat batch, padding last: its
tokens of one document are neighbours, and those of them that a query sees come first.

A split is computed from the lengths alone, alike on every rank. Made once a batch, it serves all
layers.

Source: Dubey et al. 2024, https://arxiv.org/abs/2407.21783, section 3.3.2 (2M chunks); Brandon et
al. 2023, https://arxiv.org/abs/2311.09431, section 3 (uneven work under a causal mask).
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..collectives import Group, join, place

BALANCES = ("contiguous", "zigzag", "document")
_FEW = 8  # a document of more than 1 / 8 of a member's work is cut

T = TypeVar("T")
Range = tuple[int, int]


class Segment(NamedTuple):
    """Neighbouring tokens of one document that a member of the ring holds.

    Attributes:
        document: Flat index of the document's first token.
        end: Flat index after its last.
        start: Flat index of the segment's first token.
        stop: Flat index after its last.
        offset: Where the segment starts among the member's tokens.
    """

    document: int
    end: int
    start: int
    stop: int
    offset: int


def _work(document: int, start: int, stop: int) -> int:
    """Count the pairs of a query in [start, stop) and a key that it sees in its document."""
    a, b = start - document, stop - document
    return (b * (b + 1) - a * (a + 1)) // 2


def _chunks(m: int, members: int, share: int, rows: int, zigzag: bool) -> Iterator[Range]:
    """List what member `m` holds of each row, in order."""
    places = (m, 2 * members - 1 - m) if zigzag else (m,)
    width = share // (rows * len(places))
    for row in range(rows):
        start = row * share * members // rows
        yield from ((start + p * width, start + (p + 1) * width) for p in places)


def _deal(bounds: Sequence[int], members: int, share: int) -> list[list[Range]]:
    """Cut long documents in zigzag; deal the rest, the most work first, to who has least."""
    held: list[list[Range]] = [[] for _ in range(members)]
    load, room = [0] * members, [share] * members
    documents = list(zip(bounds, bounds[1:], strict=False))
    total = sum(_work(a, a, b) for a, b in documents)
    pieces: list[tuple[int, int, int]] = []
    for a, b in documents:
        long = _work(a, a, b) * _FEW * members > total
        width = (b - a) // (2 * members) if long else 0
        for m in range(members) if width else ():
            for p in (m, 2 * members - 1 - m):
                held[m].append((a + p * width, a + (p + 1) * width))
                load[m] += _work(a, *held[m][-1])
            room[m] -= 2 * width
        pieces.append((a, a + 2 * members * width, b))
    for document, start, stop in sorted(pieces, key=lambda piece: (-_work(*piece), piece)):
        while start < stop:
            fit = [m for m in range(members) if room[m] >= stop - start]
            m = min(fit, key=load.__getitem__) if fit else room.index(max(room))
            cut = min(stop, start + room[m])
            held[m].append((start, cut))
            load[m] += _work(document, start, cut)
            room[m] -= cut - start
            start = cut
    return held


@dataclass(frozen=True, eq=False)
class Split:
    """Tokens of a flat batch, dealt out to context-parallel ranks; make it with `Split.build`.

    Attributes:
        bounds: Where documents start in the flat batch, and its end: N + 1 entries.
        members: Number M of members of the ring.
        share: Tokens of a member, padding included.
        ulysses: Ranks of a member.
        rows: Equal rows that were split each by itself.
        ranges: For each member what it holds of the flat batch, in order, without neighbours.
    """

    bounds: tuple[int, ...]
    members: int
    share: int
    ulysses: int
    rows: int
    ranges: tuple[tuple[Range, ...], ...]
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def build(
        lengths: Sequence[int] | Tensor, ranks: int, *, multiple: int = 1, balance: str = "zigzag",
        ulysses: int = 1, rows: int = 1,
    ) -> "Split":  # fmt: skip
        """Split a batch.

        Args:
            lengths: Of the documents, in tokens; rows without packing are documents.
            ranks: Context-parallel ranks.
            multiple: Of what a rank's tokens must be a multiple: the tensor-parallel size.
            balance: `contiguous`, `zigzag` or `document`.
            ulysses: Neighbouring ranks that exchange heads.
            rows: Rows of equal length to split each by itself, so that a rank's tokens form
                `[rows, S / ranks]`; not for `document`.

        Raises:
            ValueError: If there is no token, a length is negative, `ulysses` does not divide the
                ranks, `balance` is none of these, or rows do not divide.
        """
        sizes = [int(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
        if min(sizes, default=0) < 0 or sum(sizes) == 0:
            raise ValueError(f"document lengths must be at least 0, one of them more; got {sizes}")
        if balance not in BALANCES:
            raise ValueError(f"balance must be one of {', '.join(BALANCES)}; got {balance!r}")
        if min(ranks, ulysses, multiple, rows) < 1 or ranks % ulysses:
            raise ValueError(
                f"ranks, ulysses, multiple and rows must be at least 1 and ulysses divide the "
                f"ranks, got {ranks}, {ulysses}, {multiple} and {rows}"
            )
        bounds, members = (0, *accumulate(sizes)), ranks // ulysses
        unit = math.lcm(multiple * ulysses, rows * (2 if balance == "zigzag" else 1))
        share = -(-bounds[-1] // (members * unit)) * unit
        if rows > 1 and (balance == "document" or share * members != bounds[-1]):
            raise ValueError(
                f"rows ({rows} of {bounds[-1]} tokens in all) must each be divisible by "
                f"{members * unit // rows}, and balance be contiguous or zigzag (got {balance}): "
                f"pad the rows, or split without rows"
            )
        if balance == "document":
            held = _deal(bounds, members, share)
        else:
            zigzag = balance == "zigzag"
            held = [list(_chunks(m, members, share, rows, zigzag)) for m in range(members)]
        ranges = tuple(tuple(_joined(own, bounds[-1])) for own in held)
        return Split(bounds, members, share, ulysses, rows, ranges)

    @property
    def ranks(self) -> int:
        """Context-parallel ranks."""
        return self.members * self.ulysses

    @property
    def tokens(self) -> int:
        """Tokens of a rank, padding included."""
        return self.share // self.ulysses

    @property
    def total(self) -> int:
        """Tokens of the batch."""
        return self.bounds[-1]

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what was kept under `key`, made at the first call: layers share plans."""
        if key not in self._kept:
            self._kept[key] = make()
        value: T = self._kept[key]
        return value

    @cached_property
    def _segments(self) -> tuple[tuple[Segment, ...], ...]:
        return tuple(tuple(self._cut(ranges)) for ranges in self.ranges)

    def _cut(self, ranges: Sequence[Range]) -> Iterator[Segment]:
        """Cut ranges, in order, at the borders of documents."""
        offset = 0
        for start, stop in ranges:
            at = bisect_right(self.bounds, start)  # beyond the last bound that is not after it
            while start < stop:
                cut = min(stop, self.bounds[at])
                if cut > start:
                    yield Segment(self.bounds[at - 1], self.bounds[at], start, cut, offset)
                offset += cut - start
                start = cut
                at += 1

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """List the segments, in order, of the member of the ring that `rank` belongs to."""
        return self._segments[rank // self.ulysses]

    def work(self, rank: int) -> int:
        """Count the pairs of a query and a key it sees, causally, that the rank's member attends.

        The `ulysses` ranks of a member share these by heads.
        """
        return sum(_work(s.document, s.start, s.stop) for s in self.segments(rank))

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """Flat indices and positions of all ranks, `[ranks, tokens]`."""
        flat = [(m, s) for m, held in enumerate(self._segments) for s in held]
        shift = torch.tensor([s.start - m * self.share - s.offset for m, s in flat])
        document = torch.tensor([s.document for _, s in flat])
        sizes = torch.tensor([s.stop - s.start for _, s in flat])
        held = [sum(b - a for a, b in ranges) for ranges in self.ranges]
        real = torch.cat([torch.arange(n) + m * self.share for m, n in enumerate(held)])
        indices = torch.full((self.members * self.share,), -1)
        positions = torch.zeros_like(indices)
        indices[real] = real + shift.repeat_interleave(sizes)
        positions[real] = indices[real] - document.repeat_interleave(sizes)
        shape = (self.ranks, self.tokens)
        return indices.view(shape), positions.view(shape)

    def indices(self, rank: int) -> Tensor:
        """Return the flat index of each of the rank's tokens, int64 `[tokens]`; -1 for padding."""
        return self._table[0][rank]

    def positions(self, rank: int) -> Tensor:
        """Return each token's position in its document, int64 `[tokens]`; 0 for padding."""
        return self._table[1][rank]

    @cached_property
    def inverse(self) -> Tensor:
        """Where each flat token lies among the tokens of all ranks, one after the other: `[T]`."""
        indices = self._table[0].flatten()
        places = torch.arange(len(indices))[indices >= 0]
        return torch.empty(self.total, dtype=torch.int64).index_copy_(0, indices[places], places)


def _joined(ranges: list[Range], total: int) -> Iterator[Range]:
    """Sort ranges, drop what lies beyond the batch, and join neighbours."""
    last: Range | None = None
    for start, stop in sorted((a, min(b, total)) for a, b in ranges):
        if start >= stop:
            continue
        if last is not None and last[1] == start:
            last = (last[0], stop)
            continue
        if last is not None:
            yield last
        last = (start, stop)
    if last is not None:
        yield last


def shard_sequence(x: Tensor, split: Split, rank: int, *, fill: float = 0) -> Tensor:
    """Cut out a rank's tokens.

    Args:
        x: The whole batch, `[T, ...]`, or, of a split by rows, `[rows, S, ...]`.
        split: Which rank holds what.
        rank: Whose tokens.
        fill: Value of padding tokens, such as an ignored target.

    Returns:
        `[tokens, ...]`, or `[rows, S / ranks, ...]`.

    Raises:
        ValueError: If `x` does not hold the tokens of the split.
    """
    by_rows = x.shape[:2] == (split.rows, split.total // split.rows) and len(x) != split.total
    flat = x.flatten(0, 1) if by_rows else x
    if len(flat) != split.total:
        raise ValueError(
            f"x must hold the {split.total} tokens of the split in its first dimension (or, by "
            f"rows, in its first two), got {[*x.shape]}"
        )
    indices = split.indices(rank).to(x.device)
    own = flat.index_select(0, indices.clamp(min=0))
    mask = (indices < 0).view(-1, *(1 for _ in own.shape[1:]))
    own = own.masked_fill(mask, fill)
    return own.unflatten(0, (split.rows, -1)) if by_rows else own


def unshard(x: Tensor, split: Split, *, group: Group) -> Tensor:
    """Gather every rank's tokens and put them in the order of the flat batch, on every rank.

    Args:
        x: This rank's tokens, `[tokens, ...]`, or `[rows, S / ranks, ...]`.
        split: Which rank holds what.
        group: The context-parallel ranks.

    Returns:
        `[T, ...]`, or `[rows, S, ...]`; backward keeps this rank's part of a gradient that is equal
        on all ranks.

    Raises:
        ValueError: If `x` does not hold a rank's tokens, or the split is for other ranks.
    """
    _, size = place(group)
    by_rows = x.shape[:2] == (split.rows, split.tokens // split.rows) and len(x) != split.tokens
    flat = x.flatten(0, 1) if by_rows else x
    if size != split.ranks or len(flat) != split.tokens:
        raise ValueError(
            f"x must hold {split.tokens} tokens on each of {split.ranks} ranks, as the split says; "
            f"got {[*x.shape]} on {size} ranks"
        )
    whole = join(flat, group).index_select(0, split.inverse.to(x.device))
    return whole.unflatten(0, (split.rows, -1)) if by_rows else whole
