"""The unattended GPU run, tried on the CPU: parts, files, budget, and the refusal without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from warploom.benchmarks import gpu, proofs

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def _run(*words):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU")
def test_without_a_gpu_there_is_one_sentence(tmp_path):
    done = _run("--results", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "make gpu needs a CUDA device, and torch sees none here\n"
    assert not list(tmp_path.iterdir())


def test_an_unknown_part_is_refused(tmp_path):
    done = _run("--results", str(tmp_path), "--parts", "prove,bake")
    assert done.returncode == 2
    assert "must be among csrc, prove, train, bench, tests, suites, got 'bake'" in done.stderr


def test_parts_leave_files_and_a_page(tmp_path):
    words = ["--device", "cpu", "--small", "--steps", "2", "--only", "swiglu"]
    done = _run("--results", str(tmp_path), *words, "--parts", "prove,train")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "training.json").read_text())
    assert found["step_time_s"] > 0
    assert found["first_loss"] == pytest.approx(5.55, abs=0.1)  # ln 256 for a random guess
    assert "mfu" not in found, "a CPU has no bfloat16 peak to speak of"
    proven = json.loads((tmp_path / "proofs.json").read_text())
    assert proven["verdicts"]["swiglu reference"]["failed"] == {}
    assert proven["checked"]["swiglu:reference"]["dtypes"] == 4
    assert len(proven["training"]["swiglu:reference"]["ms"]) == 1
    assert "swiglu reference: proven" in (tmp_path / "summary.md").read_text()
    assert done.stdout.rstrip().endswith((tmp_path / "summary.md").read_text().splitlines()[-1])


@pytest.mark.slow
def test_the_benchmarks_and_the_tests_leave_files_too(tmp_path):
    words = ["--device", "cpu", "--small", "--only", "rms_norm", "--parts", "bench,tests"]
    test = "tests/recipes/test_timing.py::test_milliseconds_and_counts"
    done = _run("--results", str(tmp_path), *words, "--tests", test)
    assert "bench: done" in done.stdout, done.stdout + done.stderr
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["op"] for row in rows} == {"rms_norm"}
    assert json.loads((tmp_path / "tests.json").read_text())["exit_code"] == 5, "none of gpu"


def test_a_spent_budget_leaves_parts_out_and_says_so(tmp_path):
    done = _run("--results", str(tmp_path), "--device", "cpu", "--parts", "train", "--budget", "0")
    assert done.returncode == 1
    assert "train: left out, the budget of 0.0 s is used up" in done.stdout


def test_two_cases_of_each_suite_are_rows_the_first_of_each_first():
    asked = gpu.arguments([])
    names = [name for name in gpu._bench_rows(asked) if name.startswith("suite/")]
    assert names == [f"suite/{suite}/{n}" for n in range(2) for suite in gpu.SUITES]
    every = [name for name, _ in gpu._suite_rows(asked)]
    assert every[: len(gpu.SUITES)] == names[: len(gpu.SUITES)]
    assert len(every) == len({*every}) > len(names)
    words = ["--only", "flash_attention_varlen"]
    assert gpu._bench_rows(gpu.arguments(words)) == [f"suite/attention/{n}" for n in range(2)]


@pytest.mark.slow
def test_every_case_of_a_suite_is_timed_in_a_part_of_its_own(tmp_path):
    words = ["--device", "cpu", "--small", "--only", "paged_attention", "--parts", "suites"]
    done = _run("--results", str(tmp_path), *words)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "suites.json").read_text())
    assert {(row["op"], row["variant"]) for row in found["rows"]} == {
        ("paged_attention", "decode"),
        ("paged_attention", "chunk"),
    }
    assert "## suites" in (tmp_path / "suites.md").read_text()


@pytest.mark.slow
def test_a_case_of_a_suite_is_measured():
    asked = gpu.arguments(["--device", "cpu", "--small", "--only", "moe_block"])
    found = gpu._bench_row("suite/moe_layer/0", asked, warm=True)
    assert {row["op"] for row in found["rows"]} == {"moe_block"}
    assert found["overhead"] == []


def test_a_backend_is_proven_by_all_rows_of_all_specimens(monkeypatch):
    monkeypatch.setattr(proofs, "operator", lambda row: ("norm", row.rpartition(":")[2]))
    good, time = {"error": 0.5}, {"error": 0.7, "ms": [1.0, 2.0]}
    checked = {"a:triton": good, "b:triton": good, "a:cuda": good, "b:cuda": {"failed": "crash"}}
    timed = {"a:triton": time, "b:triton": {**time, "ms": [9.0]}, "a:cuda": time}
    found = proofs.verdicts(checked, timed)
    assert found["norm", "triton"] == {"failed": {}, "error": 0.7, "time_ms": 2.0}
    assert found["norm", "cuda"]["failed"] == {"b:cuda": "crash"}
    assert proofs.verdicts(checked, {})["norm", "triton"]["failed"]["a:triton"] == "was not timed"


def test_each_part_leaves_time_to_the_later_ones(monkeypatch):
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 0.0)
    asked = gpu.arguments(["--budget", "400"])
    session = gpu.Session(asked)
    ends = [session.deadline(part) for part in session.parts]
    assert ends == [90.0, 210.0, 120.0, 200.0, 200.0]
    assert (
        gpu.Session(gpu.arguments(["--parts", "tests", "--budget", "50"])).deadline("tests") == 50
    )
