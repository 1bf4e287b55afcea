"""FP8 in linear layers: the bits of `fp8_linear`, a weight rounded once a step, its scales."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from warploom.kernels.gemm import Fp8Recipe, fp8_linear
from warploom.parallel.collectives import all_gather_rows
from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import AdamW
from warploom.parallel.sharding import layouts
from warploom.parallel.tensor import ColumnLinear, Fp8Product, RowLinear, fp8, update_scales
from warploom.parallel.tensor.product import WeightGradients, swiglu_linear

T, D, F = 70, 160, 192
SCALINGS = ("tensor", "row", "block", "mx")
DELAYED = Fp8Recipe(scaling="tensor", delayed=True, history=3)


def draw(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype)


@pytest.fixture
def counted(monkeypatch):
    """Count how often weights are rounded and products multiplied."""
    calls = {"weight": 0, "gemm": 0}

    def counting(name, fn):
        def run(*args, **kwargs):
            calls[name] += 1
            return fn(*args, **kwargs)

        return run

    monkeypatch.setattr(fp8, "fp8_weight", counting("weight", fp8.fp8_weight))
    monkeypatch.setattr(fp8, "fp8_gemm", counting("gemm", fp8.fp8_gemm))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", [ColumnLinear, RowLinear])
def test_a_layer_has_the_bits_of_fp8_linear(kind, scaling, dtype):
    torch.manual_seed(1)
    recipe = Fp8Recipe(scaling=scaling)
    layer = kind(D, F, group=None, bias=True, fp8=recipe).to(dtype)
    nn.init.normal_(layer.bias)
    x, dy = draw(2, T // 2, D, dtype=dtype).requires_grad_(), draw(2, T // 2, F, seed=1).to(dtype)
    y = layer(x)
    y.backward(dy)
    x2, w2 = (t.detach().clone().requires_grad_() for t in (x, layer.weight))
    wanted = fp8_linear(x2, w2, recipe=recipe) + layer.bias
    wanted.backward(dy)
    assert torch.equal(y, wanted)
    assert torch.equal(x.grad, x2.grad)
    assert torch.equal(layer.weight.grad, w2.grad)
    with torch.no_grad():
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("recipe", [*(Fp8Recipe(scaling=s) for s in SCALINGS), DELAYED], ids=str)
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_weight_gradient_that_waits_has_the_same_bits(recipe, recomputed, counted):
    torch.manual_seed(1)
    layer = ColumnLinear(D, F, group=None, fp8=recipe)
    x, dy = draw(T, D).requires_grad_(), draw(T, F, seed=1)
    layer(x).backward(dy)
    wanted, layer.weight.grad = layer.weight.grad, None
    seen = None if layer.fp8.seen is None else layer.fp8.seen.clone()
    counted["gemm"], dx, x.grad = 0, x.grad, None
    queue = WeightGradients()
    with queue.open():
        y = checkpoint(layer, x, use_reentrant=False) if recomputed else layer(x)
        y.backward(dy)
    assert layer.weight.grad is None
    assert torch.equal(x.grad, dx)
    queue.run()
    assert torch.equal(layer.weight.grad, wanted)
    assert counted["gemm"] == 3  # recomputation stops at what the product keeps
    assert seen is None or torch.equal(layer.fp8.seen, seen)


def test_what_needs_no_gradient_gets_none():
    layer = ColumnLinear(D, F, group=None, fp8=Fp8Recipe())
    layer(draw(T, D)).sum().backward()
    assert layer.weight.grad is not None
    layer.requires_grad_(False).zero_grad()
    x = draw(T, D).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    assert not layer(x.detach()).requires_grad


def test_under_autocast_the_weight_is_rounded_from_its_own_values():
    layer = ColumnLinear(D, F, group=None, fp8=Fp8Recipe())
    x = draw(T, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    wanted = fp8_linear(x.bfloat16(), layer.weight, recipe=Fp8Recipe())
    assert torch.equal(y, wanted)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_a_weight_is_rounded_once_until_it_changes(counted):
    layer = RowLinear(D, F, group=None, fp8=Fp8Recipe())
    x = draw(T, D).requires_grad_()
    with torch.no_grad():
        layer(x)  # without the copy for a backward
    counted["weight"] = 0
    for _ in range(2):  # micro-batches, an evaluation, a recomputation
        layer(x).sum().backward()
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        with torch.no_grad():
            layer(x)
    assert counted["weight"] == 1
    before = layer(x).detach()
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer(x), 2 * before)
    assert counted["weight"] == 2
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(2)
    assert torch.equal(other(x), 4 * before)
    assert torch.equal(layer(x), 2 * before)
    layer.weight = nn.Parameter(layer.weight.detach() / 2)
    assert torch.equal(layer(x), before)


def test_a_weight_that_is_written_before_the_backward_is_refused():
    layer = ColumnLinear(D, F, group=None, fp8=Fp8Recipe())
    y = layer(draw(T, D).requires_grad_())
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"shape \[192, 160\] was written since its forward"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_below_a_step_of_fp8_are_not_lost(dtype):
    """A hundred steps that FP8 and bfloat16 do not see one by one move the weight by their sum."""
    layer = ColumnLinear(32, 32, group=None, fp8=Fp8Recipe()).to(dtype)
    gradient = torch.ones(32, 32)
    gradient[:, 0] = 0.0
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[:, 0] = 1.75  # does not move, and holds the scale
    parameters, made = dict(layer.named_parameters()), layouts(layer)
    optimizer = AdamW(parameters, made, Mesh.alone(), weight_decay=0.0)
    before = layer.fp8.codes(layer.weight, copy=False).dequantize(torch.float32)
    optimizer.step({"weight": gradient}, 1e-3)
    after = layer.fp8.codes(layer.weight, copy=False).dequantize(torch.float32)
    assert torch.equal(after, before)
    assert before[0, 1] == 1.0
    for _ in range(99):
        optimizer.step({"weight": gradient}, 1e-3)
    master = optimizer.shards["weight"].master
    assert master.dtype == torch.float32
    torch.testing.assert_close(master[:, 1:], torch.full((32, 31), 0.9), atol=1e-3, rtol=0)
    moved = layer.fp8.codes(layer.weight, copy=False).dequantize(torch.float32)
    assert moved[0, 1] == 0.875  # of steps of 1 / 16: not what the optimizer has


class Two(nn.Module):
    """Two layers, of which the second has an input that overflows when it is told to."""

    def __init__(self, recipe=DELAYED):
        super().__init__()
        self.up = ColumnLinear(64, 96, group=None, fp8=recipe)
        self.down = RowLinear(96, 64, group=None, fp8=recipe)

    def forward(self, x):
        return self.down(self.up(x).relu())


def test_histories_follow_the_definition():
    torch.manual_seed(0)
    model, amaxes = Two(), []
    layer = model.up.fp8
    for step in range(5):
        scale = layer.scale.clone()
        x, dy = draw(24, 64, seed=step) * 3.0**step, draw(24, 64, seed=9 + step)
        x.requires_grad_()
        model.up.weight.grad = None
        y = model(x)
        y.register_hook(lambda _: None)
        up = model.up(x)
        up.backward(dy @ model.down.weight.detach())
        amaxes.append((x.abs().max().item(), model.up.weight.abs().max().item()))
        if step:  # the products took the scales of the steps before
            want = [max(a[n] for a in amaxes[max(0, step - 3) : step]) / 448 for n in (0, 1)]
            assert scale[:2].tolist() == pytest.approx(want)
        update_scales(model)
        with torch.no_grad():
            model.up.weight.mul_(1.5)
    assert layer.history[0].tolist() == pytest.approx([a[0] for a in amaxes[:1:-1]])
    assert layer.history[1].tolist() == pytest.approx([a[1] for a in amaxes[:1:-1]])
    assert not layer.seen.any()
    assert model.down.fp8.history[2].eq(0).all()  # no backward has reached it
    assert model.down.fp8.scale[2] == 1


def test_a_weight_that_is_frozen_takes_the_new_scale():
    """Or a run that is resumed would round it by another scale than one that was not."""
    layer = Two().requires_grad_(False).up
    first = layer.fp8.codes(layer.weight, copy=False)
    update_scales(layer)
    with torch.no_grad():
        layer.fp8.scale.mul_(2)
    second = layer.fp8.codes(layer.weight, copy=False)
    assert second.scale == layer.fp8.scale[1] == 2 * first.scale


def test_the_first_step_is_scaled_by_its_own_values():
    torch.manual_seed(0)
    first, second = Two(), Two(Fp8Recipe(scaling="tensor"))
    second.load_state_dict(first.state_dict(), strict=False)
    gradients = []
    for model in (first, second):
        x = draw(24, 64).requires_grad_()
        (model(x) * 1e-7).sum().backward()  # what a scale of 1 would round to zero
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *gradients))
    assert all(g.any() for g in gradients[0])


def test_a_step_that_overflows_sets_no_scale():
    model = Two()
    x = draw(24, 64)
    model(x).sum().backward()
    update_scales(model)
    kept = model.up.fp8.scale.clone()
    model(x.fill_(float("inf"))).sum().backward()
    update_scales(model)
    assert torch.equal(model.up.fp8.scale, kept)
    assert model.up.fp8.history.isfinite().all()


def test_an_evaluation_measures_nothing_of_the_tokens():
    model = Two()
    with torch.no_grad():
        model(draw(24, 64))
    assert model.up.fp8.seen.tolist() == [0, model.up.weight.abs().max(), 0]


def test_scales_stay_float32_and_start_fresh():
    with torch.device("meta"):
        model = Two()
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for module in (model.up.fp8, model.down.fp8):
        assert {b.dtype for b in module.buffers()} == {torch.float32}
        assert module.history.eq(0).all()
        assert module.scale.eq(1).all()
        assert module.seen.eq(0).all()
    assert not [name for name in model.state_dict() if "seen" in name]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"fp8": Fp8Recipe(), "width": 40}, "needs width to be a multiple of 16 on a rank, got 40"),
        ({"fp8": Fp8Recipe(scaling="mx"), "features": 48}, "features to be a multiple of 32 on a"),
    ],
)
def test_widths_that_do_not_fit_are_refused(options, told):
    for kind in (ColumnLinear, RowLinear):
        with pytest.raises(ValueError, match=told):
            kind(**{"width": 64, "features": 64, "group": None, **options})


def test_a_fused_product_is_refused():
    layer = RowLinear(32, 32, group=None, fp8=Fp8Recipe())
    with pytest.raises(ValueError, match=r"RowLinear with fp8 \(block\) multiplies by itself"):
        layer(draw(4, 64), product=swiglu_linear)


def _on_two_ranks():
    for sequence_parallel in (True, False):
        _exact_on_two_ranks(Fp8Recipe(), sequence_parallel)


def _exact_on_two_ranks(recipe, sequence_parallel):
    """A column and a row layer of a group: exact where groups do not cross ranks."""
    mesh = Mesh.build("tp2")
    for options in ({"chunks": 2}, {"regather": True}):
        with pytest.raises(ValueError, match="overlap products in high precision: leave them out"):
            ColumnLinear(256, 256, group=mesh.tp, fp8=recipe, **options)
    found = []
    for group in (mesh.tp, None):
        torch.manual_seed(5)
        up = ColumnLinear(
            128, 256, group=group, fp8=recipe, bias=True, sequence_parallel=sequence_parallel
        ).double()
        down = RowLinear(
            256, 128, group=group, fp8=recipe, sequence_parallel=sequence_parallel
        ).double()
        x, dy = draw(32, 128).double(), draw(32, 128, seed=1).double()
        mine = slice(None)
        if group is not None and sequence_parallel:
            mine = slice(group.rank() * 16, group.rank() * 16 + 16)
        x = x[mine].clone().requires_grad_()
        y = down(up(x).tanh())
        y.backward(dy[mine])
        whole = group if sequence_parallel else None
        rows = all_gather_rows(up.weight.grad, group)
        found.append(
            [*(all_gather_rows(t.contiguous(), whole) for t in (y.detach(), x.grad)), rows]
        )
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_two_ranks_multiply_as_one(pool):
    pool(2, _on_two_ranks)


def test_only_fp8_products_have_buffers():
    plain = ColumnLinear(32, 32, group=None, fp8=Fp8Recipe())
    assert isinstance(plain.fp8, Fp8Product)
    assert list(plain.state_dict()) == ["weight"]
