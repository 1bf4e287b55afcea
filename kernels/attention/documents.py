"""Attention within documents by an operator for whole batches: which documents go into one call.

Neighbours of one length are a batch as they lie, without a copy. For causal attention short
documents of other lengths are copied into one batch, filled up with zeros behind their ends: no
token sees a key behind itself, so that the filling needs no mask, and its own gradient is 0.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

_SHORT = 64  # tokens; a call costs as much as attention within such a document
_COPIED = 1 << 15  # tokens of a batch with its filling: bounds the memory

Dense = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Batch:
    """Documents that are attended to in one call.

    Attributes:
        starts: First token of each.
        lengths: Tokens of each.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(self.lengths)

    @property
    def view(self) -> slice | None:
        """The tokens, when the documents are neighbours of one length."""
        stop = self.starts[0] + len(self.starts) * self.longest
        if self.starts != tuple(range(self.starts[0], stop, self.longest)):
            return None
        return slice(self.starts[0], stop) if min(self.lengths) == self.longest else None

    def slots(self) -> Tensor:
        """Find the place of each token in the filled batch, flattened: `[tokens]`, int64."""
        places = [
            torch.arange(row * self.longest, row * self.longest + length)
            for row, length in enumerate(self.lengths)
        ]
        return torch.cat(places)

    def tokens(self) -> Tensor:
        """Find each token of the documents in the call: `[tokens]`, int64."""
        places = [
            torch.arange(start, start + length)
            for start, length in zip(self.starts, self.lengths, strict=True)
        ]
        return torch.cat(places)


def check(op: str, cu_seqlens: Tensor, tokens: int, max_seqlen: int | None) -> list[int]:
    """Read where documents start, and refuse what is not a partition of the tokens.

    Args:
        op: Whose error it is.
        cu_seqlens: `[N + 1]`, int32.
        tokens: T.
        max_seqlen: What the caller says of the longest document.

    Returns:
        `cu_seqlens` as a list.

    Raises:
        ValueError: If it does not start at 0, decreases, does not end at T, or a document is longer
            than `max_seqlen`.
    """
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{op}: cu_seqlens must start at 0, got {bounds[0]}")
    for at, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if stop < start:
            raise ValueError(
                f"{op}: cu_seqlens must not decrease, got {start} and then {stop} at entry {at + 1}"
            )
        if max_seqlen is not None and stop - start > max_seqlen:
            raise ValueError(
                f"{op}: max_seqlen must be at least the longest document, got {max_seqlen}, "
                f"document {at} has {stop - start} tokens"
            )
    if bounds[-1] != tokens:
        raise ValueError(
            f"{op}: cu_seqlens must end at the number of tokens ({tokens}), got {bounds[-1]}"
        )
    return bounds


def _short(documents: list[tuple[int, int]]) -> Iterable[Batch]:
    """Batch documents by length, so that little is filled."""
    batch: list[tuple[int, int]] = []
    for start, length in sorted(documents, key=lambda d: (d[1], d[0])):
        if batch and (len(batch) + 1) * length > _COPIED:
            yield Batch(*zip(*batch, strict=True))
            batch = []
        batch.append((start, length))
    if batch:
        yield Batch(*zip(*batch, strict=True))


def plan(bounds: list[int], causal: bool) -> list[Batch]:
    """Decide which documents go into one call.

    Args:
        bounds: `cu_seqlens`, checked.
        causal: Whether documents may be filled up.

    Returns:
        Batches that hold each document with a token once.
    """
    documents = [(a, b - a) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
    batches, short = [], []
    for length, run in groupby(documents, key=lambda d: d[1]):
        starts = tuple(start for start, _ in run)
        if causal and length <= _SHORT and len(starts) == 1:
            short.append((starts[0], length))
        else:
            batches.append(Batch(starts, (length,) * len(starts)))
    return [*batches, *_short(short)]


def _take(x_T: Tensor, batch: Batch) -> Tensor:
    """Take a batch's documents, `[N, longest, ...]`; filled with zeros where they were copied."""
    count, rows = len(batch.starts), batch.view
    shape = count, batch.longest, *x_T.shape[1:]
    if rows is not None:
        return x_T[rows].reshape(shape)  # a view: the first dimension always splits
    filled = x_T.new_zeros(count * batch.longest, *x_T.shape[1:])
    filled[batch.slots()] = x_T[batch.tokens()]
    return filled.view(shape)


def _put(x_T: Tensor, batch: Batch, value: Tensor) -> None:
    rows = batch.view
    if rows is not None:
        x_T[rows].unflatten(0, (len(batch.starts), -1)).copy_(value)
    else:
        x_T[batch.tokens()] = value.flatten(0, 1)[batch.slots()]


def forward(
    dense: Callable[..., Dense],
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    bounds: list[int],
    causal: bool,
    scale: float,
    lse_TH: Tensor,
) -> Tensor:
    """Attend within documents.

    Args:
        dense: Attends in batches, as `attention_reference`.
        q_THK: `[T, H, K]`.
        k_TGK: `[T, G, K]`.
        v_TGK: `[T, G, K]`.
        bounds: `cu_seqlens`, checked.
        causal: Whether a query sees the keys up to its own position only.
        scale: Multiplies the scores.
        lse_TH: `[T, H]`; filled.

    Returns:
        `[T, H, K]`.
    """
    out_THK = q_THK.new_empty(q_THK.shape)
    for batch in plan(bounds, causal):
        out, lse = dense(*(_take(x, batch) for x in (q_THK, k_TGK, v_TGK)), causal, scale)
        if len(out) * out.shape[1] == len(out_THK) and batch.view is not None:
            out_THK = out.flatten(0, 1)  # the one call: nothing to copy
        else:
            _put(out_THK, batch, out)
        _put(lse_TH, batch, lse.mT)
    return out_THK


def backward(
    dense: Callable[..., Gradients],
    dout_THK: Tensor,
    dlse_TH: Tensor | None,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    out_THK: Tensor,
    lse_TH: Tensor,
    bounds: list[int],
    causal: bool,
    scale: float,
) -> Gradients:
    """Differentiate `forward`.

    Args:
        dense: Differentiates in batches, as `attention_backward_reference`.
        dout_THK: Upstream gradient of the output.
        dlse_TH: Upstream gradient of the log-sum-exp, None for 0.
        q_THK: As in the forward.
        k_TGK: As in the forward.
        v_TGK: As in the forward.
        out_THK: What the forward gave.
        lse_TH: What the forward gave.
        bounds: As in the forward.
        causal: As in the forward.
        scale: As in the forward.

    Returns:
        The gradients of q, k and v.
    """
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_THK, k_TGK, v_TGK))
    for batch in plan(bounds, causal):
        dout, q, k, v, out = (_take(x, batch) for x in (dout_THK, q_THK, k_TGK, v_TGK, out_THK))
        dlse = None if dlse_TH is None else _take(dlse_TH, batch).mT
        lse = _take(lse_TH, batch).mT
        gradients = dense(dout, dlse, q, k, v, out, lse, causal, scale)
        if q.shape[0] * q.shape[1] == len(q_THK) and batch.view is not None:
            dq, dk, dv = (d.flatten(0, 1) for d in gradients)  # the one call: nothing to copy
        else:
            for whole, part in zip((dq, dk, dv), gradients, strict=True):
                _put(whole, batch, part)
    return dq, dk, dv
