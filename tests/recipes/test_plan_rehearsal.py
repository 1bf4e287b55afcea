"""A rehearsal finds what every family saves and holds, on every mesh, and what no machine holds."""

from dataclasses import replace
from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
import torch
from tests.models.test_fp8 import RECIPES
from tests.recipes import closed_form
from tests.recipes.test_plan_memory import DENSE, KV, MOE, NORMS, PACKED, PLAIN, _batch, _both
from tests.recipes.test_verify_families import DENSE as FAMILIES
from tests.recipes.test_verify_families import ROUTED

from warploom.models.batch import Batch
from warploom.models.decoder import Decoder
from warploom.models.families import bamba, deepseek_v3, gemma3, llama, mixtral
from warploom.models.stages import Stages
from warploom.parallel.collectives import gather_json, observed
from warploom.parallel.mesh import Degrees, Mesh
from warploom.parallel.optimizer import AdamW
from warploom.recipes.plan import memory
from warploom.recipes.plan.rehearsal import imagined, laps, saved_bytes
from warploom.recipes.plan.tracker import track

EVERY = "norm,attention,feed_forward,moe"
AHEAD = replace(deepseek_v3.tiny(), predict=2)


def _name(family):
    return family.__name__.rpartition(".")[2]


MESHES = ("dp1", "tp2", "cp2", "cp4,uly2", "cp2,uly2", "tp2,cp2", "pp2")


@pytest.mark.parametrize("recompute", ["none", "full", "selective", "attention", EVERY])
@pytest.mark.parametrize("made", [DENSE, NORMS, MOE, PLAIN, KV])
def test_a_rehearsal_finds_the_closed_form_of_plain_decoders(made, recompute):
    for text in (*MESHES, *(("dp4,ep2,etp2", "tp2,ep2") if made.experts else ())):
        parsed = Degrees.parse(text)
        d = replace(parsed, dp=parsed.dp or 1)
        contexts = ("ring", "all_gather") if d.cp > d.uly else ("ring",)
        for context, stage in product(contexts, range(d.pp)):
            how = {"degrees": d, "context": context, "recompute": recompute, "held": (stage,)}
            how |= {"dtype": torch.bfloat16, "z_loss": d.tp > 1}
            how |= {"documents": int(d.cp == d.uly > 1)}  # Ulysses alone has their boundaries
            want = closed_form.activations(made, 64, **how)
            assert memory.activations(made, 64, **how) == want, (text, how)


@pytest.mark.parametrize("name", RECIPES)
def test_a_rehearsal_finds_the_closed_form_in_fp8(name):
    made = replace(llama.llama3_8b(), layers=2)
    for recompute in ("none", "selective", EVERY):
        how = {"fp8": RECIPES[name], "recompute": recompute, "dtype": torch.bfloat16}
        assert memory.activations(made, 256, **how) == closed_form.activations(made, 256, **how)


def test_what_no_machine_could_hold_is_rehearsed():
    made = replace(llama.llama3_1_405b(), layers=16)
    how = {"dtype": torch.bfloat16, "degrees": Degrees(tp=8, dp=64)}
    got = memory.activations(made, 2**17, **how)
    assert got == closed_form.activations(made, 2**17, **how) > 2**37


def test_a_rehearsal_sends_nothing_and_needs_no_gradients_on():
    def refuse(call):
        pytest.fail(f"{call} is seen")

    how = {"degrees": Degrees(tp=2, dp=2, ep=2), "rows": [(32, 40), (32, 20)]}
    want = memory.activations(MOE, 64, **how)
    with torch.no_grad(), observed(refuse):
        assert memory.activations(MOE, 64, **how) == want


def test_values_that_a_rehearsal_does_not_know_are_not_made_up():
    d = Degrees(dp=2, ep=2)
    model = Decoder(MOE, mesh=imagined(d), device="meta")
    ids = torch.empty(1, 8, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="one of 0 routed blocks: something else is read"):
        saved_bytes(model, [0], Batch(ids, ids), [1, 1, 1])


@pytest.mark.parametrize("recompute", ["none", "full", "selective", EVERY])
@pytest.mark.parametrize("family", [*FAMILIES, *ROUTED], ids=_name)
def test_every_family_saves_what_was_predicted(family, recompute):
    for lengths, dtype in ((None, torch.float32), (PACKED, torch.bfloat16)):
        assert len({*_of_lengths(family.tiny(), lengths, None, dtype, recompute=recompute)}) == 1


SSM = bamba.tiny()
LONG = [
    replace(llama.tiny(), layers=7),
    replace(gemma3.tiny(), layers=11),
    replace(SSM, layers=11, kinds=(*["ssm"] * 4, "full", *["ssm"] * 3)),
    replace(deepseek_v3.tiny(), layers=6),
    replace(mixtral.tiny(), layers=5),
]


@pytest.mark.parametrize("recompute", ["none", "full", "selective", EVERY])
@pytest.mark.parametrize("made", LONG, ids=lambda made: f"{made.layers}")
def test_laps_that_are_left_out_save_what_the_second_does(made, recompute):
    for dtype, lengths in ((torch.float32, None), (torch.bfloat16, PACKED)):
        assert len({*_of_lengths(made, lengths, None, dtype, recompute=recompute)}) == 1


