"""Triton code of `moe_block`: grouped products that gather their rows, and what lies between them.

The products are those of `gemm/grouped_triton.py`, reading rows of x and dy through the order.
`between_kernel` has a program a row: it reads b, gate and up once, and writes dh, w a and dw. Rows
beyond the counts serve no slot; nothing is read or written there. Offsets are 64-bit. Not run on a
GPU yet.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..activation import glu_triton
from ..activation.glu_triton import activate
from ..gemm import grouped_triton as grouped
from ..gemm.grouped_triton import Rows
from ..launch import next_power_of_two
from .permutation_triton import _place, unpermute


def configuration(width: int) -> dict[str, int]:
    """Choose how many columns a program holds at a time.

    Args:
        width: F.

    Returns:
        BLOCK and num_warps.
    """
    block = min(next_power_of_two(width), 1024)
    return {"BLOCK": block, "num_warps": 4 if block > 512 else 2}


@triton.jit
def between_kernel(b, h, order, weights, dh, a, dweights, width, BLOCK: tl.constexpr):
    """Write dh, w a and dw of a row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(order + row)
    if slot >= 0:
        weight = tl.load(weights + slot).to(tl.float32)
        dots = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            at = h + row * 2 * width + column
            value, slope = activate(tl.load(at, inside, other=0.0).to(tl.float32), "swiglu")
            up = tl.load(at + width, inside, other=0.0).to(tl.float32)
            above = tl.load(b + row * width + column, inside, other=0.0).to(tl.float32)
            dots += above * value * up
            tl.store(a + row * width + column, (weight * value * up).to(a.dtype.element_ty), inside)
            above *= weight
            to = dh + row * 2 * width + column
            tl.store(to, (above * up * slope).to(dh.dtype.element_ty), inside)
            tl.store(to + width, (above * value).to(dh.dtype.element_ty), inside)
        tl.store(dweights + slot, tl.sum(dots, 0).to(dweights.dtype.element_ty))


def _between(
    b_MF: Tensor, h_MF: Tensor, weights_TK: Tensor, order_M: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = b_MF.shape
    dh_MF, a_MF = h_MF.new_empty(h_MF.shape), b_MF.new_empty(b_MF.shape)
    dweights_TK = weights_TK.new_zeros(weights_TK.shape)
    weights_TK = weights_TK.contiguous()

    def start(chosen: dict[str, int]) -> None:
        between_kernel[(rows,)](
            b_MF, h_MF, order_M, weights_TK, dh_MF, a_MF, dweights_TK, width, **chosen
        )

    if b_MF.numel():
        tuning.launch("moe_block", (width,), tuning.by_warps(configuration(width)), start, b_MF)
    return dh_MF, a_MF, dweights_TK


def forward(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, indices_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `moe_block`.

    Args:
        x_TD: `[T, D]`.
        gate_up_EFD: `[E, 2F, D]`.
        down_EDF: `[E, D, F]`.
        indices_TK: `[T, k]` int64; what is not from 0 to E - 1 gives no row.
        weights_TK: `[T, k]`.

    Returns:
        y `[T, D]`, h `[T k, 2F]`, counts `[E]`, order `[T k]`.
    """
    tokens, top_k = indices_TK.shape
    _, counts, order = _place(indices_TK, len(gate_up_EFD))
    h = grouped.forward(Rows(x_TD, order, top_k), gate_up_EFD, counts, False)
    out = grouped.forward(Rows(glu_triton.forward(h, "swiglu")), down_EDF, counts, False)
    return unpermute(out, order, weights_TK, tokens, top_k), h, counts, order


def backward(
    dy_TD: Tensor, x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, weights_TK: Tensor,
    h_MF: Tensor, counts_E: Tensor, order_M: Tensor, kept: bool, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward of `moe_block`.

    Args:
        dy_TD: `[T, D]`.
        x_TD: `[T, D]`.
        gate_up_EFD: `[E, 2F, D]`.
        down_EDF: `[E, D, F]`.
        weights_TK: `[T, k]`.
        h_MF: `[T k, 2F]`, where it is kept.
        counts_E: `[E]`.
        order_M: `[T k]`.
        kept: Whether h is there, or is to be computed again.
        wanted: Whether the gradients of x, gate_up and down are wanted.

    Returns:
        The gradients of x, gate_up, down, empty where not wanted, and of the weights.
    """
    tokens, top_k = weights_TK.shape
    rows, dy = Rows(x_TD, order_M, top_k).ready(), Rows(dy_TD, order_M, top_k).ready()
    if not kept:
        h_MF = grouped.forward(rows, gate_up_EFD, counts_E, False)
    b_MF = grouped.forward(dy, down_EDF.transpose(1, 2), counts_E, False)
    dh_MF, a_MF, dweights_TK = _between(b_MF, h_MF, weights_TK, order_M)
    dx = dgate_up = ddown = x_TD.new_empty(0)
    if wanted[2]:
        ddown = grouped.weight_gradient(dy, Rows(a_MF), counts_E)
    if wanted[1]:
        dgate_up = grouped.weight_gradient(Rows(dh_MF), rows, counts_E)
    if wanted[0]:
        drows = grouped.forward(Rows(dh_MF), gate_up_EFD.transpose(1, 2), counts_E, False)
        dx = unpermute(drows, order_M, None, tokens, top_k)
    return dx, dgate_up, ddown, dweights_TK
