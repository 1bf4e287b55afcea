"""Tokens to the ranks that hold their experts, and back: dispatch, compute, combine, in chunks.

P ep ranks, S etp ranks, n chunks; a rank has m rows to send of a chunk, and serves M.

    once      counts of rows, chunk by expert                    all-to-all ep, all-gather etp
    dispatch  [m, D]  -> rows for own experts                    all-to-all ep
              ...     -> those of the etp ranks too: [M, D]      all-gather etp, uneven
    compute   sorted by expert, the experts, back in order
    combine   [M, D]  -> own part of the sum over etp            reduce-scatter etp, uneven
              ...     -> [m, D], in the order they were sent     all-to-all ep

The backward of each is the other's. The dispatch of a chunk is begun before the one before it is
computed, and its combine is waited for after the next one is computed:

    D0 | D1 W0 C0 B0 | D2 W1 C1 B1 J0 | W2 C2 B2 J1 | J2         D, B begin; W, J wait; C compute

Autograd runs, of the nodes that are ready, the youngest first: J2 J1 | B2 C2 W2 | J0 B1 C1 W1 D2 |
..., where J and W begin the backward's transfer and B and D wait for it. It overlaps likewise, and
in the same order on every rank.

An uneven all-gather is an all-to-all in which each rank sends its rows to all, and the sum of an
uneven reduce-scatter is taken here, in the order of the ranks: nothing is padded.

Source: Lepikhin et al. 2020, https://arxiv.org/abs/2006.16668, section 3.2 (dispatch and combine);
Liu et al. 2025, https://arxiv.org/abs/2504.14960, section 3 (ep and etp folded apart from tp).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from warploom.kernels.moe import permute, unpermute

from ..collectives import (
    Group,
    Pending,
    all_gather_rows,
    all_to_all_rows,
    all_to_all_rows_begin,
    observers,
    place,
    swap,
    watched,
)
from .router import count_experts


@dataclass(slots=True)
class _Transfer:
    """An all-to-all that is under way, forward or backward."""

    group: Group
    sent: Sequence[int]
    got: Sequence[int]
    pending: Pending = field(default_factory=lambda: Pending(None))

    def begin(self, x: Tensor) -> Tensor:
        """Begin to send the rows of `x`; return a token of the shape of what will come."""
        if self.group is None:
            return x
        token: Tensor = _Begin.apply(x, self)
        return token

    def finish(self, token: Tensor) -> Tensor:
        """Wait, and return the rows that came."""
        if self.group is None:
            return token
        rows: Tensor = _Finish.apply(token, self)
        return rows

    def take(self) -> Tensor:
        """Wait for what is under way."""
        rows: Tensor = self.pending.wait()
        self.pending = Pending(None)
        return rows


def _token(like: Tensor, rows: int) -> Tensor:
    """Return zeros `[rows, ...]` that take no memory."""
    return like.new_zeros(()).expand(rows, *like.shape[1:])


class _Begin(torch.autograd.Function):
    """Forward: begins the transfer. Backward: ends that of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer, ctx.observers = transfer, observers()
        transfer.pending = all_to_all_rows_begin(x, transfer.group, transfer.sent, transfer.got)
        return _token(x, sum(transfer.got))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        with watched(ctx.observers or observers()):
            return ctx.transfer.take(), None


