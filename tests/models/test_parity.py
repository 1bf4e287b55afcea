"""The decoder on meshes against one process, in float64: loss, gradients, norm, parameters."""

from dataclasses import replace

import pytest
import torch

from warploom.models.batch import Batch
from warploom.models.decoder import Architecture, Decoder, Experts
from warploom.models.stages import Stages
from warploom.parallel.mesh import Degrees, Mesh
from warploom.parallel.optimizer import AdamW
from warploom.parallel.parity import Subject, differences, failures, record
from warploom.parallel.pipeline import Schedule
from warploom.parallel.step import Step

SIZES = {
    "layers": 2,
    "width": 16,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 4,
    "hidden": 24,
    "vocabulary": 37,  # no tp divides it
    "max_positions": 16,
    "norm_eps": 1e-6,
}


def _global_batch(step, rows=4, length=10):
    """Return packed rows with unequal numbers of trained positions; one row trains nothing."""
    g = torch.Generator().manual_seed(step)
    tokens, targets = torch.randint(0, 37, (2, rows, length), generator=g)
    targets[0, :7] = -100
    targets[3] = -100
    return tokens, targets, [[10], [4, 6], [1, 8, 1], [5, 5]]


def _batches(mesh, micro, packed):
    def batches(step):
        tokens, targets, lengths = _global_batch(step)
        each = len(tokens) // mesh.data_ranks
        found = []
        for row in range(mesh.data_rank * each, (mesh.data_rank + 1) * each, micro):
            part = slice(row, row + micro)
            documents = torch.tensor(sum(lengths[part], []), dtype=torch.int32)
            found.append(Batch(tokens[part], targets[part], documents if packed else None))
        return found

    return batches


def _subject(mesh, made, *, micro, packed=True, schedule=None, virtual=1, zero=1, **options):
    table, stages = None, None
    if mesh.pp is not None:
        microbatches = 4 // mesh.data_ranks // micro
        table = Schedule.named(schedule, mesh.degree("pp"), microbatches, virtual=virtual)
        stages = Stages.deal(made.layers, table.placement)
    model = Decoder.create(
        made, mesh=mesh, seed=11, z_loss=1e-2, stages=stages, dtype=torch.float64, **options
    )
    layouts = model.layouts()
    optimizer = AdamW(dict(model.named_parameters()), layouts, mesh)
    batches = _batches(mesh, micro, packed)
    return Subject(model, layouts, optimizer, batches, zero=zero, schedule=table)


def _mesh_equals_one_process(text, made, options):
    alone = Mesh.alone()
    want = record(_subject(alone, made, micro=4, packed=options.get("packed", True)), alone)
    mesh = Mesh.build(text)
    got = record(_subject(mesh, made, micro=1, **options), mesh)
    assert failures(differences(got, want)) == {}


DENSE = Architecture(**SIZES, qk_norm="head")
TIED = Architecture(**SIZES, tied=True)
ROUTED = Architecture(
    **SIZES | {"layers": 4},
    tied=True,
    experts=Experts(
        count=4, top_k=2, hidden=12, shared=8, dense_layers=1, balance=0.5, router_z=0.1
    ),
)
BIASED = replace(ROUTED, experts=replace(ROUTED.experts, bias_rate=0.1))
CASES = [
    ("dp2", DENSE, {}),
    ("tp2", DENSE, {"recompute": "selective"}),
    ("tp4", TIED, {"packed": False, "recompute": "full"}),
    ("tp2,rep2", TIED, {}),
    ("rep2", BIASED, {}),
    ("tp8", DENSE, {}),  # two ranks share a key head
    ("cp2", DENSE, {}),
    ("cp4,uly2", DENSE, {"balance": "document"}),
    ("cp2,tp2", TIED, {"context": "all_gather", "packed": False}),
    ("pp2", replace(TIED, mup_base=8), {"schedule": "1f1b"}),  # a tied head is no head of muP
    ("pp2", ROUTED, {"schedule": "zbv"}),
    ("pp4", ROUTED, {"schedule": "1f1b"}),  # two stages between those that share the embedding
    ("pp2,dp2", ROUTED, {"schedule": "interleaved", "virtual": 2, "recompute": "full"}),
    ("dp2,ep2", ROUTED, {}),
    ("tp2,ep2", ROUTED, {"recompute": "norm,moe"}),
    ("tp2,dp2,ep2,etp2", ROUTED, {"zero": 3}),
    ("tp2,cp2,pp2,ep2", ROUTED, {"schedule": "zb_h1"}),
]


@pytest.mark.parametrize(("text", "made", "options"), CASES, ids=[c[0] for c in CASES])
def test_mesh_equals_one_process(ranks, text, made, options):
    degrees = Degrees.parse(text)
    world = degrees.tp * degrees.cp * degrees.pp * (degrees.dp or 1) * degrees.rep
    ranks(world, _mesh_equals_one_process, text, made, options)


def _logits_equal_one_process(text, made, options):
    mesh = Mesh.build(text)
    tokens, _, lengths = _global_batch(0)
    for documents in (None, torch.tensor(sum(lengths, []), dtype=torch.int32)):
        model = Decoder.create(made, mesh=mesh, seed=11, dtype=torch.float64, **options)
        want = Decoder.create(made, seed=11, dtype=torch.float64)(tokens, documents)
        torch.testing.assert_close(model(tokens, documents), want, rtol=0, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens, documents), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "made", "options"),
    [
        ("cp2,dp2", DENSE, {}),
        ("cp4,uly2", DENSE, {"balance": "document"}),
        ("tp2,cp2,ep2", ROUTED, {"context": "all_gather"}),
    ],
)
def test_logits_equal_one_process(pool, text, made, options):
    degrees = Degrees.parse(text)
    world = degrees.tp * degrees.cp * (degrees.dp or 1)
    pool(world, _logits_equal_one_process, text, made, options)


def test_the_norm_is_of_every_gradient():
    """By torch alone: a norm that leaves something out may do so on every mesh alike."""
    alone = Mesh.alone()
    subject = _subject(alone, ROUTED, micro=4)
    (batch,) = subject.batches(0)
    plain = Decoder.create(ROUTED, seed=11, z_loss=1e-2, dtype=torch.float64)
    sum(term.weight * term.sum / float(term.count) for term in plain.loss(batch)).backward()
    want = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    step = Step(subject.model, subject.layouts, subject.optimizer, alone, clip=None)
    found = step([batch], learning_rate=0.0).grad_norm
    torch.testing.assert_close(found, float(want), rtol=1e-12, atol=0)
