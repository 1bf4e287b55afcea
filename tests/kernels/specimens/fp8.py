"""Specimens of `kernels/gemm/fp8*.py`, and FP8 training by its formulas: what they are held to.

The truth knows the table of `fp8_training` and the rule of rounding alone, nothing of the code.
"""

import torch
import torch.nn.functional as F
from tests.kernels.specimen import Specimen

from warploom.kernels.gemm import Fp8Recipe, Fp8Scales, fp8_gemm, fp8_linear
from warploom.kernels.quant import fp8_quantize, mx_quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_MAX = {E4M3: 448.0, E5M2: 57344.0}
_GROUPS = {"row": (1, None), "block": (1, 128), "tile": (128, 128), "mx": (1, 32)}
_COLUMNS = 20


def rounded(x, grouping, dtype, scale=None):
    """Round to FP8 in groups of rows by columns, and multiply out; in float64."""
    rows, width = x.shape
    if not x.numel():
        return x.double()
    down, across = _GROUPS.get(grouping, (rows, None))
    down, across = down, across or width
    x = F.pad(x.float(), (0, -width % across, 0, -rows % down))
    groups = x.unflatten(0, (-1, down)).unflatten(2, (-1, across))
    a = groups.abs().amax((1, 3), keepdim=True)
    top = torch.full_like(a, _MAX[dtype])
    if grouping == "mx":
        scale = torch.exp2(torch.ceil(torch.log2((a / top).double()))).clamp(min=2.0**-127).float()
        inverse = (1 / scale.double()).float()
    elif scale is None:
        a = a.clamp(min=_MAX[dtype] * 2.0**-126)
        scale, inverse = a / top, top / a
    else:
        inverse = 1 / scale
    codes = (groups * inverse).clamp(-_MAX[dtype], _MAX[dtype]).to(dtype)
    value = codes.float() * scale
    return value.flatten(2, 3).flatten(0, 1)[:rows, :width].double()


class Straight(torch.autograd.Function):
    """y = x weight^T with each operand rounded as the table says; gradients straight through."""

    @staticmethod
    def forward(ctx, x, weight, scaling, scales=(None, None)):
        ctx.save_for_backward(x, weight)
        ctx.scaling, ctx.scales = scaling, scales
        ctx.of_weight = "tile" if scaling == "block" else scaling
        left, right = rounded(x, scaling, E4M3, scales[0]), rounded(weight, ctx.of_weight, E4M3)
        return left.to(x.dtype) @ right.to(x.dtype).t()

    @staticmethod
    def backward(ctx, dy):
        (x, weight), scaling = ctx.saved_tensors, ctx.scaling
        coarse = E5M2 if scaling in ("tensor", "row") else E4M3
        x_scale, dy_scale = ctx.scales
        dtype = dy.dtype
        dx = rounded(dy, scaling, coarse, dy_scale).to(dtype)
        dx = dx @ rounded(weight.t(), ctx.of_weight, E4M3).to(dtype).t()
        dweight = rounded(dy.t(), scaling, coarse, dy_scale).to(dtype)
        dweight = dweight @ rounded(x.t(), scaling, E4M3, x_scale).to(dtype).t()
        return dx, dweight, None, None


def _draw(draw, rows, width, **more):
    columns = width if width >= 1024 else _COLUMNS
    return (draw(rows, width), draw(columns, width, seed=1, scale=0.3)), more


def _linear(name, scaling, *, delayed=False):
    recipe = Fp8Recipe(scaling=scaling, delayed=delayed)

    def draw(draw, rows, width):
        if not delayed:
            return _draw(draw, rows, width)
        fill = lambda v: torch.full((), v, device=draw.device)  # noqa: E731
        return _draw(draw, rows, width, scale=fill(0.01), gradient_scale=fill(1e-4))

    def run(x, weight, *, scale=None, gradient_scale=None, backend=None):
        scales = None if scale is None else Fp8Scales(scale, gradient_scale)
        return fp8_linear(x, weight, recipe=recipe, scales=scales, backend=backend)

    def truth(x, weight, *, scale=None, gradient_scale=None):
        return Straight.apply(x, weight, scaling, (scale, gradient_scale))

    return Specimen(
        name=f"fp8_linear_{name}",
        op="fp8_linear",
        draw=draw,
        run=run,
        truth=truth,
        plain=truth,
        shapes=((0, 6), (1, 1), (5, 3), (33, 129), (130, 140)),
        training=((8192, 4096),),
        huge=False,  # its kernels are those of the quantiser and the product
        rows=(),  # the CPU's product of few rows may sum in another order
    )


def _gemm(scaling, dtype=E4M3):
    of_a = "block" if scaling == "tile" else scaling

    def quantised(x, grouping, dtype, backend):
        if grouping == "mx":
            return mx_quantize(x.detach(), dtype=dtype, rounding="ceil", backend=backend)
        return fp8_quantize(x.detach(), scaling=grouping, dtype=dtype, backend=backend)

    def run(a, b, *, backend=None):
        a, b = quantised(a, of_a, dtype, backend), quantised(b, scaling, E4M3, backend)
        return fp8_gemm(a, b, backend=backend)

    def truth(a, b):
        a, b = a.detach(), b.detach()
        left, right = rounded(a, of_a, dtype).to(a.dtype), rounded(b, scaling, E4M3).to(a.dtype)
        return left @ right.t()

    return Specimen(
        name=f"fp8_gemm_{scaling}",
        op="fp8_gemm",
        draw=_draw,
        run=run,
        truth=truth,
        plain=truth,
        shapes=((0, 6), (3, 0), (1, 1), (33, 129), (3, 1000), (130, 140)),
        training=((8192, 4096), (8192, 2048)),
        rows=(),  # the CPU's product of few rows may sum in another order
        gradient=False,
    )


SPECIMENS = (_gemm("tile"), _linear("row", "row"), _linear("block", "block"))
# Held to their values alone: the whole list costs seconds a way.
MORE = (
    _gemm("tensor", E5M2),
    _gemm("row"),
    _gemm("block", E5M2),
    _gemm("mx"),
    _linear("tensor", "tensor"),
    _linear("delayed", "tensor", delayed=True),
    _linear("mx", "mx"),
)
