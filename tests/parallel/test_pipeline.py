"""A pipeline gives the gradients of one process, whatever its schedule; nothing runs twice."""

import functools
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from warploom.parallel.collectives import all_reduce_, observed
from warploom.parallel.mesh import Mesh
from warploom.parallel.pipeline import Action, Schedule, execute, simulate
from warploom.parallel.tensor import ColumnLinear, RowLinear, product

NAMES = ("gpipe", "1f1b", "interleaved", "zb_h1", "zbv", "dualpipev")
TOKENS = 5
OWN = """
F0.0 F3.0 F0.1 B3.0 F3.1 B0.0, I3.1 I0.1 W0.1 W3.1
F1.0 F2.0 F1.1 F2.1 B2.0 B1.0, I2.1 W2.1 B1.1
"""


def _forward_flops(gate_up, weight, *_, **__):
    return 2 * gate_up[0] * weight[0] * weight[1]


OPERATORS = {
    torch.ops.warploom.swiglu_linear_forward: _forward_flops,
    torch.ops.warploom.swiglu_linear_backward: lambda dy, gate_up, weight, weight_grad, *_, **__: (
        (1 + weight_grad) * _forward_flops(gate_up, weight)
    ),
}


def _counted():
    return FlopCounterMode(display=False, custom_mapping=OPERATORS)


class Block(nn.Module):
    """A linear whose weight gradient may wait, a norm whose gradient does not."""

    def __init__(self, width, out, recomputed):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Parameter(torch.randn(2 * out, width))
        self.down = nn.Parameter(torch.randn(out, out))
        self.bias = nn.Parameter(torch.randn(out))
        self.recomputed = recomputed

    def inner(self, x):
        h = product.linear(self.norm(x), self.up)
        return product.linear(product.swiglu_linear(h, self.down), self.down, self.bias)

    def forward(self, x):
        if self.recomputed and torch.is_grad_enabled():
            return checkpoint(self.inner, x, use_reentrant=False)
        return self.inner(x)


class Stages(nn.Module):
    """Stages of uneven widths; the first and the last share an embedding; one in the middle pays.

    The lengths of the micro-batches differ, so that a shape of another one would be seen.
    """

    def __init__(self, stages, recomputed=False):
        super().__init__()
        torch.manual_seed(0)
        self.stages = stages
        self.embedding = nn.Parameter(torch.randn(11, 4))
        self.widths = [4, *(3 + s % 3 for s in range(stages))]
        self.blocks = nn.ModuleList(
            Block(a, b, recomputed) for a, b in zip(self.widths, self.widths[1:], strict=False)
        )
        self.back = nn.Parameter(torch.randn(4, self.widths[-1]))
        self.double()

    def boundary(self, stage, batch):
        return (len(batch[0]), self.widths[stage + 1]), torch.float64

    def stage(self, s, x, batch):
        tokens, targets = batch
        assert (x is None) == (s == 0)
        y = self.blocks[s](F.embedding(tokens, self.embedding) if s == 0 else x)
        objective = 0.01 * y.square().sum() if s == self.stages // 2 else None
        if s < self.stages - 1:
            return y, objective
        logits = product.linear(product.linear(y, self.back), self.embedding)
        loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        return None, loss if objective is None else objective + loss


def _batches(count):
    g = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        tokens, targets = (torch.randint(0, 11, (TOKENS + i % 3,), generator=g) for _ in range(2))
        targets[: i % 2] = -100
        if i == 1:
            targets[:] = -100  # nothing but the objective in the middle trains
        made.append((tokens, targets))
    return made


@functools.cache
def _alone(stages, count):
    """Return gradients, objectives by stage, and FLOPs of one process without a schedule."""
    with _counted() as flops:
        model, objectives = Stages(stages), {}
        _run_alone(model, objectives, count)
    found = {name: p.grad for name, p in model.named_parameters()}
    return found, objectives, flops.get_total_flops()


def _run_alone(model, objectives, count):
    for i, batch in enumerate(_batches(count)):
        x, total = None, 0
        for s in range(model.stages):
            x, objective = model.stage(s, x, batch)
            if objective is not None:
                objectives[s, i] = objective.detach()
                total = total + objective
        total.backward()


def _of_stages(model, held):
    """Name the parameters of the stages that a rank holds."""
    names = {f"blocks.{s}." for s in held}
    last = model.stages - 1
    ends = {"embedding": {0, last}, "back": {last}}
    return {
        name: p
        for name, p in model.named_parameters()
        if any(name.startswith(n) for n in names) or ends.get(name, set()) & set(held)
    }


def _schedule(name, ranks):
    count = {"interleaved": 2 * ranks, "dualpipev": 2 * ranks + 1}.get(name, ranks + 2)
    if name == "own":
        return Schedule.table(OWN)
    return Schedule.named(name, ranks, count, virtual=3 if name == "interleaved" else 1)


