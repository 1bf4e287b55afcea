"""What a schedule would do: when each action runs, how long ranks are idle, what they hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .schedule import Schedule
from .tables import Action, Costs
from .validator import Times, run


@dataclass(frozen=True)
class Timeline:
    """A simulated schedule.

    Attributes:
        schedule: What ran.
        start: Start of each action, for each rank in the order of its row.
        end: End of each action.
    """

    schedule: Schedule
    start: tuple[tuple[float, ...], ...]
    end: tuple[tuple[float, ...], ...]

    @property
    def makespan(self) -> float:
        """Time until the last rank ends."""
        return max(ends[-1] for ends in self.end)

    @property
    def busy(self) -> tuple[float, ...]:
        """Time that each rank computes."""
        rows = zip(self.start, self.end, strict=True)
        return tuple(sum(e - s for s, e in zip(*row, strict=True)) for row in rows)

    @property
    def bubble(self) -> tuple[float, ...]:
        """Fraction of the makespan in which each rank is idle."""
        return tuple(1 - busy / self.makespan for busy in self.busy)

    def peak(self, size: Callable[[int], float] = lambda stage: 1.0) -> tuple[float, ...]:
        """Return the most activations that each rank holds at a time.

        A micro-batch counts from its F to its B, or to its W: from I to W the inputs of the weight
        gradients are held.

        Args:
            size: Of one micro-batch's activations in a stage; by default the unit.
        """
        return tuple(_peak(row, size) for row in self.schedule.rows)

    def draw(self, unit: float = 1.0) -> list[str]:
        """Draw one line a rank; a column for each `unit` of time, `.` where the rank is idle."""
        labels = [[str(action) for action in row] for row in self.schedule.rows]
        width = 1 + max(len(label) for row in labels for label in row)
        lines = []
        for names, starts, ends in zip(labels, self.start, self.end, strict=True):
            line = ""
            for name, start, end in zip(names, starts, ends, strict=True):
                line = line.ljust(round(start / unit) * width, ".")
                line += name.ljust((round(end / unit) - round(start / unit)) * width, " ")
            lines.append(line.ljust(round(self.makespan / unit) * width, "."))
        return lines


def _peak(row: Sequence[Action], size: Callable[[int], float]) -> float:
    held = most = 0.0
    for kind, stage, _ in row:
        if kind != "I":
            held += size(stage) if kind == "F" else -size(stage)
        most = max(most, held)
    return most


def simulate(schedule: Schedule, times: Times | None = None, p2p: float = 0.0) -> Timeline:
    """Run a schedule on paper, each action as early as its rank's order and its inputs allow.

    Args:
        schedule: Any schedule.
        times: Duration of an action: `Costs`, or a function of it; by default 1 for F, I and W.
        p2p: Time that a tensor travels between two ranks; it delays its receiver alone.

    Raises:
        ValueError: If the table deadlocks.
    """
    starts, ends = run(
        schedule.rows, schedule.placement, schedule.microbatches, times or Costs(), p2p
    )
    return Timeline(schedule, tuple(map(tuple, starts)), tuple(map(tuple, ends)))
