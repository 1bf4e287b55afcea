"""Specimens of `kernels/gemm/grouped.py`: rows sorted by expert, of which some have none."""

import torch
from tests.kernels.specimen import Specimen

from warploom.kernels.gemm import grouped_gemm

_EXPERTS = 5


def _counts(draw, rows, rest):
    """Leave the first, a middle and the last expert without rows, and `rest` rows to nobody."""
    counts = draw.integers(1, _EXPERTS)
    if draw.ghost or draw.device == "meta":
        return counts
    held = max(rows - rest, 0)
    counts[1], counts[3] = held // 3, held - held // 3
    return counts


def _draw(rest):
    def draw(draw, rows, width):
        columns = width // 2 if width >= 1024 else 12
        inputs = draw(rows, width), draw(_EXPERTS, columns, width, seed=1, scale=0.2)
        return inputs, {"counts": _counts(draw, rows, rest)}

    return draw


def _product(x, weight, *, counts):
    """Multiply every row by the weight of its own expert, gathered; rows of nobody are zero."""
    experts = torch.arange(_EXPERTS, device=counts.device).repeat_interleave(counts)
    y = (x[: len(experts)].unsqueeze(1) @ weight[experts].transpose(1, 2)).squeeze(1)
    return torch.cat((y, y.new_zeros(len(x) - len(experts), weight.shape[1])))


def _specimen(name, rest, shapes):
    return Specimen(
        name=name,
        op="grouped_gemm",
        draw=_draw(rest),
        run=lambda x, weight, *, counts, backend: grouped_gemm(
            x, weight, counts, zero_rest=rest > 0, backend=backend
        ),
        truth=_product,
        plain=_product,
        shapes=shapes,
        training=((8192, 4096), (8192, 2048)),
        waits=True,
        rows=(),  # a row's bits are those of a product of the size of its expert's load
    )


SPECIMENS = (
    _specimen("grouped_gemm", 0, ((0, 6), (1, 1), (5, 3), (33, 129), (2, 300))),
    _specimen("grouped_gemm_rest", 2, ((1, 1), (7, 65))),
)
