"""Specimens of `kernels/gemm/grouped.py`: rows sorted by expert, of which some have none."""

import torch
from tests.kernels.specimen import Specimen

from warploom.kernels.gemm import grouped_gemm

_EXPERTS = 5


def _draw(draw, rows, width):
    """Leave the first, a middle and the last expert without rows."""
    columns = width // 2 if width >= 1024 else 12
    counts = draw.integers(1, _EXPERTS)
    if draw.device != "meta":
        counts[1], counts[3] = rows // 3, rows - rows // 3
    inputs = draw(rows, width), draw(_EXPERTS, columns, width, seed=1, scale=0.2)
    return inputs, {"counts": counts}


def _product(x, weight, *, counts):
    """Multiply every row by the weight of its own expert, gathered."""
    experts = torch.arange(_EXPERTS, device=counts.device).repeat_interleave(counts)
    return (x.unsqueeze(1) @ weight[experts].transpose(1, 2)).squeeze(1)


SPECIMENS = (
    Specimen(
        name="grouped_gemm",
        op="grouped_gemm",
        draw=_draw,
        run=lambda x, weight, *, counts, backend: grouped_gemm(x, weight, counts, backend=backend),
        truth=_product,
        plain=_product,
        shapes=((0, 6), (1, 1), (5, 3), (33, 129), (2, 300)),
        training=((8192, 4096), (8192, 2048)),
        waits=True,
        rows=(),  # a row's bits are those of a product of the size of its expert's load
    ),
)
