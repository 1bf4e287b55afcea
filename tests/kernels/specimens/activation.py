"""Specimens of `kernels/activation`."""

import torch
from tests.kernels.specimen import Specimen

from warploom.kernels.activation import swiglu, swiglu_reference


def _draw(draw, rows, width):
    return (draw(rows, 2 * width),), {}


def _plain(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


SPECIMENS = (
    Specimen(
        name="swiglu",
        op="swiglu",
        draw=_draw,
        run=swiglu,
        truth=swiglu_reference,
        plain=_plain,
        training=((8192, 1536), (8192, 14336)),
    ),
)
