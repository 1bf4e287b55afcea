"""What layers and steps communicate equals theory, in number and bytes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from warploom.parallel.collectives import (
    all_gather_rows,
    all_reduce_,
    all_to_all_rows,
    broadcast_,
    exchange_begin,
    observed,
    reduce_scatter_rows,
)
from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import AdamW
from warploom.parallel.sharding import layouts
from warploom.parallel.step import Step, Term
from warploom.parallel.tensor import ColumnLinear, RowLinear, VocabEmbedding, VocabHead
from warploom.recipes.plan.ledger import Ledger, Total, ring_bytes

T, D, FEATURES, V = 16, 6, 8, 12
ITEM = 4  # bytes of a float32


def theory(*lines):
    """Tell what should be counted on tp: (phase, op, calls, elements that a rank brings in all)."""
    ranks = dist.get_world_size()
    return {
        ("tp", op, phase): Total(calls, ring_bytes(op, ranks, ITEM * elements))
        for phase, op, calls, elements in lines
    }


def counted(mesh, layer, x):
    ledger = Ledger(mesh)
    if x.is_floating_point():
        x.requires_grad_()
    with observed(ledger):
        y = layer(x)
        y = y[0][0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))
    return ledger.table()


def _layers_send_what_theory_says():
    ranks = dist.get_world_size()
    mesh = Mesh.build(f"tp{ranks}")
    keep = {"group": mesh.tp}
    part, whole, own = torch.ones(T // ranks, D), torch.ones(T, D), torch.ones(T, FEATURES // ranks)
    tokens = torch.arange(T) % V
    local, full = T // ranks * D, T * D
    gather, scatter, both = "all_gather", "reduce_scatter", "all_reduce"
    for chunks in (1, 2):
        up = ColumnLinear(D, FEATURES, chunks=chunks, **keep)
        dx = ("backward", scatter, chunks, full)
        assert counted(mesh, up, part) == theory(("forward", gather, chunks, local), dx)
        up = ColumnLinear(D, FEATURES, chunks=chunks, regather=True, **keep)
        again = ("backward", gather, 1, local)
        assert counted(mesh, up, part) == theory(("forward", gather, chunks, local), dx, again)
        down = RowLinear(FEATURES, D, chunks=chunks, bias=True, **keep)
        lines = ("forward", scatter, chunks, full), ("backward", gather, chunks, local)
        assert counted(mesh, down, own) == theory(*lines)
    embed, head = VocabEmbedding(V, D, **keep), VocabHead(V, D, **keep)
    lines = ("forward", scatter, 1, full), ("backward", gather, 1, local)
    assert counted(mesh, embed, tokens) == theory(*lines)
    lines = ("forward", gather, 2, local + V // ranks * T), ("backward", scatter, 1, full)
    assert counted(mesh, head, part) == theory(*lines)
    merge = ("forward", both, 2, 3 * T)  # the largest, then sum and target together
    lines = ("forward", gather, 1, local), merge, ("backward", scatter, 1, full)
    assert counted(mesh, lambda x: head.loss(x, tokens), part) == theory(*lines)

    keep["sequence_parallel"] = False
    up, down = ColumnLinear(D, FEATURES, **keep), RowLinear(FEATURES, D, **keep)
    assert counted(mesh, up, whole) == theory(("backward", both, 1, full))
    assert counted(mesh, down, own) == theory(("forward", both, 1, full))
    embed, head = VocabEmbedding(V, D, **keep), VocabHead(V, D, **keep)
    assert counted(mesh, embed, tokens) == theory(("forward", both, 1, full))
    lines = ("forward", gather, 1, V // ranks * T), ("backward", both, 1, full)
    assert counted(mesh, head, whole) == theory(*lines)
    lines = merge, ("backward", both, 1, full)
    assert counted(mesh, lambda x: head.loss(x, tokens), whole) == theory(*lines)


@pytest.mark.parametrize("size", [2, 4])
def test_layers_send_what_theory_says(pool, size):
    pool(size, _layers_send_what_theory_says)


def _plain_collectives():
    group, rank = dist.group.WORLD, dist.get_rank()
    ledger = Ledger()
    x = torch.ones(6, 2, dtype=torch.float64)  # 96 bytes
    with observed(ledger), ledger.phase("step"):
        all_gather_rows(x, group)
        all_reduce_(x, group)
        reduce_scatter_rows(x, group)
        all_to_all_rows(x, group)
        broadcast_(x, group, source=1)
        sent = [1, 2, 3] if rank == 0 else [2, 2, 2]
        all_to_all_rows(x, group, sent, [(1, 2, 3)[rank], 2, 2])
        header = torch.zeros(3, dtype=torch.int64)
        right, left = (rank + 1) % 3, (rank - 1) % 3
        exchange_begin(
            [(header, right), (x.float(), right)],
            [(torch.empty_like(header), left), (torch.empty(6, 2), left)],
            group,
        ).wait()
    uneven = 80 if rank == 0 else 64
    assert ledger.table() == {
        ("0+1+2", "all_gather", "step"): (1, 192),
        ("0+1+2", "all_reduce", "step"): (1, 128),
        ("0+1+2", "reduce_scatter", "step"): (1, 64),
        ("0+1+2", "all_to_all", "step"): (2, 64 + uneven),
        ("0+1+2", "broadcast", "step"): (1, 0 if rank == 0 else 96),
        ("0+1+2", "exchange", "step"): (1, 24 + 48),
    }
    assert ledger.total(op="all_to_all") == (2, 64 + uneven)
    assert ledger.total(phase="forward") == (0, 0)
    ledger.clear()
    assert ledger.table() == {}


def test_plain_collectives_by_the_ring(pool):
    pool(3, _plain_collectives)


def _axes_have_names():
    mesh = Mesh.build("tp2,dp2")
    ledger = Ledger(mesh)
    with observed(ledger):
        for group in (mesh.tp, mesh.dp, mesh.shard, mesh.world):
            all_reduce_(torch.ones(4), group)
    assert {key[0]: total.calls for key, total in ledger.table().items()} == {
        "tp": 1,
        "dp": 2,
        "edp": 1,  # without expert axes every rank holds the same experts
    }


def test_groups_are_named_by_their_axes(pool):
    pool(4, _axes_have_names)


def test_bytes_of_an_exchange_do_not_follow_from_the_size():
    with pytest.raises(ValueError, match="a collective that all ranks enter alike, got 'exchange'"):
        ring_bytes("exchange", 2, 8)


class _Toy(nn.Module):
    """Two blocks and a root parameter, all of rows that 2 and 4 divide."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(FEATURES))

    def counts(self, batch):
        return {"loss": len(batch)}

    def loss(self, batch):
        x = batch
        for block in self.blocks:
            x = block(x)
        return (Term("loss", (x.sum() * self.scale.sum()), len(batch)),)


