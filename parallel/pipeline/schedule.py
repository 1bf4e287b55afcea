"""A pipeline schedule as data: which rank holds which stage, and what it runs in which order."""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from . import tables
from .messages import Plan, plan
from .tables import Action, Costs, Rows
from .validator import check, run


def _at_least(name: str, what: str, value: int, least: int, why: str = "") -> None:
    if value < least:
        raise ValueError(f"{name}: {what} ({value}) must be at least {least}{why}")


@dataclass(frozen=True)
class Schedule:
    """A table of actions.

    Attributes:
        name: Of the named tables one, or `forward_only`, or `table`.
        placement: Rank of each stage.
        microbatches: How many micro-batches a step has.
        rows: Actions of each rank, in the order in which it runs them.
    """

    name: str
    placement: tuple[int, ...]
    microbatches: int
    rows: Rows

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.rows)

    @property
    def stages(self) -> int:
        """Number of stages, over all ranks."""
        return len(self.placement)

    @property
    def trains(self) -> bool:
        """Whether anything goes backward."""
        return any(kind != "F" for kind, _, _ in self.rows[0])

    @staticmethod
    def gpipe(ranks: int, microbatches: int) -> "Schedule":
        """Return GPipe: all forwards, then all backwards."""
        return Schedule.named("gpipe", ranks, microbatches)

    @staticmethod
    def one_f_one_b(ranks: int, microbatches: int) -> "Schedule":
        """Return 1F1B: GPipe's bubble with at most `ranks` micro-batches in flight."""
        return Schedule.named("1f1b", ranks, microbatches)

    @staticmethod
    def interleaved(ranks: int, microbatches: int, virtual: int) -> "Schedule":
        """Return interleaved 1F1B over `virtual` stages a rank."""
        return Schedule.named("interleaved", ranks, microbatches, virtual=virtual)

    @staticmethod
    def zb_h1(ranks: int, microbatches: int) -> "Schedule":
        """Return ZB-H1: a third of 1F1B's bubble with its memory."""
        return Schedule.named("zb_h1", ranks, microbatches)

    @staticmethod
    def zbv(ranks: int, microbatches: int) -> "Schedule":
        """Return ZBV: two stages a rank, no stall, 1F1B's memory."""
        return Schedule.named("zbv", ranks, microbatches)

    @staticmethod
    def dualpipev(ranks: int, microbatches: int) -> "Schedule":
        """Return DualPipeV: two stages a rank, an F beside each B."""
        return Schedule.named("dualpipev", ranks, microbatches)

    @staticmethod
    def named(name: str, ranks: int, microbatches: int, *, virtual: int = 1) -> "Schedule":
        """Return the schedule `name`.

        Args:
            name: `gpipe`, `1f1b`, `interleaved`, `zb_h1`, `zbv` or `dualpipev`.
            ranks: Number of ranks.
            microbatches: Micro-batches a step.
            virtual: Stages a rank, of `interleaved`; the others have 1, those in V shape 2.

        Raises:
            ValueError: If there is no such schedule, or not with these numbers.
        """
        _at_least(name, "ranks", ranks, 1)
        _at_least(name, "microbatches", microbatches, 1)
        if name == "interleaved":
            _at_least(name, "virtual stages a rank", virtual, 2, "; with one it is 1f1b")
            if microbatches % ranks:
                raise ValueError(
                    f"interleaved: microbatches ({microbatches}) must be a multiple of the ranks "
                    f"({ranks})"
                )
            rows = tables.interleaved(ranks, microbatches, virtual)
            around = tuple(stage % ranks for stage in range(virtual * ranks))
            return Schedule(name, around, microbatches, rows)
        if name == "dualpipev":
            _at_least(name, "microbatches", microbatches, 2 * ranks, ", twice the ranks")
        straight = {"gpipe": tables.gpipe, "1f1b": tables.one_f_one_b, "zb_h1": tables.zb_h1}
        bent = {"zbv": tables.zbv, "dualpipev": tables.dualpipev}
        if name in straight:
            placement, make = tuple(range(ranks)), straight[name]
        elif name in bent:
            placement, make = (*range(ranks), *range(ranks)[::-1]), bent[name]
        else:
            names = ", ".join((*straight, "interleaved", *bent))
            raise ValueError(f"a schedule must be one of {names}; got {name!r}")
        if virtual not in (1, len(placement) // ranks):
            raise ValueError(
                f"{name}: virtual stages a rank ({virtual}) must be {len(placement) // ranks}"
            )
        return Schedule(name, placement, microbatches, make(ranks, microbatches))

    @staticmethod
    def forward_only(placement: Sequence[int], microbatches: int) -> "Schedule":
        """Return the forwards alone, for evaluation.

        Args:
            placement: Rank of each stage; any, such as that of the schedule that trains.
            microbatches: Micro-batches to run.

        Raises:
            ValueError: If there are none, or a rank has no stage.
        """
        _at_least("forward_only", "microbatches", microbatches, 1)
        steps = range(len(placement) + microbatches - 1)
        order = [
            Action("F", stage, step - stage)
            for step in steps
            for stage in range(min(step + 1, len(placement)))
            if step - stage < microbatches
        ]
        return _placed("forward_only", placement, microbatches, order)

    @staticmethod
    def table(rows: str | Sequence[Sequence[Action]]) -> "Schedule":
        """Return the schedule of a user's own table. A stage lies on the rank whose row has it.

        Args:
            rows: Actions of each rank; or text, a line a rank, such as `F0.0 F0.1 B0.0 B0.1`: the
                kind (F, B, I or W), the stage and the micro-batch, with spaces or commas between.

        Raises:
            ValueError: If a word is no action, or the table is not sound (`validator`).
        """
        if isinstance(rows, str):
            rows = [
                [_action(word) for word in re.split(r"[\s,]+", line) if word]
                for line in rows.strip().splitlines()
            ]
        places = {action.stage: rank for rank, row in enumerate(rows) for action in row}
        if not all(rows) or set(places) != set(range(len(places))) or not places:
            raise ValueError(
                f"a table must have a row of actions for each rank and stages 0, 1, 2, ...; the "
                f"{len(rows)} rows have {[len(row) for row in rows]} actions of the stages "
                f"{sorted(places)}"
            )
        placement = tuple(places[stage] for stage in range(len(places)))
        microbatches = 1 + max(action.microbatch for row in rows for action in row)
        schedule = Schedule("table", placement, microbatches, tuple(map(tuple, rows)))
        schedule.validate()
        return schedule

    def text(self) -> str:
        """Write the rows as `table` reads them."""
        return "\n".join(" ".join(map(str, row)) for row in self.rows)

    def validate(self) -> None:
        """Check that every action is there once, on its rank, and that nothing deadlocks.

        Raises:
            ValueError: Naming the actions that are wrong, or wait for each other.
        """
        check(self.rows, self.placement, self.microbatches)
        self._ends  # noqa: B018  computed once, and raises

    def bubble_formula(self, costs: Costs | None = None) -> float:
        """Return the fraction of the makespan in which a rank is idle, in closed form.

        Args:
            costs: Times of one stage; by default F = I = W.

        Raises:
            ValueError: If this table has no closed formula for these costs (`tables`).
        """
        costs = costs or Costs()
        idle = tables.idle(self.name, self.ranks, self.microbatches, costs)
        stage = costs.forward + costs.input + costs.weight
        return idle / (idle + self.stages // self.ranks * self.microbatches * stage)

    @cached_property
    def fingerprint(self) -> int:
        """Identify the table by 32 bits that are the same on every rank."""
        return zlib.crc32(self.text().encode())

    @cached_property
    def _ends(self) -> list[list[float]]:
        return run(self.rows, self.placement, self.microbatches, Costs(), 0.0)[1]

    @cached_property
    def messages(self) -> Plan:
        """What each rank begins before each action; a receive one action ahead."""
        self.validate()
        return plan(self.rows, self.placement, self._ends, 1)

    @cached_property
    def late_messages(self) -> Plan:
        """The same with each receive right before the action that needs it."""
        self.validate()
        return plan(self.rows, self.placement, self._ends, 0)


def _action(word: str) -> Action:
    match = re.fullmatch(r"([FBIW])(\d+)\.(\d+)", word)
    if match is None:
        raise ValueError(
            f"an action must be F, B, I or W, a stage and a micro-batch, such as F0.3; got {word!r}"
        )
    return Action(match[1], int(match[2]), int(match[3]))


def _placed(
    name: str, placement: Sequence[int], microbatches: int, order: Sequence[Action]
) -> Schedule:
    """Deal actions, in a global order that holds no circle, to the ranks of their stages."""
    rows: list[list[Action]] = [[] for _ in range(max(placement, default=-1) + 1)]
    for action in order:
        rows[placement[action.stage]].append(action)
    if not rows or not all(rows):
        raise ValueError(f"{name}: every rank must have a stage; the placement is {placement}")
    return Schedule(name, tuple(placement), microbatches, tuple(map(tuple, rows)))
