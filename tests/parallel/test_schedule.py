"""Schedules without processes: sound, without deadlock, with the bubble and memory they promise."""

import random
import time
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.parallel.pipeline import Action, Costs, Schedule, simulate
from warploom.parallel.pipeline.messages import Message

NAMES = ("gpipe", "1f1b", "interleaved", "zb_h1", "zbv", "dualpipev")
RANKS = (1, 2, 3, 4, 5, 8, 16, 33, 64)
UNEVEN = Costs(1.0, 1.3, 0.6)


def peak(name, p, m, v):
    return {
        "gpipe": m,
        "1f1b": min(p, m),
        "interleaved": min(v * m, (v + 1) * p - 1),
        "zb_h1": min(p, m),
        "zbv": 2 * min(p, m),
        "dualpipev": 2 * p + 1,
    }[name]


def passes_with_blocking_messages(schedule, begun):
    """Run the plan where each message blocks both its ends until both have begun it."""
    lines = []
    for rank, row in enumerate(schedule.rows):
        line = []
        for messages, action in zip(begun[rank], (*row, None), strict=True):
            line += [*messages, *([] if action is None else [action])]
        lines.append(line)
    at, seen, ready = [0] * len(lines), set(), set(range(len(lines)))
    while ready:
        rank = ready.pop()
        while at[rank] < len(lines[rank]):
            item = lines[rank][at[rank]]
            if isinstance(item, Action):
                for forward, by in needs_of(schedule.stages, item):
                    came = Message if schedule.placement[by] != rank else None
                    need = (came, forward, by, item.microbatch)
                    assert need in seen, f"{item} before its inputs"
                if item.kind != "W":
                    seen.add((None, item.kind == "F", item.stage, item.microbatch))
            else:
                other = item.target if item.source == rank else item.source
                met = lines[other][at[other] : at[other] + 1]
                if met != [item]:
                    break
                made = (item.forward, item.stage + (-1 if item.forward else 1), item.microbatch)
                assert (None, *made) in seen, f"{item} before it is there"
                seen.add((Message, *made))
                at[other] += 1
                ready.add(other)
            at[rank] += 1
    return all(n == len(line) for n, line in zip(at, lines, strict=True))


def needs_of(stages, action):
    """Say what an action needs, as whether a forward, of which stage: not as the validator does."""
    kind, stage, _ = action
    if kind == "F":
        return {(True, stage - 1)} - {(True, -1)}
    if kind == "W":
        return {(False, stage)}
    return {(True, stage), (False, stage + 1)} - {(False, stages)}


def holds_what_it_promises(name, p, m, v=1):
    schedule = Schedule.named(name, p, m, virtual=v)
    v = schedule.stages // p
    schedule.validate()
    timeline = simulate(schedule)
    assert max(timeline.bubble) == pytest.approx(schedule.bubble_formula(), abs=1e-12)
    assert min(timeline.bubble) == pytest.approx(schedule.bubble_formula(), abs=1e-12)
    assert max(timeline.peak()) == peak(name, p, m, v)
    if name == "zbv" and m >= 2 * p - 1:
        for start, end, busy in zip(timeline.start, timeline.end, timeline.busy, strict=True):
            assert end[-1] - start[0] == busy  # no rank waits between its first and its last
    if name not in ("zbv", "dualpipev"):
        uneven = simulate(schedule, UNEVEN)
        assert uneven.bubble[0] == pytest.approx(schedule.bubble_formula(UNEVEN), abs=1e-9)
    else:
        with pytest.raises(ValueError, match=f"{name} has no closed formula .* simulate"):
            schedule.bubble_formula(UNEVEN)
    return schedule


def grid(ranks, microbatches):
    for name, p, m in product(NAMES, ranks, microbatches):
        for v in (2, 3) if name == "interleaved" else (1,):
            wrong = (name == "dualpipev" and m < 2 * p) or (name == "interleaved" and m % p)
            if not wrong:
                yield name, p, m, v


