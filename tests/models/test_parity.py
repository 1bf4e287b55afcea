"""The decoder on meshes against one process, in float64: loss, gradients, norm, parameters."""

import pytest
import torch

from warploom.models.batch import Batch
from warploom.models.decoder import Architecture, Decoder
from warploom.parallel.mesh import Degrees, Mesh, _build
from warploom.parallel.optimizer import AdamW
from warploom.parallel.parity import Subject, differences, failures, record

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
        ranks = mesh.degree("dp") * mesh.degree("rep")
        own = mesh.coordinate("dp") + mesh.degree("dp") * mesh.coordinate("rep")
        each = len(tokens) // ranks
        found = []
        for row in range(own * each, (own + 1) * each, micro):
            part = slice(row, row + micro)
            documents = torch.tensor(sum(lengths[part], []), dtype=torch.int32)
            found.append(Batch(tokens[part], targets[part], documents if packed else None))
        return found

    return batches


def _subject(mesh, *, micro, packed, tied, qk_norm, recompute="none"):
    model = Decoder.create(
        Architecture(**SIZES, tied=tied, qk_norm=qk_norm),
        mesh=mesh,
        seed=11,
        z_loss=1e-2,
        recompute=recompute,
        dtype=torch.float64,
    )
    made = model.layouts()
    optimizer = AdamW(dict(model.named_parameters()), made, mesh)
    return Subject(model, made, optimizer, _batches(mesh, micro, packed))


def _mesh_equals_one_process(text, options):
    alone = _build(Degrees.parse("").resolve(1), 0, lambda ranks: None)
    want = record(_subject(alone, micro=4, **options | {"recompute": "none"}), alone)
    mesh = Mesh.build(text)
    got = record(_subject(mesh, micro=1, **options), mesh)
    assert failures(differences(got, want)) == {}


@pytest.mark.parametrize("text", ["dp2", "tp2", "tp4", "tp2,dp2", "tp2,rep2", "tp4,dp2"])
@pytest.mark.parametrize(
    "options",
    [
        {"packed": True, "tied": False, "qk_norm": True, "recompute": "none"},
        {"packed": False, "tied": True, "qk_norm": False, "recompute": "full"},
    ],
    ids=["packed-qk_norm", "tied-recompute"],
)
def test_mesh_equals_one_process(ranks, text, options):
    degrees = Degrees.parse(text)
    ranks(degrees.tp * (degrees.dp or 1) * degrees.rep, _mesh_equals_one_process, text, options)
