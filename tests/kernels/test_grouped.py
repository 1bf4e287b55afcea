"""Grouped matrix products: values, both gradients, experts without rows, rows beyond the counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.kernels.gemm import (
    grouped_gemm,
    grouped_gemm_reference,
    grouped_gemm_weight_gradient,
)


def _randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 3), st.integers(1, 4))
def test_values_and_gradients(counts, rest, width):
    total, experts = sum(counts), len(counts)
    x, counts = _randn(total + rest, width), torch.tensor(counts)
    x[total:] = torch.nan
    x.requires_grad_()
    weight = _randn(experts, 3, width, seed=1).requires_grad_()
    dy = _randn(total + rest, 3, seed=2)
    dy[total:] = torch.nan
    y = grouped_gemm(x, weight, counts)
    assert y[total:].isnan().all(), "rows beyond the counts are not written"
    expert = torch.arange(experts).repeat_interleave(counts)
    want = torch.einsum("md,mfd->mf", x[:total], weight[expert])
    torch.testing.assert_close(y[:total], want, atol=1e-12, rtol=0)
    torch.testing.assert_close(grouped_gemm_reference(x, weight, counts)[:total], want)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    wanted = torch.autograd.grad(want, (x, weight), dy[:total])
    torch.testing.assert_close(dx[:total], wanted[0][:total], atol=1e-12, rtol=0)
    assert not dx[total:].any()
    torch.testing.assert_close(dweight, wanted[1], atol=1e-12, rtol=0)
    alone = grouped_gemm_weight_gradient(dy, x.detach(), counts)
    assert torch.equal(alone, dweight)
    assert not grouped_gemm(x, weight, counts, zero_rest=True)[total:].any()


def test_gradcheck():
    x, weight = _randn(5, 3).requires_grad_(), _randn(3, 2, 3).requires_grad_()
    counts = torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(lambda x, w: grouped_gemm(x, w, counts), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_integers_are_exact(dtype):
    x = torch.randint(-4, 5, (40, 32)).to(dtype)
    weight = torch.randint(-4, 5, (4, 8, 32)).to(dtype)
    counts = torch.tensor([0, 17, 3, 20])
    want = grouped_gemm_reference(x.double(), weight.double(), counts).to(dtype)
    assert torch.equal(grouped_gemm(x, weight, counts), want)


def test_operator_is_registered_properly():
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(3, 2, 3, requires_grad=True)
    counts = torch.tensor([2, 0, 3])
    ops = torch.ops.warploom
    torch.library.opcheck(ops.grouped_gemm_forward, (x, weight, counts, False))
    args = (torch.randn(5, 2), x.detach(), counts)
    torch.library.opcheck(ops.grouped_gemm_weight_gradient, args)


def test_compiles_without_a_break():
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(3, 2, 3, requires_grad=True)
    counts, dy = torch.tensor([2, 0, 3]), torch.randn(5, 2)
    compiled = torch.compile(grouped_gemm, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, weight, counts), (x, weight), dy)
    want = torch.autograd.grad(grouped_gemm(x, weight, counts), (x, weight), dy)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, w: grouped_gemm(x, w, torch.tensor([3, 4])),
            r"counts \[3, 4\] must sum to at most 5",
        ),
        (lambda x, w: grouped_gemm(x, w, torch.tensor([3])), r"counts must be \[2\]"),
        (lambda x, w: grouped_gemm(x[:, :2], w, torch.tensor([3, 1])), r"got \[5, 2\] and"),
        (lambda x, w: grouped_gemm(x.double(), w, torch.tensor([3, 1])), "in the dtype of x"),
        (
            lambda x, w: grouped_gemm_weight_gradient(x[:2], x, torch.tensor([3, 1])),
            r"dy must be \[M, F\] and x \[M, D\], got \[2, 3\]",
        ),
    ],
)
def test_errors_say_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(5, 3), torch.ones(2, 4, 3))
