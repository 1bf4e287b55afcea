"""Specimens of `kernels/activation`."""

import functools

import torch
import torch.nn.functional as F
from tests.kernels.specimen import SHAPES, Specimen

from warploom.kernels.activation import (
    geglu,
    geglu_fp8,
    geglu_reference,
    relu2,
    relu2_fp8,
    relu2_reference,
    swiglu,
    swiglu_fp8,
    swiglu_reference,
)
from warploom.kernels.quant import fp8_quantize

_FEW = ((0, 6), (1, 1), (5, 3), (9, 129), (3, 1000))  # a row is a program: the interpreter is slow
_PLAIN = {
    "swiglu": F.silu,
    "geglu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "geglu": F.gelu,
    "relu2": lambda z: F.relu(z).square(),
}


def _exact(gate_up, backend=None):
    return geglu(gate_up, approximate="none", backend=backend)


def _draw(name):
    halves = 1 if name.startswith("relu2") else 2
    return lambda draw, rows, width: ((draw(rows, halves * width),), {})


def _plain(name):
    if name == "relu2":
        return _PLAIN[name]
    return lambda x: _PLAIN[name](x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]


def _specimen(name, run, truth):
    return Specimen(
        name=f"{name}_exact" if name == "geglu" else name,
        op=name.removesuffix("_tanh"),
        draw=_draw(name),
        run=run,
        truth=truth,
        plain=_plain(name),
        shapes=SHAPES if name == "swiglu" else _FEW,
        training=((8192, 1536), (8192, 14336)),
    )


def _quantized(name, run, truth, scaling, **fixed):
    """The value straight through the quantiser, its codes and scales."""

    def draw(draw, rows, width):
        return _draw(name)(draw, rows, width)[0], {"value": not getattr(draw, "ghost", False)}

    def whole(x, *, value=True, backend=None):
        q = run(x, scaling=scaling, backend=backend, **fixed)
        seen = q.dequantize() if value else q.carrier  # of memory that nobody touches
        return seen, q.data.view(torch.uint8), q.scale

    def specified(form):
        def of(x, value=True):
            y = form(x)
            q = fp8_quantize(y.float(), scaling=scaling, backend="reference", **fixed)
            value = q.dequantize(y.dtype).detach()
            return y + (value - y).detach(), q.data.view(torch.uint8), q.scale

        return of

    return Specimen(
        name=f"{name}_fp8_{scaling}",
        op=name.removesuffix("_tanh"),
        draw=draw,
        run=whole,
        truth=specified(truth),
        plain=specified(_plain(name)),
        shapes=_FEW,
        training=((8192, 14336),),
        dtypes=(torch.float32, torch.bfloat16),
        rows=(0, 1, 2),
    )


SPECIMENS = (
    _specimen("swiglu", swiglu, swiglu_reference),
    _specimen("geglu_tanh", geglu, geglu_reference),
    _specimen("geglu", _exact, lambda x: geglu_reference(x, approximate="none")),
    _specimen("relu2", relu2, relu2_reference),
    _quantized("swiglu", swiglu_fp8, swiglu_reference, "block"),
    _quantized("swiglu", swiglu_fp8, swiglu_reference, "row", power_of_two=True),
    _quantized("geglu_tanh", geglu_fp8, geglu_reference, "block"),
    _quantized("relu2", relu2_fp8, relu2_reference, "row"),
)
