"""A pipeline gives the gradients of one process, whatever its schedule; nothing runs twice."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from warploom.parallel.collectives import all_reduce_, observed
from warploom.parallel.mesh import Mesh
from warploom.parallel.pipeline import Action, Schedule, execute
from warploom.parallel.tensor import product

TOKENS = 5
OWN = """
F0.0 F3.0 F0.1 B3.0 F3.1 B0.0, I3.1 I0.1 W0.1 W3.1
F1.0 F2.0 F1.1 F2.1 B2.0 B1.0, I2.1 W2.1 B1.1
"""


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
            nn.Sequential(Block(a, b, recomputed), Block(b, b, recomputed))
            for a, b in zip(self.widths, self.widths[1:], strict=False)
        )
        self.back = nn.Parameter(torch.randn(4, self.widths[-1]))
        self.double()

    def boundary(self, stage, batch):
        return (len(batch[0]), self.widths[stage + 1]), torch.float64

    def stage(self, s, x, batch, log=None):
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


def _alone(stages, batches):
    """Return gradients and objectives by stage of one process without a schedule."""
    model = Stages(stages)
    objectives = {}
    for i, batch in enumerate(batches):
        x, total = None, 0
        for s in range(stages):
            x, objective = model.stage(s, x, batch)
            if objective is not None:
                objectives[s, i] = objective.detach()
                total = total + objective
        total.backward()
    return {name: p.grad for name, p in model.named_parameters()}, objectives


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


def _equals_one_process(names):
    size = dist.get_world_size()
    mesh = Mesh.build(f"pp{size}")
    for name in names:
        schedule = _schedule(name, size)
        batches = _batches(schedule.microbatches)
        want, objectives = _alone(schedule.stages, batches)
        for headers, recomputed in ((True, False), (False, True)):
            model = Stages(schedule.stages, recomputed)
            held, found = _pipelined(model, schedule, mesh, headers, batches)
            own = _of_stages(model, held)
            assert all((p.grad is not None) == (n in own) for n, p in model.named_parameters())
            if "embedding" in own and schedule.placement[0] != schedule.placement[-1]:
                all_reduce_(own["embedding"].grad, mesh.ends)
            for path, p in own.items():
                _close(p.grad, want[path], f"{name} {path}")
            assert found.keys() == {k for k in objectives if k[0] in held}
            for key, value in found.items():
                _close(value, objectives[key], f"{name} {key}")


def _close(got, want, label):
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0, msg=lambda m: f"{label}: {m}")


NAMES = ("gpipe", "1f1b", "interleaved", "zb_h1", "zbv", "dualpipev")


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_equal_those_of_one_process(ranks, size):
    ranks(size, _equals_one_process, (*NAMES, "own") if size == 2 else NAMES)
