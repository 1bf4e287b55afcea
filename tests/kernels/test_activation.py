"""What is special to the activations: outside oracles, extremes, what is saved, errors."""

import pytest
import torch

from warploom.kernels.activation import geglu, geglu_fp8, relu2, relu2_fp8, swiglu, swiglu_fp8
from warploom.kernels.quant import fp8_quantize


def _exact(x):
    return geglu(x, approximate="none")


ALL = pytest.mark.parametrize("fn", [swiglu, geglu, _exact, relu2])


@ALL
def test_gradcheck(fn):
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fn, (x,))


@pytest.mark.parametrize(
    ("fn", "activation"), [(swiglu, "silu"), (geglu, "gelu_pytorch_tanh"), (_exact, "gelu")]
)
def test_transformers_agrees(fn, activation):
    """The feed-forward of LlamaMLP (Gemma has the same) between its matrix products."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    theirs = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=24, hidden_act=activation))
    x = torch.randn(5, 32)
    packed = torch.cat([theirs.gate_proj(x), theirs.up_proj(x)], -1)
    torch.testing.assert_close(theirs.down_proj(fn(packed)), theirs(x), rtol=1e-5, atol=1e-6)


def test_relu2_is_that_of_transformers():
    from transformers.activations import ACT2FN

    x = torch.randn(40, 30, dtype=torch.float64)
    assert torch.equal(relu2(x), ACT2FN["relu2"](x))


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gates_do_not_overflow(fn, dtype):
    gate = torch.tensor([[-1e4, -200.0, -100.0, 0.0, 100.0, 1e4]], dtype=dtype)
    up = () if fn is relu2 else (torch.ones_like(gate),)
    x = torch.cat([gate, *up], -1).requires_grad_()
    y = fn(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    top = gate[0, 4:].double()
    assert torch.equal(y[0, 4:].double(), (top.square() if fn is relu2 else top).to(dtype).double())
    assert float(y.detach()[0, :3].abs().max()) < 1e-30
    slope = [0, 0, 0, 0, 200, 2e4] if fn is relu2 else [0, 0, 0, 0.5, 1, 1]
    torch.testing.assert_close(dx[0, :6], torch.tensor(slope, dtype=dtype))
    assert dx.isfinite().all()


@pytest.mark.parametrize("fn", [swiglu, geglu, relu2, *(
    lambda x, f=f: f(x, scaling="row").carrier for f in (swiglu_fp8, geglu_fp8, relu2_fp8)
)])  # fmt: skip
def test_only_the_input_is_saved(fn):
    x = torch.randn(8, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fn(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


@pytest.mark.parametrize("scaling", ["row", "block"])
@pytest.mark.parametrize(
    ("fused", "fn"), [(swiglu_fp8, swiglu), (geglu_fp8, geglu), (relu2_fp8, relu2)]
)
def test_fused_codes_are_those_of_the_float32_value(fused, fn, scaling):
    x = torch.randn(3, 7, 520).bfloat16().requires_grad_()
    got = fused(x, scaling=scaling, power_of_two=True)
    want = fp8_quantize(fn(x.detach().float()), scaling=scaling, power_of_two=True)
    assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(got.scale, want.scale)
    dy = torch.randn(got.carrier.shape).bfloat16()
    assert got.carrier.dtype == torch.bfloat16
    assert torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in (got.carrier, fn(x))))


def test_errors_say_what_was_found():
    for fn in (swiglu, geglu):
        with pytest.raises(ValueError, match=r"must be even \(gate, up\), got \[2, 7\]"):
            fn(torch.ones(2, 7))
        with pytest.raises(ValueError, match=r"got torch.int64"):
            fn(torch.ones(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"relu2: x must have a last dimension, got \[\]"):
        relu2(torch.ones(()))
    with pytest.raises(ValueError, match="must be tanh or none, got 'erf'"):
        geglu(torch.ones(2, 8), approximate="erf")
    with pytest.raises(ValueError, match="swiglu_fp8: scaling must be row or block, got 'tensor'"):
        swiglu_fp8(torch.ones(2, 8), scaling="tensor")


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", ["row", "block"])
@pytest.mark.parametrize(
    ("fused", "fn"), [(swiglu_fp8, swiglu), (geglu_fp8, geglu), (relu2_fp8, relu2)]
)
def test_fused_codes_on_the_device(fused, fn, scaling):
    x = torch.randn(300, 2 * 14336, device="cuda", dtype=torch.bfloat16)
    got = fused(x, scaling=scaling, backend="triton")
    want = fp8_quantize(fn(x.float(), backend="triton"), scaling=scaling, backend="triton")
    assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(got.scale, want.scale)
