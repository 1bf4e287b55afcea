"""Faults on real ranks: one sleeps, one hangs, ranks call different things, one is slow."""

import math
import re
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from warploom.parallel.collectives import (
    all_gather_rows,
    all_reduce_,
    all_reduce_begin,
    all_to_all_rows,
    broadcast_,
    exchange_begin,
    observed,
    reduce_scatter_rows,
    reduce_scatter_rows_begin,
    watched,
)
from warploom.parallel.faults import Fingerprint, MismatchError, Stragglers, Watchdog
from warploom.parallel.mesh import Mesh
from warploom.parallel.tensor import ColumnLinear, RowLinear


def shared_store(prefix):
    return dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())


def settle(where):
    """Meet in the store, so that no rank leaves while another asks about it."""
    store = shared_store(f"settle/{where}")
    store.add("there", 1)
    while store.add("there", 0) < dist.get_world_size():
        time.sleep(0.01)


# --- watchdog


def oversleep(seconds):
    time.sleep(seconds)


def _a_rank_sleeps():
    rank, group = dist.get_rank(), dist.group.WORLD
    hangs = []
    settle("begin")
    with Watchdog(shared_store("w"), rank=rank, patience_s=0.8, report=hangs.append):
        for _ in range(3):
            all_reduce_(torch.ones(2), group)
        if rank == 1:
            oversleep(2.4)
        x = all_reduce_(torch.ones(4, 2), group)
    assert x[0, 0] == 3
    if rank == 1:
        assert hangs == []
        return
    (hang,) = hangs
    assert (hang.rank, hang.number, hang.ranks) == (rank, 4, (0, 1, 2))
    assert hang.what == "all_reduce of [4, 2] float32 (sum)"
    assert 0.8 <= hang.waited_s < 2.4
    assert "_a_rank_sleeps" in hang.stack
    assert "all_reduce_(torch.ones(4, 2), group)" in hang.stack
    assert set(hang.missing) == {1}
    assert re.search(r"test_faults.py:\d+ in oversleep", hang.missing[1])
    assert "began all_reduce of [2] float32" in hang.missing[1]
    assert re.match(
        r"rank \d hangs for [\d.]+ s in all_reduce of .* not there: rank 1 is at", hang.sentence()
    )


def test_a_rank_that_sleeps_is_named(pool):
    pool(3, _a_rank_sleeps)


def _a_message_does_not_come():
    rank, group = dist.get_rank(), dist.group.WORLD
    hangs = []
    settle("begin")
    with Watchdog(shared_store("m"), rank=rank, patience_s=0.8, report=hangs.append):
        x = torch.ones(3)
        for late in (0.0, 2.2):
            if rank == 0:
                exchange_begin([], [(x, 1)], group).wait()
            elif rank == 1:
                time.sleep(late)
                exchange_begin([(x, 0)], [], group).wait()
        time.sleep(0.3)
        settle("end")
    told = [(h.what, h.number, list(h.missing)) for h in hangs]
    assert told == ([("exchange of 3 float32 from rank 1", 2, [1])] if rank == 0 else [])


def test_a_rank_that_does_not_send_is_named(pool):
    pool(3, _a_message_does_not_come)


def _all_overlap():
    """What is begun and completes in time is no hang, however late it is waited for."""
    hangs = []
    with Watchdog(shared_store("o"), rank=dist.get_rank(), patience_s=0.3, report=hangs.append):
        pending = all_reduce_begin(torch.ones(2), dist.group.WORLD)
        time.sleep(0.8)
        pending.wait()
        with pytest.raises(RuntimeError), observed(_refuse):
            all_reduce_(torch.ones(2), dist.group.WORLD)
        time.sleep(0.5)
    assert hangs == []


def _refuse(call):
    raise RuntimeError(call.op)


def test_what_completed_is_no_hang(pool):
    pool(2, _all_overlap)


def _reduce_scatters_then_a_hang():
    """gloo's reduce-scatter never says that it has completed, so its wait must."""
    rank, group = dist.get_rank(), dist.group.WORLD
    hangs, opened, x = [], [], torch.ones(4, 3)
    settle("begin")
    watchdog = Watchdog(shared_store("r"), rank=rank, patience_s=0.8, report=hangs.append)
    with watchdog:
        for _ in range(24):
            reduce_scatter_rows(x, group)
            pending = reduce_scatter_rows_begin(x, group)
            with watched(()):  # as in a thread of autograd, which does not see the observers
                pending.wait()
            opened.append(len(watchdog._open))
            time.sleep(0.1)
        assert hangs == []
        assert max(opened) <= 2
        if rank == 1:
            oversleep(2.4)
        reduce_scatter_rows(x, group)
    told = [(h.what, h.number, list(h.missing)) for h in hangs]
    assert told == ([("reduce_scatter of [4, 3] float32", 49, [1])] if rank == 0 else [])


