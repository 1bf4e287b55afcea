"""Specimens of `kernels/quant`: values straight through, then codes and scales to the last bit."""

import torch
from tests.kernels.specimen import Specimen

from warploom.kernels.quant import Nf4, fp8_quantize, mx_quantize, nf4_dequantize, nf4_quantize


def _bits(x):
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


_SHAPES = ((0, 6), (3, 0), (1, 1), (5, 3), (33, 129), (130, 300))


def _fp8(name, rows=(), quantize=fp8_quantize, **fixed):
    def draw(draw, rows, width):
        return (draw(rows, width),), {"value": not getattr(draw, "ghost", False)}

    def run(x, *, value=True, backend=None):
        q = quantize(x, backend=backend, **fixed)
        parts = q.data, q.scale, getattr(q, "amax", None), q.data_t, q.scale_t
        bits = [None if p is None else _bits(p) for p in parts]
        return q.dequantize() if value else q.carrier, *bits  # memory that nobody touches

    def truth(x, *, rounded, value=True):
        value, *parts = run(x.detach().to(rounded), backend="reference")
        return x + (value.double() - x).detach(), *parts

    return Specimen(
        name=name,
        op=quantize.__name__,
        draw=draw,
        run=run,
        truth=truth,
        plain=lambda x, value: truth(x, rounded=x.dtype),
        shapes=_SHAPES,
        rows=rows,
        exact=tuple(range(6)),
        second="there is no second derivative",
    )


_NF4 = {
    "shapes": ((0, 6), (1, 1), (5, 3), (33, 129)),
    "dtypes": (torch.float32, torch.bfloat16, torch.float16),
    "rows": (),
    "gradient": False,
}


def _nf4_codes(x, *, backend=None):
    q = nf4_quantize(x.detach(), double=False, backend=backend)
    return q.packed, q.absmax


def _nf4_codes_truth(x, *, rounded):
    return _nf4_codes(x.detach().to(rounded), backend="reference")


def _draw_codes(draw, rows, width):
    """Draw codes and scales; the numbers to multiply have no gradient."""
    size = rows * width
    if getattr(draw, "ghost", False):
        packed = torch.empty((size + 1) // 2, 1, dtype=torch.uint8)
    else:
        packed = draw.integers(256, (size + 1) // 2, 1).to(torch.uint8)
    levels = draw.integers(256, -(-size // 64), seed=1).to(torch.uint8)
    code, offset = draw(256, seed=2).float(), draw(1, seed=3).float()
    fixed = {"packed": packed, "levels": levels, "code": code, "offset": offset}
    return (draw(-(-size // (64 * 256)), seed=4),), {**fixed, "shape": (rows, width)}


def _nf4_value(absmax2, *, packed, levels, code, offset, shape, backend=None):
    dtype, absmax2 = absmax2.dtype, absmax2.detach().float()
    q = Nf4(packed, levels, shape, dtype, 64, code, absmax2, offset.reshape(()))
    return nf4_dequantize(q, backend=backend)


def _nf4_value_truth(absmax2, *, rounded, **fixed):
    return _nf4_value(absmax2.to(rounded), backend="reference", **fixed)


SPECIMENS = (
    Specimen(
        name="nf4_quantize",
        op="nf4_quantize",
        draw=lambda draw, rows, width: ((draw(rows, width),), {}),
        run=_nf4_codes,
        truth=_nf4_codes_truth,
        plain=_nf4_codes,
        exact=(0, 1),
        **_NF4,
    ),
    Specimen(
        name="nf4_dequantize",
        op="nf4_dequantize",
        draw=_draw_codes,
        run=_nf4_value,
        truth=_nf4_value_truth,
        plain=_nf4_value,
        exact=(0,),
        **_NF4,
    ),
    _fp8("fp8_quantize_tensor"),
    _fp8("fp8_quantize_tensor_transposed", transpose=True, dtype=torch.float8_e5m2),
    _fp8("fp8_quantize_row", (0, 1, 2), scaling="row"),
    _fp8("fp8_quantize_row_transposed", scaling="row", transpose=True),
    _fp8("fp8_quantize_block", (0, 1, 2), scaling="block"),
    _fp8("fp8_quantize_block_transposed", scaling="block", transpose=True, power_of_two=True),
    _fp8("fp8_quantize_tile", scaling="tile"),
    _fp8("mx_quantize", (0, 1, 2), mx_quantize),
    _fp8("mx_quantize_transposed", (), mx_quantize, rounding="ceil", transpose=True),
    _fp8("mx_quantize_e5m2", (0, 1, 2), mx_quantize, rounding="ceil", dtype=torch.float8_e5m2),
)
