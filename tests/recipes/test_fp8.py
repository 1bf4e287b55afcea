"""Runs in FP8: from the command line to a report, killed and gone on, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.recipes.tiny import losses

from warploom.parallel.checkpoint import latest
from warploom.recipes import pretrain
from warploom.recipes.errors import UserError
from warploom.recipes.runner import fp8, launch
from warploom.recipes.runner import train as train_module
from warploom.recipes.runner.run import check, describe, fingerprint
from warploom.recipes.runner.train import train


class Killed(BaseException):
    """What a signal does."""


def _weights(run):
    return (Path(run.folder) / "model" / "model.safetensors").read_bytes()


def test_a_run_that_was_stopped_has_the_bits_of_one_that_was_not(tiny_run, tmp_path):
    name = "delayed"
    calm = tiny_run(folder=tmp_path / "calm", fp8=name, steps=6, evaluate_every=3)
    train(calm)
    run = replace(calm, folder=str(tmp_path / "run"))
    inner = train_module.advance

    def advance(job, number, batches, rate):
        if number == 5:
            raise Killed
        return inner(job, number, batches, rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "advance", advance)
        with pytest.raises(Killed):
            train(run)
    index = json.loads((latest(Path(run.folder) / "checkpoints") / "index.json").read_text())
    assert index["state"]["step"] == 3
    kept = [n for n in index["tensors"] if n.startswith("buffer/") and ".fp8." in n]
    assert len(kept) == 2 * 4 * 2  # blocks, products, history and scale
    train(run)
    assert losses(run.folder) == losses(calm.folder)
    assert _weights(run) == _weights(calm)
    facts = json.loads((Path(run.folder) / "report.json").read_text())
    assert facts["run"]["fp8"] == name
    flops = facts["flops"]
    assert flops["measured"] == pytest.approx(flops["planned"], rel=0.1)
    assert (
        f"with FP8 projections ({name} scales)"
        in (Path(run.folder) / "model" / "README.md").read_text()
    )
    page = (Path(run.folder) / "report.html").read_text()
    assert f"projections in FP8 ({name} scales)" in page


def test_the_words_of_the_command_line(capsys):
    parse = [["stdlib-smoke", "--fp8", name] for name in ("tensor", "row", "block", "mx")]
    runs = [launch.parse(words, pretrain.RUNS, "", prog="pretrain") for words in parse]
    assert [run.fp8 for run in runs] == ["tensor", "row", "block", "mx"]
    assert launch.parse(["stdlib-smoke"], pretrain.RUNS, "", prog="pretrain").fp8 is None
    prints = {fingerprint(describe(run)) for run in runs}
    assert len(prints) == 4  # it decides the trace
    with pytest.raises(SystemExit):
        launch.parse(["stdlib-smoke", "--help"], pretrain.RUNS, "", prog="pretrain")
    assert "--fp8" in capsys.readouterr().out


def test_widths_that_do_not_fit_are_one_sentence(tiny_run):
    run = tiny_run()
    odd = replace(run.architecture, hidden=72)
    with pytest.raises(UserError, match="fp8 with scaling 'block' needs hidden to be a multiple"):
        tiny_run(architecture=odd, fp8="block")
    with pytest.raises(UserError, match=r"needs heads x head_dim .* of 32 on a rank, got 16"):
        tiny_run(fp8="mx", mesh="tp2")
    with pytest.raises(UserError, match="fp8 must be one of tensor, delayed, row, block, mx"):
        tiny_run(fp8="int8")


@pytest.mark.parametrize(
    ("name", "capability", "told"),
    [
        (
            "block",
            (8, 0),
            r"fp8 block: FP8 needs compute capability 8.9, this device has 8.0: take a",
        ),
        (
            "mx",
            (9, 0),
            r"fp8 mx: MX scales need .* this device has 9.0: take --fp8 block, or leave",
        ),
        ("block", (9, 0), None),
    ],
)
def test_a_device_without_fp8_is_refused(tiny_run, monkeypatch, name, capability, told):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if told is None:
        fp8.check_device(name, torch.device("cuda"))
        return
    with pytest.raises(UserError, match=told):
        check(tiny_run(fp8=name), 1, torch.device("cuda"))
    fp8.check_device(name, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp2", "dp2", "pp2"])
def test_another_mesh_goes_on(tiny_run, tmp_path, mesh):
    """Histories are of the whole tensors: a checkpoint of one rank serves any mesh."""
    from tests.recipes.tiny import train_on

    calm = tiny_run(folder=tmp_path / "calm", fp8="delayed")
    train(calm)
    run = replace(calm, folder=str(tmp_path / "run"))
    inner = train_module.advance

    def advance(job, number, batches, rate):
        if number == 5:
            raise Killed
        return inner(job, number, batches, rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "advance", advance)
        with pytest.raises(Killed):
            train(run)
    codes, printed = train_on(replace(run, mesh=mesh), 2, tmp_path / "out")
    assert codes == [0, 0], printed
    found, expected = ([float(x) for _, x, _ in losses(r.folder)] for r in (run, calm))
    assert found == pytest.approx(expected, rel=2e-3)
