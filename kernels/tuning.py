"""Configurations of Triton kernels by shape: a table that ships, and a bounded search on request.

A host function asks `tuned(op, key, candidates, start, device=...)` for its configuration. The
answer is that of the table `tuned.json`, if it has one for this operator, compute capability and
key that was found with the device code as it is now and is among the candidates; otherwise the
first candidate. Nothing is searched unless `searched()` asks: what a search finds depends on
noise, ranks would differ in their configurations and so in the last bits of what they must hold
alike. It is found once, by `warploom bench kernels --tune`, into a file; a program whose ranks all
`use` the same file runs by it, or its entries move to the table that ships.

A file holds operator -> capability -> key -> `{"configuration": ..., "source": ..., "ms": ...}`.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .backends import source_hash
from .launch import on_device

Configuration = dict[str, int]
Start = Callable[[Configuration], object]
Search = Callable[[str, str, str, Sequence[Configuration], Start, torch.device], Configuration]

SHIPPED = Path(__file__).resolve().parent / "tuned.json"
MOST = 8
"""Candidates of one key, at most: a search is bounded."""

_LOG = logging.getLogger(__name__)


class _State:
    """What the process was told; a context variable would not reach autograd's threads."""

    search: Search | None = None
    frozen = False
    files: tuple[Path, ...] = (SHIPPED,)


_STATE = _State()


def use(*files: Path) -> None:
    """Take configurations from files of searches, before the table that ships.

    Args:
        files: The first that has an entry counts; every rank of a job must name the same. None at
            all goes back to the table that ships.
    """
    _STATE.files = (*files, SHIPPED)
    forget()


def freeze() -> None:
    """Forbid any search from here on in this process."""
    _STATE.frozen = True


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Forbid any search in the `with` block, in all threads."""
    before, _STATE.frozen = _STATE.frozen, True
    try:
        yield
    finally:
        _STATE.frozen = before


@contextlib.contextmanager
def searched(search: Search, file: Path) -> Iterator[None]:
    """Search in the `with` block, in all threads, for each key that has no entry.

    Args:
        search: Takes operator, capability, key, candidates, what starts one, and the device; finds
            one of the candidates and writes it down.
        file: Where it does so, which is used.
    """
    before = _STATE.search, _STATE.files
    _STATE.search = search
    use(file)
    try:
        yield
    finally:
        _STATE.search, _STATE.files = before
        forget()


def tuned(
    op: str, key: Sequence[int | str], candidates: Sequence[Configuration],
    start: Start | None = None, *, device: torch.device,
) -> Configuration:  # fmt: skip
    """Choose the configuration of a kernel.

    Args:
        op: Operator, as `backends.available()` lists it.
        key: What the choice depends on: the kernel's name, sizes, dtype.
        candidates: At most 8, the default first.
        start: Enqueues the kernel in a configuration; only called by a search.
        device: Where the kernel runs; anything but a CUDA device takes the default.

    Returns:
        One of `candidates`.

    Raises:
        ValueError: If there are no candidates or more than 8.
    """
    if not 0 < len(candidates) <= MOST:
        raise ValueError(f"tuned: {op} must have 1 to {MOST} candidates, got {len(candidates)}")
    if device.type != "cuda":
        return candidates[0]
    name, capability = ",".join(map(str, key)), _capability(device)
    entry = _lookup(op, capability, name)
    if entry is not None and entry in candidates:
        return entry
    if start is None or len(candidates) == 1 or not _may_search():
        return candidates[0]
    assert _STATE.search is not None
    return _STATE.search(op, capability, name, candidates, start, device)


def by_warps(first: Configuration) -> list[Configuration]:
    """Return a configuration, and the same with twice and with half as many warps.

    Args:
        first: The default, with `num_warps`; no other has more than 16, which leave a thread 128
            registers.
    """
    warps = first["num_warps"]
    return [first, *(first | {"num_warps": w} for w in (2 * warps, warps // 2) if 1 <= w <= 16)]


def launch(
    op: str,
    key: Sequence[int | str],
    candidates: Sequence[Configuration],
    start: Start,
    x: torch.Tensor,
) -> None:
    """Start a kernel in its configuration, on the device of its input.

    Args:
        op: As in `tuned`.
        key: What the choice depends on, besides the dtype of `x`.
        candidates: The default first.
        start: Enqueues the kernel; a search calls it many times.
        x: The input that says device and dtype.
    """
    with on_device(x):
        start(tuned(op, (*key, str(x.dtype)), candidates, start, device=x.device))


def _may_search() -> bool:
    """Refuse where a search was not asked for, or would be recorded, traced or not repeatable."""
    return (
        _STATE.search is not None
        and not _STATE.frozen
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.compiler.is_compiling()
        and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


@functools.cache
def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


@functools.cache
def _lookup(op: str, capability: str, key: str) -> Configuration | None:
    """Return the first entry of the files that the device code of today was searched with."""
    for file in _STATE.files:
        entry = read(file).get(op, {}).get(capability, {}).get(key)
        if entry and entry.get("source") == source_hash(op):
            configuration: Configuration = entry["configuration"]
            return configuration
    return None


@functools.cache
def read(file: Path) -> dict[str, Any]:
    """Read a table, once; one that cannot be read is told and counts as empty."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise TypeError(f"holds a {type(found).__name__}, not an object")
    except (OSError, TypeError, ValueError) as error:
        _LOG.warning("tuned configurations: %s is ignored: %s", file, error)
        return {}
    return found


def forget() -> None:
    """Read the files anew at the next call."""
    read.cache_clear()
    _lookup.cache_clear()
