"""Collectives without a gradient: sums of gradients and metrics, shards, parts that travel.

`None` stands for a group of one rank: nothing is sent and, where a new tensor would be returned,
the argument itself is. A name that ends in `begin` returns at once with a `Pending`, whose `wait`
gives the result: what runs between the two overlaps with the transfer.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from warploom.kernels.invariant import invariant

from .door import Message, observers, passing, waiting

Group = dist.ProcessGroup | None

# Renamed in torch 2.13; the old names warn there, the new ones are missing before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Pending:
    """A collective under way.

    Args:
        result: What it gives when it is done.
        works: Its parts that are still running: of torch, or begun here.
        kept: Tensors that must live until then.
    """

    def __init__(
        self, result: Any, works: "Sequence[dist.Work | Pending]" = (), kept: Any = None
    ) -> None:
        self._result, self._works, self._kept = result, list(works), kept

    def wait(self) -> Any:
        """Return the result once it is there; may be called again."""
        if self._works and observers():
            with waiting():
                self._finish()
        else:
            self._finish()
        return self._result

    def _finish(self) -> None:
        for work in self._works:
            work._finish() if isinstance(work, Pending) else work.wait()
        self._works, self._kept = [], None


def place(group: Group) -> tuple[int, int]:
    """Return this rank's place in the group, and the group's size.

    Raises:
        ValueError: If this rank is not in the group, which is then no group at all.
    """
    if group is None:
        return 0, 1
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be a process group that this rank is in, or None for one rank; got "
            f"{group}: build a layer on the ranks of its group alone"
        )
    return group.rank(), group.size()


def device_of(group: Group) -> torch.device:
    """Return the device on which small tensors travel over `group`."""
    if group is None or "nccl" not in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def all_reduce_(x: Tensor, group: Group, *, op: str = "sum") -> Tensor:
    """Reduce `x` in place over the group (`sum`, `max` or `min`) and return it."""
    result: Tensor = all_reduce_begin(x, group, op=op).wait()
    return result


def all_reduce_begin(x: Tensor, group: Group, *, op: str = "sum") -> Pending:
    """Begin to reduce `x` in place over the group; `wait` gives `x`."""
    if group is None:
        return Pending(x)
    if _ordered(group) and op == "sum":
        return Pending(x.copy_(_sum(x, group)))

    def run() -> dist.Work:
        work: dist.Work = dist.all_reduce(x, op=_REDUCE[op], group=group, async_op=True)
        return work

    return Pending(x, [passing("all_reduce", x, group, run, detail=op)])


def _ordered(group: dist.ProcessGroup) -> bool:
    """Tell whether the order of a sum must not depend on the place, as that of a ring does."""
    return invariant() and group.size() > 2


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum `x` over the group, in the order of the ranks."""
    total: Tensor = x.new_zeros(())
    for part in all_gather_rows(x[None], group):
        total = total + part
    return total


def all_gather_rows(x: Tensor, group: Group) -> Tensor:
    """Gather `x` `[n, ...]` of every rank, in rank order, into `[n * R, ...]`."""
    full: Tensor = all_gather_rows_begin(x, group).wait()
    return full


def all_gather_rows_begin(x: Tensor, group: Group, *, out: Tensor | None = None) -> Pending:
    """Begin to gather `x` `[n, ...]`; `wait` gives `[n * R, ...]` (`out`, where it is given)."""
    if group is None:
        return Pending(x if out is None else out.copy_(x))
    x = x.contiguous()
    full = x.new_empty(x.shape[0] * group.size(), *x.shape[1:]) if out is None else out

    def run() -> dist.Work:
        work: dist.Work = _all_gather(full, x, group=group, async_op=True)
        return work

    return Pending(full, [passing("all_gather", x, group, run)], kept=x)


def reduce_scatter_rows(x: Tensor, group: Group) -> Tensor:
    """Sum `x` `[n * R, ...]` over the group and keep this rank's `[n, ...]`."""
    part: Tensor = reduce_scatter_rows_begin(x, group).wait()
    return part


