import dataclasses
import json

import pytest
import torch

from warploom.models import hf
from warploom.models.decoder import Decoder
from warploom.models.families import llama
from warploom.parallel.mesh import Degrees
from warploom.recipes.errors import UserError
from warploom.recipes.runner import launch
from warploom.recipes.runner import run as module
from warploom.recipes.runner.learning_rate import Cosine
from warploom.recipes.runner.parallel import Parallel
from warploom.recipes.runner.run import AdamW, Muon, Run, check, describe, fingerprint, flatten
from warploom.recipes.runner.train import train

CPU = torch.device("cpu")

ODD = dataclasses.replace(llama.tiny(), heads=6, kv_heads=6, hidden=81)


def tiny(**changes):
    given = {"sequence": 64, "batch_tokens": 1024, "micro_batch": 2, "steps": 10}
    given |= {"architecture": llama.tiny(), "schedule": Cosine(warmup=2)}
    return Run(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mesh": "tp2,zz4"}, "degrees of tp.*'zz4'"),
        ({"mesh": "ep2"}, "ep2 splits experts, but the model is dense"),
        ({"mesh": "pp3"}, r"layers \(2\) must be at least the pipeline stages \(3\): use pp2, "),
        ({"mesh": "tp2", "architecture": ODD}, r"hidden \(81\), and .*: tp1 and tp3 do"),
        ({"mesh": "cp4,uly8"}, r"uly \(8\) must divide cp \(4\), heads of .*: uly4 does"),
        ({"mesh": "tp3"}, r"tp \(3\) must divide heads \(4\).*kv_heads \(2\): tp2 and tp4 do"),
        ({"mesh": "tp8"}, r"tp \(8\) must divide heads \(4\).*: tp4 does"),
        ({"recompute": "half"}, "recompute must be none, full, selective or a list"),
        ({"parallel": Parallel(schedule="zbv")}, "need pipeline stages: put pp2 or more"),
        ({"parallel": Parallel(balance="document")}, "needs context parallelism: put cp2"),
        ({"parallel": Parallel(context="all_gather")}, "ranks between which keys travel"),
        ({"sequence": 1024}, r"sequence \(1024\).*max_positions \(512\)"),
        ({"batch_tokens": 1000}, r"batch_tokens \(1000\).*sequence \(64\): 960 or 1024 fits"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2}, r"schedule.warmup \(2\) must be less than steps \(2\)"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"clip": -1.0}, "clip must be above 0"),
        ({"folder": ""}, "folder must name"),
        ({"z_loss": -1e-4}, "z_loss must be at least 0"),
        ({"seed": -1}, "seed must be from 0"),
        ({"steps": 10**22}, "steps must be at most 1,099,511,627,776, got 10,000,"),
        ({"sample_tokens": 513}, r"sample_tokens \(513\) must be at most .* \(512\)"),
        ({"prompts": ("\udcff",)}, "prompts must be text that UTF-8 can encode"),
    ],
)
def test_a_run_refuses_alone(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)


def test_clip_may_be_none():
    assert tiny(clip=None).clip is None


@pytest.mark.parametrize(
    ("changes", "world", "words"),
    [
        ({"mesh": "tp2,dp2"}, 2, r"4 ranks.*world size \(2\)"),
        ({"mesh": "dp3"}, 2, r"3 ranks.*world size \(2\): start 3 processes"),
        ({"micro_batch": 3}, 1, r"64 x 3 x 1 = 192\): 960 or 1152 fits"),
        ({}, 16, r"64 x 2 x 16 = 2048\): 2048 fits"),
        (
            {"mesh": "pp2", "micro_batch": 8, "parallel": Parallel(schedule="dualpipev")},
            2,
            r"dualpipev: microbatches .*\(2\).* 4.*: change batch_tokens or micro_batch",
        ),
        (
            {"mesh": "pp2", "parallel": Parallel(stage_layers=(1, 2))},
            2,
            r"stage_layers \(1, 2\) must name 2 stages",
        ),
    ],
)
def test_check_refuses_with_the_world(changes, world, words):
    with pytest.raises(UserError, match=words):
        check(tiny(**changes), world, CPU)


def test_check_fills_in_dp():
    assert check(tiny(mesh="tp2"), 8, CPU).dp == 4
    assert check(tiny(), 1, CPU).dp == 1


def test_check_refuses_what_memory_does_not_hold(monkeypatch):
    run = tiny(sequence=512, batch_tokens=512 * 64, micro_batch=64)
    needed = module.needed_bytes(run, check(run, 1, CPU))
    monkeypatch.setattr(module, "_machine_bytes", lambda: needed - 1)
    with pytest.raises(UserError, match=r"run needs .* GiB a rank.*--recompute full") as caught:
        check(run, 1, CPU)
    assert "--micro-batch 1" in str(caught.value)
    monkeypatch.setattr(module, "_machine_bytes", lambda: needed)
    check(run, 1, CPU)
    with pytest.raises(UserError):  # two ranks share the machine
        check(run, 1, CPU, local_ranks=2)


