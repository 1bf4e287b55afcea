"""The door: every collective of the library passes here, and whoever wants to may watch.

    with observed(ledger):
        step(...)

An observer is called with each `Call` before it runs and gives a context that is open while it
runs: a ledger counts, a fingerprint compares, a watchdog starts its clock. With no observer the
door costs a look at one context variable.

A context variable does not reach the threads in which autograd runs the backward of CUDA tensors:
functions with a backward take `observers()` along in their forward and reopen them with `watched`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One collective, as one rank is about to run it.

    Attributes:
        op: `all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all`, `broadcast`, `exchange`.
        group: Over which ranks.
        shape: Of what this rank brings (for an `exchange`, of all it sends, flattened).
        dtype: Of the same.
        detail: What must agree beside these, such as the kind of reduction; or, for an `exchange`,
            the peers.
        uniform: Whether every rank of the group must bring the same shape.
    """

    op: str
    group: dist.ProcessGroup
    shape: tuple[int, ...]
    dtype: torch.dtype
    detail: str = ""
    uniform: bool = True

    @property
    def bytes(self) -> int:
        """Bytes that this rank brings."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Observer = Callable[[Call], AbstractContextManager[object]]

_OBSERVERS: ContextVar[tuple[Observer, ...]] = ContextVar("warploom_observers", default=())


def observers() -> tuple[Observer, ...]:
    """Return who watches now."""
    return _OBSERVERS.get()


@contextmanager
def watched(by: tuple[Observer, ...]) -> Iterator[None]:
    """Have exactly these observers watch while the context is open, in this thread."""
    token = _OBSERVERS.set(by)
    try:
        yield
    finally:
        _OBSERVERS.reset(token)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Let one more observer see every collective while the context is open, in this thread."""
    with watched((*_OBSERVERS.get(), observer)):
        yield


def passing(
    op: str,
    x: Tensor,
    group: dist.ProcessGroup,
    run: Callable[[], T],
    *,
    detail: str = "",
    uniform: bool = True,
) -> T:
    """Run a collective that brings `x`, seen by every observer, the first one outermost."""
    watching = _OBSERVERS.get()
    if not watching:
        return run()
    call = Call(op, group, tuple(x.shape), x.dtype, detail, uniform)
    with ExitStack() as stack:
        for observer in watching:
            stack.enter_context(observer(call))
        return run()
