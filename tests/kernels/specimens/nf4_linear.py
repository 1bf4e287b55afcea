"""Specimens of the linear layer in NF4; the specification multiplies by the whole weight."""

import torch
from tests.kernels.specimen import DTYPES, Specimen

from warploom.kernels.gemm import nf4_linear, nf4_linear_reference
from warploom.kernels.quant import Nf4, nf4_quantize

_F = 24


def _draw(double, bias):
    def draw(draw, rows, width):
        out = 256 if getattr(draw, "ghost", False) else _F
        size = out * width
        if getattr(draw, "ghost", False) or draw.device == "meta":
            device = "meta" if draw.device == "meta" else "cpu"
            new = lambda n, dtype: torch.empty(n, dtype=dtype, device=device)  # noqa: E731
            blocks = -(-size // 64)
            q = Nf4(
                new((size + 1) // 2, torch.uint8), new(blocks, torch.float32), (), draw.dtype, 64
            )
            if double:
                second = new(256, torch.float32), new(-(-blocks // 256), torch.float32)
                q = q._replace(absmax=new(blocks, torch.uint8), code=second[0], absmax2=second[1])
                q = q._replace(offset=new(1, torch.float32))
        else:
            weight = type(draw)(torch.float32, draw.device)(out, width, seed=1, scale=width**-0.5)
            q = nf4_quantize(weight, double=double)
        fixed = {"packed": q.packed, "absmax": q.absmax, "shape": (out, width)}
        if double:
            fixed |= {"code": q.code, "absmax2": q.absmax2, "offset": q.offset}
        inputs = (draw(rows, width), draw(out, seed=2)) if bias else (draw(rows, width),)
        return inputs, fixed

    return draw


def _weight(x, shape, packed, absmax, code=None, absmax2=None, offset=None):
    return Nf4(packed, absmax, shape, x.dtype, 64, code, absmax2, offset)


def _run(x, bias=None, *, backend=None, **parts):
    return nf4_linear(x, _weight(x, **parts), bias, backend=backend)


def _truth(x, bias=None, *, rounded, **parts):
    weight = nf4_linear_reference(torch.eye(x.shape[1], dtype=rounded), _weight(x, **parts))
    return torch.nn.functional.linear(x, weight.t().double(), bias)


def _plain(x, bias=None, **parts):
    return nf4_linear_reference(x, _weight(x, **parts), bias)


def _specimen(name, double, bias):
    return Specimen(
        name=name,
        op="nf4_linear",
        draw=_draw(double, bias),
        run=_run,
        truth=_truth,
        plain=_plain,
        shapes=((0, 6), (1, 1), (1, 64), (5, 3), (33, 129), (3, 1000)),
        training=((128, 4096),),
        dtypes=DTYPES,
        rows=(),  # a row's bits are those of a product of so many rows
        huge=False,
    )


SPECIMENS = (
    _specimen("nf4_linear", double=True, bias=False),
    _specimen("nf4_linear_bias", double=False, bias=True),
)