@pytest.mark.parametrize("name", NAMES)
def test_named_schedules_hold_what_they_promise(name):
    for case in grid((1, 2, 3, 4, 8), (1, 2, 3, 4, 5, 8, 16, 24)):
        if case[0] == name:
            schedule = holds_what_it_promises(*case)
            assert passes_with_blocking_messages(schedule, schedule.messages), case
            assert passes_with_blocking_messages(schedule, schedule.late_messages), case


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_named_schedules_up_to_64_ranks_and_256_microbatches(name):
    for case in grid(RANKS, (1, 2, 7, 8, 31, 33, 64, 66, 128, 192, 255, 256)):
        if case[0] == name:
            schedule = holds_what_it_promises(*case)
            assert passes_with_blocking_messages(schedule, schedule.messages), case


def test_the_largest_takes_seconds():
    start = time.process_time()
    Schedule.zbv(64, 256).validate()
    assert time.process_time() - start < 5


def random_table(p, stages, m, seed):
    """Deal a random order of actions, each after what it needs, to ranks at random."""
    dice = random.Random(seed)
    placement = [*range(p), *(dice.randrange(p) for _ in range(stages - p))]
    dice.shuffle(placement)
    split = {(s, b): dice.random() < 0.5 for s in range(stages) for b in range(m)}
    free = [Action("F", 0, b) for b in range(m)]
    rows = [[] for _ in range(p)]
    while free:
        action = free.pop(dice.randrange(len(free)))
        kind, s, b = action
        rows[placement[s]].append(action)
        if kind == "F" and s < stages - 1:
            free.append(Action("F", s + 1, b))
        elif kind != "W":
            s = s if kind == "F" else s - 1
            if kind == "I":
                free.append(Action("W", s + 1, b))
            if s >= 0:
                free.append(Action("I" if split[s, b] else "B", s, b))
    return rows


