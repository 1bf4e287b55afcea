"""Attention in blocks: which queries meet which keys, forward and backward of each, their sum.

A query attends to its member's own keys in one packed causal call. To the keys that came from
elsewhere it stands in one of two relations, all or nothing: tokens lie in the order of the flat
batch, so that what the queries of a segment see of a document is one range of keys. Equal blocks
at equal distances (the rows of a batch) are one call.

With a window a query's distance from a key matters: the packed call is over segments, and between
two segments stands a block of the keys and queries that the window joins, which says how far apart
they are; blocks beyond the window are left out.

A sink z of a head is a key without a value, which joins the final sums once:

    out' = out sigmoid(lse - z),    lse' = log(exp lse + exp z)
    dz = - sum over queries of exp(z - lse') (dout . out')

and the backward of the blocks by out' and lse' is exact.

Sums over blocks are kept in float32 at least. Shapes: N tokens of a member, H query heads, G
key/value heads, K head dimension, L of values.

Source: Liu et al. 2023, https://arxiv.org/abs/2310.01889, section 3 (blocks; the backward of each
by the final output and log-sum-exp).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warploom.kernels.attention import (
    flash_attention,
    flash_attention_backward,
    flash_attention_varlen,
    merge,
)
from warploom.kernels.library import wide

from .split import Segment, Split

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What makes the scores, beside queries and keys.

    Attributes:
        causal: Whether a query sees the keys up to its own position only.
        scale: Multiplies the scores; `None` for 1 / sqrt(K).
        window: Keys that a query sees, itself and those before it; `None` for all.
        softcap: Bound c of the scores, c tanh(score / c); `None` for none.

    Raises:
        ValueError: If the window is below 1, or not causal.
    """

    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError(
                f"window must be at least 1 and causal, or None for all keys; got {self.window} "
                f"with causal={self.causal}"
            )

    def kernel(self, *, aligned: bool = True) -> dict[str, Any]:
        """Return what the kernels take; all keys are seen unless `aligned` with the queries."""
        left = -1 if self.window is None or not aligned else self.window - 1
        mask = {"causal": self.causal and aligned, "window": (left, -1)}
        return {**mask, "scale": self.scale, "softcap": self.softcap}


class Strip(NamedTuple):
    """Ranges of rows of one length: from `start`, the next `step` rows further."""

    start: int
    length: int
    step: int = 0

    def view(self, x: Tensor, count: int) -> Tensor:
        """View `count` ranges of `x` `[N, ...]` as `[count, length, ...]`."""
        row = x.stride(0)
        return x.as_strided(
            (count, self.length, *x.shape[1:]),
            (self.step * row, *x.stride()),
            x.storage_offset() + self.start * row,
        )


@dataclass(frozen=True)
class Block:
    """Ranges of queries, each of which sees the whole range of keys beside it.

    Or, where the first query stands `offset` tokens behind the first key, what the window leaves.
    """

    queries: Strip
    keys: Strip
    count: int = 1
    offset: int | None = None

    def then(self, other: "Block") -> "Block | None":
        """Append one range, where it lies as the earlier ones do; else `None`."""
        if other.offset != self.offset:
            return None
        grown = []
        for mine, its in ((self.queries, other.queries), (self.keys, other.keys)):
            step = its.start - mine.start - (self.count - 1) * mine.step
            same = its.length == mine.length and step >= mine.length
            if not same or (self.count > 1 and step != mine.step):
                return None
            grown.append(mine._replace(step=step))
        return replace(self, queries=grown[0], keys=grown[1], count=self.count + 1)


@dataclass(frozen=True)
class Own:
    """Documents, or parts of them, that attend to themselves: boundaries and the longest."""

    bounds: tuple[int, ...]
    longest: int

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return self.bounds[-1]


def _runs(split: Split, member: int) -> dict[int, list[Segment]]:
    """Group a member's segments by document."""

    def make() -> dict[int, list[Segment]]:
        runs: dict[int, list[Segment]] = {}
        for segment in split.segments(member * split.ulysses):
            runs.setdefault(segment.document, []).append(segment)
        return runs

    return split.kept(("runs", member), make)


def _length(run: Sequence[Segment]) -> int:
    return sum(s.stop - s.start for s in run)