def _steps_send_what_theory_says(text, zero, micro):
    mesh = Mesh.build(text)
    torch.manual_seed(0)
    model = _Toy()
    made = layouts(model)
    step = Step(model, made, AdamW(dict(model.named_parameters()), made, mesh), mesh, zero=zero)
    ledger = Ledger(mesh)
    with observed(ledger), ledger.phase("step"):
        step([torch.ones(3, D) for _ in range(micro)], learning_rate=1e-3)
    block, root = ITEM * D * D, ITEM * FEATURES  # bytes
    whole, units = 2 * block + root, [root, block, block]  # what travels together under ZeRO-3
    shard = mesh.degree("dp")
    wanted = {}

    def add(group, op, *brought):
        if group is not None:
            key = (ledger.axis(group), op, "step")
            calls, sent = wanted.get(key, (0, 0))
            sent += sum(ring_bytes(op, group.size(), int(b)) for b in brought)
            wanted[key] = Total(calls + len(brought), sent)

    add(mesh.tokens, "all_reduce", 24, 16)  # a count and micro-batches; a sum, and if there is any
    add(mesh.world, "all_reduce", 8)  # the gradient's norm
    own = [size / shard for size in units] if zero == 3 else [whole / (shard if zero else 1)]
    add(mesh.rep, "all_reduce", *own)
    if zero == 0:
        add(mesh.shard, "all_reduce", whole)
    elif zero == 3:
        add(mesh.shard, "reduce_scatter", *units * micro)
        add(mesh.shard, "all_gather", root / shard, *[block / shard] * 4 * micro)
    else:
        add(mesh.shard, "reduce_scatter", *[whole] * (micro if zero == 2 else 1))
        add(mesh.shard, "all_gather", whole / shard)
    assert ledger.table() == wanted, (text, zero, micro)


def _every_stage(text):
    for zero in range(4):
        for micro in (1, 3):
            _steps_send_what_theory_says(text, zero, micro)


@pytest.mark.parametrize("text", ["dp2", "rep2,dp2"])
def test_a_step_sends_what_theory_says(pool, text):
    pool(4 if "rep" in text else 2, _every_stage, text)
