"""The pool of ranks: fresh worlds, results, and what it says when a rank fails, dies or hangs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from warploom.recipes.verification.pool import Pool, RankError


def _sum(value):
    x = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(x)
    return dist.get_world_size(), int(x), bool(torch.empty(3).isnan().all())


def _fail(rank):
    if dist.get_rank() == rank:
        raise LookupError("nobody home")
    dist.barrier()


def _die(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _asleep_in_a_corner():
    time.sleep(60)


def _drawn():
    return int(torch.randint(2**40, ()))


def _pid():
    return os.getpid()


def test_worlds_of_several_sizes_on_the_same_processes(pool):
    first = pool(2, _pid)
    assert pool(2, _sum, 5) == (2, 11, True)
    assert pool(1, _sum, 5) == (1, 5, True)
    assert pool(4, _sum, 0) == (4, 6, True)
    assert pool(2, _pid) == first
    assert pool(1, _drawn) == pool(2, _drawn), "a world goes on with the numbers of another"


def test_a_failure_is_told_with_its_trace_and_new_ranks_come():
    with Pool(2) as pool:
        with pytest.raises(RankError, match=r"rank 1 of 2:(.|\n)*LookupError: nobody home"):
            pool(2, _fail, 1)
        assert pool(2, _sum, 1)[:2] == (2, 3)
        with pytest.raises(RankError, match="rank 0 of 2:\nthe process died|Connection closed"):
            pool(2, _die, 0)
        with pytest.raises(RankError, match=r"ranks \[0\] of 1 (.|\n)*_asleep_in_a_corner"):
            pool(1, _asleep_in_a_corner, timeout_s=0.5)
        with pytest.raises(ValueError, match="runs 1 to 2; got 3"):
            pool(3, _sum, 1)


_PARENT = """
import time
from tests.test_pool import _pid
from warploom.recipes.verification.pool import Pool
pool = Pool(1, preload=("torch",))
print(pool(1, _pid), flush=True)
time.sleep(60)
"""


def test_ranks_die_with_the_process_that_started_them():
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", _PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        rank = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + 10
    while time.monotonic() < end and Path(f"/proc/{rank}").exists():
        state = Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{rank}").exists()
