"""Optimizers against torch's, and sharded against unsharded."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import AdamW, Muon
from warploom.parallel.optimizer.muon import newton_schulz
from warploom.parallel.sharding import assemble, layouts


def _model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 3)).to(dtype)


def _gradient(step, model):
    g = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(p.shape, generator=g, dtype=torch.float64)
        for name, p in model.named_parameters()
    }


def _own(optimizer, gradients):
    return {
        path: gradients[path][s.start : s.stop].to(s.master.dtype).clone()
        for path, s in optimizer.shards.items()
    }


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torch(decay):
    ours, theirs = _model(), _model()
    parameters = dict(ours.named_parameters())
    optimizer = AdamW(parameters, layouts(ours), Mesh.build(), weight_decay=decay)
    named = dict(theirs.named_parameters())
    oracle = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(4):
        gradients = _gradient(step, ours)
        for name, p in named.items():
            p.grad = gradients[name].clone()
        oracle.step()
        optimizer.step(_own(optimizer, gradients), 1e-2)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, named[name], atol=1e-12, rtol=0)


def test_newton_schulz_makes_a_matrix_nearly_orthogonal():
    torch.manual_seed(0)
    for shape in ((8, 8), (5, 16), (16, 5)):
        x = newton_schulz(torch.randn(shape, dtype=torch.float64))
        values = torch.linalg.svdvals(x)
        assert values.min() > 0.6
        assert values.max() < 1.3
    u = torch.randn(6, 4, dtype=torch.float64)
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    assert torch.sum(newton_schulz(u) * (left @ right)) > 3.4  # along the polar factor: 4 if exact


def test_muon_equals_torch():
    """Torch iterates in bfloat16, we in the masters' float64: close, and far from no Nesterov."""
    torch.manual_seed(1)
    ours, theirs = (torch.nn.Linear(24, 40, bias=False) for _ in range(2))
    theirs.weight.data.copy_(ours.double().weight.data.float())
    start = theirs.weight.detach().clone()
    optimizer = Muon(
        dict(ours.named_parameters()),
        layouts(ours),
        Mesh.build(),
        hidden=lambda path, p: True,
        weight_decay=0.1,
    )
    oracle = torch.optim.Muon(
        theirs.parameters(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(4):
        gradients = _gradient(step, ours)
        theirs.weight.grad = gradients["weight"].float()
        oracle.step()
        optimizer.step(_own(optimizer, gradients), 0.02)
    moved = (theirs.weight.detach() - start).double()
    error = ours.weight.detach() - theirs.weight.detach().double()
    assert float(error.norm() / moved.norm()) < 0.02


def _run(optimizer_class, mesh, dtype):
    model = _model(dtype)
    extra = {"hidden": lambda path, p: p.dim() > 1} if optimizer_class is Muon else {}
    parameters = dict(model.named_parameters())
    made = layouts(model)
    optimizer = optimizer_class(parameters, made, mesh, **extra)
    for step in range(3):
        optimizer.step(_own(optimizer, _gradient(step, model)), 1e-2)
    entries = {f"{e.prefix}/{i}": e for i, e in enumerate(optimizer.entries())}
    state = assemble(
        {name: e.tensor for name, e in entries.items()},
        {name: _prefixed(e) for name, e in entries.items()},
        mesh.world,
    )
    return parameters, state


def _prefixed(entry):
    from dataclasses import replace

    pieces = tuple(replace(p, name=f"{entry.prefix}/{p.name}") for p in entry.layout.pieces)
    return replace(entry.layout, pieces=pieces)


def _sharded_equals_unsharded(optimizer_class, dtype):
    # The last bit may differ: the fused step rounds its vectors and their tails differently.
    rtol = 0 if dtype == torch.float64 else 1e-6
    alone, state_alone = _run(optimizer_class, _single(), dtype)
    sharded, state = _run(optimizer_class, Mesh.build(), dtype)
    for name, p in alone.items():
        torch.testing.assert_close(sharded[name], p, atol=0, rtol=0)
    assert state.keys() == state_alone.keys()
    for name in state:
        torch.testing.assert_close(state[name], state_alone[name], atol=0, rtol=rtol)


def _single():
    from warploom.parallel.mesh import Degrees, _build

    return _build(Degrees.parse("").resolve(1), 0, lambda ranks: None)


@pytest.mark.parametrize("optimizer_class", [AdamW, Muon])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sharded_equals_unsharded(ranks, optimizer_class, dtype):
    ranks(3, _sharded_equals_unsharded, optimizer_class, dtype)


def test_masters_of_16_bits_are_float32():
    model = _model(torch.bfloat16)
    optimizer = AdamW(dict(model.named_parameters()), layouts(model), Mesh.build())
    assert {s.master.dtype for s in optimizer.shards.values()} == {torch.float32}
    before = {n: p.clone() for n, p in model.named_parameters()}
    tiny = {path: torch.ones_like(s.master) for path, s in optimizer.shards.items()}
    for _ in range(200):  # each step is far below a bfloat16 ulp of the larger weights
        optimizer.step(tiny, 1e-5)
    moved = [not torch.equal(p, before[n]) for n, p in model.named_parameters()]
    assert all(moved), "small steps must add up in the masters"


def _muon_refuses_split_matrices():
    from warploom.parallel.tensor import ColumnLinear

    mesh = Mesh.build("tp2")
    layer = ColumnLinear(4, 6, group=mesh.tp)
    with pytest.raises(ValueError, match="Muon needs whole matrices, but weight is split"):
        Muon(dict(layer.named_parameters()), layouts(layer), mesh, hidden=lambda path, p: True)
    assert dist.get_world_size() == 2


def test_muon_refuses_split_matrices(ranks):
    ranks(2, _muon_refuses_split_matrices)
