"""Rows of work in processes of their own: one that crashes or hangs loses itself alone.

A worker gets names and does one row after the other. Each row's begin and result go to a file, a
JSON line each. When the worker dies, or a row takes too long, that row has failed, and another
worker goes on with the next. A CUDA error that outlives its row ends the worker too.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_POLL_S = 0.1


def serve(work: Callable[[str], Row], names: Sequence[str], file: Path) -> None:
    """Do rows, in a worker.

    Args:
        work: From a name to its row; what it raises becomes the row's `failed`.
        names: In order.
        file: Takes the lines.
    """
    with file.open("a") as stream:

        def say(**line: Any) -> None:
            stream.write(json.dumps(line) + "\n")
            stream.flush()

        for name in names:
            say(begin=name)
            try:
                row = work(name)
            except Exception as error:  # this row's failure is this row's result
                row = {"failed": f"{type(error).__name__}: {error}"[:600]}
            say(end=name, row=row)
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_initialized():
                torch.cuda.synchronize()  # raises when the context is lost: a new worker goes on


def run(
    command: Sequence[str],
    names: Sequence[str],
    *,
    row_s: float,
    deadline: float,
    jobs: int = 1,
    said: Callable[[str, Row], None] = lambda name, row: None,
) -> dict[str, Row]:
    """Have rows done.

    Args:
        command: Starts a worker; a file and names follow it, and it calls `serve` with them.
        names: Of the rows.
        row_s: Seconds that a row may take; the first of a worker includes its start.
        deadline: On `time.monotonic()`; what is not done by then is left out.
        jobs: Workers at a time.
        said: Called with each row as it ends; by one thread a worker.

    Returns:
        A row for every name; `failed` says why there is nothing else in it.
    """
    found: dict[str, Row] = {}

    def take(name: str, row: Row) -> None:
        found[name] = row
        said(name, row)

    shares = [list(names[i::jobs]) for i in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(_share, command, s, row_s, deadline, take) for s in shares if s]:
            done.result()
    return {name: found[name] for name in names}


def _share(
    command: Sequence[str],
    names: list[str],
    row_s: float,
    deadline: float,
    take: Callable[[str, Row], None],
) -> None:
    """Start workers one after the other until every name has its row."""
    while names:
        if time.monotonic() >= deadline:
            for name in names:
                take(name, {"failed": "left out: the time is used up"})
            return
        with tempfile.TemporaryDirectory() as folder:
            file, log = Path(folder) / "rows", Path(folder) / "log"
            file.touch()
            with log.open("w") as stream:
                worker = subprocess.Popen(
                    [*command, str(file), *names],
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                why = _follow(worker, file, names, row_s, deadline, take)
            if why is not None and names:
                words = log.read_text(errors="replace").strip().splitlines()
                take(names.pop(0), {"failed": ": ".join([why, *words[-1:]])[:600]})


def _follow(
    worker: subprocess.Popen[bytes],
    file: Path,
    names: list[str],
    row_s: float,
    deadline: float,
    take: Callable[[str, Row], None],
) -> str | None:
    """Take rows as they come; say why the first of the names left has failed, or None."""
    with file.open() as stream:
        last, working, rest = time.monotonic(), True, ""  # its start belongs to its first row
        while True:
            ended, now = worker.poll() is not None, time.monotonic()
            *lines, rest = (rest + stream.read()).split("\n")
            for line in map(json.loads, lines):
                last, working = now, "begin" in line
                if "end" in line:
                    names.remove(line["end"])
                    take(line["end"], line["row"])
            if ended:
                return f"the process ended with {worker.returncode}" if working else None
            if now - last > row_s or now > deadline:
                end(worker)
                return f"took more than {row_s:g} s" if now <= deadline else "the time is used up"
            if not lines:
                time.sleep(_POLL_S)


def end(program: subprocess.Popen[Any]) -> None:
    """End a program that leads a session of its own, and what it started."""
    os.killpg(program.pid, signal.SIGKILL)
    program.wait()
