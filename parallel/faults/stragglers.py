"""Who is slow, by how much, and on what.

    stragglers = Stragglers(mesh.world, every=20)
    with observed(stragglers):
        with stragglers.section("forward"): ...
        with stragglers.section("backward"): ...
    report = stragglers.step()          # every 20 steps a Report on every rank, else None

Ranks that meet in collectives take the same time for a step, the slow one and those that wait for
it. So a section's time is given without the waits inside it, and the rank that waits least is the
one that the others wait for.

On CUDA the times are those of events on the current stream, read once a report; a wait is then what
the stream waits for, that is communication which nothing overlaps.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..collectives import Call, Group, device_of, gather_json
from .describe import members

_WAITS = "collectives"


@dataclass(frozen=True, slots=True)
class Section:
    """One section over the ranks that ran it; seconds a step, without waits in collectives.

    Attributes:
        name: As it was opened.
        median_s: Median over the ranks.
        slowest: The slowest rank, in the world.
        slowest_s: Its seconds.
    """

    name: str
    median_s: float
    slowest: int
    slowest_s: float

    @property
    def ratio(self) -> float:
        """How many times the median the slowest takes."""
        return self.slowest_s / self.median_s if self.median_s > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Report:
    """What the steps since the last report took.

    Attributes:
        steps: How many.
        sections: By the seconds that the slowest rank takes more than the median, most first.
        awaited: The rank that waits least in collectives: the one that the others wait for.
        wait_s: Seconds a step that it waits.
        median_wait_s: Seconds a step that the median rank waits.
    """

    steps: int
    sections: tuple[Section, ...]
    awaited: int
    wait_s: float
    median_wait_s: float

    def sentence(self) -> str:
        """Tell it in a line."""
        told = (
            f"over {self.steps} steps rank {self.awaited} was awaited: it waits {self.wait_s:.3f} "
            f"s a step in collectives, the median rank {self.median_wait_s:.3f} s"
        )
        if not self.sections:
            return told
        worst = self.sections[0]
        return (
            f"{told}; slowest is {worst.name} on rank {worst.slowest}: {worst.slowest_s:.3f} s a "
            f"step, {worst.ratio:.2f} times the median {worst.median_s:.3f} s"
        )


class Stragglers:
    """Times sections and waits; an observer for `observed`.

    Args:
        group: The ranks to compare, such as `mesh.world`.
        every: How many steps a report covers.

    Raises:
        ValueError: If `every` is not positive.
    """

    def __init__(self, group: Group, *, every: int = 20) -> None:
        if every < 1:
            raise ValueError(f"every must be at least one step, got {every}")
        self.group, self.every = group, every
        self._device = device_of(group)
        self._steps = 0
        self._open: list[str] = []
        self._spans: list[tuple[str, tuple[str, ...], Any, Any]] = []

    def __call__(self, call: Call) -> AbstractContextManager[object]:
        """Let a collective begin: only waits are timed."""
        return nullcontext()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time what runs in this context, without its waits in collectives.

        Raises:
            ValueError: If `name` is `collectives`, which names the waits.
        """
        if name == _WAITS:
            raise ValueError(f"a section must not be called {_WAITS!r}: that is what the waits are")
        self._open.append(name)
        start = self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._spans.append((name, (), start, self._mark()))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a wait for a transfer; called by `collectives`."""
        start = self._mark()
        try:
            yield
        finally:
            self._spans.append((_WAITS, tuple(self._open), start, self._mark()))

    def step(self) -> Report | None:
        """End a step; every so many, exchange the times over the group and report.

        A collective call over the group when it reports.
        """
        self._steps += 1
        if self._steps < self.every:
            return None
        own = self._seconds()
        lines: list[dict[str, float]] = gather_json(own, self.group)
        report = self._report(lines)
        self._steps = 0
        self._spans.clear()
        return report

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self) -> dict[str, float]:
        """Return the seconds a step of each section, without waits, and of the waits."""
        on_device = self._device.type == "cuda"
        if on_device:
            torch.cuda.synchronize(self._device)
        totals: dict[str, float] = defaultdict(float, {_WAITS: 0.0})
        for name, inside, start, end in self._spans:
            took = start.elapsed_time(end) / 1e3 if on_device else end - start
            totals[name] += took
            for outer in inside:
                totals[outer] -= took
        return {name: total / self._steps for name, total in totals.items()}

    def _report(self, lines: list[dict[str, float]]) -> Report:
        ranks = (0,) if self.group is None else members(self.group)
        sections = []
        for name in dict.fromkeys(name for line in lines for name in line if name != _WAITS):
            by = {rank: line[name] for rank, line in zip(ranks, lines, strict=True) if name in line}
            slowest = max(by, key=by.__getitem__)
            sections.append(Section(name, statistics.median(by.values()), slowest, by[slowest]))
        sections.sort(key=lambda s: s.median_s - s.slowest_s)
        waits = [line[_WAITS] for line in lines]
        least = min(range(len(waits)), key=waits.__getitem__)
        return Report(
            steps=self._steps, sections=tuple(sections), awaited=ranks[least], wait_s=waits[least],
            median_wait_s=statistics.median(waits),
        )  # fmt: skip
