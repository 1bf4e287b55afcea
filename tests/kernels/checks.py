"""What every backend of rms_norm, rotary and swiglu must hold, on any device.

`operator(name)` gives inputs, the operator, its float64 truth and the plain PyTorch form; `errors`
compares values and all gradients under a random upstream gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from warploom.kernels.activation import swiglu, swiglu_reference
from warploom.kernels.norm import rms_norm, rms_norm_reference
from warploom.kernels.rope import rotary, rotary_reference, rotary_tables

SHAPES = [(0, 6), (1, 1), (1, 64), (5, 3), (33, 129), (3, 1000), (130, 128)]


@dataclass(frozen=True)
class Case:
    """Inputs that take a gradient, and three ways to compute outputs from them."""

    inputs: tuple[Tensor, ...]
    operator: Callable[..., object]
    truth: Callable[..., object]
    plain: Callable[..., object]


def _randn(*shape, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)


def _plain_rms(x, weight, residual=None, eps=1e-6):
    h = x if residual is None else x + residual
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight
    return y if residual is None else (y, h)


def _truth_rms(rounded, x, weight, residual=None, eps=1e-6):
    """Normalise the sum as it was rounded to the dtype of the input."""
    if residual is None:
        return rms_norm_reference(x, weight, eps=eps)[0]
    h = x + residual
    h = h + ((x.to(rounded) + residual.to(rounded)).to(h.dtype) - h).detach()
    return rms_norm_reference(h, weight, eps=eps)[0], h


def _plain_rotary(cos, sin, q, k):
    cos, sin = (t.to(q.dtype).unsqueeze(1) for t in (cos, sin))

    def turn(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    return turn(q), turn(k)


def _plain_swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def case(name: str, tokens: int, width: int, dtype, *, device="cpu", backend=None, seed=0) -> Case:
    """Build the case `name`: rms_norm, rms_norm_residual, swiglu or rotary."""
    randn = partial(_randn, dtype=dtype, device=device)
    if name == "swiglu":
        return Case(
            (randn(tokens, 2 * width, seed=seed),),
            partial(swiglu, backend=backend),
            swiglu_reference,
            _plain_swiglu,
        )
    if name == "rotary":
        tables = rotary_tables(torch.arange(tokens, device=device), 2 * width, base=1e4)
        q, k = randn(tokens, 3, 2 * width, seed=seed), randn(tokens, 1, 2 * width, seed=seed + 1)

        def run(q, k):
            return rotary(q, k, *tables, backend=backend)

        def truth(q, k):
            return rotary_reference(q, k, *(t.double() for t in tables))

        return Case((q, k), run, truth, partial(_plain_rotary, *tables))
    x, weight = randn(tokens, width, seed=seed), randn(width, seed=seed + 1)
    extra = (randn(tokens, width, seed=seed + 2),) if name == "rms_norm_residual" else ()

    def norm(x, weight, residual=None):
        return rms_norm(x, weight, residual=residual, backend=backend)

    return Case((x, weight, *extra), norm, partial(_truth_rms, dtype), _plain_rms)


def results(fn, inputs, upstream_seed=7) -> list[Tensor]:
    """Compute outputs and the gradients of all inputs under a random upstream gradient."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = fn(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [
        _randn(*o.shape, dtype=o.dtype, device=o.device, seed=upstream_seed + i)
        for i, o in enumerate(outputs)
    ]
    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]


def truth_results(c: Case) -> list[Tensor]:
    """Compute the same in float64 on the same rounded inputs and rounded upstream gradients."""
    dtype = c.inputs[0].dtype
    inputs = [t.detach().double().requires_grad_() for t in c.inputs]
    outputs = c.truth(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [
        _randn(*o.shape, dtype=dtype, device=o.device, seed=7 + i).double()
        for i, o in enumerate(outputs)
    ]
    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]


def check(c: Case) -> float:
    """Hold the operator to the rules; returns its largest error over that of plain PyTorch.

    float64: 1e-10 absolute. float32: 1e-5 of the largest value. Below: at most twice the error of
    plain PyTorch in that dtype, and 1.5 times on average; half a unit in the last place of the
    largest value is free, because rounding the exact answer costs as much.
    """
    dtype, worst = c.inputs[0].dtype, 0.0
    actual, truth = results(c.operator, c.inputs), truth_results(c)
    plain = results(c.plain, c.inputs)
    for a, t, p in zip(actual, truth, plain, strict=True):
        a, t, p = a.detach(), t.detach(), p.detach()
        assert a.shape == t.shape
        assert a.dtype == dtype
        assert a.is_contiguous()
        if not a.numel():
            continue
        error, allowed = (a.double() - t).abs(), (p.double() - t).abs()
        unit = torch.finfo(dtype).eps / 2 * float(t.abs().max())
        if dtype == torch.float64:
            assert float(error.max()) <= 1e-10
        elif dtype == torch.float32:
            assert float(error.max()) <= 1e-5 * float(t.abs().max()) + 1e-6
        else:
            assert float(error.max()) <= 2 * float(allowed.max()) + unit
            assert float(error.mean()) <= 1.5 * float(allowed.mean()) + unit
        worst = max(worst, float(error.max()) / (float(allowed.max()) + unit + 1e-12))
    return worst
