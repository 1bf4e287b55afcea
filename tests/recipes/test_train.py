"""The loop on a tiny model: what it writes, and that it trains what it says."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from tests.recipes.tiny import losses, train_on

from warploom.models import hf
from warploom.models.batch import Batch
from warploom.parallel.mesh import Mesh
from warploom.recipes.runner.evaluate import evaluate
from warploom.recipes.runner.metrics import read
from warploom.recipes.runner.run import Muon
from warploom.recipes.runner.sample import continue_ids
from warploom.recipes.runner.train import train

KEYS = {
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "trained_tokens",
    "step_time_s",
    "data_wait_s",
    "tokens_per_s",
    "tokens_per_s_per_gpu",
    "mfu",
    "peak_memory_gib",
}


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    from tests.recipes.tiny import tiny_run

    run = tiny_run(text, tmp_path_factory.mktemp("trained") / "run")
    train(run)
    return run


def test_the_run_folder_has_everything(trained):
    folder = Path(trained.folder)
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "config.json",
        "environment.json",
        "starts.jsonl",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "report.html",
        "report.json",
        "loss.png",
        "tensorboard",
    }
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [
        "step-00000006",
        "step-00000008",
    ]
    assert json.loads((folder / "config.json").read_text())["run"]["steps"] == 8
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_each_step_has_a_line_with_units(trained):
    lines = read(Path(trained.folder) / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line.keys() >= KEYS for line in lines)
    evaluated = [line["step"] for line in lines if "held_out_loss" in line]
    assert evaluated == [4, 8]
    assert lines[-1]["loss"] < lines[0]["loss"] < math.log(300) + 0.1
    assert lines[0]["learning_rate"] == pytest.approx(1.5e-3)
    assert all(line["tokens_per_s"] == pytest.approx(512 / line["step_time_s"]) for line in lines)


def test_the_weights_are_transformers_weights(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(trained.folder) / "model"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = hf.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("def main():\n    return 0\n")["input_ids"]])
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-5)
    assert ids[0, 0] == tokenizer.bos_token_id
    card = (folder / "README.md").read_text()
    assert "held-out tokens" in card
    assert "Trained from random weights by" in card


def test_the_weights_are_the_ones_of_the_last_step(trained, text):
    """What is exported scores what the report says, on the whole held-out text."""
    from warploom.recipes.runner.data import Data, open_store

    store = open_store(trained, Path("unused"), verify=True)
    mesh = Mesh.build("")
    data = Data(run=trained, store=store, mesh=mesh, device=torch.device("cpu"))
    model = hf.load(Path(trained.folder) / "model")
    byte_counts = torch.from_numpy(store.tokenizer.byte_counts())
    held = evaluate(model, data.held_out(), byte_counts, mesh)
    report = json.loads((Path(trained.folder) / "report.json").read_text())
    assert report["held_out"]["nats_per_token"] == pytest.approx(held.nats_per_token, rel=1e-6)
    assert report["held_out"]["bits_per_byte"] == pytest.approx(held.bits_per_byte, rel=1e-6)


def test_a_finished_run_says_so_and_trains_no_more(trained, capsys):
    folder = Path(trained.folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    train(trained)
    printed = capsys.readouterr().out
    assert "is finished (8 steps" in printed
    assert "held-out loss" in printed
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_killed_export_is_done_again(trained, tmp_path):
    """Killed between the last checkpoint and the report: the same command finishes the run."""
    import shutil

    run = dataclasses.replace(trained, folder=str(tmp_path / "run"))
    shutil.copytree(trained.folder, run.folder)
    report = Path(run.folder) / "report.json"
    expected = json.loads(report.read_text())
    report.unlink()
    (Path(run.folder) / "model" / "model.safetensors").unlink()
    train(run)
    found = json.loads(report.read_text())
    assert found["held_out"] == expected["held_out"]
    assert found["baselines"][0]["nats_per_token"] == expected["baselines"][0]["nats_per_token"]
    assert losses(run.folder) == losses(trained.folder)


@pytest.mark.parametrize("changes", [{"micro_batch": 1}, {"micro_batch": 8}, {"recompute": "full"}])
def test_micro_batches_and_recomputation_do_not_change_the_losses(trained, tiny_run, changes):
    run = tiny_run(**changes)
    train(run)
    ours, theirs = ([float(loss) for _, loss, _ in losses(r.folder)] for r in (run, trained))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("mesh", "size"), [("dp2", 2), ("tp2", 2)])
def test_ranks_do_not_change_the_losses(trained, tiny_run, tmp_path, mesh, size):
    run = tiny_run(mesh=mesh)
    codes, printed = train_on(run, size, tmp_path / "out")
    assert codes == [0] * size, printed
    assert printed.count("step 8/8") == 1  # only rank 0 speaks
    found = [float(loss) for _, loss, _ in losses(run.folder)]
    expected = [float(loss) for _, loss, _ in losses(trained.folder)]
    assert found == pytest.approx(expected, rel=2e-5)


def test_bf16_trains_on_float32_masters(trained, tiny_run):
    run = tiny_run(precision="bf16", steps=6, checkpoint_every=6)
    train(run)
    index = json.loads((Path(run.folder) / "checkpoints/step-00000006/index.json").read_text())
    kinds = {record["dtype"] for record in index["tensors"].values()}
    assert kinds == {"F32"} or kinds == {"float32"}
    found = [float(loss) for _, loss, _ in losses(run.folder)]
    expected = [float(loss) for _, loss, _ in losses(trained.folder)][:6]
    assert found == pytest.approx(expected, rel=2e-2)
    assert found[-1] < found[0]
    assert hf.load(Path(run.folder) / "model").norm.weight.dtype == torch.bfloat16


def test_muon_and_z_loss_train(tiny_run):
    run = tiny_run(optimizer=Muon(), z_loss=1e-4, steps=6)
    train(run)
    lines = read(Path(run.folder) / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["z_loss"] == pytest.approx(math.log(300) ** 2, rel=0.05)


class Uniform(torch.nn.Module):
    """Gives every one of V ids the same chance."""

    def loss(self, batch):
        from warploom.parallel.step import Term

        count = int((batch.targets >= 0).sum())
        return (Term("language_model", torch.tensor(count * math.log(8.0)), count),)


def test_bits_a_byte_are_those_of_the_text():
    """8 ids at ln 8 nats each are 3 bits a token; ids stand for 0 to 3 bytes."""
    targets = torch.tensor([[1, 2, 3, -100], [3, 0, -100, -100]])
    held = evaluate(
        Uniform(), [Batch(targets, targets)], torch.tensor([0, 1, 2, 3]), Mesh.build("")
    )
    assert (held.tokens, held.bytes) == (5, 9)
    assert held.nats_per_token == pytest.approx(math.log(8))
    assert held.bits_per_byte == pytest.approx(5 * 3 / 9)


def test_samples_are_of_the_model(trained):
    model = hf.load(Path(trained.folder) / "model")
    ids = [1, 2, 3]
    greedy = continue_ids(model, ids, count=5, vocabulary=300)
    with torch.no_grad():
        for i, token in enumerate(greedy):
            logits = model(torch.tensor([ids + greedy[:i]]))
            assert int(logits[0, -1].argmax()) == token
    assert (
        continue_ids(model, ids, count=5, vocabulary=300, stop=greedy[2])
        == greedy[: greedy.index(greedy[2])]
    )
    drawn = [
        continue_ids(model, ids, count=8, vocabulary=300, temperature=2.0, seed=s)
        for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    long = continue_ids(model, [5] * 200, count=2, vocabulary=300)  # beyond max_positions
    assert len(long) == 2
