"""The door: every collective of the library passes here, and whoever wants to may watch.

    with observed(ledger):
        step(...)

An observer is called with each `Call` before it runs and gives a context that is open while it is
begun: a ledger counts, a fingerprint compares. If entering the context gives a function, that gets
what was begun, a list of works with `is_completed`: a watchdog keeps them until they are completed.
An observer that has a method `waiting` is asked for a context around each wait for a transfer. With
no observer the door costs a look at one context variable.

A context variable does not reach the threads in which autograd runs the backward of CUDA tensors:
functions with a backward take `observers()` along in their forward and reopen them with `watched`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Message:
    """What travels between this rank and one other (or stays, where the peer is this rank).

    Attributes:
        peer: Rank in the group.
        sent: Whether it goes there; else it comes from there.
        elements: How many.
        dtype: Of which kind.
    """

    peer: int
    sent: bool
    elements: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Call:
    """One collective, as one rank is about to run it.

    Attributes:
        op: `all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all`, `broadcast`, `exchange`.
        group: Over which ranks.
        shape: Of what this rank brings (for an `exchange`, of its first tensor).
        dtype: Of the same.
        detail: What must agree beside these, such as the kind of reduction; or, for an `exchange`.
        uniform: Whether every rank of the group must bring the same shape.
        messages: Of an `exchange` and an uneven `all_to_all`: what goes to and comes from each.
    """

    op: str
    group: dist.ProcessGroup
    shape: tuple[int, ...]
    dtype: torch.dtype
    detail: str = ""
    uniform: bool = True
    messages: tuple[Message, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes that this rank brings."""
        if self.op == "exchange":
            return sum(m.bytes for m in self.messages if m.sent)
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


@contextmanager
def waiting() -> Iterator[None]:
    """Tell the observers that ask for it that this thread waits for a transfer."""
    with ExitStack() as stack:
        for observer in _OBSERVERS.get():
            if (opened := getattr(observer, "waiting", None)) is not None:
                stack.enter_context(opened())
        yield


class _Waited:
    """A work that is completed, too, once its wait has ended, in whichever thread.

    A reduce-scatter of gloo does its last part in the wait, and never says itself that it is done.
    """

    __slots__ = ("_over", "_work")

    def __init__(self, work: dist.Work) -> None:
        self._work, self._over = work, False

    def wait(self) -> None:
        try:
            self._work.wait()
        finally:  # what raised hangs no more
            self._over = True

    def is_completed(self) -> bool:
        return self._over or self._work.is_completed()


def _wait_blocks(x: Tensor, group: dist.ProcessGroup) -> bool:
    """Return whether a wait ends with the transfer; NCCL's only has the stream wait."""
    kind = x.device.type
    return kind == "cpu" or f"{kind}:gloo" in dist.get_backend_config(group)


def passing(
    op: str, x: Tensor, group: dist.ProcessGroup, run: Callable[[], T], *, detail: str = "",
    uniform: bool = True, messages: Callable[[], tuple[Message, ...]] = tuple,
) -> T:  # fmt: skip
    """Run a collective that brings `x`, seen by every observer, the first one outermost.

    Returns:
        What `run` began; where somebody follows it, what they see of it, to be waited for.
    """
    watching = _OBSERVERS.get()
    if not watching:
        return run()
    call = Call(op, group, tuple(x.shape), x.dtype, detail, uniform, messages())
    with ExitStack() as stack:
        entered = [stack.enter_context(observer(call)) for observer in watching]
        works = run()
        following = [follow for follow in entered if callable(follow)]
        if not following:
            return works
        begun: list[Any] = works if isinstance(works, list) else [works]
        if _wait_blocks(x, group):
            begun = [_Waited(work) for work in begun]
        for follow in following:
            follow(begun)
        return cast("T", begun if isinstance(works, list) else begun[0])
