"""What a user can get wrong and what can break: one sentence, a code, nothing half-written."""

import dataclasses
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tests.recipes.tiny import Ranks, losses, train_on

from warploom.models.feed_forward import FeedForward
from warploom.parallel.checkpoint import latest, saver, verify
from warploom.parallel.checkpoint.commit import commit
from warploom.recipes import pretrain
from warploom.recipes.errors import UserError
from warploom.recipes.runner import launch, world
from warploom.recipes.runner import train as train_module
from warploom.recipes.runner.spike import SpikeError
from warploom.recipes.runner.train import train


def _sentence(text):
    """The one line that `warploom:` begins; no traceback beside it."""
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("warploom: ")]
    return line


def _main(capsys, *words):
    code = pretrain.main(list(words))
    return code, _sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--mesh", "dp3"], "3 ranks) must multiply to the world size (1)"),
        (["--mesh", "tp3"], "tp (3) must divide heads (4)"),
        (["--mesh", "ep2"], "ep2 splits experts, but the model is dense"),
        (["--sequence", "256", "--batch-tokens", "2048"], "sequence (256) must be at most"),
        (["--batch-tokens", "1000"], "batch_tokens (1000) must be a multiple"),
        (["--corpus.paths", "nowhere"], "corpus path nowhere must be a folder or a file"),
        (["--corpus.tokenizer", "nowhere"], "nowhere must hold tokenizer.json"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(capsys, tmp_path, words, told):
    folder = tmp_path / "run"
    code, sentence = _main(capsys, "stdlib-smoke", "--folder", str(folder), *words)
    assert code == 2
    assert told in sentence
    assert not (folder / "checkpoints").exists()


def test_a_corpus_with_nothing_to_read(tmp_path, tiny_run):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "empty.py").write_text("")
    (folder / "binary.py").write_bytes(b"\0\1\2" * 100)
    corpus = dataclasses.replace(tiny_run().corpus, paths=(str(folder),), store=None)
    with pytest.raises(UserError, match=r"1 binary .*1 empty") as caught:
        train(tiny_run(corpus=corpus))
    assert "\n" not in str(caught.value)


def test_a_corpus_shorter_than_a_sequence(tmp_path, tiny_run):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.py").write_text(f"x = {i}\n")
    store = shutil.copytree(Path(tiny_run().corpus.store) / "tokenizer", tmp_path / "tokenizer")
    corpus = dataclasses.replace(
        tiny_run().corpus, paths=(str(folder),), store=None, tokenizer=str(store), held_out=0.5
    )
    with pytest.raises(UserError, match="fill one sequence of 64|both sides of the split"):
        train(tiny_run(corpus=corpus))


def test_a_folder_of_another_run(tiny_run):
    train(tiny_run(steps=3, evaluate_tokens=64))
    other = tiny_run(steps=3, evaluate_tokens=64, learning_rate=1e-2, seed=5)
    with pytest.raises(
        UserError, match=r"learning_rate is 0.003 there, 0.01 here, seed is 0 there, 5 here"
    ):
        train(other)
    train(tiny_run(steps=3, evaluate_tokens=64, log_every=1))  # what changes no loss may differ


def test_a_mistake_does_not_claim_the_folder(capsys, tmp_path):
    words = ["stdlib-smoke", "--folder", str(tmp_path / "run"), "--steps", "4"]
    assert _main(capsys, *words, "--corpus.paths", "/nonexistent")[0] == 2
    assert _main(capsys, *words, "--mesh", "dp1", "--corpus.paths", "/nowhere")[0] == 2
    assert pretrain.main(words) == 0
    assert (tmp_path / "run" / "report.json").exists()


def test_a_folder_whose_name_is_too_long(capsys, tmp_path):
    code, sentence = _main(capsys, "stdlib-smoke", "--folder", str(tmp_path / ("x" * 300)))
    assert code == 2
    assert "must be a folder to write in (File name too long): choose another" in sentence


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "must hold a JSON object, it holds []"),
        ('{"run": []}', "must hold a run, it holds []"),
        ("{}", "must hold a run, it holds None"),
        ("{", "must be JSON"),
    ],
)
def test_a_damaged_config_is_told_with_what_works(tiny_run, text, told):
    folder = Path(tiny_run().folder)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        train(tiny_run())
    assert told in str(caught.value)
    assert "bring back what the run wrote, or choose another --folder" in str(caught.value)


