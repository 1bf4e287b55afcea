"""Triton code of `fp8_quantize`, and what other kernels call to quantise what they computed.

A program of `tile_kernel` reads a tile once and writes its codes, and with TRANSPOSE those of the
transposed matrix through shared memory; tiles of 128 by 128 hold whole groups of both. A scale that
spans more than a tile is prepared by `amax_kernel`, which reads x once more; rows without the
transposed copy take `row_kernel`, whose second read finds the row in the cache. Absolute values are
compared as integers, which keeps NaN the largest. Offsets are 64-bit.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launch import near, next_power_of_two
from .formats import BLOCK, MAXIMA

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_SPAN = 4096  # elements of a row that a program of `row_kernel` holds at a time


def configuration(scaling: str, transpose: bool, width: int) -> dict[str, int]:
    """Choose tile and warps.

    Args:
        scaling: "tensor", "row", "block" or "tile".
        transpose: Whether the transposed copy is written.
        width: D.

    Returns:
        ROWS and COLUMNS of a tile, and num_warps.
    """
    if scaling == "row" and not transpose:
        columns = min(next_power_of_two(width), _SPAN)
        return {"ROWS": 1, "COLUMNS": columns, "num_warps": 8 if columns > 2048 else 4}
    if transpose or scaling == "tile":
        return {"ROWS": BLOCK, "COLUMNS": BLOCK, "num_warps": 16}
    return {"ROWS": 32, "COLUMNS": BLOCK, "num_warps": 4}


@triton.jit
def fp8_bits(x):
    """Return |x| of float32 as integers in the same order, NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def fp8_amax(x, axis: tl.constexpr):
    """Return max |x| along `axis` in float32; NaN stays NaN."""
    return tl.max(fp8_bits(x), axis).to(tl.float32, bitcast=True)


@triton.jit
def fp8_scale(a, MAX: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Return scale and inverse for groups of which `a`, float32, is the largest absolute value."""
    a = tl.maximum(a, MAX * 2.0**-126, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.div_rn(a, MAX)
    if POWER_OF_TWO:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = tl.where(scale == scale, bits.to(tl.float32, bitcast=True), scale)
        return scale, tl.div_rn(1.0, scale)
    return scale, tl.div_rn(MAX, a)


@triton.jit
def fp8_cast(x, inverse, MAX: tl.constexpr, TYPE: tl.constexpr):
    """Return clamp(x * inverse) as TYPE, rounded to nearest, ties to even; NaN stays NaN."""
    x = tl.clamp(x * inverse, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL)
    if _INTERPRETED:  # its cast neither carries nor keeps NaN: round before, so that it is exact
        bits = fp8_bits(x)
        least: tl.constexpr = 121 if MAX == 448.0 else 113  # exponent of the least normal number
        mantissa: tl.constexpr = 3 if MAX == 448.0 else 2
        quantum = (tl.maximum(bits >> 23, least) - mantissa) << 23
        anchor = quantum.to(tl.float32, bitcast=True) * 12582912.0  # 1.5 * 2^23: ties to even
        near = (bits.to(tl.float32, bitcast=True) + anchor) - anchor
        code = near.to(TYPE).to(tl.uint8, bitcast=True)
        code = tl.where(x == x, code, 0x7F).to(tl.uint8)
        sign = (x.to(tl.uint32, bitcast=True) >> 24).to(tl.uint8) & 0x80
        return (code | sign).to(TYPE, bitcast=True)
    return x.to(TYPE)


@triton.jit
def row_kernel(
    x, data, scale, width, stride, MAX: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Quantise a row with one scale."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    largest = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, width, COLUMNS):
        column = start + columns
        value = tl.load(x + row * stride + column, column < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, fp8_bits(value))
    a = tl.max(largest, 0).to(tl.float32, bitcast=True)
    factor, inverse = fp8_scale(a, MAX, POWER_OF_TWO)
    tl.store(scale + row, factor)
    for start in range(0, width, COLUMNS):
        column = start + columns
        value = tl.load(x + row * stride + column, column < width, other=0.0).to(tl.float32)
        codes = fp8_cast(value, inverse, MAX, data.dtype.element_ty)
        tl.store(data + row * width + column, codes, column < width)


@triton.jit
def amax_kernel(
    x, amax, amax_t, tokens, width, pieces, stride, SCALING: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Raise the largest absolute value of the tensor, or of the rows and columns of a tile."""
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % pieces) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < tokens)[:, None] & (column < width)[None, :]
    value = tl.load(x + row[:, None] * stride + column[None, :], inside, other=0.0)
    bits = fp8_bits(value.to(tl.float32))
    if SCALING == "tensor":
        tl.atomic_max(amax, tl.max(tl.max(bits, 1), 0), sem="relaxed")
    else:
        tl.atomic_max(amax + row, tl.max(bits, 1), row < tokens, sem="relaxed")
        tl.atomic_max(amax_t + column, tl.max(bits, 0), column < width, sem="relaxed")