def reduce_scatter_rows_begin(x: Tensor, group: Group, *, out: Tensor | None = None) -> Pending:
    """Begin to sum `x` `[n * R, ...]`; `wait` gives this rank's `[n, ...]` (`out`, if given)."""
    if group is None:
        return Pending(x if out is None else out.copy_(x))
    x = x.contiguous()
    part = x.new_empty(x.shape[0] // group.size(), *x.shape[1:]) if out is None else out
    if _ordered(group):
        return Pending(part.copy_(_sum(x, group).chunk(group.size())[group.rank()]))

    def run() -> dist.Work:
        work: dist.Work = _reduce_scatter(part, x, group=group, async_op=True)
        return work

    return Pending(part, [passing("reduce_scatter", x, group, run)], kept=x)


def all_to_all_rows(
    x: Tensor, group: Group, sent: Sequence[int] | None = None, got: Sequence[int] | None = None
) -> Tensor:
    """Send rows of `x` to each rank of the group, and return what they sent here, in rank order.

    Args:
        x: `[n, ...]`: first the rows for rank 0, then those for rank 1, and so on.
        group: The ranks.
        sent: Rows for each rank; `None` for equal parts.
        got: Rows from each rank; `None` for equal parts.
    """
    received: Tensor = all_to_all_rows_begin(x, group, sent, got).wait()
    return received


def all_to_all_rows_begin(
    x: Tensor, group: Group, sent: Sequence[int] | None = None, got: Sequence[int] | None = None
) -> Pending:
    """Begin `all_to_all_rows`."""
    if group is None:
        return Pending(x)
    x = x.contiguous()
    y = x.new_empty(x.shape[0] if got is None else sum(got), *x.shape[1:])
    arriving, leaving = (None if n is None else list(n) for n in (got, sent))

    def run() -> dist.Work:
        work: dist.Work = dist.all_to_all_single(
            y, x, arriving, leaving, group=group, async_op=True
        )
        return work

    def messages() -> tuple[Message, ...]:
        width = x.shape[1:].numel()
        lines = ((True, leaving), (False, arriving))
        return tuple(
            Message(peer, out, n * width, x.dtype)
            for out, counts in lines
            for peer, n in enumerate(counts or ())
        )

    work = passing("all_to_all", x, group, run, uniform=sent is None, messages=messages)
    return Pending(y, [work], kept=x)


def exchange_begin(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], group: Group
) -> Pending:
    """Begin to send tensors to ranks of the group and to fill others from them.

    Args:
        sends: Tensors, each with the rank in the group that it goes to.
        receives: Tensors to overwrite, each with the rank in the group that it comes from. Between
            two ranks, tensors arrive in the order in which they are sent.
        group: The ranks.

    Returns:
        `wait` gives the received tensors, in order, and means that the sent ones may be changed.
    """
    outgoing = [(x.contiguous(), peer) for x, peer in sends]
    filled = [x for x, _ in receives]
    if group is None or not (outgoing or filled):
        return Pending(filled)
    ops = [dist.P2POp(dist.isend, x, group=group, group_peer=peer) for x, peer in outgoing]
    ops += [dist.P2POp(dist.irecv, x, group=group, group_peer=peer) for x, peer in receives]

    def messages() -> tuple[Message, ...]:
        both = ((True, outgoing), (False, receives))
        return tuple(
            Message(peer, out, x.numel(), x.dtype) for out, line in both for x, peer in line
        )

    def run() -> list[dist.Work]:
        return dist.batch_isend_irecv(ops)

    first = (outgoing or list(receives))[0][0]
    works = passing("exchange", first, group, run, uniform=False, messages=messages)
    return Pending(filled, works, kept=outgoing)


def broadcast_(x: Tensor, group: Group, *, source: int = 0) -> Tensor:
    """Overwrite `x` with that of rank `source` of the group, and return it."""
    if group is not None:

        def run() -> dist.Work:
            work: dist.Work = dist.broadcast(x, group=group, group_src=source, async_op=True)
            return work

        Pending(x, [passing("broadcast", x, group, run, detail=str(source))]).wait()
    return x


def barrier(group: Group) -> None:
    """Wait for every rank of the group."""
    all_reduce_(torch.zeros(1, device=device_of(group)), group)


def gather_json(value: Any, group: Group) -> list[Any]:
    """Gather a JSON value of every rank, in rank order; no pickle travels."""
    if group is None:
        return [value]
    device = device_of(group)
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = all_gather_rows(torch.tensor([text.numel()], device=device), group).tolist()
    line = torch.zeros(1, max(sizes), dtype=torch.uint8, device=device)
    line[0, : text.numel()] = text.to(device)
    lines = all_gather_rows(line, group).cpu()
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(lines, sizes, strict=True)]
