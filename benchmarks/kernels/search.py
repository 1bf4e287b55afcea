"""The search for the configurations of Triton kernels, and the file of what it found.

A file holds operator -> capability -> key -> `{"configuration": ..., "source": ..., "ms": ...}`;
`kernels/tuning.py` reads it.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from warploom.kernels import backends, tuning
from warploom.kernels.tuning import Configuration, Start
from warploom.recipes.plan.timing import time_ms

_GAIN = 0.97  # a candidate must take less than this share of the default's time to replace it


def user_file() -> Path:
    """Return the file of this user's own searches, below the home directory."""
    return Path.home() / ".cache" / "warploom" / "tuned.json"


@contextlib.contextmanager
def searching(file: Path | None = None, *, seconds: float = 2.0) -> Iterator[None]:
    """Search in the `with` block, in all threads, for each key that has no entry, and use it.

    Args:
        file: Takes what is found; None for `user_file()`. Its directory is made.
        seconds: A search stops before its next candidate when it has taken so long.
    """
    own = file or user_file()

    def search(
        op: str,
        capability: str,
        key: str,
        candidates: Sequence[Configuration],
        start: Start,
        device: torch.device,
    ) -> Configuration:
        best, ms = _search(candidates, start, device, seconds)
        _record(own, op, capability, key, best, ms)
        return best

    with tuning.searched(search, own):
        yield


def _search(
    candidates: Sequence[Configuration], start: Start, device: torch.device, seconds: float
) -> tuple[Configuration, float]:
    """Time the default, then the others while there is time; the default wins what is close."""

    def measure(candidate: Configuration) -> float:
        return time_ms(lambda: start(candidate), device, repeats=10)

    end = time.monotonic() + seconds
    best, least = candidates[0], measure(candidates[0])
    needed = least * _GAIN
    for candidate in candidates[1:]:
        if time.monotonic() >= end:
            break
        if (ms := measure(candidate)) < min(needed, least):
            best, least = candidate, ms
    return best, least


def _record(
    file: Path, op: str, capability: str, key: str, configuration: Mapping[str, int], ms: float
) -> None:
    """Add an entry to a file, as it is now, and replace it atomically."""
    tuning.forget()
    found = tuning.read(file)
    entry = {"configuration": dict(configuration), "ms": ms, "source": backends.source_hash(op)}
    found.setdefault(op, {}).setdefault(capability, {})[key] = entry
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".json")
    with os.fdopen(handle, "w") as stream:
        stream.write(json.dumps(found, indent=1, sort_keys=True) + "\n")
    os.replace(name, file)
    tuning.forget()
