"""The linear layer in NF4: blocks of the weight, gradients, and what QLoRA makes of it."""

import importlib.util
from unittest import mock

import pytest
import torch
from tests.kernels.specimen import item
from torch.profiler import profile

from warploom.kernels.gemm import nf4, nf4_linear, nf4_linear_reference
from warploom.kernels.quant import nf4_dequantize, nf4_quantize

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (extra quant)"
)
BIG = torch.bfloat16, torch.float32, torch.float64


def _case(rows=7, width=96, out=200, *, dtype=torch.float32, double=True, block=64):
    torch.manual_seed(0)
    q = nf4_quantize(torch.randn(out, width) * width**-0.5, double=double, block=block)
    x = torch.randn(rows, width, dtype=torch.float64).to(dtype).requires_grad_()
    return x, q, torch.randn(out, dtype=dtype, requires_grad=True)


def _small(elements):
    return mock.patch.dict(nf4._BUFFER, {"cpu": elements})


def _grads(y, *leaves):
    torch.manual_seed(1)
    return y, *torch.autograd.grad(y, leaves, torch.randn(y.shape).to(y))


@item("values", "zero and odd sizes", ops=("nf4_linear",))
@pytest.mark.parametrize(("dtype", "double"), [(torch.float32, False), *((d, True) for d in BIG)])
@pytest.mark.parametrize(
    ("out", "width", "block", "elements"),
    [(200, 96, 64, 1000), (257, 129, 64, 4096), (33, 1000, 256, 1), (5, 3, 64, 1), (301, 7, 32, 9)]
    + [(70, 640, 64, 20_000)],  # more than one scale of scales, in blocks that begin beside one
)
def test_blocks_of_rows_give_what_the_whole_weight_gives(
    dtype, double, out, width, block, elements
):
    x, q, bias = _case(9, width, out, dtype=dtype, double=double, block=block)
    want = _grads(nf4_linear_reference(x, q, bias), x, bias)
    with _small(elements):
        got = _grads(nf4_linear(x, q, bias), x, bias)
        assert len([*nf4._blocks(q, x, "reference")]) > 1
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near * float(b.detach().abs().max()))


def test_many_blocks_round_their_sum_once():
    """In bfloat16 the gradient of x errs as much as with the whole weight, whatever the blocks."""
    x, q, _ = _case(16, 24, 900, dtype=torch.bfloat16)
    dy = torch.randn(16, 900).bfloat16()
    truth = dy.double() @ nf4_dequantize(q, dtype=torch.bfloat16).double()
    plain = torch.autograd.grad(nf4_linear_reference(x, q), x, dy)[0]
    with _small(1):
        got = torch.autograd.grad(nf4_linear(x, q), x, dy)[0]
    error, allowed = ((g.double() - truth).norm() for g in (got, plain))
    assert error <= 2 * allowed


@pytest.mark.parametrize("double", [False, True])
def test_the_blocks_are_the_rows_of_the_weight_bit_for_bit(double):
    x, q, _ = _case(1, 129, 700, double=double)
    whole = nf4_dequantize(q, dtype=torch.float32)
    with _small(5000):
        seen = [(rows, block.clone()) for rows, block in nf4._blocks(q, x, "reference")]
    assert torch.equal(torch.cat([block for _, block in seen]), whole)
    assert [rows.start for rows, _ in seen[1:]] == [rows.stop for rows, _ in seen[:-1]]


@pytest.mark.parametrize("backward", [False, True])
def test_the_whole_weight_is_never_there(backward):
    """No allocation is larger than the buffer (or what is given and returned)."""
    out, width, elements = 3000, 512, 32_768
    x, q, _ = _case(4, width, out)
    slack = 4 * 64 * 256 * 2  # a block begins where a scale of scales does
    with _small(elements):
        y = nf4_linear(x, q)
        with profile(profile_memory=True) as trace:
            y.sum().backward() if backward else nf4_linear(x, q)
    events = trace.profiler.kineto_results.events()
    largest = max(e.nbytes() for e in events if e.name() == "[memory]")
    assert 4 * elements // 2 <= largest <= 2 * (4 * elements + slack)
    assert largest < 4 * out * width / 10


@item("upstream gradients", ops=("nf4_linear",))
@pytest.mark.parametrize("double", [False, True])
def test_gradcheck(double):
    x, q, bias = _case(3, 10, 8, dtype=torch.float64, double=double, block=32)
    with _small(1):
        assert torch.autograd.gradcheck(lambda x, b: nf4_linear(x, q, b), (x, bias))


def test_any_leading_sizes_and_strides():
    x, q, _ = _case(24)
    want = nf4_linear_reference(x, q)
    torch.testing.assert_close(nf4_linear(x.view(2, 3, 4, 96), q), want.view(2, 3, 4, 200))
    torch.testing.assert_close(nf4_linear(x[5], q), want[5])
    torch.testing.assert_close(nf4_linear(x.t().contiguous().t(), q), want)
    assert nf4_linear(x[:0], q).shape == (0, 200)
    assert nf4_linear(x.view(2, 3, 4, 96)[:, :0], q).shape == (2, 0, 4, 200)