def _pipelined(model, schedule, mesh, headers, batches):
    rank = mesh.coordinate("pp")
    held = [s for s, place in enumerate(schedule.placement) if place == rank]
    stages = {s: (lambda x, batch, s=s: model.stage(s, x, batch)) for s in held}
    boundary = None if headers else model.boundary
    found = execute(schedule, stages, batches, group=mesh.pp, boundary=boundary)
    return held, found


def _check_one(schedule, mesh, *, headers, recomputed):
    batches = _batches(schedule.microbatches)
    want, objectives, flops = _alone(schedule.stages, schedule.microbatches)
    model = Stages(schedule.stages, recomputed)
    with nullcontext() if recomputed else _counted() as counted:
        held, found = _pipelined(model, schedule, mesh, headers, batches)
    if counted is not None:
        total = all_reduce_(torch.tensor(counted.get_total_flops()), mesh.pp)
        assert total == flops, "no product runs twice"
    own = _of_stages(model, held)
    assert all((p.grad is not None) == (n in own) for n, p in model.named_parameters())
    if "embedding" in own and schedule.placement[0] != schedule.placement[-1]:
        all_reduce_(own["embedding"].grad, mesh.ends)
    for path, p in own.items():
        _close(p.grad, want[path], f"{schedule.name} {path}")
    assert found.keys() == {k for k in objectives if k[0] in held}
    for key, value in found.items():
        _close(value, objectives[key], f"{schedule.name} {key}")
    evaluated = Schedule.forward_only(schedule.placement, schedule.microbatches)
    for p in model.parameters():
        p.grad = None
    _, found = _pipelined(model, evaluated, mesh, not headers, batches)
    for key, value in found.items():
        _close(value, objectives[key], f"evaluation after {schedule.name} {key}")
    assert all(p.grad is None for p in model.parameters())


def _equal_one_process(names):
    size = dist.get_world_size()
    mesh = Mesh.build(f"pp{size}")
    for name in names:
        for mode in (False, True) if size == 2 else (name in ("interleaved", "zbv"),):
            _check_one(_schedule(name, size), mesh, headers=mode, recomputed=mode)


def _different_schedules_are_refused():
    mesh = Mesh.build("pp2")
    count = 3 + mesh.coordinate("pp")
    model = Stages(2)
    with pytest.raises(RuntimeError, match="every rank must run the same schedule"):
        _pipelined(model, Schedule.gpipe(2, count), mesh, True, _batches(count))
    with pytest.raises(RuntimeError, match="all with a boundary or all without"):
        _pipelined(model, Schedule.gpipe(2, 3), mesh, mesh.coordinate("pp") == 0, _batches(3))


def _close(got, want, label):
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0, msg=lambda m: f"{label}: {m}")


def _on_two():
    _equal_one_process((*NAMES, "own"))
    _different_schedules_are_refused()


def _on_four():
    _collectives_run_once()
    _equal_one_process(NAMES)


def _collectives_run_once():
    """Tensor-parallel stages communicate as often under every schedule."""
    mesh = Mesh.build("tp2,pp2")
    kinds = {}
    for name in ("1f1b", "zb_h1", "zbv", "dualpipev"):
        schedule = _schedule(name, 2)
        blocks = [
            nn.Sequential(ColumnLinear(4, 8, group=mesh.tp), RowLinear(8, 4, group=mesh.tp))
            for _ in range(schedule.stages)
        ]

        def bind(s, blocks=blocks):
            last = s == len(blocks) - 1
            return lambda x, batch: (
                (None, blocks[s](x).sum()) if last else (blocks[s](batch if x is None else x), None)
            )

        batches = [torch.randn(6, 4) for _ in range(schedule.microbatches)]
        own = [s for s, rank in enumerate(schedule.placement) if rank == mesh.coordinate("pp")]
        seen = Counter()

        @contextmanager
        def count(call, seen=seen):
            seen[call.op] += call.group is mesh.tp
            yield

        with observed(count):
            execute(schedule, {s: bind(s) for s in own}, batches, group=mesh.pp)
        runs = len(own) * schedule.microbatches
        first = sum(1 for s in own if s == 0) * schedule.microbatches  # its x needs no gradient
        assert seen["all_gather"] == 2 * runs
        assert seen["reduce_scatter"] == 2 * runs - first
        kinds[name] = set(seen)
    assert all(found == kinds["1f1b"] for found in kinds.values())


@pytest.mark.parametrize(("size", "check"), [(2, _on_two), (4, _on_four)])
def test_gradients_equal_those_of_one_process(ranks, size, check):
    ranks(size, check)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [False, True])
