"""Ranks on this machine that are started once and run one function after the other.

Each call is a gloo world of its own: to start a process takes seconds, to join a world some ten
milliseconds. The ranks are forked from a server that has imported torch, and die with this process.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from warploom.parallel.collectives import barrier

PRELOADED = (
    *("torch", "torch.distributed", "torch.optim", "torch._inductor.config", "numpy"),
    *("safetensors.torch", "warploom.models.decoder", "warploom.recipes.verification.case"),
)
_HOST = "127.0.0.1"
_DYING_S = 2.0  # how long the trace of a rank that hangs, or of the first that failed, is awaited


_LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|Connection closed", re.IGNORECASE)


class RankError(RuntimeError):
    """A function failed, or hung, on a rank of a pool; holds that rank's trace."""


@dataclass(frozen=True, slots=True)
class _Worker:
    process: BaseProcess
    line: Connection
    trace: Path


class Pool:
    """Up to `most` ranks, started when they are first needed.

    Args:
        most: The largest world.
        prepare: Called once in each process, before its first function.
        preload: Modules that the server of processes imports; what it has imported already counts.

    Use it in a `with` block, or call `close`.
    """

    def __init__(
        self,
        most: int = 8,
        *,
        prepare: Callable[[], None] | None = None,
        preload: Sequence[str] = PRELOADED,
    ) -> None:
        self.most, self.prepare = most, prepare
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(preload))
        self.jobs = 0
        self._workers: list[_Worker] = []
        self._store: TCPStore | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(
        self, size: int, fn: Callable[..., Any], *args: object, timeout_s: float = 120.0
    ) -> Any:
        """Run `fn(*args)` on ranks `0 .. size - 1` of a fresh gloo world.

        Args:
            size: How many ranks.
            fn: A function of a module, which the ranks import.
            args: What it takes; copied.
            timeout_s: How long it may run.

        Returns:
            What rank 0 returned; copied.

        Raises:
            RankError: If a rank raised, died or hung; the ranks are started anew when next needed.
            ValueError: If there are not so many ranks.
        """
        if not 1 <= size <= self.most:
            raise ValueError(f"a pool of {self.most} ranks runs 1 to {self.most}; got {size}")
        self._start(size)
        self.jobs += 1
        chosen = self._workers[:size]
        try:
            for rank, worker in enumerate(chosen):
                if not worker.process.is_alive():
                    raise RankError(f"rank {rank} of {size} died before it began")
                worker.line.send((self.jobs, size, timeout_s, fn, args))
            return self._collect(chosen, timeout_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the ranks."""
        for worker in self._workers:
            worker.line.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        self._workers, self._store = [], None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self, size: int) -> None:
        """Start the ranks below `size` that are not there yet."""
        if self._store is None or self._folder is None:
            self._store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
            self._folder = tempfile.TemporaryDirectory(prefix="warploom-")
        for rank in range(len(self._workers), size):
            own, other = self.context.Pipe()
            trace = Path(self._folder.name, str(rank))
            process = self.context.Process(
                target=_serve,
                args=(rank, self._store.port, other, trace, self.prepare),
                daemon=True,
                name=f"rank {rank}",
            )
            process.start()
            other.close()
            self._workers.append(_Worker(process, own, trace))

    def _collect(self, chosen: list[_Worker], timeout_s: float) -> Any:
        """Wait for the answers of all, and return the first rank's."""
        waiting = {worker.line: rank for rank, worker in enumerate(chosen)}
        end = time.monotonic() + timeout_s
        result: Any = None
        while waiting:
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                hung = sorted(waiting.values())
                stacks = _stacks(chosen[hung[0]])
                raise RankError(
                    f"ranks {hung} of {len(chosen)} did not end within {timeout_s:g} s; "
                    f"rank {hung[0]} is at:\n{stacks}"
                )
            for line in ready:
                assert isinstance(line, Connection)
                rank = waiting.pop(line)
                failed, answer = _receive(line)
                if failed:
                    rank, answer = _first_cause(waiting, rank, answer)
                    raise RankError(f"rank {rank} of {len(chosen)}:\n{answer}")
                if rank == 0:
                    result = answer
        return result


def _receive(line: Connection) -> tuple[bool, Any]:
    """Return whether a rank failed, and its answer or its trace."""
    try:
        failed, answer = line.recv()
    except (EOFError, OSError):
        return True, "the process died"
    return failed, answer


def _first_cause(waiting: dict[Connection, int], rank: int, answer: str) -> tuple[int, str]:
    """Return the rank and the trace of what failed by itself, not for want of another rank."""
    end = time.monotonic() + _DYING_S
    while _LOST.search(answer) and waiting:
        ready = wait(list(waiting), max(0.0, end - time.monotonic()))
        for line in ready:
            assert isinstance(line, Connection)
            other = waiting.pop(line)
            failed, text = _receive(line)
            if failed and not _LOST.search(text):
                return other, text
        if not ready:
            break
    return rank, answer


def _stacks(worker: _Worker) -> str:
    """Have a rank that hangs write where each of its threads is."""
    if worker.process.pid is not None and worker.process.is_alive():
        os.kill(worker.process.pid, signal.SIGUSR1)
    end = time.monotonic() + _DYING_S
    while time.monotonic() < end and not (worker.trace.exists() and worker.trace.stat().st_size):
        time.sleep(0.05)
    return worker.trace.read_text() if worker.trace.exists() else ""


def _serve(
    rank: int, port: int, line: Connection, trace: Path, prepare: Callable[[], None] | None
) -> None:
    """Run what comes along the line, until it closes."""
    torch.set_num_threads(1)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    store = TCPStore(_HOST, port, is_master=False)
    if prepare is not None:
        prepare()
    gc.freeze()
    with trace.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        while True:
            try:
                number, size, timeout_s, fn, args = line.recv()
            except EOFError:
                return
            except Exception:  # the function's module cannot be imported here
                line.send((True, traceback.format_exc()))
                continue
            line.send(_run(PrefixStore(str(number), store), rank, size, timeout_s, fn, args))


def _run(
    store: PrefixStore,
    rank: int,
    size: int,
    timeout_s: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> tuple[bool, Any]:
    """Run one function in a world of its own: whether it failed, and its result or trace."""
    try:
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s + _DYING_S),
        )
        barrier(dist.group.WORLD)  # a rank that is done must not close on one that connects
        torch.manual_seed(0)  # not what an earlier world left, which not every rank was in
        result = fn(*args)
        dist.destroy_process_group()
        gc.collect()  # groups that a cycle holds keep gloo's threads
    except Exception:
        return True, traceback.format_exc()
    return False, result if rank == 0 else None


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        with contextlib.suppress(OSError):
            parent.join()
    os._exit(1)
