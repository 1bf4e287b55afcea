"""A layer of FP8 products: error bands, halves of the backward, what is saved, delayed scaling."""

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.specimen import calls, item
from tests.kernels.specimens.fp8 import E4M3, E5M2, rounded

from warploom.kernels.gemm import (
    Fp8Recipe,
    Fp8Scales,
    amax_history_update,
    fp8_linear,
    fp8_linear_input_gradient,
    fp8_linear_weight_gradient,
    fp8_weight,
)
from warploom.parallel.tensor.product import WeightGradients, deferred

RECIPES = ("tensor", "row", "block", "mx")


def difference(found, want):
    """One minus the cosine, nearly: the measure of DeepGEMM."""
    x, y = found.double(), want.double()
    return float(1 - 2 * (x * y).sum() / (x.square() + y.square()).sum())


@item("values", ops=("fp8_linear",))
@pytest.mark.parametrize("scaling", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_fp8_stays_in_its_band(scaling, dtype):
    """1e-3 with three bits behind the point on both sides; gradients of two bits have 2.5e-3."""
    torch.manual_seed(3)
    x, weight = torch.randn(256, 384, dtype=dtype), torch.randn(192, 384, dtype=dtype)
    x.requires_grad_(), weight.requires_grad_()
    dy = torch.randn(256, 192, dtype=dtype)
    y = fp8_linear(x, weight, recipe=Fp8Recipe(scaling=scaling))
    found = y, *torch.autograd.grad(y, (x, weight), dy)
    want = F.linear(x, weight)
    want = want, *torch.autograd.grad(want, (x, weight), dy)
    coarse = (1.2e-3, 2.5e-3) if scaling in ("tensor", "row") else (1e-4, 1e-3)
    for f, w, (low, high) in zip(found, want, ((1e-4, 1e-3), coarse, coarse), strict=True):
        assert low < difference(f.detach(), w.detach()) < high


@item("values", ops=("fp8_linear",))
@pytest.mark.parametrize("scaling", RECIPES)
def test_structured_inputs(scaling):
    """A constant, a ramp, one hot rows and zeros: what FP8 holds comes back exactly."""
    recipe, eye = Fp8Recipe(scaling=scaling, power_of_two=True), torch.eye(160)
    hot = torch.zeros(160, 160)
    hot[3] = 1.0
    for x in (torch.full((160, 160), 3.0), hot, torch.zeros(160, 160)):
        assert torch.equal(fp8_linear(x, eye, recipe=recipe), x)
        assert torch.equal(fp8_linear(eye, x, recipe=recipe), x.t())
    ramp = torch.linspace(-1, 1, 160).expand(160, 160)
    assert (fp8_linear(ramp, eye, recipe=recipe) - ramp).abs().max() <= 2.0**-4


@item("values", ops=("fp8_linear",))
def test_an_outlier_spoils_what_shares_its_scale():
    """One value of 1e6: the weight does not see its block, so that only its scale can hurt."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 512), torch.randn(96, 512)
    weight[:, :128] = 0
    clean = F.linear(x, weight)
    x[5, 3] = 1e6
    error = {}
    for scaling in RECIPES:
        off = fp8_linear(x, weight, recipe=Fp8Recipe(scaling=scaling)) - clean
        error[scaling] = float(off[5].norm() / clean[5].norm()), float(off.norm() / clean.norm())
    for scaling in ("block", "mx"):
        assert error[scaling][0] < 0.06
        assert error[scaling][1] < 0.045
    assert error["row"][0] > 0.5
    assert error["row"][1] < 0.15
    assert error["tensor"][1] > 0.5


@item("values", ops=("fp8_linear",))
@pytest.mark.parametrize("scaling", RECIPES)
def test_the_parts_give_the_bits_of_the_whole(scaling):
    """A weight that is given, the halves of the backward, a queue: all the same products."""
    torch.manual_seed(1)
    recipe = Fp8Recipe(scaling=scaling)
    x = torch.randn(3, 43, 72, requires_grad=True)
    weight, dy = torch.randn(40, 72, requires_grad=True), torch.randn(3, 43, 40)
    y = fp8_linear(x, weight, recipe=recipe)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    quantized = fp8_weight(weight, recipe)
    with calls() as called:
        given = fp8_linear(x, weight, recipe=recipe, quantized=quantized)
        again = torch.autograd.grad(given, (x, weight), dy)
    kinds = [str(op) for op, _ in called]
    assert kinds == [f"warploom.fp8_linear_{half}.default" for half in ("forward", "backward")]
    assert all(map(torch.equal, (given, *again), (y, dx, dweight)))

    def input_gradient(dy, x, weight):
        return fp8_linear_input_gradient(dy, weight, recipe=recipe, quantized=quantized)

    def weight_gradient(dy, x):
        return fp8_linear_weight_gradient(dy, x, recipe=recipe)

    queue = WeightGradients()
    with queue.open():
        y = deferred(
            x,
            weight,
            forward=lambda x, weight: fp8_linear(x, weight, recipe=recipe),
            input_gradient=input_gradient,
            weight_gradient=weight_gradient,
        )
    y.backward(dy)
    assert torch.equal(x.grad, dx)
    assert weight.grad is None
    queue.run()
    assert torch.equal(weight.grad, dweight)


@item("values", ops=("fp8_linear",))
def test_a_float32_master_has_a_float32_gradient():
    torch.manual_seed(1)
    recipe = Fp8Recipe()
    x, weight = torch.randn(70, 48).bfloat16(), torch.randn(40, 48, requires_grad=True)
    y = fp8_linear(x, weight, recipe=recipe)
    dy = torch.randn(70, 40).bfloat16()
    y.backward(dy)
    assert y.dtype == torch.bfloat16
    want = rounded(dy.t(), "block", E4M3) @ rounded(x.t(), "block", E4M3).t()
    torch.testing.assert_close(weight.grad, want.float(), rtol=1e-5, atol=1e-5)
    main = fp8_linear_weight_gradient(dy, x, recipe=recipe, dtype=torch.float32)
    assert torch.equal(main, weight.grad)
    narrow = fp8_linear_weight_gradient(dy, x, recipe=recipe)
    assert torch.equal(narrow, main.bfloat16())


@item("values", ops=("fp8_linear",))
def test_what_is_saved_is_a_byte_an_element():
    recipe, saved = Fp8Recipe(), []
    x = torch.randn(256, 128, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    quantized = fp8_weight(weight, recipe)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8_linear(x, weight, recipe=recipe, quantized=quantized)
    own = {t.data_ptr(): t.numel() * t.itemsize for t in (quantized.data_t, quantized.scale_t)}
    rest = sum(t.numel() * t.itemsize for t in saved if t.data_ptr() not in own)
    assert 256 * 128 < rest <= 256 * 128 + 4 * 128 * 2
    frozen = weight.detach()
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8_linear(x, frozen, recipe=recipe, quantized=quantized)
    assert sum(t.numel() for t in saved if t.data_ptr() not in own) == 0


def recipe_of_te(amax, scale, top, margin):
    """TransformerEngine's rule, on its multiplying scales."""
    new = (top / amax) / 2.0**margin
    new = torch.where(amax > 0, new, 1 / scale)
    return 1 / torch.where(amax.isfinite(), new, 1 / scale)


@item("values", ops=("fp8_linear",))
def test_scales_of_delayed_scaling():
    recipe = Fp8Recipe(scaling="tensor", delayed=True, margin=2, history=3)
    history, scale = torch.zeros(2, 3), torch.ones(2)
    seen = [[0.0, 1.5], [3.0, 0.5], [2.0, torch.inf], [torch.nan, 0.25], [0.125, 0.25]]
    tops = [[0.0, 1.5], [3.0, 1.5], [3.0, 1.5], [3.0, 0.5], [2.0, 0.25]]
    for amax, top in zip(seen, tops, strict=True):
        want = recipe_of_te(torch.tensor(top), scale, 448.0, 2)
        amax = torch.tensor(amax)
        history, scale = amax_history_update(history, amax, scale, recipe, recipe.dtype)
        torch.testing.assert_close(scale, want, rtol=1e-6, atol=0)
    even = Fp8Recipe(scaling="tensor", delayed=True, power_of_two=True)
    _, scale = amax_history_update(torch.zeros(1), torch.tensor(3.0), scale[0], even, E5M2)
    assert scale == 2.0**-14  # above 3 / 57344
    with pytest.raises(ValueError, match=r"\[\.\.\., H\], .* got \[3\], \[2\] and \[\]"):
        amax_history_update(torch.zeros(3), torch.zeros(2), torch.ones(()), recipe, E4M3)


@item("values", ops=("fp8_linear",))
def test_the_gradient_of_a_scale_is_the_amax():
    torch.manual_seed(1)
    recipe = Fp8Recipe(scaling="tensor", delayed=True)
    x, weight = torch.randn(30, 24), torch.randn(10, 24, requires_grad=True)
    scales = Fp8Scales(*(torch.full((), s, requires_grad=True) for s in (0.001, 1e-4)))
    y = fp8_linear(x, weight, recipe=recipe, scales=scales)
    dy = torch.randn(30, 10)
    y.backward(dy)
    assert scales.x.grad == x.abs().max()
    assert scales.gradient.grad == dy.abs().max()
    left = rounded(x, "tensor", E4M3, torch.tensor(0.001))  # saturates
    assert left.abs().max() < x.abs().max()
    want = left @ rounded(weight.detach(), "tensor", E4M3).t()
    torch.testing.assert_close(y.detach().double(), want, rtol=1e-6, atol=1e-6)
    whole = fp8_weight(weight, recipe, scale=torch.tensor(0.25))
    assert whole.scale == 0.25
    assert whole.amax == weight.abs().max()


@item("bad input", ops=("fp8_linear",))
def test_layers_that_do_not_fit_are_refused():
    recipe, delayed = Fp8Recipe(), Fp8Recipe(scaling="tensor", delayed=True)
    x, weight = torch.randn(5, 24), torch.randn(10, 24)
    linear = lambda x=x, weight=weight, recipe=recipe, **r: fp8_linear(  # noqa: E731
        x, weight, recipe=recipe, **r
    )
    given = fp8_weight(weight, recipe)
    one = torch.ones(())
    cases = [
        (lambda: linear(x[:, :3]), r"weight \[F, D\], got \[5, 3\] and \[10, 24\]"),
        (lambda: linear(x.int()), "got torch.int32 and torch.float32"),
        (lambda: linear(recipe=delayed), "only then, got none with delayed=True"),
        (lambda: linear(scales=Fp8Scales(one, one)), "only then, got some with delayed=False"),
        (
            lambda: linear(recipe=delayed, scales=Fp8Scales(one, one.double())),
            r"float32 \[\], got torch.float64 \[\]",
        ),
        (lambda: linear(quantized=fp8_weight(weight[:4], recipe)), r"got \[4, 24\] with scales"),
        (lambda: linear(quantized=given._replace(scale=given.scale.half())), "and torch.float16"),
        (
            lambda: linear(quantized=given._replace(data_t=given.data_t[:3])),
            r"got \[3, 10\] with scales",
        ),
        (
            lambda: linear(quantized=fp8_weight(weight, Fp8Recipe(scaling="row"))),
            r"of weight \[10, 24\] with scaling 'block' .* with scales \[10, 1\]",
        ),
        (
            lambda: linear(
                x.clone().requires_grad_(), quantized=fp8_weight(weight, recipe, transpose=False)
            ),
            "takes the transposed copy of the weight, got data_t=None: make it with fp8_weight",
        ),
        (
            lambda: fp8_linear_input_gradient(x, weight, recipe=recipe, quantized=given),
            r"dy must be \[..., F\] and weight \[F, D\], got \[5, 24\] and \[10, 24\]",
        ),
        (
            lambda: fp8_linear_weight_gradient(x[:2], x, recipe=recipe),
            r"of the same tokens, .* got \[2, 24\] .*, \[5, 24\] in torch.float32, None",
        ),
        (
            lambda: fp8_linear_weight_gradient(x, x, recipe=recipe, dtype=torch.int8),
            "of floating point, got .*, torch.int8",
        ),
    ]
    for call, text in cases:
        with pytest.raises(ValueError, match=f"^fp8_linear: .*{text}"):
            call()
    for call in (lambda: linear(recipe="block"), lambda: fp8_weight(weight, "block")):
        with pytest.raises(TypeError, match="recipe must be an Fp8Recipe, got 'block'"):
            call()
    with pytest.raises(TypeError, match=r"must be fp8_weight\(weight, recipe\), got Tensor"):
        linear(quantized=weight)
    with pytest.raises(ValueError, match=r"fp8_weight: weight must be \[F, D\], got \[24\]"):
        fp8_weight(weight[0], recipe)
    with pytest.raises(ValueError, match="fp8_weight: scale goes with a recipe that is delayed"):
        fp8_weight(weight, recipe, scale=one)
    for call in (fp8_linear, fp8_linear_input_gradient):
        with pytest.raises(TypeError, match="recipe must be an Fp8Recipe, got 'block': make one"):
            call(x if call is fp8_linear else x[:, :10], weight, recipe="block")
    with pytest.raises(TypeError, match="fp8_weight: recipe must be an Fp8Recipe, got 'row'"):
        fp8_weight(weight, "row")
    with pytest.raises(RuntimeError, match="fp8_linear: backend 'cuda' is not one of"):
        linear(backend="cuda")


@item("bad input", ops=("fp8_linear",))
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scaling": "tile"}, "scaling must be one of tensor, row, block, mx, got 'tile'"),
        (
            {"scaling": "delayed"},
            "got 'delayed': delayed scaling is scaling='tensor', delayed=True",
        ),
        ({"forward": "e3m4"}, "must be e4m3 or e5m2, got 'e3m4' and None"),
        ({"delayed": True}, "delayed scaling goes with scaling 'tensor', got 'block'"),
        ({"history": 0}, "history must be an integer of at least 1 .*, got 0 and 0"),
        ({"history": 1.5}, "history must be an integer of at least 1 .*, got 1.5 and 0"),
    ],
)
def test_recipes_that_cannot_be_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Fp8Recipe(**options)