@triton.jit
def tile_kernel(
    x, data, scale, data_t, scale_t, amax, amax_t, tokens, width, pieces, pieces_t, stride,
    SCALING: tl.constexpr, GIVEN: tl.constexpr, TRANSPOSE: tl.constexpr, MAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Quantise a tile; with GIVEN by the scale that is there, raising amax for the next one."""
    program = tl.program_id(0)
    down, across = (program // pieces).to(tl.int64), program % pieces
    row = down * ROWS + tl.arange(0, ROWS)
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < tokens)[:, None] & (column < width)[None, :]
    value = tl.load(x + row[:, None] * stride + column[None, :], inside, other=0.0)
    value = value.to(tl.float32)
    if SCALING == "tensor":
        if GIVEN:
            inverse = tl.div_rn(1.0, tl.load(scale))
            largest = tl.max(tl.max(fp8_bits(value), 1), 0)
            tl.atomic_max(amax, largest, sem="relaxed")
        else:
            a = tl.load(amax).to(tl.float32, bitcast=True)
            factor, inverse = fp8_scale(a, MAX, POWER_OF_TWO)
            tl.store(scale, factor, program == 0)
        inverse_t = inverse
    elif SCALING == "tile":
        a = tl.max(tl.max(fp8_bits(value), 1), 0).to(tl.float32, bitcast=True)
        factor, inverse = fp8_scale(a, MAX, POWER_OF_TWO)
        tl.store(scale + down * pieces + across, factor)
        inverse_t = inverse
    else:
        if SCALING == "row":
            a = tl.load(amax + row, row < tokens, other=0).to(tl.float32, bitcast=True)
            a_t = tl.load(amax_t + column, column < width, other=0).to(tl.float32, bitcast=True)
            to, to_t = scale + row, scale_t + column
            write, write_t = (row < tokens) & (across == 0), (column < width) & (down == 0)
        else:
            a, a_t = fp8_amax(value, 1), fp8_amax(value, 0)
            to = scale + row * pieces + across
            to_t = scale_t + column.to(tl.int64) * pieces_t + down
            write, write_t = row < tokens, column < width
        factor, inverse = fp8_scale(a, MAX, POWER_OF_TWO)
        tl.store(to, factor, write)
        inverse = inverse[:, None]
        if TRANSPOSE:
            factor_t, inverse_t = fp8_scale(a_t, MAX, POWER_OF_TWO)
            tl.store(to_t, factor_t, write_t)
            inverse_t = inverse_t[None, :]
    codes = fp8_cast(value, inverse, MAX, data.dtype.element_ty)
    tl.store(data + row[:, None] * width + column[None, :], codes, inside)
    if TRANSPOSE:
        if SCALING == "row" or SCALING == "block":
            codes = fp8_cast(value, inverse_t, MAX, data.dtype.element_ty)
        to_T = data_t + column.to(tl.int64)[:, None] * tokens + row[None, :]
        tl.store(to_T, tl.trans(codes), tl.trans(inside))


def _scales(x_TD: Tensor, scaling: str, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Allocate the scales and those of the transposed copy."""
    tokens, width = x_TD.shape
    down, across = triton.cdiv(tokens, BLOCK), triton.cdiv(width, BLOCK)
    none = x_TD.new_empty(0, dtype=torch.float32)
    if scaling == "tensor":
        return none.new_empty(()) if given is None else given, none
    if scaling == "tile":
        return none.new_empty(down, across), none
    groups, groups_t = (1, 1) if scaling == "row" else (across, down)
    return none.new_empty(tokens, groups), none.new_empty(width, groups_t)


def _launch(kernel, x_TD, parts, more, scaling, transpose, options=None):
    """Launch a kernel over the tiles of x; `more` are sizes besides tokens, width and pieces."""
    tokens, width = x_TD.shape
    first = configuration(scaling, transpose, width)
    pieces = triton.cdiv(width, first["COLUMNS"])
    sizes = tokens, width, pieces, *more, x_TD.stride(0)

    def start(chosen):
        kernel[(triton.cdiv(tokens, chosen["ROWS"]) * pieces,)](
            x_TD, *parts, *sizes, SCALING=scaling, **(options or {}), **chosen
        )

    key = kernel.__name__, width, scaling, int(transpose)
    tuning.launch("fp8_quantize", key, tuning.by_warps(first), start, x_TD)


def quantize(
    x_TD: Tensor, scaling: str, dtype: torch.dtype, scale: Tensor | None, power_of_two: bool,
    transpose: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch what `scaling` needs.

    Args:
        x_TD: `[T, D]`.
        scaling: "tensor", "row", "block" or "tile".
        dtype: float8_e4m3fn or float8_e5m2.
        scale: float32 `[]` or None.
        power_of_two: Whether scales are powers of two.
        transpose: Whether to write the transposed copy.

    Returns:
        data `[T, D]`, scale (empty where it was given), the transposed copy and its scale (empty
        where not asked for, or the same), max |x| (empty unless scaling is "tensor").
    """
    tokens, width = x_TD.shape
    x_TD = near(x_TD)
    data = x_TD.new_empty(tokens, width, dtype=dtype)
    data_t = x_TD.new_empty((width, tokens) if transpose else (0,), dtype=dtype)
    scales, scale_t = _scales(x_TD, scaling, scale)
    none = scales.new_empty(0)
    whole, both = scaling == "tensor", scaling == "row" and transpose
    amax = x_TD.new_zeros(() if whole else tokens if both else 0, dtype=torch.int32)
    amax_t = x_TD.new_zeros(width if both else 0, dtype=torch.int32)
    options = {"MAX": MAXIMA[dtype], "POWER_OF_TWO": power_of_two}
    if not data.numel():
        for part in (scale_t, *(() if scale is not None else (scales,))):
            part.fill_(2.0**-126)
    elif scaling == "row" and not transpose:

        def start(chosen: dict[str, int]) -> None:
            row_kernel[(tokens,)](x_TD, data, scales, width, x_TD.stride(0), **options, **chosen)

        first = configuration(scaling, transpose, width)
        tuning.launch("fp8_quantize", ("row_kernel", width), tuning.by_warps(first), start, x_TD)
    else:
        options |= {"GIVEN": scale is not None, "TRANSPOSE": transpose}
        if both or (whole and scale is None):
            _launch(amax_kernel, x_TD, (amax, amax_t), (), scaling, transpose)
        parts = data, scales, data_t, scale_t, amax, amax_t
        _launch(
            tile_kernel, x_TD, parts, (triton.cdiv(tokens, BLOCK),), scaling, transpose, options
        )
    given = none if scale is not None else scales
    largest = amax.view(torch.float32) if whole else none
    return data, given, data_t, scale_t if transpose else none.new_empty(0), largest
