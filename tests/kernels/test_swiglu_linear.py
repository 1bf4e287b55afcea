"""swiglu_linear: the two operators in one, saving neither's product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.kernels.activation import swiglu_linear, swiglu_linear_reference


def _draw(tokens, hidden, width, dtype):
    torch.manual_seed(tokens + hidden + width)
    gate_up = torch.randn(tokens, 2 * hidden, dtype=dtype)
    weight = torch.randn(width, hidden, dtype=dtype) / max(hidden, 1) ** 0.5
    return (
        gate_up.requires_grad_(),
        weight.requires_grad_(),
        torch.randn(tokens, width, dtype=dtype),
    )


def _run(fn, gate_up, weight, dy):
    y = fn(gate_up, weight)
    return y, *torch.autograd.grad(y, (gate_up, weight), dy)


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(0, 9), hidden=st.integers(1, 40), width=st.integers(1, 20))
def test_any_shape_in_float64(tokens, hidden, width):
    gate_up, weight, dy = _draw(tokens, hidden, width, torch.float64)
    got = _run(swiglu_linear, gate_up, weight, dy)
    want = _run(swiglu_linear_reference, gate_up, weight, dy)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_at_most_twice_as_far_as_plain_torch(dtype):
    inputs = _draw(150, 96, 64, dtype)
    exact = _run(swiglu_linear_reference, *(x.detach().double().requires_grad_() for x in inputs))

    def plain(gate_up, weight):
        gate, up = gate_up.chunk(2, -1)
        return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, weight)

    for a, b, c in zip(_run(swiglu_linear, *inputs), _run(plain, *inputs), exact, strict=True):
        allowed = 2 * (b.double() - c).abs().max() + 1e-6 * c.abs().max()
        assert (a.double() - c).abs().max() <= allowed


def test_gradcheck_and_opcheck():
    gate_up, weight, _ = _draw(3, 4, 5, torch.float64)
    assert torch.autograd.gradcheck(swiglu_linear, (gate_up, weight))
    torch.library.opcheck(torch.ops.warploom.swiglu_linear_forward.default, (gate_up, weight, None))


def test_strided_input_and_expanded_gradient():
    base, weight, _ = _draw(4, 12, 5, torch.float64)
    gate_up = base.unflatten(1, (6, 4))[..., :2].permute(1, 0, 2).flatten(1)[:, ::2]
    weight = weight[:, :2]
    got = torch.autograd.grad(swiglu_linear(gate_up, weight).sum(), base, retain_graph=True)
    want = torch.autograd.grad(swiglu_linear_reference(gate_up, weight).sum(), base)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_a_frozen_weight_gets_no_gradient():
    gate_up, weight, dy = _draw(3, 4, 5, torch.float64)
    y = swiglu_linear(gate_up, weight.detach())
    (got,) = torch.autograd.grad(y, gate_up, dy)
    (want,) = torch.autograd.grad(swiglu_linear_reference(gate_up, weight), gate_up, dy)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_only_the_input_and_the_weight_are_saved():
    gate_up, weight, _ = _draw(30, 40, 5, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        swiglu_linear(gate_up, weight)
    assert sorted(x.numel() for x in saved) == sorted((gate_up.numel(), weight.numel()))


def test_autocast_casts_both_as_for_a_linear_layer():
    gate_up, weight, dy = _draw(3, 4, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = _run(swiglu_linear, gate_up.bfloat16(), weight, dy.bfloat16())
    want = _run(swiglu_linear_reference, gate_up.bfloat16(), weight.bfloat16(), dy.bfloat16())
    assert torch.equal(got[0], want[0])
    assert got[2].dtype == torch.float32  # the weight's, which was cast


@pytest.mark.parametrize(
    ("gate_up", "weight", "message"),
    [
        (torch.ones(2, 6), torch.ones(4, 4), r"twice as wide .* got \[2, 6\] and weight \[4, 4\]"),
        (torch.ones(2, 8), torch.ones(4, 4).double(), "must have one dtype, got torch.float32"),
        (torch.ones(2, 8).long(), torch.ones(4, 4).long(), "swiglu: gate_up must be float16"),
    ],
)
def test_bad_input_gets_one_sentence(gate_up, weight, message):
    with pytest.raises(ValueError, match=message):
        swiglu_linear(gate_up, weight)