def own_keys(split: Split, member: int, *, by_segment: bool = False) -> Own:
    """Plan how a member's queries attend to its own keys.

    Args:
        split: Who holds what.
        member: Of the ring.
        by_segment: Whether a segment sees only itself, not what is held of its document before it.
    """

    def make() -> Own:
        runs = _runs(split, member).values()
        parts = [[s] for run in runs for s in run] if by_segment else list(runs)
        lengths = [_length(part) for part in parts]
        return Own((0, *accumulate(lengths)), max(lengths, default=0))

    return split.kept(("own", member, by_segment), make)


def _ranges_seen(queries: list[Segment], keys: list[Segment], causal: bool) -> Iterator[Block]:
    """Yield the blocks of one document: neighbouring queries that see the same keys are one."""
    if not causal:
        queries = [queries[0]._replace(stop=queries[0].start + _length(queries))]
    last: Block | None = None
    for q in queries:
        seen = _length([k for k in keys if not causal or k.stop <= q.start])
        if not seen:
            continue
        size = q.stop - q.start
        if last is not None and last.keys.length == seen:
            last = Block(last.queries._replace(length=last.queries.length + size), last.keys)
            continue
        if last is not None:
            yield last
        last = Block(Strip(q.offset, size), Strip(keys[0].offset, seen))
    if last is not None:
        yield last


def _window_seen(queries: list[Segment], keys: list[Segment], window: int) -> Iterator[Block]:
    """Yield the blocks of one document within a window, cut to the keys and queries it joins."""
    for q in queries:
        for k in keys:
            first, stop = max(k.start, q.start - window + 1), min(q.stop, k.stop + window - 1)
            if first < k.stop <= q.start:
                held = Strip(k.offset + first - k.start, k.stop - first)
                offset = q.start - first if stop - first > window else None
                yield Block(Strip(q.offset, stop - q.start), held, offset=offset)


def _batched(blocks: Iterable[Block]) -> tuple[Block, ...]:
    batches: list[Block] = []
    for block in blocks:
        grown = batches[-1].then(block) if batches else None
        batches[-1:] = [grown] if grown else [*batches[-1:], block]
    return tuple(batches)


def pair_blocks(
    split: Split, member: int, source: int, *, causal: bool, window: int | None = None
) -> tuple[Block, ...]:
    """Plan how a member's queries attend to another member's keys, in that member's order.

    Or to its own beside what `own_keys` plans: with a window those of its other segments.
    """

    def make() -> tuple[Block, ...]:
        queries, keys = _runs(split, member), _runs(split, source)
        shared = [d for d in queries if d in keys]
        if window is not None:
            return _batched(b for d in shared for b in _window_seen(queries[d], keys[d], window))
        if member == source:
            return ()
        return _batched(b for d in shared for b in _ranges_seen(queries[d], keys[d], causal))

    return split.kept(("pair", member, source, causal, window), make)


def flat_blocks(
    split: Split, member: int, *, causal: bool, window: int | None = None
) -> tuple[Block, ...]:
    """Plan how each of a member's segments attends to its document outside it, in flat order."""

    def make() -> tuple[Block, ...]:
        blocks: list[Block] = []
        for s in split.segments(member * split.ulysses):
            if window is not None:
                before = Segment(s.document, s.end, s.document, s.start, s.document)
                blocks += _window_seen([s], [before], window)
                continue
            sides = [(s.document, s.start), *([] if causal else [(s.stop, s.end)])]
            queries = Strip(s.offset, s.stop - s.start)
            blocks += [Block(queries, Strip(a, b - a)) for a, b in sides if b > a]
        return _batched(blocks)

    return split.kept(("flat", member, causal, window), make)


def _widest(x: Tensor) -> Tensor:
    """Widen what a backward reads, so that its part of a sum is not rounded; not so on CUDA.

    There the kernels take low precision only. Elsewhere they widen by themselves: nothing is lost.
    """
    return x if x.is_cuda else x.to(wide(x.dtype))


