"""`warploom verify`: it proves what is right, and names the module and the axis of what is not."""

import json
from dataclasses import replace
from unittest.mock import patch

import pytest

from warploom import cli
from warploom.models.architecture import Experts
from warploom.models.decoder import Decoder
from warploom.models.families import llama, mixtral
from warploom.parallel import collectives, step
from warploom.parallel.mesh import Degrees
from warploom.parallel.parity import failures
from warploom.parallel.tensor import linear
from warploom.recipes import verify
from warploom.recipes.pretrain import RUNS
from warploom.recipes.runner.parallel import Parallel
from warploom.recipes.verification.case import prove, reference
from warploom.recipes.verification.diagnosis import diagnose
from warploom.recipes.verification.shrink import shrink

# Each breaks something on the ranks of a mesh, and leaves one process as it is.


def _twice(x, weight, bias, plan, inner=linear.gather_linear):
    y = inner(x, weight, bias, plan)
    return y * 2 - y.detach()  # the value of y, twice its gradient


def _unsummed(x, group):
    return x if group is None else x.chunk(group.size())[group.rank()]


def _without(field, layouts):
    """Drop a declaration of every layout."""

    def changed(*args):
        return {path: replace(layout, **{field: ()}) for path, layout in layouts(*args).items()}

    return changed


def _divided_again(promised, mesh, inner=step._divisors):
    size = 1 if mesh.tokens is None else mesh.tokens.size()
    return {name: count * size for name, count in inner(promised, mesh).items()}


def _norm_of_data_ranks_alone(self, shards, losses, inner=step.Step._norm):
    with patch.object(step, "all_reduce_", lambda x, group: collectives.all_reduce_(x, None)):
        return inner(self, shards, losses)


def _breaks():
    return {
        "gather doubles": patch.object(linear, "gather_linear", _twice),
        "partial dropped": patch.object(Decoder, "layouts", _without("partial", Decoder.layouts)),
        "spread dropped": patch.object(Decoder, "layouts", _without("spread", Decoder.layouts)),
        "divided again": patch.object(step, "_divisors", _divided_again),
        "row sum dropped": patch.object(linear, "scatter", _unsummed),
        "norm of one": patch.object(step.Step, "_norm", _norm_of_data_ranks_alone),
    }


def broken(what, case):
    """Prove a case with something broken, against one process that is not."""
    reference(case)  # kept, so that what follows finds it as it should be
    with _breaks()[what]:
        return prove(case)


@pytest.mark.parametrize(
    ("what", "mesh", "axis", "module", "cause"),
    [
        ("row sum dropped", "tp2,pp2", "tp", "blocks.0.attention", "everything before it is right"),
        ("partial dropped", "pp2", "pp", "embedding", "their sum is missing"),
        ("norm of one", "tp2", "tp", "the gradient norm", "counted too rarely"),
        *(
            pytest.param(*broken, marks=pytest.mark.slow)
            for broken in (
                ("gather doubles", "tp2,dp2", "tp", "gate_up", "2 times what it must be"),
                ("partial dropped", "tp2,dp2", "tp", "norm", "their sum is missing"),
                ("spread dropped", "tp2,dp2", "tp", "attention.qkv", "their sum is missing"),
                ("divided again", "tp2,dp2", "dp", "every loss", "divided by the 2 data ranks"),
            )
        ),
    ],
)
def test_what_is_broken_is_named(pool, what, mesh, axis, module, cause):
    case = verify.plan(verify.Verify(mesh=mesh))
    if what == "spread dropped":
        case = replace(case, architecture=replace(case.architecture, kv_heads=1))

    def run(one):
        return pool(one.degrees.world, broken, what, one)

    outcome = run(case)
    assert failures(outcome.differences)
    found = diagnose(case, outcome, run)
    assert found.axis == axis
    assert module in found.module
    assert cause in found.cause


def broken_prove(case, measure=False):
    """What `warploom verify` runs on the ranks, with the partial sums left out."""
    return broken("partial dropped", case)


