"""What makes a table a schedule, and when each of its actions runs.

A table is sound if

- the rank that holds a stage runs each micro-batch's F once there, and either one B, or one I and
  one W, or (if nothing in the table goes backward) none of these;
- its actions can be ordered: F after the F of the stage before, B and I after the F of the stage
  and the B or I of the stage behind, W after its I, and all after what its rank runs before.

The second is freedom from deadlock. The order in which messages travel is derived from a sound
table (`messages.py`), and with that order the executor cannot hang even where every message waits
for its receiver.
"""

from collections.abc import Callable, Sequence

from .tables import Action, Rows

Times = Callable[[Action], float]


def check(table: Rows, placement: Sequence[int], microbatches: int) -> None:
    """Check that every action that a table needs is there once, on its rank.

    Raises:
        ValueError: If an action is missing, doubled, superfluous or on another rank than its stage.
    """
    place: dict[Action, int] = {}
    for rank, row in enumerate(table):
        for action in row:
            kind, stage, microbatch = action
            if kind not in "FBIW" or not 0 <= stage < len(placement) or microbatch < 0:
                raise ValueError(
                    f"an action must be F, B, I or W of a stage below {len(placement)}; rank "
                    f"{rank} has {action}"
                )
            if placement[stage] != rank:
                raise ValueError(
                    f"{action} must run on rank {placement[stage]}, which holds stage {stage}; "
                    f"the table has it on rank {rank}"
                )
            if microbatch >= microbatches:
                raise ValueError(f"{action} is beyond the {microbatches} micro-batches")
            if action in place:
                raise ValueError(f"{action} must run once; rank {rank} runs it twice")
            place[action] = rank
    backward = any(kind != "F" for kind, _, _ in place)
    for stage in range(len(placement)):
        for microbatch in range(microbatches):
            held = "".join(k for k in "FBIW" if Action(k, stage, microbatch) in place)
            if held not in (("FB", "FIW") if backward else ("F",)):
                wanted = "F and either B or I and W" if backward else "F"
                raise ValueError(
                    f"stage {stage} must run {wanted} of micro-batch {microbatch}; the table has "
                    f"{', '.join(held) or 'nothing'}"
                )


def run(
    table: Rows, placement: Sequence[int], microbatches: int, times: Times, p2p: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Run a complete table, each rank's actions in order and each as early as it can.

    Args:
        table: Actions of each rank.
        placement: Rank of each stage.
        microbatches: How many.
        times: Duration of an action.
        p2p: Time that a tensor travels between two ranks.

    Returns:
        Start and end of each action, in the shape of the table.

    Raises:
        ValueError: If the table deadlocks; names the actions that wait for each other.
    """
    last = len(placement) - 1
    ended: dict[tuple[bool, int, int], float] = {}
    waiting: dict[tuple[bool, int, int], int] = {}
    starts: list[list[float]] = [[] for _ in table]
    ends: list[list[float]] = [[] for _ in table]
    ready = list(range(len(table)))[::-1]
    while ready:
        rank = ready.pop()
        row, start, end = table[rank], starts[rank], ends[rank]
        while len(end) < len(row):
            action = row[len(end)]
            needs = _needs(*action, last)
            blocked = next((need for need in needs if need not in ended), None)
            if blocked is not None:
                waiting[blocked] = rank
                break
            begin = end[-1] if end else 0.0
            for need in needs:
                begin = max(begin, ended[need] + (p2p if placement[need[1]] != rank else 0.0))
            start.append(begin)
            end.append(begin + times(action))
            if action.kind != "W":
                done = (action.kind == "F", action.stage, action.microbatch)
                ended[done] = end[-1]
                if done in waiting:
                    ready.append(waiting.pop(done))
    if any(len(end) < len(row) for end, row in zip(ends, table, strict=True)):
        raise ValueError(_circle(table, placement, [len(end) for end in ends]))
    return starts, ends


def _needs(kind: str, stage: int, microbatch: int, last: int) -> tuple[tuple[bool, int, int], ...]:
    """List what an action waits for: whether a forward, of which stage and micro-batch."""
    if kind == "F":
        return ((True, stage - 1, microbatch),) if stage else ()
    if kind == "W":
        return ((False, stage, microbatch),)
    if stage == last:
        return ((True, stage, microbatch),)
    return (True, stage, microbatch), (False, stage + 1, microbatch)


def _circle(table: Rows, placement: Sequence[int], at: Sequence[int]) -> str:
    """Say which actions of a table that stands still at `at` wait for each other."""
    last = len(placement) - 1
    done = {action for row, n in zip(table, at, strict=True) for action in row[:n]}

    def blocker(rank: int) -> Action:
        for forward, stage, microbatch in _needs(*table[rank][at[rank]], last):
            for kind in "F" if forward else "BI":
                action = Action(kind, stage, microbatch)
                if action not in done and action in table[placement[stage]]:
                    return action
        raise AssertionError((rank, table[rank][at[rank]]))

    rank = next(r for r, row in enumerate(table) if at[r] < len(row))
    trail: list[int] = []
    while rank not in trail:
        trail.append(rank)
        rank = placement[blocker(rank).stage]
    told = []
    for waits in trail[trail.index(rank) :]:
        need = blocker(waits)
        other = placement[need.stage]
        told.append(
            f"{table[waits][at[waits]]} (rank {waits}) waits for {need}, which rank {other} runs "
            f"after {table[other][at[other]]}"
        )
    return f"the table deadlocks, its actions wait in a circle: {'; '.join(told)}"