def test_reduce_scatters_that_completed_are_no_hang_and_hide_none(pool):
    pool(2, _reduce_scatters_then_a_hang)


def _each_that_is_stuck():
    rank, group = dist.get_rank(), dist.group.WORLD
    hangs = []
    settle("begin")
    with Watchdog(shared_store("e"), rank=rank, patience_s=0.8, report=hangs.append):
        for begun in (2, 1):
            if rank == 1:
                oversleep(2.4)
            for pending in [all_reduce_begin(torch.ones(2), group) for _ in range(begun)]:
                pending.wait()
    told = [(h.number, list(h.missing)) for h in hangs]
    assert told == ([(1, [1]), (2, [1]), (3, [1])] if rank == 0 else [])


def test_each_that_is_stuck_is_told_once_also_after_a_recovery(pool):
    pool(2, _each_that_is_stuck)


@pytest.mark.parametrize("patience_s", [0, -1.0, math.nan, math.inf, None])
def test_a_patience_that_is_none_is_refused(patience_s):
    sentence = f"patience_s must be a finite number of seconds above 0, got {patience_s}$"
    for build in (lambda **to: Watchdog(dist.HashStore(), rank=0, **to), _fingerprint):
        with pytest.raises(ValueError, match=sentence):
            build(patience_s=patience_s)


def _fingerprint(**to):
    return Fingerprint(dist.HashStore(), **to)


def _hang_for_ever(abort):
    rank = dist.get_rank()
    with Watchdog(shared_store("a"), rank=rank, patience_s=0.3, abort=abort):
        if rank == 0:
            all_reduce_(torch.ones(2), dist.group.WORLD)
        time.sleep(60)


def test_a_hang_ends_the_process_if_asked(pool):
    begun = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"rank 0 of 2:\s+the process died"):
        pool(2, _hang_for_ever, True, timeout_s=30)
    assert time.monotonic() - begun < 25


# --- fingerprint


def differs(fn, sentence, patience_s=20.0):
    """Run `fn` on every rank under a fingerprint, which must tell `sentence` on every one."""
    store = shared_store(f"f/{fn.__name__}")
    with observed(Fingerprint(store, patience_s=patience_s)):
        all_reduce_(torch.ones(1), dist.group.WORLD)
        with pytest.raises(MismatchError, match=sentence):
            fn(dist.get_rank(), dist.group.WORLD)
    settle(fn.__name__)


def swapped(rank, group):
    x = torch.ones(4)
    calls = [lambda: all_reduce_(x, group), lambda: all_gather_rows(x, group)]
    for call in calls if rank == 0 else calls[::-1]:
        call()


def other_shape(rank, group):
    all_gather_rows(torch.ones(2, 3 + (rank == 1)), group)


def other_dtype(rank, group):
    broadcast_(torch.ones(2, dtype=torch.float64 if rank == 1 else torch.float32), group)


def other_kind(rank, group):
    all_reduce_(torch.ones(2), group, op="max" if rank == 1 else "sum")


def other_op(rank, group):
    (reduce_scatter_rows if rank else all_reduce_)(torch.ones(4), group)


def absent(rank, group):
    if rank == 1:
        time.sleep(2.5)
        raise MismatchError("collective 2: not all came; rank 1: all_reduce of [1]")
    all_reduce_(torch.ones(4), group)


def uneven(rank, group):
    sent, got = ([1, 3], [1, 1]) if rank == 0 else ([1, 3], [2, 3])
    all_to_all_rows(torch.ones(4, 5), group, sent, got)


def _each_difference_is_named():
    here = r"\S*test_faults.py:\d+ in"
    differs(
        swapped,
        rf"collective 2 of ranks 0\+1 differs: rank 0 brings all_reduce of \[4\] float32 \(sum\), "
        rf"{here} <lambda>; rank 1 brings all_gather of \[4\] float32, {here} <lambda>",
    )
    differs(other_shape, rf"rank 0 brings .* \[2, 3\] .*{here} other_shape; rank 1 .* \[2, 4\]")
    differs(other_dtype, r"broadcast of \[2\] float32 \(0\), .* broadcast of \[2\] float64 \(0\)")
    differs(other_kind, r"all_reduce of \[2\] float32 \(sum\), .* float32 \(max\)")
    differs(other_op, r"rank 0 brings all_reduce of .* rank 1 brings reduce_scatter of ")
    differs(absent, r"collective 2.*not all came.*rank 1: all_reduce of \[1\]", 1.0)
    differs(uneven, r"rank 0 sends 15 elements to rank 1 \(.*\), which awaits 10 \(")


