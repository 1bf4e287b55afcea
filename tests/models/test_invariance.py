"""One global batch has one gradient, however it is cut, packed and spread.

The batch is eight bins of documents. An arrangement deals the bins to data ranks, micro-batches and
rows in any order, shuffles the documents of a bin, and runs on a mesh; loss, gradients and norm
must be those of one process that takes all of it at once.
"""

import random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from warploom.models.architecture import Architecture, Experts
from warploom.models.batch import Batch
from warploom.models.decoder import Decoder
from warploom.models.stages import Stages
from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import AdamW
from warploom.parallel.parity import Subject, differences, failures, record
from warploom.parallel.pipeline import Schedule

BIN, BINS = 12, 8
SIZES = Architecture(
    layers=2,
    width=16,
    heads=4,
    kv_heads=2,
    head_dim=4,
    hidden=24,
    vocabulary=37,
    max_positions=BIN * BINS,
    tied=True,
    experts=Experts(count=4, top_k=2, hidden=12, dense_layers=1, balance=0.5, router_z=0.1),
)
MESHES = {2: ("dp2", "cp2", "tp2,ep2", "pp2", "dp2,ep2"), 4: ("dp2,cp2,ep2", "tp2,pp2", "cp4,uly2")}


def _documents():
    """Bins of documents, each `(tokens, targets)`; some train nothing, some a part."""
    g = torch.Generator().manual_seed(5)
    bins = []
    for lengths in ([12], [5, 7], [1, 11], [3, 4, 5], [12], [6, 6], [2, 10], [9, 1, 2]):
        held = []
        for n in lengths:
            tokens, targets = torch.randint(37, (2, n), generator=g)
            targets[: int(torch.randint(n + 1, (), generator=g))] = -100
            held.append((tokens, targets))
        bins.append(held)
    return bins


def _batch(bins, rows):
    """Lay bins out one after the other in so many rows."""
    documents = [document for held in bins for document in held]
    tokens, targets = (torch.cat([d[i] for d in documents]).view(rows, -1) for i in (0, 1))
    lengths = torch.tensor([len(d[0]) for d in documents], dtype=torch.int32)
    return Batch(tokens, targets, lengths)


def _trace(mesh, batches, schedule=None):
    table = schedule and Schedule.named(schedule, mesh.degree("pp"), len(batches))
    stages = table and Stages.deal(SIZES.layers, table.placement)
    model = Decoder.create(
        SIZES, mesh=mesh, seed=2, z_loss=1e-2, stages=stages, dtype=torch.float64
    )
    layouts = model.layouts()
    optimizer = AdamW(dict(model.named_parameters()), layouts, mesh)
    subject = Subject(model, layouts, optimizer, lambda _: batches, schedule=table)
    return record(subject, mesh, steps=1)


def _arrangement_equals_one_process(text, micro_batches, rows, seed):
    want = _trace(Mesh.alone(), [_batch(_documents(), 1)])
    mesh, shuffle = Mesh.build(text), random.Random(seed)
    bins = _documents()
    shuffle.shuffle(bins)
    for held in bins:
        shuffle.shuffle(held)
    own = bins[mesh.data_rank :: mesh.data_ranks]
    each = len(own) // micro_batches
    batches = [_batch(own[i * each :][:each], min(rows, each)) for i in range(micro_batches)]
    got = _trace(mesh, batches, schedule="1f1b" if mesh.pp is not None else None)
    assert failures(differences(got, want)) == {}


def test_no_split_changes_the_gradient(pool):
    @settings(
        max_examples=12,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(
        st.sampled_from([(n, text) for n, texts in MESHES.items() for text in texts]),
        st.sampled_from([1, 2, 4]),
        st.sampled_from([1, 2]),
        st.integers(0, 2**16),
    )
    def check(mesh, micro_batches, rows, seed):
        world, text = mesh
        pool(world, _arrangement_equals_one_process, text, micro_batches, rows, seed)

    check()