def runs(schedule):
    """Say whether a complete table runs to its end: any rank whose next action may run, runs it."""
    left, seen, before = [list(row) for row in schedule.rows], set(), -1
    while len(seen) > before:
        before = len(seen)
        for row in filter(None, left):
            if {(*need, row[0].microbatch) for need in needs_of(schedule.stages, row[0])} <= seen:
                kind, stage, microbatch = row.pop(0)
                seen.add(({"F": True, "W": None}.get(kind, False), stage, microbatch))
    return not any(left)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 5), st.integers(0, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_any_sound_table_passes_and_a_changed_one_is_refused_or_passes(p, more, m, seed):
    rows = random_table(p, p + more, m, seed)
    schedule = Schedule.table(rows)
    assert passes_with_blocking_messages(schedule, schedule.messages)
    assert passes_with_blocking_messages(schedule, schedule.late_messages)
    assert Schedule.table(schedule.text()) == schedule
    dice = random.Random(seed)
    row = dice.choice(rows)
    i, j = dice.randrange(len(row)), dice.randrange(len(row))
    row[i], row[j] = row[j], row[i]
    changed = replace(schedule, rows=tuple(map(tuple, rows)))
    if runs(changed):
        assert passes_with_blocking_messages(changed, changed.messages)
    else:
        with pytest.raises(ValueError, match="wait in a circle"):
            changed.validate()


@pytest.mark.parametrize("name", NAMES)
def test_forward_only_has_the_placement_of_what_trains(name):
    trained = Schedule.named(name, 4, 8, virtual=2 if name == "interleaved" else 1)
    assert trained.trains
    for m in (1, 3, 9):
        schedule = Schedule.forward_only(trained.placement, m)
        schedule.validate()
        assert not schedule.trains
        assert passes_with_blocking_messages(schedule, schedule.messages)
        assert sum(map(len, schedule.rows)) == schedule.stages * m


def test_times_of_p2p_and_of_single_stages():
    schedule = Schedule.one_f_one_b(3, 4)
    assert simulate(schedule, p2p=0.5).makespan == simulate(schedule).makespan + 2 * 2 * 0.5 + 2
    slow = simulate(schedule, lambda a: 10.0 if a.stage == 1 else 1.0)
    assert slow.busy == (8.0, 80.0, 8.0)
    assert slow.peak(lambda stage: 1.0 + stage) == (3.0, 4.0, 3.0)


def test_drawing():
    assert simulate(Schedule.one_f_one_b(2, 2)).draw() == [
        "F0.0 F0.1 ..........B0.0      .....B0.1      ",
        ".....F1.0 B1.0      F1.1 B1.1      ..........",
    ]


def test_a_table_of_the_users():
    schedule = Schedule.table("F0.0, F0.1, B0.0 ,B0.1\n F1.0 I1.0 F1.1 W1.0 B1.1")
    assert schedule.placement == (0, 1)
    assert schedule.microbatches == 2
    assert schedule.text() == "F0.0 F0.1 B0.0 B0.1\nF1.0 I1.0 F1.1 W1.0 B1.1"
    with pytest.raises(ValueError, match="table has no closed formula"):
        schedule.bubble_formula()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F0.0 X0.0", r"must be F, B, I or W, a stage and a micro-batch, such as F0.3; got 'X0.0'"),
        ("", r"must have a row of actions for each rank"),
        ("F0.0 B0.0\n\nF1.0 B1.0", r"the 3 rows have \[2, 0, 2\] actions"),
        ("F0.0 B0.0 F2.0 B2.0", r"stages 0, 1, 2, .* of the stages \[0, 2\]"),
        (
            "F0.0 F1.0 B1.0",
            r"stage 0 must run F and either B or I and W of micro-batch 0; .* has F",
        ),
        ("F0.0 I0.0", r"stage 0 must run .* micro-batch 0; the table has F, I$"),
        ("F0.0 W0.0", r"stage 0 must run .* micro-batch 0; the table has F, W$"),
        ("F0.0 B0.0 I0.0 W0.0", r"the table has F, B, I, W$"),
        ("F0.0 F0.0 B0.0", r"F0.0 must run once; rank 0 runs it twice"),
        ("F0.0 B0.0 B0.1", r"stage 0 must run .* micro-batch 1; the table has B"),
        ("F0.0 B1.0 B0.0\nF1.0", r"B1.0 must run on rank 1, which holds stage 1; .* on rank 0"),
        ("B0.0 F0.0", r"circle: B0.0 \(rank 0\) waits for F0.0, which rank 0 runs after B0.0"),
        ("F0.0 W0.0 I0.0", r"circle: W0.0 \(rank 0\) waits for I0.0, which rank 0 runs after W0.0"),
        (
            "F0.0 B0.0 F0.1 B0.1\nF1.1 B1.1 F1.0 B1.0",
            r"B0.0 \(rank 0\) waits for B1.0, which rank 1 runs after F1.1; F1.1 \(rank 1\) waits "
            r"for F0.1, which rank 0 runs after B0.0",
        ),
    ],
)
def test_a_wrong_table_is_told_in_a_sentence(text, message):
    with pytest.raises(ValueError, match=message):
        Schedule.table(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.gpipe(4, 0), r"gpipe: microbatches \(0\) must be at least 1"),
        (lambda: Schedule.zbv(0, 4), r"zbv: ranks \(0\) must be at least 1"),
        (lambda: Schedule.dualpipev(4, 7), r"microbatches \(7\) must be at least 8, twice the"),
        (lambda: Schedule.interleaved(4, 6, 2), r"microbatches \(6\) .* multiple of the ranks \(4"),
        (lambda: Schedule.interleaved(4, 8, 1), r"virtual stages a rank \(1\) .* it is 1f1b"),
        (lambda: Schedule.named("zbv", 4, 8, virtual=3), r"zbv: virtual .* \(3\) must be 2"),
        (lambda: Schedule.named("1f1b", 4, 8, virtual=2), r"1f1b: virtual .* \(2\) must be 1"),
        (lambda: Schedule.named("zb_v", 4, 8), r"one of gpipe, 1f1b, .*; got 'zb_v'"),
        (lambda: Schedule.forward_only((0, 2), 1), r"every rank must have a stage; .* \(0, 2\)"),
        (lambda: Schedule.forward_only((0, 1), 0), r"microbatches \(0\) must be at least 1"),
    ],
)
def test_a_schedule_that_cannot_be_is_told_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