def test_one_rank_needs_no_group(name, mode):
    seen = []

    @contextmanager
    def watch(call):
        seen.append(call)
        yield

    with observed(watch):
        _check_one(_schedule(name, 1), Mesh.build(), headers=mode, recomputed=mode)
    assert not seen


def test_plain_sequential_stages_train_under_a_split_schedule():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    batches = [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)]
    torch.cat(batches).requires_grad_()
    model(torch.cat(batches)).square().sum().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    stages = {
        0: lambda x, batch: (model[:2](batch), None),
        1: lambda x, batch: (None, model[2](x).square().sum()),
    }
    execute(Schedule.zbv(1, 3), stages, batches, group=None)
    for p, gradient in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-12, rtol=0)


class Token:
    """Lives as long as what a micro-batch holds from its forward to its weight gradients."""


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_held_as_the_simulation_says(name):
    schedule = _schedule(name, 1)
    alive, most = set(), 0
    weight = torch.ones(2, 2, requires_grad=True)

    def stage(s, x, batch):
        nonlocal most
        token = Token()
        alive.add(key := (s, batch))
        weakref.finalize(token, alive.remove, key)
        most = max(most, len(alive))
        y = product.deferred(
            torch.ones(3, 2) if x is None else x,
            weight,
            forward=F.linear,
            input_gradient=lambda dy, x, w: dy @ w + 0 * id(token),
            weight_gradient=lambda dy, x: dy.t() @ x + 0 * id(token),
        )
        if (s, batch) not in split:
            y = Keep.apply(y, token)
        return (y, None) if s < schedule.stages - 1 else (None, y.sum())

    split = {(s, b) for kind, s, b in schedule.rows[0] if kind == "I"}
    stages = {s: (lambda x, b, s=s: stage(s, x, b)) for s in range(schedule.stages)}
    execute(schedule, stages, range(schedule.microbatches), group=None)
    assert not alive
    assert most == max(simulate(schedule).peak())


class Keep(torch.autograd.Function):
    """Holds a token until its backward."""

    @staticmethod
    def forward(ctx, x, token):
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy, None


TWO = dist.ProcessGroup(1, 2)  # of a rank and a size, without a backend


def _stage(x, batch):
    return None, torch.zeros((), requires_grad=True)


CIRCLE = tuple(
    tuple(Action(k, s, 0) for k, s in row) for row in ((("B", 0), ("F", 0)), (("F", 1), ("B", 1)))
)


@pytest.mark.parametrize(
    ("schedule", "stages", "batches", "group", "message"),
    [
        (Schedule.gpipe(2, 1), {0: _stage}, [0], None, "is for 2 ranks; the group has 1"),
        (Schedule.gpipe(2, 1), {0: _stage}, [0], TWO, r"rank 1 must hold the stages \[1\]; .*0"),
        (Schedule.gpipe(1, 2), {0: _stage}, [0], None, "for 2 micro-batches; got 1"),
        (
            Schedule("table", (0, 1), 1, CIRCLE),
            {1: _stage},
            [0],
            TWO,
            r"circle: B0.0 \(rank 0\) waits for F0.0",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_sent(
    schedule, stages, batches, group, message
):
    with pytest.raises(ValueError, match=message):
        execute(schedule, stages, batches, group=group)


@pytest.mark.parametrize(
    ("stages", "boundary", "message"),
    [
        ({0: lambda x, b: (None, None)}, None, r"stage 0 of 2 returned none"),
        (
            {0: lambda x, b: (torch.ones(2, 3), torch.ones(1))},
            None,
            r"an objective must be 0-dim; that of stage 0 is \[1\]",
        ),
        (
            {0: lambda x, b: (torch.ones(2, 3, dtype=torch.int64), None)},
            None,
            r"must be floating-point .* stage 0 is torch.int64 \[2, 3\]",
        ),
        (
            {0: lambda x, b: (torch.ones(2, 3), None)},
            lambda s, b: ((2, 4), torch.float32),
            r"stage 0 must be as its boundary says, \[2, 4\] .*; it is \[2, 3\]",
        ),
        (
            {0: lambda x, b: (torch.ones(2, 3), None), 1: lambda x, b: (x, None)},
            None,
            r"the last none; stage 1 of 2 returned one",
        ),
    ],
)
def test_what_a_stage_must_return(stages, boundary, message):
    with pytest.raises(ValueError, match=message):
        execute(Schedule.zbv(1, 1), {1: _stage, **stages}, [0], group=None, boundary=boundary)


def test_training_needs_gradients():
    with torch.no_grad(), pytest.raises(ValueError, match="gpipe trains, which no_grad forbids"):
        execute(Schedule.gpipe(1, 1), {0: _stage}, [0], group=None)
