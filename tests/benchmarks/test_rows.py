"""Rows in processes of their own: one that crashes or hangs loses itself alone."""

import subprocess
import sys
import time

import pytest

from warploom.benchmarks import rows

WORKER = """
import ctypes, os, sys, time
from pathlib import Path
from warploom.benchmarks import rows

def work(name):
    kind = name.rstrip("0123456789")
    if kind == "exit":
        os._exit(3)
    if kind == "crash":
        ctypes.string_at(0)
    if kind == "hang":
        time.sleep(600)
    if kind == "raise":
        raise ValueError(f"{name} is wrong")
    return {"pid": os.getpid(), "name": name}

file, *names = sys.argv[1:]
rows.serve(work, names, Path(file))
"""


def _run(names, *, code=WORKER, row_s=30.0, seconds=120.0, **rest):
    command = [sys.executable, "-c", code]
    deadline = time.monotonic() + seconds
    return rows.run(command, names, row_s=row_s, deadline=deadline, **rest)


def test_each_failure_loses_its_row_alone():
    said = []
    names = ["good1", "exit", "good2", "crash", "good3", "raise", "good4"]
    found = _run(names, said=lambda name, row: said.append(name))
    assert list(found) == said == names
    assert all(found[f"good{i}"]["name"] == f"good{i}" for i in range(1, 5))
    assert found["exit"]["failed"].startswith("the process ended with 3")
    assert found["crash"]["failed"].startswith("the process ended with -11")
    assert found["raise"] == {"failed": "ValueError: raise is wrong"}
    assert found["good3"]["pid"] == found["good4"]["pid"], "an exception does not cost the worker"
    assert found["good1"]["pid"] != found["good2"]["pid"]


def test_a_hang_ends_at_its_limit():
    found = _run(["good1", "hang", "good2"], row_s=5.0)
    assert found["hang"]["failed"].startswith("took more than 5 s")
    assert "pid" in found["good1"]
    assert "pid" in found["good2"]


def test_the_deadline_is_kept():
    start = time.monotonic()
    found = _run(["hang1", "good"], seconds=2.0)
    assert time.monotonic() - start < 10.0
    assert found["hang1"]["failed"].startswith("the time is used up")
    assert found["good"] == {"failed": "left out: the time is used up"}


def test_a_worker_that_never_starts_says_why():
    found = _run(["a", "b"], code="raise SystemExit('no such thing')")
    assert [row["failed"] for row in found.values()] == [
        "the process ended with 1: no such thing"
    ] * 2


def test_several_workers_share_the_rows():
    found = _run([f"good{i}" for i in range(4)] + ["exit"], jobs=2)
    assert len({row["pid"] for row in found.values() if "pid" in row}) == 2
    assert "failed" in found["exit"]


@pytest.mark.parametrize("names", [[], ["good1"]])
def test_no_rows_and_one(names):
    assert list(_run(names, jobs=3)) == names


def test_a_program_is_ended_with_its_children():
    program = subprocess.Popen(["sh", "-c", "sleep 600 & sleep 600"], start_new_session=True)
    rows.end(program)
    assert program.returncode == -9