def test_laps_are_the_longest_that_leave_most_out():
    assert [*laps("")] == []
    assert [*laps("aaaab")] == [(0, 1, 4), (4, 1, 1)]
    assert [*laps("aabaabaabaa")] == [(0, 3, 3), (9, 1, 1), (10, 1, 1)]
    assert sum(length * number for _, length, number in laps("abcabcabdabd")) == 12
    for stages, held in (
        (Stages((0, 1, 1, 0), (3, 4, 0, 4)), (0, 3)),
        (Stages((0, 0), (11, 0)), (1,)),
    ):
        how = {"stages": stages, "held": held}
        every = [memory.activations(LONG[2], 64, **how)]
        with patch.object(memory, "laps", lambda sorts: [(n, 1, 1) for n in range(len(sorts))]):
            every.append(memory.activations(LONG[2], 64, **how))
        assert every[0] == every[1]


def _of_lengths(made, lengths, mesh, dtype=torch.float32, length=26, **options):
    """Return what a micro-batch saves, measured, and predicted from its lengths."""
    batch = _batch(made, length=length, lengths=lengths)
    known = partial(memory.activations, lengths=lengths or [length] * 4)
    with patch.object(memory, "activations", known):
        return _both(made, batch, mesh, dtype, **options)


def _compared(cases):
    """Compare every case on every rank; return those that differ."""
    wrong, meshes = [], {}
    for name, made, text, lengths, options in cases:
        mesh = meshes[text] = meshes.get(text) or Mesh.build(text)
        found = gather_json(_of_lengths(made, lengths, mesh, **options), mesh.world)
        wrong += [(name, text, options, found)] * any(got != want for got, want in found)
    return wrong


def _cases(meshes, routed):
    """List each family on each mesh, with what the table of meshes says."""
    made = [(family, routed) for family in ROUTED] + [(family, []) for family in FAMILIES]
    for family, more in made:
        for text, lengths, options in meshes + more:
            yield _name(family), family.tiny(), text, lengths, options
    yield from (("ahead", AHEAD, *one) for one in meshes + routed)


ON_2 = [
    ("tp2", None, {"length": 25, "recompute": "selective"}),
    ("cp2", PACKED, {"z_loss": 0.1}),
    ("cp2,uly2", None, {"length": 25}),
    ("pp2", PACKED, {"recompute": "attention"}),
]
ROUTED_2 = [("dp2,ep2", PACKED, {}), ("dp2,etp2", None, {"recompute": "moe"})]
MORE_ON_2 = [
    ("tp2", PACKED, {"recompute": "feed_forward"}),
    ("cp2", None, {"context": "all_gather", "length": 25}),
    ("cp2,uly2", PACKED, {"recompute": "norm,feed_forward"}),
    ("pp2", None, {"recompute": "full"}),
]
MORE_ROUTED_2 = [("tp2,ep2", None, {"length": 25, "recompute": EVERY})]
ON_4 = [("tp2,cp2", PACKED, {}), ("cp4,uly2", None, {"length": 25})]
ROUTED_4 = [("tp2,cp2,ep2,etp2", None, {}), ("cp2,pp2,ep2", PACKED, {"recompute": "selective"})]


@pytest.mark.parametrize(
    ("size", "tables"),
    [
        (2, (ON_2, ROUTED_2)),
        pytest.param(2, (MORE_ON_2, MORE_ROUTED_2), marks=pytest.mark.slow),
        pytest.param(4, (ON_4, ROUTED_4), marks=pytest.mark.slow),
    ],
)
def test_every_rank_of_every_family_saves_what_was_predicted(pool, size, tables):
    assert pool(size, _compared, list(_cases(*tables))) == []


def _held(cases):
    """Return where the first rank holds other parameters and state than planned, or one more."""
    wrong = []
    for name, made, text, *_ in cases:
        mesh = Mesh.build(text)
        model = Decoder.create(made, mesh=mesh, dtype=torch.bfloat16)
        optimizer = AdamW(dict(model.named_parameters()), model.layouts(), mesh)
        with track(model=model, optimizer=optimizer) as seen:
            found = [seen.live["parameters"], seen.live["optimizer"]]
        how = {"dtype": torch.bfloat16, "degrees": mesh.degrees, "rank": mesh.coordinate("pp")}
        plan = memory.memory(made, 8, **how)
        every = gather_json([found, [plan.parameters, plan.optimizer]], mesh.world)
        more = any(a > b for got, want in every for a, b in zip(got, want, strict=True))
        wrong += [(name, text, every)] * (every[0][0] != every[0][1] or more)
    return wrong


def test_every_rank_of_every_family_holds_what_was_planned(pool):
    meshes = [("tp2", None, {}), ("cp2", None, {}), ("pp2", None, {})]
    assert pool(2, _held, list(_cases(meshes, [("dp2,ep2", None, {})]))) == []
