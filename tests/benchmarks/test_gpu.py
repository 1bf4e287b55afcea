"""The unattended GPU run, tried on the CPU: parts, files, budget, and the refusal without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def _run(*words):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU")
def test_without_a_gpu_there_is_one_sentence(tmp_path):
    done = _run("--results", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "make gpu needs a CUDA device, and torch sees none here\n"
    assert not list(tmp_path.iterdir())


def test_a_part_runs_in_its_own_process_and_leaves_a_file(tmp_path):
    words = ["--device", "cpu", "--small", "--steps", "2", "--parts", "train"]
    done = _run("--results", str(tmp_path), *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "training.json").read_text())
    assert found["step_time_s"] > 0
    assert found["first_loss"] == pytest.approx(5.55, abs=0.1)  # ln 256 for a random guess
    assert "mfu" not in found, "a CPU has no bfloat16 peak to speak of"


def test_a_spent_budget_leaves_parts_out_and_says_so(tmp_path):
    done = _run("--results", str(tmp_path), "--device", "cpu", "--parts", "train", "--budget", "0")
    assert done.returncode == 1
    assert "train: left out, the budget of 0.0 s is used up" in done.stdout
