"""Attention within documents by an operator for whole batches: which documents go into one call.

Neighbours of one length are a batch as they lie; nothing is copied on the way in. Short documents
of one length are a batch wherever they lie: a call costs more than to copy them. To fill up short
documents into one length was tried and is slower: 68 documents of 32 tokens on average, 9 heads of
64, one core: 89 ms forward and backward, against 35 in a call each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .scores import Packed

Dense = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


_SHORT = 64  # tokens: documents below are collected by their lengths

Document = tuple[int, int, int, int]  # first query, queries, first key, keys


class Rows:
    """The rows of some documents of one length in queries or keys.

    Args:
        starts: First row of each document.
        length: Rows of each.
    """

    def __init__(self, starts: list[int], length: int) -> None:
        self.starts, self.length = starts, length
        step = range(starts[0], starts[0] + len(starts) * length, length or 1)
        self.neighbours = not length or starts == [*step]

    def _index(self, x_T: Tensor) -> Tensor:
        within = torch.arange(self.length, device=x_T.device)
        return (torch.tensor(self.starts, device=x_T.device)[:, None] + within).flatten()

    def take(self, x_T: Tensor) -> Tensor:
        """Return the documents' part of a packed tensor, `[T, ...]`, as `[count, length, ...]`."""
        shape = len(self.starts), self.length, *x_T.shape[1:]
        if not self.neighbours:
            return x_T[self._index(x_T)].view(shape)
        return x_T[self.starts[0] : self.starts[0] + shape[0] * shape[1]].view(shape)

    def put(self, x_T: Tensor, part: Tensor) -> None:
        """Write the documents' part of a packed tensor."""
        if self.neighbours:
            self.take(x_T).copy_(part)
        else:
            x_T[self._index(x_T)] = part.flatten(0, 1).to(x_T.dtype)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Documents of the same lengths, attended to in one call."""

    queries: Rows
    keys: Rows


def check(op: str, cu_seqlens: Tensor, tokens: int, max_seqlen: int | None) -> list[int]:
    """Read where documents start, and refuse what is not a partition of the tokens.

    Args:
        op: Whose error it is.
        cu_seqlens: `[N + 1]`, int32.
        tokens: Rows of all documents.
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


def bounds_of(op: str, packed: Packed, queries: int, keys: int) -> tuple[list[int], list[int]]:
    """Read and check the boundaries of documents, in queries and in keys.

    Args:
        op: Whose error it is.
        packed: The boundaries.
        queries: Rows of all queries.
        keys: Rows of all keys.

    Returns:
        Both as lists.

    Raises:
        ValueError: As `check`, or if they are not of as many documents.
    """
    of_queries = check(op, packed.q, queries, packed.max_q)
    if packed.q is packed.k:
        if queries != keys:
            raise ValueError(
                f"{op}: q and k must have the same tokens, or give cu_seqlens_k, got {queries} and "
                f"{keys}"
            )
        return of_queries, of_queries
    return of_queries, check(f"{op} (cu_seqlens_k)", packed.k, keys, packed.max_k)


def plan(queries: list[int], keys: list[int]) -> list[Batch]:
    """Decide which documents go into one call.

    Args:
        queries: `cu_seqlens` of the queries, checked.
        keys: That of the keys.

    Returns:
        Batches that hold each document that has queries once.
    """
    short: dict[tuple[int, int], list[Document]] = {}
    groups: list[list[Document]] = []
    last = None
    for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True):
        lengths = b - a, d - c
        if b == a:
            continue
        if max(lengths) < _SHORT:
            group = short.setdefault(lengths, [])
        elif lengths == last:
            group = groups[-1]
        else:
            group = []
        if not group:
            groups.append(group)
        group.append((a, b - a, c, d - c))
        last = lengths if max(lengths) >= _SHORT else None
    return [
        Batch(
            queries=Rows([start for start, *_ in group], group[0][1]),
            keys=Rows([start for *_, start, _ in group], group[0][3]),
        )
        for group in groups
    ]


def forward(
    dense: Callable[..., Dense], q_THK: Tensor, k_UGK: Tensor, v_UGL: Tensor, batches: list[Batch],
    dtype: torch.dtype,
) -> Dense:  # fmt: skip
    """Attend within documents.

    Args:
        dense: Attends in batches, as `attention_reference` of three tensors.
        q_THK: `[T, H, K]`.
        k_UGK: `[U, G, K]`.
        v_UGL: `[U, G, L]`.
        batches: Of `plan`.
        dtype: Of the log-sum-exp.

    Returns:
        `[T, H, L]` and the log-sum-exp `[H, T]`.
    """
    out_THL = q_THK.new_empty(*q_THK.shape[:-1], v_UGL.shape[-1])
    lse_HT = q_THK.new_empty(q_THK.shape[1], len(q_THK), dtype=dtype)
    for batch in batches:
        rows, keys = batch.queries, batch.keys.take
        out, lse = dense(rows.take(q_THK), keys(k_UGK), keys(v_UGL))
        rows.put(lse_HT.t(), lse.mT)
        if len(batches) == 1 and rows.neighbours:
            return out.flatten(0, 1), lse_HT  # all tokens: nothing to copy
        rows.put(out_THL, out)
    return out_THL, lse_HT


def backward(
    dense: Callable[..., Gradients], dout_THL: Tensor, dlse_HT: Tensor | None, q_THK: Tensor,
    k_UGK: Tensor, v_UGL: Tensor, out_THL: Tensor, lse_HT: Tensor, batches: list[Batch],
) -> Gradients:  # fmt: skip
    """Differentiate `forward`.

    Args:
        dense: Differentiates in batches, as `attention_backward_reference` of seven tensors.
        dout_THL: Upstream gradient of the output.
        dlse_HT: Upstream gradient of the log-sum-exp, None for 0.
        q_THK: As in the forward.
        k_UGK: As in the forward.
        v_UGL: As in the forward.
        out_THL: What the forward gave.
        lse_HT: What the forward gave.
        batches: As in the forward.

    Returns:
        The gradients of q, k and v.
    """
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q_THK, k_UGK, v_UGL))
    lse_TH, dlse_TH = lse_HT.t(), None if dlse_HT is None else dlse_HT.t()
    for batch in batches:
        rows, keys = batch.queries.take, batch.keys.take
        dlse = None if dlse_TH is None else rows(dlse_TH).mT
        saved = rows(q_THK), keys(k_UGK), keys(v_UGL), rows(out_THL), rows(lse_TH).mT
        parts = dense(rows(dout_THL), dlse, *saved)
        whole = batch.queries.neighbours and batch.keys.neighbours
        if len(batches) == 1 and whole and parts[1].flatten(0, 1).shape == dk.shape:
            dq, dk, dv = (d.flatten(0, 1) for d in parts)  # all tokens: nothing to copy
            break
        for at, x, part in zip(
            (batch.queries, batch.keys, batch.keys), (dq, dk, dv), parts, strict=True
        ):
            at.put(x, part)
    return dq, dk, dv
