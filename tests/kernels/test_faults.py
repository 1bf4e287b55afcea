"""Faults that a reviewer found, each held by the smallest call that showed it."""

import pytest
import torch

from warploom.kernels.activation import relu2, swiglu, swiglu_fp8, swiglu_linear
from warploom.kernels.loss import cross_entropy, linear_cross_entropy, linear_log_probs
from warploom.kernels.moe import permute, route, unpermute
from warploom.kernels.norm import rms_norm, rms_norm_fp8
from warploom.kernels.optim import clip_by_global_norm_, newton_schulz
from warploom.kernels.quant import fp8_quantize, nf4_dequantize, nf4_quantize
from warploom.kernels.rope import rotary, rotary_tables


def test_more_rows_than_slots_are_refused():
    with pytest.raises(ValueError, match=r"at most T k rows, got 4096 for weights \[4, 2\]"):
        unpermute(torch.randn(4096, 8), torch.arange(4096), torch.ones(4, 2))


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_log_probs])
def test_a_head_under_autocast_with_ignored_targets(op):
    hidden, weight = (torch.randn(n, 8, requires_grad=True) for n in (6, 9))
    targets = torch.tensor([0, 1, 2, -100, 3, 4])

    def gradients():
        found = op(hidden, weight, targets)
        total = (found[0] if isinstance(found, tuple) else found).sum()
        return torch.autograd.grad(total, (hidden, weight))

    want = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gradients(), want)


def test_a_norm_beyond_float16_is_no_zero():
    u = (torch.randn(64, 64) * 2000).half()
    assert newton_schulz(u).abs().max() > 0.1


@pytest.mark.parametrize(
    "change",
    [{"absmax2": torch.ones(1)}, {"code": None}, {"offset": None}, {"code": torch.ones(10)}],
)
def test_a_second_level_that_does_not_fit_is_refused(change):
    q = nf4_quantize(torch.randn(64 * 600))
    with pytest.raises(ValueError, match="scales of torch.uint8 need code, absmax2 and offset"):
        nf4_dequantize(q._replace(**change))


def test_what_both_hold_is_not_turned_twice():
    fused = torch.randn(5, 3, 8)
    tables = rotary_tables(torch.arange(5), 8, base=100.0)
    for k in (fused[:, :2], fused[:, 1:]):
        with pytest.raises(ValueError, match="share memory, which would turn twice"):
            rotary(fused[:, :2], k, *tables, inplace=True)
    want = rotary(fused[:, :2], fused[:, 2:], *tables)
    got = rotary(fused[:, :2], fused[:, 2:], *tables, inplace=True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("size", "above", "eps"), [(1e17, 1e22, 1e-6), (1e-18, 1e3, 0.0)])
def test_the_gradient_of_a_norm_does_not_overflow_on_the_way(size, above, eps):
    x = (torch.randn(2, 4096) * size).requires_grad_()
    dy = torch.randn(2, 4096) * above
    (dx,) = torch.autograd.grad(rms_norm(x, torch.ones(4096), eps=eps), x, dy)
    wide = x.detach().double().requires_grad_()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    (want,) = torch.autograd.grad(y, wide, dy.double())
    torch.testing.assert_close(dx.double(), want, rtol=1e-3, atol=float(want.abs().max()) * 1e-5)


def test_the_slope_of_a_huge_gate_is_one():
    x = torch.tensor([[2.0**25, 1.0]], requires_grad=True)
    assert torch.autograd.grad(swiglu(x).sum(), x)[0].tolist() == [[1.0, 2.0**25]]


def test_small_products_of_relu2_are_rounded_once():
    x = torch.tensor([2.0**-13], dtype=torch.float16, requires_grad=True)
    (dx,) = torch.autograd.grad(relu2(x), x, torch.tensor([2.0**-12], dtype=torch.float16))
    assert dx.item() == 2.0**-24


def test_overwritten_logits_that_someone_writes_are_seen():
    x, targets = torch.randn(3, 7, requires_grad=True), torch.tensor([0, 1, 2])
    logits = x * 1
    total, _ = cross_entropy(logits, targets, inplace=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="someone wrote to them"):
        total.backward()


def test_further_bad_arguments_get_a_sentence():
    a, indices = torch.ones(3), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="no two tensors may share memory"):
        clip_by_global_norm_([a, a], 1.0)
    with pytest.raises(ValueError, match="experts must be at least 1, got -1"):
        permute(torch.ones(2, 3), indices, -1)
    with pytest.raises(ValueError, match="chosen must be below 4, got 9"):
        route(torch.randn(2, 4), 1, chosen=indices + 9)
    tables = [t.long() for t in rotary_tables(torch.arange(2), 4, base=10.0)]
    with pytest.raises(ValueError, match="cos and sin must be floating"):
        rotary(torch.ones(2, 1, 4), torch.ones(2, 1, 4), *tables)
    with pytest.raises(ValueError, match="a given scale is used as it is"):
        fp8_quantize(torch.ones(2, 4), scale=torch.ones(()), power_of_two=True)


def test_a_peer_is_never_replaced_by_ours():
    """It serves whole calls; a form that it does not have must not fall back to PyTorch."""
    x, weight = torch.ones(2, 8), torch.ones(4, 4)
    for call in (
        lambda: swiglu_fp8(x, scaling="row", backend="liger"),
        lambda: swiglu_linear(x, weight, backend="liger"),
        lambda: rms_norm_fp8(x, torch.ones(8), backend="liger"),
        lambda: relu2(x, backend="liger"),
    ):
        with pytest.raises(RuntimeError, match="backend 'liger' is not one of reference, triton"):
            call()


def test_tables_elsewhere_are_refused_in_place():
    cos, sin = rotary_tables(torch.arange(2), 4, base=10.0)
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        rotary(torch.ones(2, 1, 4), torch.ones(2, 1, 4), cos.to("meta"), sin, inplace=True)