@item("values", ops=("nf4_linear",))
@pytest.mark.parametrize(("width", "out"), [(0, 5), (96, 0)])
def test_a_weight_without_elements(width, out):
    q, bias = nf4_quantize(torch.zeros(out, width), double=False), torch.randn(out)
    x = torch.randn(3, width, requires_grad=True)
    y = nf4_linear(x, q, bias)
    assert torch.equal(y, bias.expand(3, out))
    assert not nf4_linear(x, q).any()
    (dx,) = torch.autograd.grad(y, x, torch.randn(3, out))
    assert torch.equal(dx, torch.zeros_like(x))


@item("values", ops=("nf4_linear",))
@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
def test_equals_bitsandbytes_with_a_low_rank_part(dtype, double):
    """A layer as peft makes it: the frozen weight, and B A x beside it."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        160, 96, compute_dtype=dtype, quant_type="nf4", compress_statistics=double
    )
    start = torch.randn(96, 160, dtype=dtype) * 0.1
    layer.weight = bnb.nn.Params4bit(
        start, requires_grad=False, quant_type="nf4", compress_statistics=double
    )
    layer.bias.data = layer.bias.data.to(dtype)
    layer = layer.to("cpu")  # quantises
    q = nf4_quantize(start, double=double)
    down, up = (torch.randn(s, dtype=dtype) * 0.1 for s in ((8, 160), (96, 8)))
    x = torch.randn(2, 11, 160, dtype=dtype)

    def step(base):
        leaves = [t.clone().requires_grad_() for t in (x, down, up)]
        y = base(leaves[0]) + 2 * (leaves[0] @ leaves[1].t()) @ leaves[2].t()
        return _grads(y, *leaves)

    with torch.compiler.set_stance("force_eager"):
        want = step(layer)
    bias = layer.bias.detach()
    with _small(2000):
        got = step(lambda x: nf4_linear(x, q, bias))
    near = 1e-5 if dtype == torch.float32 else 0.02
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near * float(b.detach().abs().max()))


@item("NaN and inf", ops=("nf4_linear",))
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_poisons_its_row_alone(poison):
    x, q, bias = _case()
    clean = _grads(nf4_linear(x, q, bias), x)
    spoilt = x.detach().clone()
    spoilt[4] = poison
    y, dx = _grads(nf4_linear(spoilt.requires_grad_(), q, bias), spoilt)
    others = [0, 1, 2, 3, 5, 6]
    assert torch.equal(y[others], clean[0][others])
    assert not y[4].isfinite().any()
    assert torch.equal(dx, clean[1])


def test_autocast_casts_as_linear_does():
    x, q, bias = _case()
    with torch.autocast("cpu", torch.bfloat16):
        y = nf4_linear(x, q, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, nf4_linear(x.bfloat16(), q, bias.bfloat16()))
    y.float().sum().backward()
    assert x.grad.dtype == bias.grad.dtype == torch.float32


@item("bad input", ops=("nf4_linear",))
def test_errors_say_what_was_found():
    x, q, bias = _case()
    with pytest.raises(TypeError, match="weight must be an Nf4, got Tensor: make one by"):
        nf4_linear(x, torch.ones(3, 96))
    with pytest.raises(TypeError, match="bias must be a tensor, got float"):
        nf4_linear(x, q, 1.0)
    with pytest.raises(
        ValueError, match=r"x must be \[..., D\] and weight \[F, D\], got \[7, 95\]"
    ):
        nf4_linear(x[:, 1:], q)
    with pytest.raises(ValueError, match=r"bias must be \[200\], got \[199\]"):
        nf4_linear(x, q, bias[1:])
    with pytest.raises(ValueError, match=r"must have one dtype .*, got .*float32 and .*float64"):
        nf4_linear(x, q, bias.double())
    with pytest.raises(ValueError, match=r"nf4_linear: 300 scales of .* need code, .* got"):
        nf4_linear(x, q._replace(code=None))
    with pytest.raises(ValueError, match="nf4_linear: shape .* needs 9552 bytes and 299 scales"):
        nf4_linear(x, q._replace(shape=(199, 96)))
    with pytest.raises(RuntimeError, match="nf4_linear: backend 'cuda' is not one of"):
        nf4_linear(x, q, backend="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_blocks_on_the_device(backend, dtype):
    x, q, bias = _case(65, 1001, 4097, dtype=dtype)
    parts = [t.cuda() if isinstance(t, torch.Tensor) else t for t in q]
    want = _grads(nf4_linear(x, q, bias), x, bias)
    x, bias = (t.detach().cuda().requires_grad_() for t in (x, bias))
    with mock.patch.object(nf4, "_BUFFER_GPU", 1 << 18):
        got = _grads(nf4_linear(x, type(q)(*parts), bias, backend=backend), x, bias)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0.02, atol=0.02 * float(b.detach().abs().max()))