@dataclass(frozen=True, eq=False)
class Attention:
    """A member's queries, and the sums over what they have attended to so far.

    Attributes:
        split: Who holds what.
        own: How the queries attend to their member's keys.
        options: What makes the scores.
        q: `[N, H, K]`.
        out: `[N, H, L]`; 0 where no key was seen.
        lse: `[N, H]`; -inf where no key was seen.
    """

    split: Split
    own: Own
    options: Options
    q: Tensor
    out: Tensor
    lse: Tensor

    @staticmethod
    def begin(split: Split, own: Own, options: Options, q: Tensor, v: Tensor) -> "Attention":
        """Start with sums over no key, in float32 at least."""
        out = q.new_zeros(*q.shape[:2], v.shape[2], dtype=wide(q.dtype))
        lse = out.new_full(q.shape[:2], -torch.inf)
        return Attention(split, own, options, q, out, lse)

    def finish(self, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output in the dtype of `q` and the log-sum-exp, with the sinks `[H]`."""
        if sinks is None:
            return self.out.to(self.q.dtype), self.lse
        z = sinks.to(self.lse.dtype)
        out = self.out * torch.sigmoid(self.lse - z).unsqueeze(-1)
        return out.to(self.q.dtype), torch.logaddexp(self.lse, z)

    def sinks_gradient(self, sinks: Tensor | None, dout: Tensor) -> Tensor | None:
        """Differentiate `finish`: this member's part `[H]` of the gradient of the sinks."""
        if sinks is None:
            return None
        weights = (sinks.to(self.lse.dtype) - self.lse).exp()
        shares = (dout.to(self.lse.dtype) * self.out).sum(-1)
        return -(weights * shares).sum(0).to(sinks.dtype)

    def _packed(self) -> dict[str, Any]:
        """Return the options of a packed call over the member's own tokens."""

        def make() -> Tensor:
            return torch.tensor(self.own.bounds, dtype=torch.int32, device=self.q.device)

        cu_seqlens = self.split.kept((self.own, self.q.device), make)
        longest = self.own.longest
        return {"cu_seqlens": cu_seqlens, "max_seqlen": longest, **self.options.kernel()}

    def _between(self, block: Block) -> dict[str, Any]:
        """Return the options of a call over a block."""
        aligned = block.offset is not None
        return {"offset": block.offset, **self.options.kernel(aligned=aligned)}

    def add_own(self, k: Tensor, v: Tensor) -> None:
        """Attend to the member's own keys `[N, G, K]`; the first to be added."""
        if n := self.own.tokens:
            packed = self.q[:n], k[:n], v[:n]
            out, lse = flash_attention_varlen(*packed, **self._packed(), return_lse=True)
            self.out[:n], self.lse[:n] = out, lse.t()

    def add(self, blocks: Iterable[Block], k: Tensor, v: Tensor) -> None:
        """Attend to keys `[U, G, K]` and values `[U, G, L]` from elsewhere."""
        for block in blocks:
            count, strip = block.count, block.queries
            views = (strip.view(self.q, count), *(block.keys.view(x, count) for x in (k, v)))
            part: Any = flash_attention(*views, **self._between(block), return_lse=True)
            out, lse = strip.view(self.out, count), strip.view(self.lse, count)
            merged, merged_lse = merge(out, lse.mT, *part)
            out.copy_(merged)
            lse.copy_(merged_lse.mT)

    def own_gradients(self, dout: Tensor, k: Tensor, v: Tensor) -> Gradients:
        """Differentiate `add_own`: dq, dk and dv as q, k and v, float32 at least.

        `out` and `lse` must be those of `finish` here and in `add_gradients`.
        """
        wider = wide(dout.dtype)
        dq, dk, dv = (x.new_zeros(x.shape, dtype=wider) for x in (self.q, k, v))
        if n := self.own.tokens:
            do, q, keys, values, out = (_widest(x[:n]) for x in (dout, self.q, k, v, self.out))
            saved = q, keys, values, out, self.lse[:n].t()
            parts = flash_attention_backward(do, *saved, **self._packed())
            for whole, part in zip((dq, dk, dv), parts, strict=True):
                whole[:n] = part
        return dq, dk, dv

    def add_gradients(
        self, blocks: Iterable[Block], dout: Tensor, kv: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> None:
        """Differentiate `add`: dq, dk and dv are added to `grads`."""
        for block in blocks:
            count, strip = block.count, block.queries
            lse = strip.view(self.lse, count).mT
            do, q, out = (_widest(strip.view(x, count)) for x in (dout, self.q, self.out))
            keys, values = (_widest(block.keys.view(x, count)) for x in kv)
            parts = flash_attention_backward(do, q, keys, values, out, lse, **self._between(block))
            for whole, part, at in zip(grads, parts, (strip, *[block.keys] * 2), strict=True):
                at.view(whole, count).add_(part)