def test_what_is_gone_from_a_finished_run_is_named_and_comes_back(tiny_run):
    run = tiny_run(steps=3, evaluate_tokens=64)
    train(run)
    report = Path(run.folder) / "report.json"
    for gone in ("model", "report.html"):
        path = Path(run.folder) / gone
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        with pytest.raises(UserError, match=f"{path} must be there .* remove {report} and start"):
            train(run)
        report.unlink()  # as it says
        train(run)
        assert path.exists()
    for text in ("{}", "[]"):
        report.write_text(text)
        with pytest.raises(UserError, match=r"report.json must .* start the same command again"):
            train(run)


def test_a_folder_that_is_not_a_run(tiny_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("do not lose me")
    with pytest.raises(UserError, match="must be empty or hold a run's config.json"):
        train(tiny_run())
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="must be a folder to write in"):
        train(tiny_run(folder=tmp_path / "run" / "thesis.txt"))


def test_two_processes_in_one_folder(tiny_run, tmp_path):
    run = tiny_run(steps=2000, checkpoint_every=2000, evaluate_every=2000)
    ranks = Ranks(run, 1, tmp_path / "out")
    end = time.monotonic() + 60
    while not (Path(run.folder) / "metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(UserError, match="in use by another process"):
        train(run)
    ranks.kill()


def test_a_damaged_store_is_named(tiny_run, tmp_path):
    store = shutil.copytree(tiny_run().corpus.store, tmp_path / "store")
    ids = store / "train.ids.bin"
    data = bytearray(ids.read_bytes())
    data[100] ^= 1
    ids.write_bytes(data)
    corpus = dataclasses.replace(tiny_run().corpus, store=str(store))
    with pytest.raises(UserError, match="train.ids.bin was changed after the build"):
        train(tiny_run(corpus=corpus))


def test_a_tokenizer_that_is_not_the_stores(tiny_run, tmp_path, text):
    from warploom.recipes.corpus.sources import Skips, TextSource
    from warploom.recipes.tokens.training import BPE, train_bpe

    texts = [d.text for d in TextSource(paths=text.paths).documents(Skips())]
    train_bpe(texts, BPE(vocabulary=290)).save(tmp_path / "tokenizer")
    corpus = dataclasses.replace(text, tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match="built from another tokenizer"):
        train(tiny_run(corpus=corpus))
    small = dataclasses.replace(tiny_run().architecture, vocabulary=280)
    with pytest.raises(UserError, match=r"architecture.vocabulary \(280\) must be at least"):
        train(tiny_run(corpus=corpus, architecture=small, folder=tmp_path / "other"))


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_checkpoint_is_named_and_the_last_good_one_offered(
    tiny_run, tmp_path, capsys, damage, monkeypatch
):
    run = tiny_run()
    train(run)
    calm = losses(run.folder)
    (Path(run.folder) / "report.json").unlink()
    newest = latest(Path(run.folder) / "checkpoints")
    file = newest / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data if damage == "flip" else data[:-100])
    monkeypatch.setattr(launch, "parse", lambda *_, **__: run)
    code = launch.main([], {}, "", prog="test")
    sentence = _sentence(capsys.readouterr().err)
    assert code == 1
    assert str(file) in sentence
    assert "the last good checkpoint is" in sentence
    assert "step-00000006" in sentence
    assert f"remove {newest} and start the same command again" in sentence
    shutil.rmtree(newest)  # as it says
    assert launch.main([], {}, "", prog="test") == 0
    assert losses(run.folder) == calm


def _small_files(rank):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_a_save_that_fails_stops_with_the_last_good_checkpoint(tiny_run, tmp_path):
    run = tiny_run(steps=4, checkpoint_every=1)
    assert train_on(tiny_run(steps=4, checkpoint_every=1), 1, tmp_path / "out")[0] == [0]
    (Path(run.folder) / "report.json").unlink()
    newest = latest(Path(run.folder) / "checkpoints")
    size = sum(p.stat().st_size for p in newest.glob("*.safetensors"))
    assert size > 200_000  # so that the limit stops the next one
    shutil.rmtree(newest)
    codes, printed = train_on(run, 1, tmp_path / "full", plant=_small_files)
    assert codes == [1]
    sentence = _sentence(printed)
    assert "step-00000004 was not saved" in sentence
    assert "last complete checkpoint is" in sentence
    verify(latest(Path(run.folder) / "checkpoints"))
    assert latest(Path(run.folder) / "checkpoints").name == "step-00000003"


