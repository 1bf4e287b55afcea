"""A product whose weight gradient waits gives the same gradients, with the same matmuls."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from warploom.kernels.activation import swiglu_linear
from warploom.parallel.tensor import product
from warploom.parallel.tensor.product import WeightGradients


def _forward_flops(gate_up, weight, *_, **__):
    return 2 * gate_up[0] * weight[0] * weight[1]


def _backward_flops(dy, gate_up, weight, weight_grad, *_, **__):
    return (1 + weight_grad) * _forward_flops(gate_up, weight)


OPERATORS = {
    torch.ops.warploom.swiglu_linear_forward: _forward_flops,
    torch.ops.warploom.swiglu_linear_backward: _backward_flops,
}


def _tensor(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


def _block(x, p, linear, swiglu):
    """A view of a weight, a cast, a bias, a weight that is used twice, SwiGLU, a plain scale."""
    h = linear(x, p["a"][:8], p["bias"])
    h = linear(h.unflatten(0, (2, -1)).tanh(), p["twice"]).flatten(0, 1)
    h = linear(h, p["twice"]) * p["scale"]
    h = linear(h, 2 * p["a"].exp()[:8, :8])
    return swiglu(h, p["down"])


def _parameters():
    shapes = {"a": (12, 8), "bias": (8,), "twice": (8, 8), "scale": (8,), "down": (5, 4)}
    return {n: _tensor(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}


def _check_equal(got, want):
    for name, tensor in want.items():
        torch.testing.assert_close(got[name].grad, tensor.grad, atol=1e-12, rtol=0, msg=name)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("leaf_input", [False, True])
def test_split_gradients_equal_whole_ones(recomputed, leaf_input):
    x, dy, want, got = _tensor(6, 8), _tensor(6, 5, seed=9), _parameters(), _parameters()
    with FlopCounterMode(display=False, custom_mapping=OPERATORS) as whole:
        _block(x, want, F.linear, swiglu_linear).backward(dy)
    queue, x2 = WeightGradients(), x.detach().clone().requires_grad_(not leaf_input)
    with FlopCounterMode(display=False, custom_mapping=OPERATORS) as split:
        with queue.open():
            run = (x2, got, product.linear, product.swiglu_linear)
            y = checkpoint(_block, *run, use_reentrant=False) if recomputed else _block(*run)
            y.backward(dy)
        assert len(queue) == 6
        assert got["twice"].grad is None
        assert got["scale"].grad is not None  # no product: at once
        queue.run()
    assert not len(queue)
    _check_equal(got, want)
    if leaf_input:
        assert x2.grad is None
    else:
        torch.testing.assert_close(x2.grad, x.grad, atol=1e-12, rtol=0)
    if not recomputed:
        less = 2 * 6 * 8 * 8 if leaf_input else 0  # the input gradient of the first product
        assert split.get_total_flops() == whole.get_total_flops() - less


def test_split_gradients_equal_whole_ones_under_autocast():
    x, dy = (_tensor(6, n, seed=n).detach().float() for n in (8, 5))
    results = []
    for queue in (None, WeightGradients()):
        inner = x.clone().requires_grad_()
        p = {n: t.detach().float().requires_grad_() for n, t in _parameters().items()}
        opened = nullcontext() if queue is None else queue.open()
        with opened, torch.autocast("cpu", dtype=torch.bfloat16):
            y = _block(inner.tanh(), p, product.linear, product.swiglu_linear)
        y.backward(dy.to(y.dtype))  # outside of autocast, as a schedule does
        if queue is not None:
            queue.run()
        results.append([y.detach(), inner.grad, *(t.grad for t in p.values())])
    assert results[0][0].dtype == torch.bfloat16
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=0.02 * float(want.abs().max()), rtol=0)


def test_a_compiled_product_waits_too():
    x, weight = _tensor(6, 8), _tensor(5, 4)
    product.swiglu_linear(x, weight).sum().backward()
    wanted, queue = weight.grad, WeightGradients()
    run = torch.compile(lambda x: product.swiglu_linear(x, weight), backend="eager")
    with queue.open():
        y = run(x)
    weight.grad = None
    y.sum().backward()
    assert weight.grad is None
    queue.run()
    torch.testing.assert_close(weight.grad, wanted)


def test_the_queue_accumulates_as_autograd_does():
    weight = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    seen = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    for step in (1, 2):
        queue = WeightGradients()
        with queue.open():
            y = product.linear(_tensor(5, 4), weight) + product.linear(_tensor(5, 4), weight)
        y.sum().backward()
        assert len(seen) == step - 1
        queue.run()
        assert len(seen) == step, "a parameter that is used twice accumulates once"
    torch.testing.assert_close(seen[1], 2 * seen[0])


def test_without_a_queue_or_a_gradient_it_is_the_plain_operator():
    weight, x = _tensor(3, 4), _tensor(5, 4)
    assert "_Split" not in type(product.linear(x, weight).grad_fn).__name__
    queue = WeightGradients()
    with queue.open(), torch.no_grad():
        product.linear(x, weight)
    with queue.open():
        y = product.linear(x, weight.detach())
        y.sum().backward()
    assert product.current_queue() is None
    assert not len(queue)
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(5, 4))


def test_there_is_no_second_derivative():
    queue, x = WeightGradients(), _tensor(5, 4)
    with queue.open():
        y = product.linear(x, _tensor(3, 4))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
