"""What a run measures, one line a step, and where the lines go.

A sink is one small class with `write`, `flush` and `close`. `metrics.jsonl` is the record: it has
each step once, whatever was killed when. A line is whole or it is the last; a run that goes on from
step n drops the lines after n, and the same steps write the same losses again.
"""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

Value = float | int | str | None
Line = Mapping[str, Value]


class Sink(Protocol):
    """Takes lines; the first key of each is `step`, the number of steps done."""

    def write(self, line: Line) -> None:
        """Take one line."""
        ...

    def flush(self) -> None:
        """Make what was taken safe from a crash of the machine."""
        ...

    def close(self) -> None:
        """Take no more."""
        ...


class JsonLines:
    """Appends to a JSON-lines file; a reader sees each line as soon as it is written.

    Args:
        path: The file.
        after: Steps that are done: lines of later ones, and a torn last line, are dropped.
    """

    def __init__(self, path: Path, *, after: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        trim(path, after)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Line) -> None:
        """Append one line and hand it to the operating system at once."""
        self._file.write(json.dumps(dict(line), allow_nan=False) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Force the file to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Force the file to the disk and close it."""
        self.flush()
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard, by the keys of the lines.

    Args:
        folder: Where its event files go.
        after: Steps that are done; TensorBoard hides what an earlier process wrote after them.
    """

    def __init__(self, folder: Path, *, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after + 1)

    @staticmethod
    def available() -> bool:
        """Say whether the `tensorboard` package is installed."""
        return importlib.util.find_spec("tensorboard") is not None

    def write(self, line: Line) -> None:
        """Take the numbers of one line."""
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, int(line["step"] or 0))

    def flush(self) -> None:
        """Hand the events to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class Metrics:
    """Keeps lines until they are due, so that a value may stay a tensor on its device.

    Args:
        sinks: Where lines go; none on ranks that write nothing.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = list(sinks)
        self._pending: list[dict[str, Any]] = []

    def add(self, step: int, **values: Tensor | Value) -> None:
        """Keep the line of a step, or more values of the newest line if `step` is the same."""
        if self._pending and self._pending[-1]["step"] == step:
            self._pending[-1] |= values
        else:
            self._pending.append({"step": step, **values})

    def flush(self) -> dict[str, Value] | None:
        """Write what is kept and return the newest line, if there was one."""
        lines = [{k: _number(v) for k, v in line.items()} for line in self._pending]
        self._pending.clear()
        for sink in self._sinks:
            for line in lines:
                sink.write(line)
        return lines[-1] if lines else None

    def sync(self) -> None:
        """Write what is kept and make it safe from a crash: a checkpoint of these steps follows."""
        self.flush()
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Write what is kept and close the sinks."""
        self.flush()
        for sink in self._sinks:
            sink.close()
        self._sinks.clear()


def _number(value: Any) -> Value:
    return value.item() if isinstance(value, Tensor) else value


def trim(path: Path, after: int) -> None:
    """Cut a JSON-lines file behind the line of step `after`, or before its first broken line."""
    if not path.exists():
        return
    good = 0
    with path.open("rb") as file:
        for line in file:
            step = _step(line)
            if step is None or step > after:
                break
            good += len(line)
    with path.open("rb+") as file:
        file.truncate(good)
        os.fsync(file.fileno())


def _step(line: bytes) -> int | None:
    """Return the step of a whole line, `None` if it is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def read(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a JSON-lines file, up to the first broken one."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if _step(line) is None:
                    break
                lines.append(json.loads(line))
    return lines