class _Finish(torch.autograd.Function):
    """Forward: ends the transfer. Backward: begins that of the gradient."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer, ctx.observers = transfer, observers()
        return transfer.take()

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        with watched(ctx.observers or observers()):
            transfer.pending = all_to_all_rows_begin(
                dys[0], transfer.group, transfer.got, transfer.sent
            )
        return _token(dys[0], len(dys[0])), None


def _gather_uneven(x: Tensor, group: Group, sizes: Sequence[int]) -> Tensor:
    """All-gather the rows of every rank, `sizes` of them; backward sums."""
    if group is None:
        return x
    ranks = group.size()
    return swap(x.repeat(ranks, 1), group, [len(x)] * ranks, sizes)


def _scatter_uneven(x: Tensor, group: Group, sizes: Sequence[int]) -> Tensor:
    """Sum over the ranks, and keep those of the `sizes` rows that are this rank's."""
    if group is None:
        return x
    ranks, own = group.size(), sizes[group.rank()]
    return swap(x, group, sizes, [own] * ranks).view(ranks, own, x.shape[1]).sum(0)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Where the rows of a chunk go.

    Attributes:
        sent: Rows to each ep rank.
        got: Rows from each ep rank.
        sizes: Rows that each etp rank got.
        lines: Rows from each etp and ep rank by own expert, `[S, P, E/P]`.
    """

    sent: list[int]
    got: list[int]
    sizes: list[int]
    lines: Tensor

    def order(self) -> Tensor:
        """Sort the served rows by expert: `[M]` indices."""
        held = self.lines.shape[2]
        each = torch.arange(held, device=self.lines.device).repeat(self.lines.numel() // held)
        of_row = each.repeat_interleave(self.lines.flatten(), output_size=sum(self.sizes))
        return of_row.argsort(stable=True)


def _plan(counts: Tensor, group: Group, etp_group: Group) -> list[_Chunk]:
    """Exchange the counts `[n, E]` of rows to send: one wait for the device, whatever n is."""
    _, ranks = place(group)
    chunks, experts = counts.shape
    leaving = counts.view(chunks, ranks, experts // ranks).transpose(0, 1).contiguous()
    own = all_to_all_rows(leaving, group).unsqueeze(0)
    lines = all_gather_rows(own, etp_group)
    sent = leaving.sum(2).t()
    totals = torch.cat([sent, own[0].sum(2).t(), lines.sum((1, 3)).t()], 1).tolist()
    return [
        _Chunk(line[:ranks], line[ranks : 2 * ranks], line[2 * ranks :], lines[:, :, at])
        for at, line in enumerate(totals)
    ]


Compute = Callable[[Tensor, Tensor], Tensor]
_Part = tuple[Tensor, Tensor, Tensor]  # tokens [T, D], weights [T, k], indices [T, k]


def _served(x: Tensor, chunk: _Chunk, compute: Compute, etp_group: Group) -> Tensor:
    """Compute the rows that came; return this rank's part, in the order in which they came."""
    order = chunk.order()
    rows = _gather_uneven(x, etp_group, chunk.sizes).index_select(0, order)
    y = compute(rows, chunk.lines.sum((0, 1))).index_select(0, order.argsort())
    return _scatter_uneven(y, etp_group, chunk.sizes)


def _exchanged(
    parts: Sequence[_Part], experts: int, compute: Compute, group: Group, etp_group: Group,
    meanwhile: Callable[[], None],
) -> list[Tensor]:  # fmt: skip
    """Run the chunks as the table at the top of the file says."""
    counts = torch.stack([count_experts(indices, experts) for _, _, indices in parts])
    plan = _plan(counts, group, etp_group)
    going: list[tuple[_Transfer, Tensor, Tensor]] = []
    coming: list[tuple[_Transfer, Tensor, Tensor]] = []
    done: list[Tensor] = []

    def dispatch(at: int) -> None:
        x, _, indices = parts[at]
        rows, _, order = permute(x, indices, experts)
        total = sum(plan[at].sent)
        transfer = _Transfer(group, plan[at].sent, plan[at].got)
        going.append((transfer, transfer.begin(rows[:total]), order[:total]))

    def join(at: int) -> None:
        transfer, token, order = coming[at]
        done.append(unpermute(transfer.finish(token), order, parts[at][1]))

    dispatch(0)
    meanwhile()
    for at in range(len(parts)):
        if at + 1 < len(parts):
            dispatch(at + 1)
        transfer, token, order = going[at]
        y = _served(transfer.finish(token), plan[at], compute, etp_group)
        back = _Transfer(group, plan[at].got, plan[at].sent)
        coming.append((back, back.begin(y), order))
        if at:
            join(at - 1)
    join(len(parts) - 1)
    return done


def apply_experts(
    x: Tensor, weights: Tensor, indices: Tensor, experts: int, compute: Compute, *, group: Group,
    etp_group: Group, chunks: int = 1, meanwhile: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """Send tokens to their experts and sum what comes back, weighted.

    A collective call over both groups.

    Args:
        x: This rank's tokens `[T, D]`; T may differ from rank to rank, and be 0.
        weights: `[T, k]`.
        indices: Experts of each token `[T, k]` int64; -1 is none.
        experts: Experts E, over all ranks.
        compute: From rows sorted by own expert and their counts to this rank's part of the results.
        group: The expert-parallel process group; `None` for one rank.
        etp_group: The expert-tensor-parallel process group; `None` for one rank.
        chunks: Into how many the tokens are cut; the same on every rank.
        meanwhile: Called once, while the first dispatch is under way.

    Returns:
        `[T, D]`.
    """
    ends = [len(x) * at // chunks for at in range(chunks + 1)]
    sizes = [stop - start for start, stop in zip(ends, ends[1:], strict=False)]
    parts = list(zip(x.split(sizes), weights.split(sizes), indices.split(sizes), strict=True))
    if group is not None or etp_group is not None:
        done = _exchanged(parts, experts, compute, group, etp_group, meanwhile)
    else:
        meanwhile()
        done = []
        for part, weight, index in parts:
            rows, counts, order = permute(part, index, experts)
            done.append(unpermute(compute(rows, counts), order, weight))
    return done[0] if len(done) == 1 else torch.cat(done)
