"""Killed at any moment, the same command goes on, and nobody can tell from the trace."""

import json
import random
import time
from pathlib import Path

import pytest
from tests.recipes.tiny import Ranks, losses, train_on

from warploom.parallel.checkpoint import latest
from warploom.recipes.errors import UserError
from warploom.recipes.runner.metrics import read
from warploom.recipes.runner.train import train

STEPS = 24


def _weights(run):
    return (Path(run.folder) / "model" / "model.safetensors").read_bytes()


def _held_out(run):
    lines = read(Path(run.folder) / "metrics.jsonl")
    return [
        (line["step"], repr(line["held_out_loss"])) for line in lines if "held_out_loss" in line
    ]


def _saving(folder):
    return list(Path(folder, "checkpoints").glob("*.tmp-*"))


def _kill_at(ranks, moment, timeout=60.0):
    """SIGKILL all ranks as soon as `moment` is true; false if they ended before."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if moment():
            ranks.kill()
            return True
        if not any(p.is_alive() for p in ranks.processes):
            return False
        time.sleep(0.001)
    ranks.kill()
    pytest.fail(f"the run neither reached the moment nor ended in {timeout} s:\n{ranks.text}")


def test_killed_again_and_again_it_writes_the_same_trace(tiny_run, tmp_path):
    """Two ranks: killed before the first checkpoint, in a save, and between two saves."""
    calm = tiny_run(folder=tmp_path / "calm", steps=STEPS)
    codes, printed = train_on(calm, 2, tmp_path / "calm.out")
    assert codes == [0, 0], printed
    run = tiny_run(folder=tmp_path / "run", steps=STEPS)
    metrics = Path(run.folder) / "metrics.jsonl"

    def reached(step):
        lines = read(metrics)
        return bool(lines) and lines[-1]["step"] >= step

    output = tmp_path / "out"
    rng = random.Random(0)
    moments = [
        lambda: reached(1),
        lambda: bool(_saving(run.folder)) and reached(4),
        lambda: reached(10 + rng.randrange(4)),
        lambda: reached(STEPS),
    ]
    killed = [_kill_at(Ranks(run, 2, output), moment) for moment in moments]
    assert all(killed[:3]), output.read_text()
    with metrics.open("ab") as file:  # and the machine went down in the middle of a line
        file.write(b'{"step": 999, "lo')
    codes, printed = train_on(run, 2, output)
    assert codes == [0, 0], printed
    assert losses(run.folder) == losses(calm.folder)
    assert len(losses(run.folder)) == STEPS
    assert _held_out(run) == _held_out(calm)
    assert _weights(run) == _weights(calm)
    assert not _saving(run.folder)
    starts = (Path(run.folder) / "starts.jsonl").read_text().splitlines()
    resumed = [json.loads(line)["from_step"] for line in starts]
    assert resumed[0] == 0
    assert any(step > 0 for step in resumed[1:])


def test_a_run_that_goes_on_reads_its_checkpoint(tiny_run, tmp_path):
    """Would it start over from step 0, the trace could be right by chance: it must not."""
    calm = tiny_run(folder=tmp_path / "calm")
    train(calm)
    run = tiny_run(folder=tmp_path / "run")
    output = tmp_path / "out"
    assert _kill_at(Ranks(run, 1, output), lambda: latest(Path(run.folder) / "checkpoints"))
    done = int(latest(Path(run.folder) / "checkpoints").name.removeprefix("step-"))
    train(run)
    starts = (Path(run.folder) / "starts.jsonl").read_text().splitlines()
    assert json.loads(starts[-1])["from_step"] == done >= 3
    assert _weights(run) == _weights(calm)


def test_another_mesh_goes_on_where_one_rank_stopped(tiny_run, tmp_path):
    calm = tiny_run(folder=tmp_path / "calm")
    train(calm)
    run = tiny_run(folder=tmp_path / "run")
    _kill_at(Ranks(run, 1, tmp_path / "out"), lambda: latest(Path(run.folder) / "checkpoints"))
    codes, printed = train_on(tiny_run(folder=tmp_path / "run", mesh="tp2"), 2, tmp_path / "out")
    assert codes == [0, 0], printed
    found, expected = ([float(x) for _, x, _ in losses(r.folder)] for r in (run, calm))
    assert found == pytest.approx(expected, rel=2e-5)


def test_tokens_that_were_built_again_are_noticed(tiny_run, tmp_path, text):
    import dataclasses
    import shutil

    own = dataclasses.replace(text, paths=(str(tmp_path / "text"),), store=None)
    shutil.copytree(text.paths[0], own.paths[0])
    run = tiny_run(corpus=own)
    _kill_at(Ranks(run, 1, tmp_path / "out"), lambda: latest(Path(run.folder) / "checkpoints"))
    shutil.rmtree(Path(run.folder) / "tokens")
    first = next(Path(own.paths[0]).iterdir())
    first.write_text("x = 1\n" * 500)
    with pytest.raises(UserError, match="built again since"):
        train(run)
