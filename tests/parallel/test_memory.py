"""Peaks in bytes by hand, recomputation that changes no gradient, offload that is exact."""

import gc
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from warploom.kernels.norm import rms_norm
from warploom.parallel.collectives import gather, observed
from warploom.parallel.memory import Recompute, offloaded
from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import AdamW
from warploom.parallel.sharding import layouts
from warploom.parallel.tensor import ColumnLinear, RowLinear
from warploom.recipes.plan.tracker import track

KIB = 1024


class Layers(nn.Module):
    """Two linears of 16 KiB each over 128 x 64 floats (32 KiB)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 64, bias=False)
        self.second = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_bytes_of_a_small_function_are_exact():
    model = Layers()
    x = torch.randn(128, 64)  # there before: counted while the first linear keeps it
    with track(model=model) as seen:
        assert seen.live == dict.fromkeys(seen.live, 0) | {"parameters": 32 * KIB}
        y = model(x)
        # kept: x by the first linear, the tanh's output by itself and by the second linear
        assert seen.live["activations"] == 64 * KIB
        assert seen.live["temporaries"] == 32 * KIB  # y; the tanh's input is gone
        y.backward(torch.ones_like(y))
        assert seen.live["activations"] == 0
        assert seen.live["gradients"] == 32 * KIB
        for p in model.parameters():
            p.grad = None
        assert seen.live["gradients"] == 0
        del y
    assert seen.live == dict.fromkeys(seen.live, 0) | {"parameters": 32 * KIB}
    assert seen.highest["activations"] == 64 * KIB
    assert seen.peak.total == sum(seen.peak.by.values())
    assert seen.cuda is None


def test_the_peak_names_its_module():
    class Wide(nn.Module):
        def forward(self, x):
            return x.repeat(1, 8).exp().sum(-1, keepdim=True) + x

    model = nn.Sequential(nn.Linear(64, 64, bias=False), Wide(), nn.Linear(64, 1, bias=False))
    x = torch.randn(128, 64)
    with track(model=model) as seen, torch.no_grad():
        model(x)
    # the linear's output, its eightfold repetition and the exponential of that
    assert seen.peak.total == sum(p.nbytes for p in model.parameters()) + (1 + 8 + 8) * 32 * KIB
    assert seen.peak.at == "1"
    with track(model=model) as seen:
        model(x).sum().backward()
    assert seen.peak.at == "1 (backward)"


def test_a_storage_counts_once_and_parameters_never():
    weight = nn.Parameter(torch.randn(64, 64))
    holder = nn.ParameterList([weight])
    x = torch.randn(64, 64, requires_grad=True)
    with track(model=holder) as seen:
        y = (x @ weight.t()) * x.view(-1).view(64, 64)
        assert seen.live["activations"] == 2 * 16 * KIB  # x, thrice; the product; not the weight
        del y
        assert seen.live["activations"] == 0


def test_optimizer_state_and_its_masters():
    model = Layers().bfloat16()
    made = layouts(model)
    mesh = Mesh.build("")
    optimizer = AdamW(dict(model.named_parameters()), made, mesh)
    with track(model=model, optimizer=optimizer) as seen:
        assert seen.live["parameters"] == 16 * KIB
        assert seen.live["optimizer"] == 3 * 32 * KIB  # master, mean, square
    plain = torch.optim.AdamW(model.parameters())
    with track(model=model, optimizer=plain) as seen:
        model(torch.randn(4, 64, dtype=torch.bfloat16)).sum().backward()
        plain.step()
        assert seen.live["optimizer"] == 2 * 16 * KIB + 2 * 4  # moments, and two counts of steps
        assert seen.live["gradients"] == 16 * KIB


def test_nothing_is_left_behind():
    model = Layers()
    with track(model=model) as seen:
        for _ in range(3):
            model(torch.randn(128, 64)).sum().backward()
            model.zero_grad()
        gc.collect()
        assert sum(seen.live.values()) == 32 * KIB
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_the_cost_of_an_operator_does_not_grow_with_what_lives():
    def seconds(live):
        x = torch.zeros(4)
        with track() as seen:
            kept = [x + 1 for _ in range(live)]
            begin = time.process_time()
            for _ in range(300):
                x + 1
            took = time.process_time() - begin
            assert sum(seen.live.values()) == len(kept) * 16
        return took

    few, many = (min(seconds(n) for _ in range(5)) for n in (10, 3000))
    assert many < 4 * few


class Mlp(nn.Module):
    """A tensor-parallel block: norm, and a gated feed-forward."""

    def __init__(self, group, recompute="none"):
        super().__init__()
        torch.manual_seed(0)
        self.group = group
        self.recompute = Recompute.parse(recompute)
        self.scale = nn.Parameter(torch.ones(32))
        self.up = ColumnLinear(32, 256, group=group, parts={"a": 128, "b": 128})
        self.down = RowLinear(128, 32, group=group)
        self.double()

    def entered(self, x):
        return self.up(rms_norm(x, self.scale))

    def inner(self, x):
        a, b = self.recompute.run("norm", self.entered, x).chunk(2, dim=-1)
        return self.down(F.silu(a) * b)

    def mixed(self, x):
        return self.recompute.run("feed_forward", self.inner, x)

    def forward(self, x):
        return x + self.recompute.run("block", self.mixed, x)


def _run(recompute, group=None, blocks=4):
    model = nn.Sequential(*[Mlp(group, recompute) for _ in range(blocks)])
    torch.manual_seed(1)
    ranks = 1 if group is None else group.size()
    x = torch.randn(ranks, 64 // ranks, 32, dtype=torch.float64)
    own = x[0 if group is None else group.rank()].clone().requires_grad_()
    calls = []

    class Open:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    def observer(call):
        calls.append(call.op)
        return Open()

    with track(model=model) as seen, observed(observer):
        y = model(own)
        kept = seen.live["activations"]
        (y.square().sum() / 2).backward()
    return seen, kept, calls, [own.grad, *(p.grad for p in model.parameters())]


def _recomputation_frees(size):
    group = Mesh.build(f"tp{size}").tp if size > 1 else None
    found = {name: _run(name, group) for name in ("none", "selective", "feed_forward", "full")}
    _, kept, calls, gradients = found["none"]
    tokens = 64 * 8
    norm = 4 * tokens * 32  # the gathered input of four column linears
    own = 64 // size
    for name, (seen, now, ops, grads) in found.items():
        for got, want in zip(grads, gradients, strict=True):
            torch.testing.assert_close(got, want, atol=0, rtol=0)
        assert seen.peak.by["activations"] <= kept, name
        gathers = 4 * (name != "none") * (size > 1)
        assert ops.count("all_gather") == calls.count("all_gather") + gathers, name
        assert now < kept or name == "none", name
    roots = 4 * own * 8  # a float64 a token, which each norm kept
    assert found["selective"][1] == kept - norm - roots
    assert found["full"][1] == 4 * own * 32 * 8  # the input of each block, and nothing else
    assert found["feed_forward"][1] == found["full"][1]
    peaks = [found[name][0].peak.total for name in ("none", "selective", "full")]
    assert peaks[0] > peaks[1] > peaks[2]


@pytest.mark.parametrize("size", [1, 2])
def test_recomputation_frees_what_the_theory_says(ranks, size):
    if size == 1:
        _recomputation_frees(1)
    else:
        ranks(size, _recomputation_frees, size)


def _peaks_of_every_rank():
    mesh = Mesh.build("tp2")
    found = _run("none", mesh.tp)[0]
    lines = found.gather(mesh.world)
    assert len(lines) == 2
    assert lines[dist.get_rank()]["highest"] == found.highest
    assert all(line["peak"]["total"] > 0 and line["cuda"] is None for line in lines)
    with track() as seen:
        whole = gather(torch.zeros(8, 8, requires_grad=True), mesh.tp)
        assert seen.highest["communication"] == 256 + 2 * 256
        del whole


def test_peaks_gather_and_buffers_are_seen(ranks):
    ranks(2, _peaks_of_every_rank)


def test_recompute_is_read_and_refused_in_words():
    assert str(Recompute.parse("moe, norm")) == "moe,norm"
    for name in ("none", "selective", "full"):
        assert str(Recompute.parse(name)) == name
    for text in ("", "some", "full,norm", "norm,what"):
        with pytest.raises(ValueError, match="recompute must be none, full, selective or a list"):
            Recompute.parse(text)
    with pytest.raises(ValueError, match="operator must be one of block, norm"):
        Recompute.parse("norm").run("nrom", torch.exp, torch.ones(1))


def test_without_gradients_nothing_is_checkpointed():
    calls = []
    with torch.no_grad():
        Recompute.parse("norm").run("norm", calls.append, 1)
    assert calls == [1]


def test_random_numbers_are_drawn_again_as_they_were():
    x = torch.ones(1000, requires_grad=True)
    y = Recompute.parse("norm").run("norm", lambda t: F.dropout(t) * t, x)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, 2 * y.detach())


def test_offload_is_exact_and_moves_each_storage_once():
    def gradients(context):
        torch.manual_seed(3)
        model = Layers()
        x = torch.randn(128, 64, requires_grad=True)
        with context as moved:
            y = (model(x) * x[:, 1:33].repeat(1, 2)).sigmoid() + x.t().t().exp()
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        return moved, [x.grad, *(p.grad for p in model.parameters())]

    moved, got = gradients(offloaded(least=KIB))
    _, want = gradients(torch.enable_grad())
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    # x; tanh; the second linear's output; the repetition; the sigmoid; the exponential
    assert moved.out == 6 * 32 * KIB
    assert moved.back == 7 * 32 * KIB  # x is let go, and comes again for the model's first layer
    assert moved.tensors > 6
    small, got = gradients(offloaded(least=33 * KIB))
    assert small.out == small.tensors == 0
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_offload_leaves_parameters_and_sees_changes():
    weight = nn.Parameter(torch.randn(64, 64))
    x = torch.randn(64, 64, requires_grad=True)
    with offloaded(least=0) as moved:
        y = x @ weight.t()
        z = torch.zeros(64, 64).add_(x.detach())
        first = x * z
        z.add_(1.0)  # autograd would refuse: here each save has its own copy
        second = x * z
    assert moved.out == 3 * 16 * KIB  # x, and z twice
    (got,) = torch.autograd.grad((y + first + second).sum(), x)
    torch.testing.assert_close(got, weight.sum(0).expand(64, 64) + 2 * x.detach() + 1)


def test_offload_gives_back_host_memory():
    x = torch.randn(64, 64, requires_grad=True)
    with offloaded(least=0) as moved:
        first = x.exp()
        del first
        second = x.exp()
    assert moved.out == 2 * 16 * KIB
    second.sum().backward()
    with pytest.raises(ValueError, match="least and prefetch must be at least 0; got least=-1"):
        offloaded(least=-1).__enter__()
