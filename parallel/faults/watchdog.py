"""A watchdog: says which collective hangs, where, and who has not come.

    with Watchdog(store, rank=rank, patience_s=300):
        train()

A thread looks at the collectives that were begun and are not completed: neither has their wait
ended nor do their works say so. Each that is older than the patience is reported once: the rank,
the collective, how long it has run, the Python stack of the thread that began it, and which ranks
have not begun theirs, with the line where each of them is. The ranks' watchdogs exchange their
progress through a `torch.distributed.Store`, in their own threads, so that this works although the
group hangs.

A rank's progress is published every quarter of the patience, at most every second; a collective
costs a lock and a few dictionary entries.

NCCL's wait returns at once, so there only the works tell. A reduce-scatter of gloo is the other way
round, so one that is begun has to be waited for within the patience.
"""

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from ..collectives import Call, observed
from .describe import check_patience, group_key, members, place, what

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hang:
    """A collective that has not ended in time.

    Attributes:
        rank: This rank, in the world.
        what: Collective, shape and dtype, such as `all_reduce of [4] float32 (sum)`.
        ranks: Those of its group, in the world.
        number: The how-many-th of this group it is.
        waited_s: How long ago it was begun.
        stack: Python stack of the thread that began it, innermost last.
        missing: Ranks that have not begun theirs, each with what is known of it.
    """

    rank: int
    what: str
    ranks: tuple[int, ...]
    number: int
    waited_s: float
    stack: str
    missing: dict[int, str]

    def sentence(self) -> str:
        """Tell it in a line; the stack is apart."""
        told = "; ".join(f"rank {rank} {where}" for rank, where in self.missing.items())
        late = f"not there: {told}" if told else "every rank has begun it"
        group = "+".join(map(str, self.ranks))
        return (
            f"rank {self.rank} hangs for {self.waited_s:.1f} s in {self.what}, number "
            f"{self.number} of ranks {group}: {late}"
        )


@dataclass(slots=True)
class _Open:
    """A collective under way; `needs` are the counts that its partners must have reached."""

    call: Call
    number: int
    needs: list[tuple[int, str, int]]
    thread: int
    since: float = field(default_factory=time.monotonic)
    works: list[Any] | None = None
    told: bool = False

    def completed(self) -> bool:
        return self.works is not None and all(work.is_completed() for work in self.works)


class Watchdog:
    """Watches while its `with` block is open, in the thread that opened it and its backwards.

    Args:
        store: Reached by all ranks, such as a `PrefixStore` of the world's; it is cloned, so that
            whoever waits in it holds up nobody.
        rank: This rank, in the world.
        patience_s: How long a collective may take.
        report: Called with each hang, in the watchdog's thread, after it was logged as an error.
        abort: Whether the process then ends by SIGABRT, so that its launcher notices.

    Raises:
        ValueError: If `patience_s` is not a finite number above 0.
    """

    def __init__(
        self, store: Store, *, rank: int, patience_s: float = 600.0,
        report: Callable[[Hang], None] | None = None, abort: bool = False,
    ) -> None:  # fmt: skip
        check_patience(patience_s)
        held: Any = store  # the stubs lack `clone`
        self.store: Store = held.clone()
        self.rank, self.patience_s, self.report, self.abort = rank, patience_s, report, abort
        self._lock = threading.Lock()
        self._open: dict[int, _Open] = {}
        self._counts: Counter[str] = Counter()
        self._last = "in no collective yet"
        self._home = 0
        self._reachable = True
        self._stop = threading.Event()
        self._stack = ExitStack()

    def __enter__(self) -> "Watchdog":
        self._home = threading.get_ident()
        self._stop.clear()
        thread = threading.Thread(target=self._run, name="warploom watchdog", daemon=True)
        self._stack.enter_context(observed(self))
        self._stack.callback(thread.join)
        self._stack.callback(self._stop.set)
        thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def __call__(self, call: Call) -> Iterator[Callable[[list[Any]], None]]:
        """Watch one collective until its works are completed."""
        group, ranks = group_key(call.group), members(call.group)
        with self._lock:
            self._forget_completed()
            entry = self._begin(call, group, ranks)
            self._open[id(entry)] = entry
            self._last = f"began {what(call)} over ranks {group} as its last"

        def follow(works: list[Any]) -> None:
            entry.works = works

        try:
            yield follow
        except BaseException:
            with self._lock:
                self._open.pop(id(entry), None)
            raise

    def _forget_completed(self) -> None:
        """Drop what is completed; under the lock."""
        for key in [key for key, entry in self._open.items() if entry.completed()]:
            del self._open[key]

    def _begin(self, call: Call, group: str, ranks: tuple[int, ...]) -> _Open:
        """Count the call, and note what each partner must have counted for it to end."""
        self._counts[group] += call.op != "exchange"
        needs = [(r, group, self._counts[group]) for r in ranks if r != self.rank]
        number = self._counts[group]
        if call.op == "exchange":
            needs = []
            self._counts[f"{group} exchanges"] += 1
            number = self._counts[f"{group} exchanges"]
            for message in call.messages:
                peer = ranks[message.peer]
                a, b = (self.rank, peer) if message.sent else (peer, self.rank)
                mine, theirs = ("sent", "got") if message.sent else ("got", "sent")
                self._counts[f"{group} {a}>{b} {mine}"] += 1
                needs.append(
                    (peer, f"{group} {a}>{b} {theirs}", self._counts[f"{group} {a}>{b} {mine}"])
                )
        return _Open(call, number, needs, threading.get_ident())

    def _run(self) -> None:
        interval = min(1.0, self.patience_s / 4)
        while not self._stop.wait(interval):
            self._exchange(self._publish)
            with self._lock:
                self._forget_completed()
                untold = [entry for entry in self._open.values() if not entry.told]
            for entry in untold:  # oldest first
                waited_s = time.monotonic() - entry.since
                if waited_s > self.patience_s and not entry.completed():
                    entry.told = True
                    self._tell(entry, waited_s)

    def _exchange(self, run: Callable[[], Any]) -> Any:
        """Reach the store; when it is gone, say so once and go on without."""
        if not self._reachable:
            return None
        try:
            return run()
        except dist.DistError as error:
            self._reachable = False
            _LOG.warning("the watchdog's store is gone, who is missing stays unknown: %s", error)
            return None

    def _publish(self) -> None:
        frame = sys._current_frames().get(self._home)
        with self._lock:
            line = {"counts": dict(self._counts), "last": self._last}
        line["at"] = place(frame) if frame is not None else "ended"
        self.store.set(f"progress/{self.rank}", json.dumps(line))

    def _missing(self, entry: _Open) -> dict[int, str]:
        missing = {}
        for rank, counted, number in entry.needs:
            key = f"progress/{rank}"
            if not self.store.check([key]):
                missing[rank] = "has shown no sign yet"
                continue
            line = json.loads(self.store.get(key))
            if line["counts"].get(counted, 0) < number:
                missing[rank] = f"is at {line['at']}, {line['last']}"
        return missing

    def _tell(self, entry: _Open, waited_s: float) -> None:
        frame = sys._current_frames().get(entry.thread)
        hang = Hang(
            rank=self.rank, what=what(entry.call), ranks=members(entry.call.group),
            number=entry.number, waited_s=waited_s,
            stack="".join(traceback.format_stack(frame)) if frame else "",
            missing=self._exchange(lambda: self._missing(entry)) or {},
        )  # fmt: skip
        _LOG.error("%s\n%s", hang.sentence(), hang.stack)
        if self.report is not None:
            self.report(hang)
        if self.abort:
            os.abort()
