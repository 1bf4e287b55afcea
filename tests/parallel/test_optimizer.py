"""Optimizers against torch's, and sharded against unsharded."""

from contextlib import contextmanager

import pytest
import torch
from tests.parallel.toy import stack
from torch import nn

from warploom.parallel.checkpoint import latest, load, save
from warploom.parallel.collectives import all_reduce_, barrier, observed
from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import AdamW, Muon
from warploom.parallel.optimizer.muon import newton_schulz
from warploom.parallel.sharding import assemble, layouts
from warploom.parallel.step import Step


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


@pytest.mark.parametrize("optimizer_class", [AdamW, Muon])
def test_what_is_frozen_stays(optimizer_class):
    model = _model()
    options = {"hidden": lambda path, p: p.dim() == 2} if optimizer_class is Muon else {}
    optimizer = optimizer_class(
        dict(model.named_parameters()), layouts(model), Mesh.build(), **options
    )
    for frozen, moving in (("0.weight", "2.weight"), ("2.weight", "0.weight")):
        before = {name: p.clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.requires_grad_(name != frozen)
        optimizer.step(_own(optimizer, _gradient(0, model)), 1e-2)
        after = dict(model.named_parameters())
        assert torch.equal(after[frozen], before[frozen])  # no decay either, as torch.optim has it
        assert not torch.equal(after[moving], before[moving])


def test_what_others_write_is_told_and_adopted():
    model = _model(torch.bfloat16)
    optimizer = AdamW(dict(model.named_parameters()), layouts(model), Mesh.build())
    gradients = {path: torch.zeros_like(s.master) for path, s in optimizer.shards.items()}
    optimizer.step(gradients, 1e-6)
    model.load_state_dict({name: torch.full_like(p, 0.5) for name, p in model.named_parameters()})
    with pytest.raises(RuntimeError, match=r"6 parameters, 0.weight first, were written since"):
        optimizer.step(gradients, 1e-6)
    optimizer.adopt()
    optimizer.step(gradients, 1e-6)
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for p in model.parameters())


def test_a_parameter_without_rows_is_refused():
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="scale is 0-dim: make it"):
        AdamW(dict(model.named_parameters()), layouts(model), Mesh.build())


def _each_matrix_has_one_owner():
    """Over tp and dp: what travels is each element once forth, and back to all that hold it."""
    mesh = Mesh.build("tp2,dp2,ep2")
    made = stack(mesh, muon=True)
    log = []

    @contextmanager
    def observer(call):
        log.append((call.op, call.group, [m.elements for m in call.messages if m.sent]))
        yield

    gradients = {path: torch.ones_like(s.master) for path, s in made.optimizer.shards.items()}
    with observed(observer):
        made.optimizer.step(gradients, 1e-2)
    travels = [sum(sent) for op, group, sent in log if op == "all_to_all" and group is mesh.stage]
    assert len(travels) == 2
    sums = all_reduce_(torch.tensor(travels), mesh.world).tolist()
    logical = 2 * (16 * 6 + 8 * 6 + 2 * 6 + 4 * 6 * 6)  # of two blocks: up, down, gate, experts
    assert sums == [logical, logical]  # nothing is held twice: dp shares out what tp does not split
    costs = [0, 0, 0, 0]
    for matrix, owner in made.optimizer.matrices.owner.items():
        costs[owner] += matrix.cost
    assert max(costs) < 1.5 * min(costs)


def test_each_matrix_has_one_owner(ranks):
    ranks(4, _each_matrix_has_one_owner)


def test_muon_refuses_vectors():
    model = _model()
    with pytest.raises(ValueError, match=r"made of matrices, but 0.bias of 0.bias has the shape"):
        Muon(
            dict(model.named_parameters()),
            layouts(model),
            Mesh.build(),
            hidden=lambda path, p: True,
        )


def _offload_equals_not_offload(text):
    mesh = Mesh.build(text)
    for muon in (False, True):
        for zero in range(4):
            steps, gathered = [], []
            for offload in (False, True):
                made = stack(mesh, zero=zero, muon=muon, offload=offload)
                step = Step(made.model, made.layouts, made.optimizer, mesh, zero=zero)
                steps.append([step(made.batches(n), learning_rate=1e-2) for n in range(2)])
                with step.opened(whole=True):
                    gathered.append({n: p.clone() for n, p in made.model.named_parameters()})
                assert all(
                    (s.master is not s.rows) for s in made.optimizer.shards.values() if offload
                )
            assert steps[0] == steps[1], (muon, zero)
            for path, parameter in gathered[0].items():
                assert torch.equal(parameter, gathered[1][path]), (muon, zero, path)


def test_offload_equals_not_offload():
    _offload_equals_not_offload("")


def test_offload_equals_not_offload_on_ranks(ranks):
    ranks(2, _offload_equals_not_offload, "dp2")


def _save_under(folder, text, zero):
    mesh = Mesh.build(text)
    made = stack(mesh, muon=True)
    step = Step(made.model, made.layouts, made.optimizer, mesh, zero=zero)
    for n in range(2):
        step(made.batches(n), learning_rate=1e-2)
    save(folder, made.optimizer.entries(), {"step": 2}, mesh)
    _write(folder, "saved", _whole(made, step, mesh), mesh)


def _load_under(folder, text, zero):
    mesh = Mesh.build(text)
    made = stack(mesh, muon=True)
    step = Step(made.model, made.layouts, made.optimizer, mesh, zero=zero)
    for tensor in (e.tensor for e in made.optimizer.entries()):
        tensor.fill_(float("nan"))
    made.optimizer.steps = load(latest(folder), made.optimizer.entries(), mesh)["step"]
    made.optimizer.publish()
    found = _whole(made, step, mesh)
    want = torch.load(folder / "saved.pt")
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor), name
    assert step(made.batches(2), learning_rate=1e-2).grad_norm > 0


def _whole(made, step, mesh):
    """Return every parameter, master and state in full, by logical name."""
    entries = dict(enumerate(made.optimizer.entries()))
    result = assemble(
        {str(n): e.tensor for n, e in entries.items()},
        {str(n): _prefixed(e) for n, e in entries.items()},
        mesh.world,
    )
    with step.opened(whole=True):
        return result | assemble(dict(made.model.named_parameters()), made.layouts, mesh.world)


def _write(folder, name, tensors, mesh):
    if mesh.rank == 0:
        torch.save(tensors, folder / f"{name}.pt")
    barrier(mesh.world)


@pytest.mark.parametrize(
    ("before", "after"),
    [(("dp2", 3), ("tp2", 1)), (("tp2", 1), ("dp2,ep2", 3)), (("dp2", 0), ("rep2", 2))],
)
def test_a_checkpoint_fits_any_stage(pool, tmp_path, before, after):
    pool(2, _save_under, tmp_path, *before)
    pool(2, _load_under, tmp_path, *after)


def test_an_optimizer_that_has_stepped_keeps_its_stage():
    made = stack(Mesh.build())
    made.optimizer.steps = 3
    with pytest.raises(RuntimeError, match="3 steps under zero=1 cannot go on under zero=3"):
        made.optimizer.place(3)
    made.optimizer.place(2)
