"""What a person sees while a run trains: a bar on a terminal, plain lines in a pipe.

Only rank 0 shows anything.
"""

import sys
from collections.abc import Mapping
from typing import Any

_FIELDS = "{task.fields[loss]} {task.fields[speed]} {task.fields[mfu]}"


class Progress:
    """Shows the newest line of the metrics.

    Args:
        steps: Steps of the run.
        done: Steps that were done before.
        every: Steps from one plain line to the next.
        shown: Whether this rank shows anything.
    """

    def __init__(self, *, steps: int, done: int, every: int, shown: bool) -> None:
        self.steps, self.done, self.every = steps, done, every
        self.shown = shown
        self._seconds_a_step = 0.0
        self._bar: Any = None
        if shown and sys.stdout.isatty():
            self._bar = _bar()
            fields = {"loss": "", "speed": "", "mfu": ""}
            self._task = self._bar.add_task("train", total=steps, completed=done, **fields)
            self._bar.start()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self.shown:
            print(text, flush=True)

    def update(self, line: Mapping[str, Any]) -> None:
        """Show one line of the metrics."""
        if not self.shown:
            return
        step = int(line["step"])
        seconds = float(line["step_time_s"])
        old = self._seconds_a_step
        self._seconds_a_step = 0.9 * old + 0.1 * seconds if old else seconds
        loss, speed = f"loss {line['loss']:.4f}", f"{line['tokens_per_s']:,.0f} tokens/s"
        mfu = f"MFU {100 * line['mfu']:.1f} %" if line.get("mfu") is not None else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, speed=speed, mfu=mfu)
        elif step % self.every == 0 or step in (self.done + 1, self.steps):
            left = self._seconds_a_step * (self.steps - step)
            held = line.get("held_out_loss")
            also = f"  held-out {held:.4f}" if held is not None else ""
            text = f"step {step}/{self.steps}  {loss}{also}  {speed}  {mfu}  {duration(left)} left"
            print(text, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar() -> Any:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        progress.BarColumn(),
        progress.TextColumn(_FIELDS),
        progress.TimeRemainingColumn(),
    )


def duration(seconds: float) -> str:
    """Write a duration as a person would: `48 s`, `3:07`, `2:10:05`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
