"""One process at a time, held by the kernel: a process that dies lets go by itself."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)


@contextmanager
def one_at_a_time(path: Path, *, wait_s: float, what: str) -> Iterator[None]:
    """Hold the lock file `path` during the block; wait while another process holds it.

    Args:
        path: Created if it is missing, and left behind, empty.
        wait_s: How long to wait, in seconds.
        what: What is being done, for the messages.

    Raises:
        RuntimeError: If another process still holds it after `wait_s`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        start = time.monotonic()
        told = False
        while not _taken(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            if time.monotonic() - start > wait_s:
                raise RuntimeError(
                    f"{what}: {holder} has been at it for {wait_s:g} s; wait for it, or end it"
                )
            if not told:
                logger.info("%s: waiting for %s", what, holder)
                told = True
            time.sleep(0.05)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
        file.truncate(0)


def _taken(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
