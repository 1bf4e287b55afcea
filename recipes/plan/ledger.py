"""A ledger of what is communicated: calls and bytes, by axis, collective and phase.

    ledger = Ledger(mesh)
    with observed(ledger):
        loss = model(batch)                  # forward
        loss.backward()                      # backward, and what is computed again there
        with ledger.phase("step"):
            step(...)
    ledger.table()    {("tp", "all_gather", "forward"): Total(calls=2, bytes=4096), ...}

Bytes are those that one rank sends by the ring algorithm, where R ranks each bring b bytes:

    all_gather        (R - 1) b             the result is R b
    reduce_scatter    (R - 1) / R b         the result is b / R
    all_reduce        2 (R - 1) / R b       a reduce-scatter, then an all-gather
    all_to_all        (R - 1) / R b         own part stays; uneven parts as they are
    broadcast         b                     each rank passes it on but the last: 0 there
    exchange          what is sent

Source: Thakur et al. 2005, https://doi.org/10.1177/1094342005051521, sections 4.1 and 4.4 (ring
algorithms).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist

from warploom.parallel.collectives.door import Call

AXES = ("tp", "cp", "dp", "rep", "pp", "ep", "etp", "edp", "ulysses", "ring", "ends")
_PRODUCTS = ("shard", "tokens", "stage", "world")  # of several axes: they name what none names


class Total(NamedTuple):
    """Calls and bytes; bytes as one rank sends them."""

    calls: int
    bytes: int


def ring_bytes(op: str, ranks: int, brought: int) -> int:
    """Return the bytes that a rank sends which brings `brought` bytes, all ranks alike.

    Args:
        op: `all_gather`, `reduce_scatter`, `all_reduce`, or `all_to_all` in equal parts.
        ranks: Size R of the group.
        brought: Bytes b.

    Raises:
        ValueError: If the bytes of `op` do not follow from these (`exchange`, `broadcast`).
    """
    if op == "all_gather":
        return (ranks - 1) * brought
    if op in ("reduce_scatter", "all_to_all"):
        return (ranks - 1) * brought // ranks
    if op == "all_reduce":
        return 2 * (ranks - 1) * brought // ranks
    raise ValueError(f"op must be a collective that all ranks enter alike, got {op!r}")


def wire_bytes(call: Call) -> int:
    """Return the bytes that this rank sends in `call`."""
    own, ranks = call.group.rank(), call.group.size()
    if call.messages:
        return sum(m.bytes for m in call.messages if m.sent and m.peer != own)
    if call.op == "broadcast":
        return call.bytes if (own - int(call.detail)) % ranks < ranks - 1 else 0
    return ring_bytes(call.op, ranks, call.bytes)


class Ledger:
    """Counts what passes; an observer for `observed`.

    Args:
        mesh: Its groups give the axes their names. A group of several axes has the first of tp, cp,
            dp, rep, pp, ep, etp, edp, ulysses, ring, ends, shard, tokens, stage, world. A group
            that is none of the mesh's is named by its ranks, such as `0+2`.
    """

    def __init__(self, mesh: object = None) -> None:
        named = [(getattr(mesh, axis, None), axis) for axis in (*AXES, *_PRODUCTS)]
        self._axes: dict[dist.ProcessGroup, str] = {}
        for group, axis in named:
            if group is not None:
                self._axes.setdefault(group, axis)
        self._totals: dict[tuple[str, str, str], Total] = {}
        self._phase: str | None = None

    def __call__(self, call: Call) -> AbstractContextManager[object]:
        """Count one collective."""
        backward = torch._C._current_graph_task_id() != -1
        phase = self._phase or ("backward" if backward else "forward")
        key = (self.axis(call.group), call.op, phase)
        calls, sent = self._totals.get(key, (0, 0))
        self._totals[key] = Total(calls + 1, sent + wire_bytes(call))
        return nullcontext()

    def axis(self, group: dist.ProcessGroup) -> str:
        """Name a group."""
        if group not in self._axes:
            self._axes[group] = "+".join(map(str, dist.get_process_group_ranks(group)))
        return self._axes[group]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs in this context under `name`, such as `step`."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def table(self) -> dict[tuple[str, str, str], Total]:
        """Return the totals by (axis, op, phase)."""
        return dict(self._totals)

    def total(self, *, axis: str = "", op: str = "", phase: str = "") -> Total:
        """Sum over what is not named."""
        wanted = (axis, op, phase)
        lines = [
            total
            for key, total in self._totals.items()
            if all(want in ("", have) for want, have in zip(wanted, key, strict=True))
        ]
        return Total(sum(t.calls for t in lines), sum(t.bytes for t in lines))

    def clear(self) -> None:
        """Forget what was counted."""
        self._totals.clear()
