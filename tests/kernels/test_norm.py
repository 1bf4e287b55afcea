"""rms_norm on the CPU: values, gradients, strides, dtypes; oracle transformers' LlamaRMSNorm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.checks import SHAPES, case, check

from warploom.kernels.norm import rms_norm, rms_norm_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_residual"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [*SHAPES, (600, 4100)])
def test_values_and_gradients(name, tokens, width, dtype):
    check(case(name, tokens, width, dtype))


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(0, 40), width=st.integers(2, 70), fused=st.booleans())
def test_any_shape(tokens, width, fused):
    check(case("rms_norm_residual" if fused else "rms_norm", tokens, width, torch.float32))


def test_gradcheck():
    x, r = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm, (x, w))
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, residual=r, eps=0.1), (x, w, r))


def test_the_second_derivative_is_refused():
    x = torch.randn(2, 3, requires_grad=True)
    y = rms_norm(x, torch.ones(3))
    with pytest.raises(RuntimeError, match="rms_norm: there is no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_agrees(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    torch.nn.init.normal_(theirs.weight)
    x = torch.randn(2, 9, 64).to(dtype).requires_grad_()
    dy = torch.randn_like(x)
    ours = rms_norm(x, theirs.weight, eps=1e-5)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(ours, theirs(x), **tolerance)
    expected = torch.autograd.grad(theirs(x), (x, theirs.weight), dy)
    if dtype == torch.float32:
        torch.testing.assert_close(
            torch.autograd.grad(ours, (x, theirs.weight), dy), expected, **tolerance
        )


def test_the_rounded_sum_is_normalised():
    x = torch.full((1, 4), 256.0, dtype=torch.bfloat16)
    residual = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)  # 257 rounds to 256
    y, h = rms_norm(x, torch.ones(4, dtype=torch.bfloat16), residual=residual)
    assert torch.equal(h, x)
    assert torch.equal(y, torch.ones_like(y))


def test_only_the_sum_is_used():
    x, r = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    w = torch.ones(3, requires_grad=True)
    _, h = rms_norm(x, w, residual=r)
    dh = torch.randn(2, 3)
    dx, dr, dw = torch.autograd.grad(h, (x, r, w), dh, allow_unused=True)
    assert torch.equal(dx, dh)
    assert torch.equal(dr, dh)
    assert dw is None


def test_strided_inputs_and_expanded_gradients():
    x = torch.randn(6, 4, 10)[:, 1:3, ::2].transpose(0, 1).requires_grad_()
    w = torch.randn(10)[::2].requires_grad_()
    y = rms_norm(x, w)
    expected = rms_norm_reference(x, w)[0]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w))
    )


def test_a_nan_poisons_its_row_only():
    x = torch.randn(4, 8)
    x[2, 3] = float("nan")
    x.requires_grad_()
    y = rms_norm(x, torch.ones(8))
    (dx,) = torch.autograd.grad(y, x, torch.randn(4, 8))
    assert y.isnan().any(1).tolist() == [False, False, True, False]
    assert dx.isnan().any(1).tolist() == [False, False, True, False]


def test_what_is_saved():
    """The sum, the weight and one number a row: not y."""
    x = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
    w = torch.ones(16, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, w)
    assert [(tuple(t.shape), t.dtype) for t in saved] == [
        ((8, 16), torch.bfloat16),
        ((16,), torch.bfloat16),
        ((8,), torch.float32),
    ]


def test_repeated_backwards_give_the_same_bits():
    x, w = torch.randn(64, 96, requires_grad=True), torch.randn(96, requires_grad=True)
    y, dy = rms_norm(x, w), torch.randn(64, 96)
    first = torch.autograd.grad(y, (x, w), dy, retain_graph=True)
    second = torch.autograd.grad(y, (x, w), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_operator_is_registered_properly(fused):
    x, r = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    w = torch.randn(8, requires_grad=True)
    ops = torch.ops.warploom
    torch.library.opcheck(ops.rms_norm_forward, (x, w, r if fused else None, 1e-6, None))
    dy, rstd = torch.randn(3, 8), torch.rand(3)
    torch.library.opcheck(
        ops.rms_norm_backward,
        (dy, dy if fused else None, x.detach(), w.detach(), rstd, None),
    )


def test_compiles_without_a_break():
    x, r = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    w = torch.randn(8, requires_grad=True)

    def fn(x, w, r):
        y, h = rms_norm(x, w, residual=r)
        return (rms_norm(y, w) * h).sum()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, w, r), (x, w, r)),
        torch.autograd.grad(fn(x, w, r), (x, w, r)),
    )


def test_errors_say_what_was_found():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"weight has shape \[3\], x has \[2, 8\]"):
        rms_norm(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"got torch.int64"):
        rms_norm(torch.ones(2, 8, dtype=torch.int64), torch.ones(8))
    with pytest.raises(ValueError, match=r"residual must have .* got \[8\]"):
        rms_norm(x, torch.ones(8), residual=torch.ones(8))
    with pytest.raises(ValueError, match=r"got \[2, 8\], torch.bfloat16"):
        rms_norm(x, torch.ones(8), residual=x.bfloat16())
    with pytest.raises(ValueError, match=r"weight has shape \[0\]"):
        rms_norm(torch.ones(2, 0), torch.ones(0))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [*SHAPES, (5000, 576), (300, 4096), (300, 16384)])
def test_triton_on_the_device(name, tokens, width, dtype):
    check(case(name, tokens, width, dtype, device="cuda", backend="triton"))
