"""Specimens of `kernels/quant`: values straight through, then codes and scales to the last bit."""

import torch
from tests.kernels.specimen import Specimen

from warploom.kernels.quant import fp8_quantize


def _fp8(name, rows=(), shapes=((0, 6), (3, 0), (1, 1), (5, 3), (33, 129), (130, 300)), **fixed):
    def draw(draw, rows, width):
        return (draw(rows, width),), {}

    def run(x, *, backend=None):
        q = fp8_quantize(x, backend=backend, **fixed)
        parts = q.data.view(torch.uint8), q.scale, q.amax, q.data_t, q.scale_t
        parts = [None if p is None else p.view(torch.uint8) if p is q.data_t else p for p in parts]
        return q.dequantize(), *parts

    def truth(x, *, rounded):
        value, *parts = run(x.detach().to(rounded), backend="reference")
        return x + (value.double() - x).detach(), *parts

    return Specimen(
        name=name,
        op="fp8_quantize",
        draw=draw,
        run=run,
        truth=truth,
        plain=lambda x: truth(x, rounded=x.dtype),
        shapes=shapes,
        rows=rows,
        exact=tuple(range(6)),
        second="there is no second derivative",
    )


SPECIMENS = (
    _fp8("fp8_quantize_tensor"),
    _fp8("fp8_quantize_tensor_transposed", transpose=True, dtype=torch.float8_e5m2),
    _fp8("fp8_quantize_row", (0, 1, 2), scaling="row"),
    _fp8("fp8_quantize_row_transposed", scaling="row", transpose=True),
    _fp8("fp8_quantize_block", (0, 1, 2), scaling="block"),
    _fp8("fp8_quantize_block_transposed", scaling="block", transpose=True, power_of_two=True),
    _fp8("fp8_quantize_tile", scaling="tile"),
)
