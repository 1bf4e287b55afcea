"""The specimen of `kernels/moe/block.py`."""

import torch
from tests.kernels.specimen import Specimen

from warploom.kernels.moe import moe_block, moe_block_reference

_K, _EXPERTS = 2, 3


def _draw(draw, rows, width):
    """Leave the last expert without tokens; what follows rows that nobody owns is h's own."""
    hidden = width // 2 if width >= 1024 else 8
    weights = draw(rows, _K, seed=3)
    inputs = (
        draw(rows, width),
        draw(_EXPERTS, 2 * hidden, width, seed=1, scale=width**-0.5),
        draw(_EXPERTS, width, hidden, seed=2, scale=hidden**-0.5),
        weights if draw.dtype == torch.float64 else weights.float(),
    )
    return inputs, {"indices": draw.integers(_EXPERTS - 1, rows, _K, seed=4)}


def _plain(x, gate_up, down, weights, *, indices):
    """Every token through every expert, and what was not chosen times 0."""
    y = torch.zeros_like(x)
    for e in range(_EXPERTS):
        gate, up = (x @ gate_up[e].t()).chunk(2, -1)
        share = (weights * (indices == e)).sum(1, keepdim=True).to(x.dtype)
        y = y + share * ((torch.nn.functional.silu(gate) * up) @ down[e].t())
    return y


SPECIMENS = (
    Specimen(
        name="moe_block",
        op="moe_block",
        draw=_draw,
        run=lambda x, gate_up, down, weights, *, indices, backend: moe_block(
            x, gate_up, down, indices, weights, backend=backend
        ),
        truth=lambda x, gate_up, down, weights, *, indices: moe_block_reference(
            x, gate_up, down, indices, weights
        ),
        plain=_plain,
        shapes=((0, 6), (1, 1), (5, 3), (33, 129)),
        training=((8192, 2048),),
        waits=True,
        rows=(),  # as of `grouped_gemm`
    ),
)