class _NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def _plant(where, value):
    """Make the feed-forward of the second block give `value`, or a NaN gradient, from call 5 on."""
    made, calls = [], []
    init, forward = FeedForward.__init__, FeedForward.forward

    def remember(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    def planted(self, x):
        y = forward(self, x)
        if torch.is_grad_enabled() and not y.is_meta and made.index(self) % 2 == 1:
            calls.append(1)
            if len(calls) > 8:
                return _NaNGradient.apply(y) if where == "backward" else y * value
        return y

    return remember, planted


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        ("forward", float("nan"), "the output of blocks.1.feed_forward was the first to hold NaN"),
        ("forward", float("inf"), "the output of blocks.1.feed_forward was the first to hold"),
        ("backward", 0.0, "was the first to hold NaN, in the backward pass"),
    ],
)
def test_a_loss_that_is_not_finite_names_step_rank_and_module(
    tiny_run, monkeypatch, where, value, told
):
    def slowly(job):
        time.sleep(0.5)
        commit(job)

    monkeypatch.setattr(saver, "commit", slowly)  # the last save is still under way
    remember, planted = _plant(where, value)
    monkeypatch.setattr(FeedForward, "__init__", remember)
    monkeypatch.setattr(FeedForward, "forward", planted)
    run = tiny_run(checkpoint_every=1)
    with pytest.raises(SpikeError, match=told) as caught:
        train(run)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.startswith("step 3 must have a finite loss and gradient")
    assert "on rank 0" in sentence
    assert "the last good checkpoint is" in sentence
    assert "step-00000002" in sentence
    if where == "backward":
        assert "feed_forward" in sentence or "attention_norm" in sentence
    assert [step for step, _, _ in losses(run.folder)] == [1, 2]


def _plant_on_rank_1(rank):
    if rank == 1:
        FeedForward.__init__, FeedForward.forward = _plant("forward", float("nan"))


@pytest.mark.parametrize("mesh", ["dp2", "tp2"])
def test_a_rank_whose_loss_is_nan_stops_all_and_is_named(tiny_run, tmp_path, mesh):
    run = tiny_run(mesh=mesh)
    codes, printed = train_on(run, 2, tmp_path / "out", plant=_plant_on_rank_1)
    assert codes == [1, 1]
    assert "blocks.1.feed_forward was the first to hold NaN" in _sentence(printed)
    assert "on rank 1" in _sentence(printed)


def test_a_rank_that_dies_stops_all_and_is_named(tiny_run, tmp_path):
    run = tiny_run(steps=5000, checkpoint_every=5000, evaluate_every=5000, log_every=1)
    ranks = Ranks(run, 2, tmp_path / "out")
    end = time.monotonic() + 60
    while "step 2/" not in ranks.text and time.monotonic() < end:
        time.sleep(0.01)
    pid = ranks.processes[1].pid
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    codes = ranks.wait(60)
    assert codes == [1, -9]
    assert time.monotonic() - began < 60
    assert f"rank 1 (process {pid} on" in _sentence(ranks.text)


def _die_before_claim(rank):
    if rank == 0:
        os._exit(9)


def _die_before_joining(rank):
    if rank == 1:
        world.joined = train_module.joined = lambda _: os._exit(9)


def _die_before_serving(rank):
    if rank == 0:
        world.joined = train_module.joined = lambda _: os._exit(9)


@pytest.mark.parametrize(
    ("plant", "codes", "told"),
    [
        (_die_before_claim, [9, 1], "written by rank 0 within 45 s, but rank 0 died"),
        (_die_before_joining, [1, 9], "all 2 ranks must join within 45 s of rank 0, but rank 1"),
        (_die_before_serving, [9, 1], "rank 1 could not reach rank 0"),
    ],
)
@pytest.mark.slow
def test_a_rank_that_dies_before_it_joins_stops_all_and_is_named(
    tiny_run, tmp_path, plant, codes, told
):
    began = time.monotonic()
    found, printed = train_on(tiny_run(), 2, tmp_path / "out", plant=plant)
    assert time.monotonic() - began < 60
    assert found == codes
    assert told in _sentence(printed)


def test_a_disk_that_fills_while_the_store_is_built(tiny_run, tmp_path, text):
    corpus = dataclasses.replace(text, store=None)
    codes, printed = train_on(tiny_run(corpus=corpus), 1, tmp_path / "out", plant=_tiny_files)
    assert codes == [1]
    assert "cannot be written (File too large)" in _sentence(printed)
    assert train_on(tiny_run(corpus=corpus), 1, tmp_path / "again")[0] == [0]


def _tiny_files(rank):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
