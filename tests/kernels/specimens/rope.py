"""Specimens of `kernels/rope`."""

import torch
from tests.kernels.specimen import Specimen

from warploom.kernels.rope import rotary, rotary_reference, rotary_tables


def _draw(draw, rows, width):
    positions = torch.arange(rows, device=draw.device)
    cos, sin = rotary_tables(positions, 2 * width, base=1e4)
    q, k = draw(rows, 3, 2 * width), draw(rows, 1, 2 * width, seed=1)
    return (q, k), {"cos": cos, "sin": sin}


def _run(q, k, *, cos, sin, backend):
    return rotary(q, k, cos, sin, backend=backend)


def _truth(q, k, *, cos, sin):
    return rotary_reference(q, k, cos.double(), sin.double())


def _plain(q, k, *, cos, sin):
    cos, sin = (t.to(q.dtype).unsqueeze(1) for t in (cos, sin))

    def turn(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    return turn(q), turn(k)


SPECIMENS = (
    Specimen(
        name="rotary",
        op="rotary",
        draw=_draw,
        run=_run,
        truth=_truth,
        plain=_plain,
        rows=(0, 1),
        training=((8192, 32), (8192, 64), (8192, 96)),
    ),
)