def test_the_command_proves_what_is_right(tmp_path, capsys):
    file = tmp_path / "found.json"
    assert cli.main(["verify", "--mesh", "tp2,etp2", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "proven in" in shown
    assert "gradient of feed_forward.experts.down" in shown
    found = json.loads(file.read_text())
    assert found["proven"]
    assert found["failures"] == {}
    assert {line["op"] for line in found["traffic"]} >= {"all_gather", "reduce_scatter"}
    assert found["case"]["architecture"]["experts"]["count"] == 4


def test_the_command_names_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "prove", broken_prove)
    file = tmp_path / "found.json"
    assert cli.main(["verify", "pretrain/stdlib-smoke", "--mesh", "tp2", "--json", str(file)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "not proven" in shown
    assert "norm" in shown
    assert "on axis tp (mesh tp2)" in shown
    found = json.loads(file.read_text())
    assert not found["proven"]
    assert found["diagnosis"]["axis"] == "tp"
    assert "their sum is missing" in found["diagnosis"]["cause"]


def _sent_twice(x, group):
    collectives.all_gather_rows(x.detach(), group)
    return collectives.scatter(x, group)


def prove_sending_twice(case, measure=False):
    """Prove with one all-gather too many beside each row-parallel layer."""
    with patch.object(linear, "scatter", _sent_twice):
        return prove(case, measure)


def test_a_collective_too_many_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "prove", prove_sending_twice)
    file = tmp_path / "found.json"
    assert cli.main(["verify", "pretrain/stdlib-smoke", "--mesh", "tp2", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert not found["proven"]
    assert "on axis tp a micro-batch makes" in found["not as predicted"][0]
    shown = " ".join(capsys.readouterr().out.split())
    assert "not proven" not in shown
    assert "on axis tp a micro-batch makes" in shown
    assert "all_gather calls forward" in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "verify needs a mesh"),
        ("--mesh tp3,ep2", "ep x etp (2 x 1) must divide tp x cp x dp"),
        ("--mesh dp128", "at most 64; dp128 has 128"),
        ("--mesh cp2,uly4", "uly (4) must divide cp (2)"),
        (
            "--mesh pp2 --schedule dualpipev --micro-batches 2",
            "must be at least 4, twice the ranks",
        ),
        ("--mesh pp2 --schedule interleaved --micro-batches 3", "must be a multiple of the ranks"),
        ("--mesh pp2 --stage-layers 1 1 1", "must name 2 stages"),
        ("--mesh pp4 --stage-layers 1 0 1 0", "leave pipeline rank 1 without a block"),
        ("--mesh pp2 --virtual 4", "parallel.virtual (4) is of parallel.schedule interleaved"),
        ("--mesh dp2 --schedule zbv", "parallel.schedule (zbv) and"),
        ("--mesh dp2 --balance document", "parallel.balance (document) needs context parallelism"),
        ("--mesh cp2,uly2 --context all_gather", "context (all_gather) needs ranks between"),
        ("--mesh tp2,ep2 --zero 3", "zero (3) needs ranks that hold the same parameters"),
        ("pretrain/llama3-8b --mesh tp2 --zero 2", "put dp2 or cp2 into the mesh ('tp2')"),
        ("--mesh dp2 --recompute everything", "recompute must be none, full, selective"),
        ("--mesh dp2 --micro-batches 0", "micro_batches must be at least 1; got 0"),
        ("--mesh dp2 --json /nowhere/found.json", "json must be a file in a folder that exists"),
        ("pretrain/llama3-8b --mesh tp3", "tp (3) must divide heads (32)"),
        ("pretrain/llama3-8b --mesh dp2,ep2", "the model is dense: leave ep out"),
        ("pretrain/stdlib-smoke --mesh pp4", "layers (2) must be at least the pipeline stages (4)"),
        ("pretrain/stdlib-smoke --mesh pp2 --schedule zbv", "pipeline stages (4): use pp1, fewer"),
        ("pretrain/llama --mesh tp2", "pretrain/llama is neither"),
        ("tests --mesh tp2", "tests must hold config.json"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_process(words, sentence, capsys, monkeypatch):
    monkeypatch.setattr(verify, "Pool", None)
    assert cli.main(["verify", *words.split()]) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out


def test_a_run_gives_the_defaults_that_its_mesh_can_use(monkeypatch):
    parallel = Parallel(schedule="zbv", zero=3, balance="document", stage_layers=(20, 12))
    made = replace(RUNS["llama3-8b"](), parallel=parallel, recompute="selective", mesh="cp2,pp2")
    monkeypatch.setitem(verify.RUNS, "llama3-8b", lambda: made)

    def found(*words):
        case = verify.plan(verify._asked(["pretrain/llama3-8b", *words]))
        return case.mesh, case.parallel, case.recompute

    whole = replace(parallel, stage_layers=())
    assert found() == ("cp2,pp2", whole, "selective")
    assert found("--mesh", "dp2") == ("dp2", Parallel(zero=3), "selective")
    assert found("--schedule", "1f1b")[1] == replace(whole, schedule="1f1b")


@pytest.mark.parametrize("family", [llama, mixtral])
def test_a_folder_is_read_for_its_sizes_alone(family, tmp_path):
    a = replace(llama.llama3_8b(), tied=True)
    if family is mixtral:
        a = replace(a, experts=Experts(count=8, top_k=2, hidden=a.hidden, score="softmax_after"))
    (tmp_path / "config.json").write_text(json.dumps(family.FAMILY.config(a)))
    mesh = "tp2,ep4,dp2" if family is mixtral else "tp2,dp2"
    case = verify.plan(verify.Verify(subject=str(tmp_path), mesh=mesh))
    assert case.architecture.tied
    assert case.architecture.heads == 4 * case.architecture.kv_heads
    assert (case.architecture.experts is None) == (family is llama)


@pytest.mark.parametrize(
    ("mesh", "stages"), [("tp2", 1), ("tp8,pp2", 2), ("tp4,cp2,uly2", 1), ("dp4,ep4", 3)]
)
def test_shrinking_keeps_what_layers_trip_over(mesh, stages):
    experts = Experts(count=256, top_k=8, hidden=2048, groups=8, top_groups=4, dense_layers=3)
    a = replace(llama.llama3_70b(), experts=experts, tied=True, qk_norm="head")
    d = replace(Degrees.parse(mesh), dp=Degrees.parse(mesh).dp or 1)
    small = shrink(a, d, stages)
    assert small.heads // small.kv_heads == a.heads // a.kv_heads
    assert (small.kv_heads % d.tp == 0) == (a.kv_heads % d.tp == 0)
    assert (small.tied, small.qk_norm) == (True, "head")
    assert small.layers >= max(stages, 2)
    assert small.routed(0) is None
    assert small.routed(small.layers - 1) is not None
    assert small.experts.count % d.ep == 0
    assert small.experts.count % small.experts.groups == 0
    assert small.width * small.vocabulary < 50_000
