"""From words to a run: overrides, help, exit codes, and the recipe started by its path."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from warploom.parallel.mesh import Degrees
from warploom.recipes import pretrain
from warploom.recipes.errors import UserError
from warploom.recipes.runner import launch
from warploom.recipes.runner.progress import Progress, duration
from warploom.recipes.runner.run import check, needed_bytes
from warploom.recipes.runner.world import World, from_environment, is_broken, lost, set_threads

ROOT = Path(__file__).parents[2]


def _parse(*words):
    return launch.parse(words, pretrain.RUNS, "about", prog="pretrain")


def test_fields_are_overridden():
    run = _parse(
        "stdlib", "--steps", "50", "--mesh", "dp2", "--architecture.layers", "3",
        "--schedule.warmup", "5", "--corpus.paths", "a", "b", "--clip", "None",
    )  # fmt: skip
    assert (run.steps, run.mesh, run.architecture.layers) == (50, "dp2", 3)
    assert run.schedule.warmup == 5
    assert run.corpus.paths == ("a", "b")
    assert run.clip is None
    assert run.sequence == pretrain.stdlib().sequence


def test_a_refused_value_is_our_sentence():
    with pytest.raises(UserError, match="^steps must be at least 1, got 0$"):
        _parse("stdlib", "--steps", "0")


def test_words_that_mean_nothing_exit_with_2(capsys):
    for words in (["nonsense"], ["stdlib", "--stepz", "3"], []):
        with pytest.raises(SystemExit) as stop:
            _parse(*words)
        assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err  # what was probably meant


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["stdlib", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for words in ("--learning-rate", "--schedule.warmup", "--optimizer.momentum", "Tokens of a"):
        assert words in shown
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    shown = capsys.readouterr().out
    assert "torchrun" in shown
    assert all(name in shown for name in pretrain.RUNS)


@pytest.mark.parametrize(
    ("name", "world"), [("stdlib", 1), ("stdlib", 2), ("stdlib-smoke", 2), ("smollm2-135m", 8)]
)
def test_runs_fit_their_worlds(name, world, monkeypatch):
    from warploom.recipes.runner import run as module

    monkeypatch.setattr(module, "_machine_bytes", lambda: 2**40)
    check(pretrain.RUNS[name](), world, torch.device("cpu"))


def test_llama3_8b_fits_80_gib_on_8_ranks():
    run = pretrain.llama3_8b()
    degrees = Degrees.parse(run.mesh).resolve(8)
    assert needed_bytes(run, degrees) < 75 * 2**30


def test_each_run_has_a_folder_and_help_of_its_own():
    runs = [make() for make in pretrain.RUNS.values()]
    assert len({run.folder for run in runs}) == len(runs)
    assert all(make.__doc__ for make in pretrain.RUNS.values())


@pytest.mark.parametrize("command", [["recipes/pretrain.py"], ["-m", "warploom.recipes.pretrain"]])
def test_the_recipe_is_started_by_its_path_without_installation(command):
    done = subprocess.run(
        [sys.executable, *command, "stdlib-smoke", "--mesh", "dp7"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "world size (1): start 7 processes" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_torchrun_trains_and_says_once_what_is_wrong(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = ["recipes/pretrain.py", "stdlib-smoke", "--folder", str(tmp_path / "run")]
    command = [*torchrun, "--master-port", "29517", *words]
    wrong = subprocess.run(
        [*command, "--mesh", "dp3"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert wrong.returncode != 0
    assert wrong.stderr.count("warploom: ") == 1
    assert not (tmp_path / "run").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout


def test_the_world_is_torchruns(monkeypatch):
    assert from_environment() == World(device=from_environment().device)
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    world = from_environment()
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 4, 1, 2)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="each rank needs a GPU of its own: 4 ranks"):
        from_environment()


def test_ranks_share_the_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it
    try:
        assert set_threads(World(size=4, local_size=4)) == 2
        assert set_threads(World(size=16, local_size=16)) == 1
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own
        assert set_threads(World(size=4, local_size=4)) == 3
    finally:
        torch.set_num_threads(before)


def test_a_lost_rank_is_named_as_far_as_it_is_known():
    error = RuntimeError("[gloo/tcp/pair.cc:525] Connection closed by peer [1.2.3.4]:5")
    assert is_broken(error)
    assert not is_broken(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_broken(ValueError("connection closed by peer"))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    while Path(f"/proc/{gone.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)  # nobody has waited for it: dead, and still in the table of processes
    here = {"host": "a", "pid": os.getpid()}
    told = lost([here, {"host": "a", "pid": gone.pid}], World(size=2), error)
    assert told == f"rank 1 (process {gone.pid} on a) died, so rank 0 stops too"
    gone.wait()
    assert f"process {gone.pid}" in lost([here, {"host": "a", "pid": gone.pid}], World(), error)
    told = lost([here, {"host": "b", "pid": 1}], World(size=2), error)
    assert "rank 0 lost another rank" in told
    assert "Connection closed by peer" in told


def test_plain_lines_in_a_pipe(capsys):
    progress = Progress(steps=20, done=0, every=10, shown=True)
    line = {"loss": 2.0, "step_time_s": 3.0, "tokens_per_s": 1000.0, "mfu": 0.25}
    for step in range(1, 21):
        progress.update({"step": step, **line})
    shown = capsys.readouterr().out.splitlines()
    assert [text.split()[1] for text in shown] == ["1/20", "10/20", "20/20"]
    assert "loss 2.0000" in shown[0]
    assert "MFU 25.0 %" in shown[0]
    assert shown[1].endswith("30 s left")
    Progress(steps=20, done=0, every=1, shown=False).update({"step": 1, **line})
    assert capsys.readouterr().out == ""


def test_durations():
    assert [duration(s) for s in (0.4, 59, 60, 187, 7805)] == [
        "0 s", "59 s", "1:00", "3:07", "2:10:05",
    ]  # fmt: skip