def test_check_names_the_nearest_that_fit(monkeypatch):
    run = tiny(mesh="dp2", sequence=512, batch_tokens=512 * 64, micro_batch=16, precision="bf16")
    degrees = check(run, 2, CPU)
    needed = module.needed_bytes(run, degrees)
    monkeypatch.setattr(module, "_machine_bytes", lambda: needed - 1)
    with pytest.raises(
        UserError, match=r"nearest that fit are (--\S+ \S+ \(.* GiB\)(, )?)+"
    ) as caught:
        check(run, 2, CPU)
    assert "--mesh tp2" in str(caught.value)
    monkeypatch.setattr(module, "_machine_bytes", lambda: 1)
    with pytest.raises(UserError, match=r"the least, .* does not fit either: use more ranks"):
        check(run, 2, CPU)


def test_needed_bytes_know_every_axis():
    run = tiny(batch_tokens=64 * 64, micro_batch=2)

    def needed(mesh, **changes):
        degrees = Degrees.parse(mesh).resolve(2)
        return module.needed_bytes(dataclasses.replace(run, mesh=mesh, **changes), degrees)

    one = module.needed_bytes(run, Degrees.parse("").resolve(1))
    for mesh in ("tp2", "cp2", "pp2"):
        assert needed(mesh) < one
    sharded = [needed("dp2", parallel=Parallel(zero=zero)) for zero in (0, 1, 2)]
    assert sharded == sorted(set(sharded), reverse=True)
    gpipe, other = (needed("pp2", parallel=Parallel(schedule=s)) for s in ("gpipe", "1f1b"))
    assert other < gpipe
    away = Parallel(offload=True)
    assert needed("dp2", parallel=away) < needed("dp2")
    degrees = Degrees.parse("dp2").resolve(2)
    there = dataclasses.replace(run, mesh="dp2", parallel=away)
    assert module.needed_bytes(there, degrees, host=True) > module.needed_bytes(there, degrees)


def test_describe_is_json_and_names_kinds():
    described = describe(tiny(optimizer=Muon()))
    assert json.loads(json.dumps(described)) == described
    flat = flatten(described)
    assert flat["optimizer.kind"] == "Muon"
    assert flat["schedule.kind"] == "Cosine"
    assert flat["architecture.width"] == 64
    assert flat["corpus.paths"] == ["stdlib"]


def test_fingerprint_follows_the_trace():
    run = tiny()
    same = dataclasses.replace(run, folder="elsewhere", log_every=1, keep=9, mesh="dp1")
    other = dataclasses.replace(run, learning_rate=1e-3)
    prints = [fingerprint(describe(r)) for r in (run, same, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(betas=(1.0, 1.0)), r"optimizer.betas must be from 0 to below 1, got \(1.0"),
        (lambda: AdamW(eps=float("nan")), "optimizer.eps must be above 0 and finite, got nan"),
        (lambda: Muon(weight_decay=float("nan")), "optimizer.weight_decay must be at least 0"),
        (lambda: Muon(momentum=1.0), "optimizer.momentum must be from 0 to below 1, got 1.0"),
        (lambda: Muon(rest_rate=0.0), "optimizer.rest_rate must be above 0 and finite, got 0.0"),
    ],
)
def test_an_optimizer_refuses_numbers_that_cannot_train(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_run_begins_with_the_weights_of_a_folder(tiny_run, tmp_path):
    made = dataclasses.replace(tiny_run().architecture, qk_norm="head", head_dim=6)
    model = Decoder.create(made, seed=9)
    hf.save(model, tmp_path / "model")
    runs = {"small": lambda: tiny_run(steps=2, schedule=Cosine(warmup=1))}
    words = ["small", "--weights", str(tmp_path / "model"), "--learning-rate", "1e-9"]
    run = launch.parse(words, runs, "", prog="test")
    assert run.architecture == made
    train(run)
    trained = hf.load(tmp_path / "run" / "model")
    assert "from the weights of model by" in (tmp_path / "run" / "model" / "README.md").read_text()
    for (name, p), q in zip(model.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(q, p, atol=1e-7, rtol=0, msg=name)
    with pytest.raises(UserError, match=r"architecture\.layers \(3\) must be that of the weights"):
        dataclasses.replace(run, architecture=dataclasses.replace(made, layers=3))
    with pytest.raises(UserError, match=r"weights: .*must hold config\.json"):
        dataclasses.replace(run, weights=str(tmp_path))
