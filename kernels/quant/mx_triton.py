"""Triton code of `mx_quantize`: a program reads a tile once and writes its codes and scales.

With TRANSPOSE it writes those of the transposed matrix too, through shared memory. Offsets are
64-bit.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import near, on_device
from .formats import EXPONENTS, MAXIMA
from .formats import MX_BLOCK as BLOCK
from .fp8_triton import fp8_bits, fp8_cast


def configuration(transpose: bool) -> dict[str, int]:
    """Choose tile and warps.

    Args:
        transpose: Whether the transposed copy is written.

    Returns:
        ROWS and COLUMNS of a tile, and num_warps.
    """
    if transpose:
        return {"ROWS": 128, "COLUMNS": 128, "num_warps": 16}
    return {"ROWS": 32, "COLUMNS": 128, "num_warps": 4}


@triton.jit
def mx_scale(bits, MAX: tl.constexpr, EXPONENT: tl.constexpr, CEIL: tl.constexpr):
    """Return exponent + 127 and 1 / scale of blocks whose largest |x| has these bits."""
    if CEIL:
        ratio = fp8_bits(tl.div_rn(bits.to(tl.float32, bitcast=True), MAX))
        exponent = tl.where(ratio > 4194304, (ratio + 0x7FFFFF) >> 23, 0)  # 4194304 is 2^-127
    else:
        exponent = tl.maximum((bits >> 23) - EXPONENT, 0)
    exponent = tl.where(bits < 0x7F800000, exponent, 255)
    inverse = (tl.maximum(254 - exponent, 0) << 23).to(tl.float32, bitcast=True)
    return exponent, inverse


@triton.jit
def tile_kernel(
    x, data, scale, data_t, scale_t, tokens, width, pieces, groups, groups_t, stride,
    TRANSPOSE: tl.constexpr, CEIL: tl.constexpr, MAX: tl.constexpr, EXPONENT: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Quantise a tile along its rows, and with TRANSPOSE along its columns."""
    program = tl.program_id(0)
    down, across = (program // pieces).to(tl.int64), program % pieces
    row = down * ROWS + tl.arange(0, ROWS)
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < tokens)[:, None] & (column < width)[None, :]
    value = tl.load(x + row[:, None] * stride + column[None, :], inside, other=0.0)
    value = value.to(tl.float32)
    blocks = tl.reshape(value, [ROWS, COLUMNS // BLOCK, BLOCK])
    exponent, inverse = mx_scale(tl.max(fp8_bits(blocks), 2), MAX, EXPONENT, CEIL)
    codes = fp8_cast(blocks, inverse[:, :, None], MAX, data.dtype.element_ty)
    codes = tl.reshape(codes, [ROWS, COLUMNS])
    tl.store(data + row[:, None] * width + column[None, :], codes, inside)
    group = across * (COLUMNS // BLOCK) + tl.arange(0, COLUMNS // BLOCK)
    known = (row < tokens)[:, None] & (group < groups)[None, :]
    tl.store(scale + row[:, None] * groups + group[None, :], exponent.to(tl.uint8), known)
    if TRANSPOSE:
        blocks = tl.reshape(value, [ROWS // BLOCK, BLOCK, COLUMNS])
        exponent, inverse = mx_scale(tl.max(fp8_bits(blocks), 1), MAX, EXPONENT, CEIL)
        codes = fp8_cast(blocks, inverse[:, None, :], MAX, data.dtype.element_ty)
        codes = tl.trans(tl.reshape(codes, [ROWS, COLUMNS]))
        far = column.to(tl.int64)[:, None]
        tl.store(data_t + far * tokens + row[None, :], codes, tl.trans(inside))
        group_t = down * (ROWS // BLOCK) + tl.arange(0, ROWS // BLOCK)
        known = (column < width)[:, None] & (group_t < groups_t)[None, :]
        exponent = tl.trans(exponent).to(tl.uint8)
        tl.store(scale_t + far * groups_t + group_t[None, :], exponent, known)


def quantize(
    x_TD: Tensor, dtype: torch.dtype, rounding: str, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the quantisation.

    Args:
        x_TD: `[T, D]`.
        dtype: float8_e4m3fn or float8_e5m2.
        rounding: "floor" or "ceil".
        transpose: Whether to write the transposed copy.

    Returns:
        data `[T, D]`, bytes of the scales `[T, ceil(D / 32)]`, and the same of the transposed
        matrix (empty where not asked for).
    """
    tokens, width = x_TD.shape
    x_TD = near(x_TD)
    groups, groups_t = triton.cdiv(width, BLOCK), triton.cdiv(tokens, BLOCK)
    data = x_TD.new_empty(tokens, width, dtype=dtype)
    scale = x_TD.new_empty(tokens, groups, dtype=torch.uint8)
    data_t = x_TD.new_empty((width, tokens) if transpose else (0,), dtype=dtype)
    scale_t = scale.new_empty((width, groups_t) if transpose else (0,))
    if data.numel():
        chosen = configuration(transpose)
        pieces = triton.cdiv(width, chosen["COLUMNS"])
        with on_device(x_TD):
            tile_kernel[(triton.cdiv(tokens, chosen["ROWS"]) * pieces,)](
                x_TD, data, scale, data_t, scale_t, tokens, width, pieces, groups, groups_t,
                x_TD.stride(0), TRANSPOSE=transpose, CEIL=rounding == "ceil", MAX=MAXIMA[dtype],
                EXPONENT=EXPONENTS[dtype], BLOCK=BLOCK, **chosen,
            )  # fmt: skip
    return data, scale, data_t, scale_t
