"""Triton code of `swiglu`: a program works on a piece of one row; the backward recomputes silu."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl
from torch import Tensor

from ..launch import next_power_of_two, on_device

_MAX_BLOCK = 2048


def configuration(width: int) -> dict[str, int]:
    """Choose block and warps for a width.

    Args:
        width: F.

    Returns:
        BLOCK, elements a program, and num_warps.
    """
    block = min(next_power_of_two(width), _MAX_BLOCK)
    return {"BLOCK": block, "num_warps": 8 if block > 1024 else 4}


@triton.jit
def forward_kernel(gate_up, y, width, pieces, stride, BLOCK: tl.constexpr):
    """Write BLOCK elements of silu(gate) * up."""
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64)
    column = (program % pieces) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = gate_up + row * stride + column
    gate = tl.load(at, inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(y + row * width + column, value.to(y.dtype.element_ty), inside)


@triton.jit
def backward_kernel(dy, gate_up, dx, width, pieces, dy_stride, stride, BLOCK: tl.constexpr):
    """Write BLOCK elements of dgate and the same of dup."""
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64)
    column = (program % pieces) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = gate_up + row * stride + column
    gate = tl.load(at, inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, inside, other=0.0).to(tl.float32)
    above = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = above * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = above * gate * sigmoid
    to = dx + row * (2 * width) + column
    tl.store(to, dgate.to(dx.dtype.element_ty), inside)
    tl.store(to + width, dup.to(dx.dtype.element_ty), inside)


def _rows(x_TD: Tensor) -> Tensor:
    """Leave strided rows as they are; copy only when the elements of a row are apart."""
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


def forward(gate_up_TF: Tensor) -> Tensor:
    """Launch the forward.

    Args:
        gate_up_TF: `[T, 2F]`.

    Returns:
        `[T, F]`.
    """
    tokens, width = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    y_TF = gate_up_TF.new_empty(tokens, width)
    if y_TF.numel():
        chosen, gate_up_TF = configuration(width), _rows(gate_up_TF)
        pieces = triton.cdiv(width, chosen["BLOCK"])
        with on_device(y_TF):
            forward_kernel[(tokens * pieces,)](
                gate_up_TF, y_TF, width, pieces, gate_up_TF.stride(0), **chosen
            )
    return y_TF


def backward(dy_TF: Tensor, gate_up_TF: Tensor) -> Tensor:
    """Launch the backward.

    Args:
        dy_TF: `[T, F]`.
        gate_up_TF: `[T, 2F]`.

    Returns:
        `[T, 2F]`.
    """
    tokens, width = dy_TF.shape
    dx_TF = gate_up_TF.new_empty(tokens, 2 * width)
    if dx_TF.numel():
        chosen, gate_up_TF, dy_TF = configuration(width), _rows(gate_up_TF), _rows(dy_TF)
        pieces = triton.cdiv(width, chosen["BLOCK"])
        with on_device(dx_TF):
            backward_kernel[(tokens * pieces,)](
                dy_TF,
                gate_up_TF,
                dx_TF,
                width,
                pieces,
                dy_TF.stride(0),
                gate_up_TF.stride(0),
                **chosen,
            )
    return dx_TF
