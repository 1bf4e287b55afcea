"""The dispatcher's table: which backend was the fastest, by device, operator and case.

    python benchmarks/fastest.py benchmarks/results/h200/kernels.json

merges what `make gpu` measured into `kernels/fastest.json`, which `backends.choose` reads. Only
backends that the dispatcher may take are compared: PyTorch's own, and ours where they are proven. A
backend whose result differs from PyTorch's by 5 % is none of them.

measured on an H200: nothing yet
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from warploom.kernels import backends

FILE = Path(backends.__file__).resolve().parent / "fastest.json"
_DIFFERENCE = 0.05

Table = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""Operator -> capability -> dtype and case -> backend, its milliseconds, the code's hash."""


def _may_choose(op: str, backend: str, capability: str) -> bool:
    listed = backends.available().get(op, {})
    if backend not in listed or listed[backend].startswith(("theirs", "needs the package")):
        return False
    return backend not in ("triton", "cuda") or backends.proof(op, capability, backend) is not None


def table(rows: Iterable[Mapping[str, Any]], capability: str, dtype: torch.dtype) -> Table:
    """Find the fastest backend of each case.

    Args:
        rows: Of `measure.measure`; those of cases with a key count, by the whole step where there
            is a backward.
        capability: Of the device they were measured on, such as "9.0".
        dtype: Of their inputs.

    Returns:
        The entries of these cases.
    """
    found: Table = {}
    kind = str(dtype).removeprefix("torch.")
    rows = [row for row in rows if row.get("key") and "failed" not in row]
    whole = {(row["op"], row["key"]) for row in rows if row["pass"] == "both"}
    for row in rows:
        op, backend = row["op"], row["contender"]
        wanted = "both" if (op, row["key"]) in whole else "forward"
        wrong = row["difference"] is not None and not row["difference"] < _DIFFERENCE
        if row["pass"] != wanted or wrong or not _may_choose(op, backend, capability):
            continue
        entries = found.setdefault(op, {}).setdefault(capability, {})
        key, ms = f"{kind},{row['key']}", row["ms"]["median"]
        if key not in entries or ms < entries[key]["ms"]:
            entries[key] = {"backend": backend, "ms": ms, "source": backends.table_hash(op)}
    return found


def merge(found: Table, file: Path = FILE) -> None:
    """Add entries to a table, in the place of those of the same cases; it is replaced atomically.

    Args:
        found: Of `table`.
        file: The table; made where it is not there.
    """
    there: Table = json.loads(file.read_text()) if file.exists() else {}
    for op, by_device in found.items():
        for capability, entries in by_device.items():
            there.setdefault(op, {}).setdefault(capability, {}).update(entries)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".json")
    with os.fdopen(handle, "w") as stream:
        stream.write(json.dumps(there, indent=1, sort_keys=True) + "\n")
    os.chmod(name, 0o644)
    os.replace(name, file)
    backends.fastest.cache_clear()


def main(argv: Sequence[str]) -> int:
    """Merge the tables of files of results."""
    for name in argv:
        merge(json.loads(Path(name).read_text())["fastest"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
