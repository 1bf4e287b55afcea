"""Checkpoints that are logical: any topology loads what any other saved.

    Entry("master", tensor, layout)      a local tensor whose pieces are slices of logical tensors
    save(folder, entries, state, mesh)   write folder/step-00000120 and return its path
    AsyncSaver(keep=3).start(...)        the same, written by a thread; `finish()` waits
    latest(folder)                       the newest complete checkpoint, or None
    load(path, entries, mesh)            fill the local tensors in place, return the state
    verify(path), latest_good(folder)    hash every byte; the newest that passes

`boxes` is the arithmetic of slices, `index` the format, `writer` and `reader` a rank's file,
`saver` and `loader` what ranks do together, `folders` names and their life.
"""

from .folders import CheckpointError, latest, set_aside
from .index import Entry
from .loader import latest_good, load, read_state, verify
from .saver import AsyncSaver, save

__all__ = [
    "AsyncSaver", "CheckpointError", "Entry", "latest", "latest_good", "load", "read_state", "save",
    "set_aside", "verify",
]  # fmt: skip
