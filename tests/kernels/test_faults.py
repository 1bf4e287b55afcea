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

    def gradients(hidden_TD, weight_VD):
        found = op(hidden_TD, weight_VD, targets)
        total = (found[0] if isinstance(found, tuple) else found).sum()
        return torch.autograd.grad(total, (hidden, weight))

    want = gradients(hidden.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gradients(hidden, weight), want, rtol=0, atol=0)


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
    with pytest.raises(ValueError, match="cos and sin must be float32 or float64"):
        rotary(torch.ones(2, 1, 4), torch.ones(2, 1, 4), *tables)
    with pytest.raises(ValueError, match="a given scale is used as it is"):
        fp8_quantize(torch.ones(2, 4), scale=torch.ones(()), power_of_two=True)
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        fp8_quantize(torch.ones(2, 4), scale=torch.zeros(()))


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


@pytest.mark.parametrize("shape", [(576, 576), (1000, 64)])
def test_compiled_double_quantisation_has_the_same_bits(shape):
    """Inductor 2.13 left the last scales unfilled where 256 does not divide their number."""
    from warploom.kernels.quant import nf4_dequantize, nf4_quantize

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def both(x):
        q = nf4_quantize(x)
        return q.absmax, q.code, q.absmax2, q.offset, nf4_dequantize(q)

    for eager, compiled in zip(both(x), torch.compile(both, fullgraph=True)(x), strict=True):
        assert torch.equal(eager, compiled)


def test_linear_losses_cast_under_autocast():
    """A head in float32 behind a layer that autocast runs in bfloat16."""
    from warploom.kernels.loss import linear_cross_entropy, linear_log_probs, linear_top_k_kl

    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, dtype=torch.bfloat16), torch.randn(32, 8, requires_grad=True)
    targets, picks = torch.randint(0, 32, (6,)), torch.arange(3).expand(6, 3)
    logs = torch.randn(6, 32).log_softmax(-1)[:, :3]
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_cross_entropy(hidden, weight, targets)
        found = linear_log_probs(hidden, weight, targets)
        divergence = linear_top_k_kl(hidden, weight, picks, logs)
        logits = torch.nn.functional.linear(hidden, weight).float()
    want = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(total, want.sum())
    torch.testing.assert_close(found, -want)
    assert divergence.dtype == torch.float32
    total.backward()
    assert weight.grad.dtype == torch.float32


def test_a_peer_of_the_gpu_is_refused_on_the_cpu():
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    from warploom.kernels.activation import swiglu

    with pytest.raises(RuntimeError, match=r"swiglu: backend 'liger' needs a CUDA device"):
        swiglu(torch.ones(2, 4), backend="liger")


def _wrong():
    from warploom.kernels import activation, loss, moe, norm, optim, quant, rope

    x, w = torch.ones(2, 4), torch.ones(4)
    table, q = torch.ones(2, 2), torch.ones(2, 1, 4)
    step, ids = torch.zeros(()), torch.zeros(2, dtype=torch.int64)
    rates = {"step": step, "learning_rate": 1.0, "eps": 0.0, "weight_decay": 0.0}
    lists, betas = ([x], [x.clone()], [x.clone()], [x.clone()]), (0.9, 0.9)

    def adamw(*columns, **given):
        optim.adamw_(*columns, **{"betas": betas, **rates, **given})

    yield lambda: norm.rms_norm(x, None), "rms_norm: weight must be a tensor, got NoneType"
    yield lambda: norm.layer_norm([1.0], w), "layer_norm: x must be a tensor, got list"
    yield lambda: norm.rms_norm(x.numpy(), w), "rms_norm: x must be a tensor, got ndarray"
    yield lambda: activation.relu2(None), "relu2: x must be a tensor"
    yield lambda: rope.rotary(q, None, table, table), "rotary: k must be a tensor"
    yield lambda: rope.rotary(q, q, table.half(), table), "rotary: cos and sin must be float32 or"
    yield lambda: rope.rotary_tables([0, 1], 4, base=1e4), "rotary_tables: positions must be a ten"
    scaling = {"rope_type": "yarn", "factor": 4.0}
    yield (
        lambda: rope.rotary_tables(ids, 4, base=1e4, scaling=scaling),
        "rotary_tables: scaling must be Linear, .* got dict",
    )
    yield lambda: loss.cross_entropy(x, None), "cross_entropy: targets must be a tensor"
    yield lambda: loss.cross_entropy(x, ids + 4), r"targets must be in \[0, 4\) .* got 4 at"
    yield lambda: loss.cross_entropy(x, ids - 1), r"targets must be in \[0, 4\) .* got -1 at"
    yield lambda: loss.linear_cross_entropy(x, None, ids), "linear_cross_entropy: weight must be a"
    yield lambda: moe.route(None, 1), "route: logits must be a tensor"
    yield lambda: moe.permute(x, None, 2), "permute: indices must be a tensor"
    yield (
        lambda: moe.unpermute(x, ids, torch.ones(2, 1).bfloat16()),
        "unpermute: weights must be float32 or float64, got torch.bfloat16",
    )
    yield lambda: quant.fp8_quantize(None), "fp8_quantize: x must be a tensor"
    yield lambda: quant.nf4_quantize(None), "nf4_quantize: x must be a tensor"
    yield lambda: optim.newton_schulz(None), "newton_schulz: u must be a tensor"
    yield lambda: optim.global_norm([x, None]), r"tensors\[1\] must be a tensor, got NoneType"
    yield lambda: optim.clip_coefficient(3.0, 1.0), "clip_coefficient: norm must be a tensor"
    yield lambda: adamw([x], [None], [x], [x]), r"adamw_: gradients\[0\] must be a tensor, got None"
    yield lambda: adamw(*lists, scale=1.0), "adamw_: scale must be a tensor, got float"
    yield lambda: adamw(*lists, step=0), "adamw_: step must be a tensor, got int"
    yield lambda: adamw(*lists, betas=(0.9,)), "adamw_: betas must be two numbers"
    yield lambda: optim.split_remainder(w.bfloat16()), "split_remainder: master must be float32"
    yield lambda: optim.join_remainder(w.bfloat16(), w), "join_remainder: the parameter must be bf"


@pytest.mark.parametrize(("call", "words"), [*_wrong()])
def test_typical_mistakes_are_one_sentence(call, words):
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_tensors_may_come_from_a_generator():
    from warploom.kernels.optim import global_norm

    assert global_norm(torch.full((n,), 2.0) for n in (3, 1)).item() == pytest.approx(4)
