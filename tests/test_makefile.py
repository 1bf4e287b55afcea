"""`make`: it lists its targets, sets up once, and says in a sentence what a machine lacks."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# An interpreter that writes down what it is asked to do, and makes a .venv whose pip does the same.
RECORDER = """#!/bin/bash
case "$*" in
  *version_info*) exit {new} ;;
  *'import ensurepip'*) exit {venv} ;;
  *print*) echo "3.12.0 (recorder)"; exit 0 ;;
  *--version*) echo "Python 3.9.2"; exit 0 ;;
esac
echo "$*" >> log
case "$*" in *'-m venv'*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;; esac
exit {pip}
"""


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _make(clone, *words):
    command = ["make", "--no-print-directory", *words]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)


def _python(clone, *, new=0, venv=0, pip=0):
    path = clone / "recorder"
    path.write_text(RECORDER.format(new=new, venv=venv, pip=pip))
    path.chmod(0o755)
    return f"PYTHON={path}"


def test_make_alone_lists_every_target(clone):
    shown = _make(clone).stdout
    for target in ("train", "test", "test-all", "check", "bench", "gpu", "docs", "clean"):
        assert f"make {target} " in shown


def test_a_second_call_installs_nothing_and_another_pin_does(clone):
    python = _python(clone)
    assert _make(clone, "setup", python).returncode == 0
    steps = (clone / "log").read_text().splitlines()
    assert len(steps) == 3
    assert "torch==2.13.0" in steps[1]  # first, so that nothing can choose another
    assert all("-c constraints.txt" in step for step in steps[1:])
    assert "--editable .[dev,plot]" in steps[2]
    assert _make(clone, "setup", python).returncode == 0
    assert len((clone / "log").read_text().splitlines()) == 3
    with (clone / "constraints.txt").open("a") as pins:
        pins.write("nothing==1\n")
    assert _make(clone, "setup", python).returncode == 0
    assert len((clone / "log").read_text().splitlines()) == 5


def test_a_set_up_that_failed_is_tried_again(clone):
    assert _make(clone, "setup", _python(clone, pip=1)).returncode != 0
    assert not (clone / ".venv" / "stamp").exists()
    assert _make(clone, "setup", _python(clone)).returncode == 0
    assert (clone / ".venv" / "stamp").exists()


@pytest.mark.parametrize(
    ("lacks", "sentence"),
    [
        ({"new": 1}, "warploom needs Python 3.11 or newer; found Python 3.9.2"),
        ({"venv": 1}, "apt-get install python3-venv"),
    ],
)
def test_what_the_machine_lacks_is_said_in_a_sentence(clone, lacks, sentence):
    done = _make(clone, "test", _python(clone, **lacks))
    assert done.returncode != 0
    assert sentence in done.stderr
    assert not (clone / ".venv").exists()


def test_the_gpu_target_makes_no_environment(clone):
    assert _make(clone, "gpu", _python(clone), "RESULTS=there").returncode == 0
    assert (clone / "log").read_text() == "benchmarks/gpu.py --results there\n"
    assert not (clone / ".venv").exists()