def test_each_difference_is_named(pool):
    pool(2, _each_difference_is_named)


def _messages_differ():
    """Whoever publishes second raises, so the sender comes late and sends nothing."""
    rank, group = dist.get_rank(), dist.group.WORLD
    x = torch.ones(4)
    with observed(Fingerprint(shared_store("x"))):
        for _ in range(2):  # right: each begins to receive before it sends
            coming = exchange_begin([], [(torch.empty(4), 1 - rank)], group)
            exchange_begin([(x, 1 - rank)], [], group).wait()
            coming.wait()
        if rank == 0:
            exchange_begin([], [(x[:3].clone(), 1)], group)
            settle("end")
        else:
            time.sleep(0.3)
            sentence = (
                r"message 3 of ranks 1>0 differs: sent are 4 torch.float32, \S*test_faults.py.*; "
                r"awaited are 3 torch.float32, "
            )
            with pytest.raises(MismatchError, match=sentence):
                exchange_begin([(x, 0)], [], group)
            settle("end")
            dist.send(x[:3].clone(), 0)  # lets the receive end
    del coming


def test_messages_between_two_ranks_are_compared(pool):
    pool(2, _messages_differ)


def _a_right_program_passes():
    mesh = Mesh.build("tp2,dp2")
    store = shared_store("right")
    model = nn.Sequential(
        ColumnLinear(4, 8, group=mesh.tp, chunks=2, regather=True), RowLinear(8, 4, group=mesh.tp)
    )
    with observed(Fingerprint(store, patience_s=20)):
        for _ in range(3):
            model(torch.ones(4, 4, requires_grad=True)).sum().backward()
            for p in model.parameters():
                all_reduce_(p.grad, mesh.dp)
            rows = [1, 2] if mesh.coordinate("dp") == 0 else [3, 1]
            got = [[1, 3], [2, 1]][mesh.coordinate("dp")]
            all_to_all_rows(torch.ones(sum(rows), 2), mesh.dp, rows, got)
    settle("end")
    left = [store.check([f"0+1/{n}/0"]) for n in range(1, 40)]
    assert sum(left) <= 1, "what all have read is deleted"


def test_a_right_program_passes(pool):
    pool(4, _a_right_program_passes)


# --- stragglers


def _the_slow_rank_is_named():
    rank, group = dist.get_rank(), dist.group.WORLD
    stragglers = Stragglers(group, every=3)
    reports = []
    with observed(stragglers):
        for _ in range(6):
            with stragglers.section("forward"):
                time.sleep(0.4 if rank == 2 else 0.02)
                all_reduce_(torch.ones(2), group)
            with stragglers.section("backward"):
                time.sleep(0.02)
            reports.append(stragglers.step())
    assert [r is None for r in reports] == [True, True, False] * 2
    report = reports[2]
    assert report.awaited == 2
    assert report.steps == 3
    assert report.median_wait_s > 2 * report.wait_s
    forward = next(s for s in report.sections if s.name == "forward")
    assert forward.slowest == 2
    assert forward.slowest_s >= 0.4
    assert 0.02 <= forward.median_s < 0.3  # without the wait for rank 2
    assert report.sections[0] is forward
    assert re.search(
        r"rank 2 was awaited: .*slowest is forward on rank 2: 0.[4-9]", report.sentence()
    )


def test_the_slow_rank_is_named(pool):
    pool(3, _the_slow_rank_is_named)


def test_stragglers_of_one_rank_and_bad_arguments():
    stragglers = Stragglers(None, every=1)
    with stragglers.section("forward"):
        pass
    report = stragglers.step()
    assert report.awaited == 0
    assert [s.name for s in report.sections] == ["forward"]
    assert "slowest is forward on rank 0" in report.sentence()
    with pytest.raises(ValueError, match="every must be at least one step, got 0"):
        Stragglers(None, every=0)
    with (
        pytest.raises(ValueError, match="must not be called 'collectives'"),
        stragglers.section("collectives"),
    ):
        pass
