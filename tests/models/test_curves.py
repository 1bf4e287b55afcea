"""500 steps in float32 on six meshes: no mesh strays further than the order of sums makes it.

Sums of float32 depend on their order, and training amplifies what rounds differently. How much, one
process shows with its global batch cut into micro-batches in several ways; a mesh may differ from
it by twice the largest difference between two of those, up to any step.
"""

import asyncio
import json
import pathlib

import pytest
import torch

from warploom.models.architecture import Architecture
from warploom.models.batch import Batch
from warploom.models.decoder import Decoder
from warploom.models.mup import is_hidden
from warploom.models.stages import Stages
from warploom.parallel.mesh import Degrees, Mesh
from warploom.parallel.optimizer import Muon
from warploom.parallel.pipeline import Schedule
from warploom.parallel.step import Step

STEPS, ROWS, LENGTH = 500, 8, 64
PEAK = 0.005  # the learning rate of `make train`, after the same 20 steps of warm-up
SIZES = Architecture(
    layers=4,
    width=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    hidden=128,
    vocabulary=256,
    max_positions=LENGTH,
    qk_norm="head",
)
MESHES = [
    ("dp2", {}),
    ("tp2", {}),
    ("cp2", {}),
    ("pp2", {"schedule": "zbv"}),
    ("tp2,dp2", {"zero": 3}),
    ("tp2,pp2", {"schedule": "1f1b", "recompute": "selective"}),
]


def _text():
    """Bytes of Python's own asyncio, as ids."""
    folder = pathlib.Path(asyncio.__file__).parent
    raw = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()


def _curve(mesh, micro, *, schedule=None, zero=1, recompute="none"):
    """Return the loss of every step."""
    each = ROWS // mesh.data_ranks
    table = schedule and Schedule.named(schedule, mesh.degree("pp"), each // micro)
    stages = table and Stages.deal(SIZES.layers, table.placement)
    model = Decoder.create(SIZES, mesh=mesh, seed=1, stages=stages, recompute=recompute)
    optimizer = Muon(
        dict(model.named_parameters()), model.layouts(), mesh, hidden=is_hidden, rest_rate=3.0
    )
    step = Step(model, model.layouts(), optimizer, mesh, zero=zero, schedule=table)
    text, draws, losses = _text(), torch.Generator().manual_seed(0), []
    for number in range(STEPS):
        starts = torch.randint(len(text) - LENGTH - 1, (ROWS,), generator=draws)
        rows = text[starts[:, None] + torch.arange(LENGTH + 1)]
        own = rows[mesh.data_rank * each :][:each]
        batches = [Batch(part[:, :-1], part[:, 1:]) for part in own.split(micro)]
        rate = PEAK * min(1.0, (number + 1) / 20)
        losses.append(step(batches, learning_rate=rate).losses["language_model"])
    step.close()
    return losses


def _write_curve(folder, text, options):
    mesh = Mesh.build(text)
    curve = _curve(mesh, 2, **options)
    if mesh.rank == 0:
        (folder / f"{text}.json").write_text(json.dumps(curve))


def _running_max(x):
    return x.cummax(0).values


@pytest.mark.slow
def test_six_meshes_follow_one_process(ranks, tmp_path):
    alone, threads = Mesh.alone(), torch.get_num_threads()
    torch.set_num_threads(1)  # as ranks have: small tensors are no quicker on more
    same = torch.tensor([_curve(alone, micro) for micro in (8, 4, 2, 1)], dtype=torch.float64)
    torch.set_num_threads(threads)
    assert same[0, -50:].mean() < 2.0 < 4.0 < same[0, 0]  # it learns
    spread = _running_max((same.max(0).values - same.min(0).values).clamp(min=1e-6))
    for text, options in MESHES:
        degrees = Degrees.parse(text)
        world = degrees.tp * degrees.cp * degrees.pp * (degrees.dp or 1)
        ranks(world, _write_curve, tmp_path, text, options, timeout=900)
        curve = torch.tensor(json.loads((tmp_path / f"{text}.json").read_text())).double()
        beyond = _running_max((curve - same[0]).abs()) / (2 * spread)
        assert float(beyond.max()) <= 1, f"{text}: {float(beyond.max()):.2f} x the bound"
