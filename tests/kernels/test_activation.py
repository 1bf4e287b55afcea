"""swiglu on the CPU: values, gradients, strides, dtypes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.checks import SHAPES, case, check

from warploom.kernels.activation import swiglu, swiglu_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [*SHAPES, (150, 2100)])
def test_values_and_gradients(tokens, width, dtype):
    check(case("swiglu", tokens, width, dtype))


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(0, 40), width=st.integers(1, 70))
def test_any_shape(tokens, width):
    check(case("swiglu", tokens, width, torch.float32))


def test_gradcheck():
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_transformers_agrees():
    """The feed-forward of LlamaMLP between its matrix products."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    theirs = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=24))
    x = torch.randn(5, 32)
    packed = torch.cat([theirs.gate_proj(x), theirs.up_proj(x)], -1)
    torch.testing.assert_close(theirs.down_proj(swiglu(packed)), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gates_do_not_overflow(dtype):
    gate = torch.tensor([[-1e4, -200.0, -100.0, 0.0, 100.0, 1e4]], dtype=dtype)
    x = torch.cat([gate, torch.ones_like(gate)], -1).requires_grad_()
    y = swiglu(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y[0, 4:].double(), gate[0, 4:].double())
    assert float(y.detach()[0, :3].abs().max()) < 1e-30
    assert dx.isfinite().all()
    torch.testing.assert_close(dx[0, :6], torch.tensor([0, 0, 0, 0.5, 1, 1], dtype=dtype))


def test_strided_inputs_and_expanded_gradients():
    x = torch.randn(6, 4, 16)[:, 1:3, ::2].transpose(0, 1).requires_grad_()
    y, expected = swiglu(x), swiglu_reference(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
    )


def test_a_nan_poisons_its_row_only():
    x = torch.randn(4, 8)
    x[2, 3] = float("nan")
    x.requires_grad_()
    y = swiglu(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn(4, 4))
    assert y.isnan().any(1).tolist() == [False, False, True, False]
    assert dx.isnan().any(1).tolist() == [False, False, True, False]


def test_only_the_input_is_saved():
    x = torch.randn(8, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(x)
    assert len(saved) == 1
    assert saved[0].data_ptr() == x.data_ptr()


def test_operator_is_registered_properly():
    x = torch.randn(3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.warploom.swiglu_forward, (x, None))
    torch.library.opcheck(torch.ops.warploom.swiglu_backward, (torch.randn(3, 4), x.detach(), None))


def test_compiles_without_a_break():
    x = torch.randn(3, 8, requires_grad=True)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    dy = torch.randn(3, 4)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x), x, dy), torch.autograd.grad(swiglu(x), x, dy)
    )


def test_errors_say_what_was_found():
    with pytest.raises(ValueError, match=r"must be even \(gate, up\), got \[2, 7\]"):
        swiglu(torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"got torch.int64"):
        swiglu(torch.ones(2, 8, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [*SHAPES, (5000, 1536), (300, 14336)])
def test_triton_on_the_device(tokens, width, dtype):
    check(case("swiglu", tokens, width, dtype, device="cuda", backend="triton"))