@pytest.mark.gpu
@item("values", ops=("fp8_linear",))
@pytest.mark.parametrize("scaling", ["tensor", "row", "block"])
@pytest.mark.parametrize("groups", [4, 5, 7])
def test_a_layer_of_pytorch_against_the_reference(scaling, groups):
    """Groups that are no multiple of 4, along each dimension that is contracted."""
    torch.manual_seed(2)
    wide, recipe = 128 * groups, Fp8Recipe(scaling=scaling)
    shapes = (128 * (groups + 1), wide), (128 * (groups + 2), wide)
    leaves = [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]
    found = []
    for backend in ("torch", "reference"):
        y = fp8_linear(*leaves, recipe=recipe, backend=backend)
        torch.manual_seed(4)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, torch.randn_like(y))))
    for a, b in zip(*found, strict=True):
        assert difference(a, b) < 1e-6


@item("NaN and inf", ops=("fp8_linear",))
@pytest.mark.parametrize("scaling", ["row", "block", "mx"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_token_spoils_its_own_rows_alone(scaling, poison):
    """And, of the weight's gradient, into which every token goes, the column of its feature."""
    x, weight = torch.ones(200, 72, requires_grad=True), torch.ones(40, 72, requires_grad=True)
    with torch.no_grad():
        x[150, 3] = poison
    y = fp8_linear(x, weight, recipe=Fp8Recipe(scaling=scaling))
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    others = [i for i in range(200) if i != 150]
    assert y[150].isnan().all()
    assert y[others].isfinite().all()
    assert dx.isfinite().all()
    assert dweight[:, 3].isnan().all()
    assert dweight[:, [i for i in range(72) if i != 3]].isfinite().all()
    dy = torch.ones_like(y)
    dy[7, 5] = poison
    (dx,) = torch.autograd.grad(fp8_linear(x, weight, recipe=Fp8Recipe(scaling=scaling)), x, dy)
    assert dx[7].isnan().all()
    assert dx[[i for i in range(200) if i != 7]].isfinite().all()
