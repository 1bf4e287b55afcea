"""That a model is being loaded, and how far a long job of the engine is, on a terminal."""

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self


def loading(folder: Path) -> AbstractContextManager[Any]:
    """Tell on standard error, where that is a terminal, that weights are being loaded."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.markup import escape

    return Console(stderr=True).status(f"loading {escape(str(folder))}")


class Progress:
    """A bar on standard error, where that is a terminal; nothing elsewhere.

    Args:
        samples: Texts of the job.
        shown: Whether this rank shows anything.
    """

    def __init__(self, samples: int, *, shown: bool) -> None:
        self.samples, self.tokens = samples, 0
        self._bar: Any = _bar() if shown and sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._task = self._bar.add_task("", total=self.samples, tokens=0)
            self._bar.start()
        return self

    def update(self, ended: int, tokens: int) -> None:
        """Count texts that have ended, and tokens."""
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, advance=ended, tokens=f"{self.tokens:,}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar() -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.completed:.0f}/{task.total:.0f} texts"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[tokens]} tokens"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
