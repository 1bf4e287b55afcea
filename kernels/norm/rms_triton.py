"""Triton code of `rms_norm`.

Forward: a program normalises a tile of rows that it holds in registers. Backward: a persistent
grid of two programs a multiprocessor strides over the tiles and keeps its share of dweight in
float32 registers; a second kernel adds the shares in a fixed order, so that the same inputs give
the same bits. Rows wider than KEEP leave no registers for a share: a column kernel reads dy and h
once more for dweight. Row offsets are 64-bit.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import next_power_of_two, on_device, processors

MAX_WIDTH = 16384
KEEP = 8192  # widest row whose share of dweight stays in registers without a spill
_TILE = 2048  # elements a tile of narrow rows
_COLUMNS = 32  # columns of dweight a program of the second kernel adds up
_SHARES = 64  # shares it adds at a time
COLUMN_TILE = {"ROWS": 32, "COLUMNS": 128, "num_warps": 4}
_COLUMN_PARTS = 16  # programs that share the rows of a column tile


def configuration(width: int) -> dict[str, int]:
    """Choose tile and warps for a width.

    Args:
        width: D.

    Returns:
        ROWS and BLOCK, the shape of a tile, and num_warps.

    Raises:
        RuntimeError: If a row does not fit in the registers of one program.
    """
    if width > MAX_WIDTH:
        raise RuntimeError(f"rms_norm: triton serves widths to {MAX_WIDTH}, x has {width}")
    block = next_power_of_two(width)
    least = 8 if width % 16 else 4  # elements that are loaded one by one take more registers
    return {
        "ROWS": max(1, _TILE // block),
        "BLOCK": block,
        "num_warps": min(max(block // 512, least), 32),
    }


@triton.jit
def forward_kernel(
    x,
    residual,
    weight,
    y,
    h,
    rstd,
    tokens,
    width,
    x_stride,
    residual_stride,
    eps,
    FUSED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise ROWS rows; with FUSED add the residual first and write the rounded sum to h."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < tokens)[:, None] & (column < width)[None, :]
    to = row[:, None] * width + column[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0.0)
    if FUSED:
        other = tl.load(
            residual + row[:, None] * residual_stride + column[None, :], inside, other=0.0
        )
        value = (value.to(tl.float32) + other.to(tl.float32)).to(h.dtype.element_ty)
        tl.store(h + to, value, inside)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    tl.store(rstd + row, scale, row < tokens)
    gain = tl.load(weight + column, column < width, other=0.0).to(tl.float32)
    normal = value * scale[:, None] * gain[None, :]
    tl.store(y + to, normal.to(y.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    dy,
    dh,
    h,
    weight,
    rstd,
    dx,
    shares,
    tokens,
    width,
    dy_stride,
    dh_stride,
    h_stride,
    FUSED: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stride over tiles of rows: write dx; with KEPT keep this program's share of dweight."""
    column = tl.arange(0, BLOCK)
    gain = tl.load(weight + column, column < width, other=0.0).to(tl.float32)
    if KEPT:
        share = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < tokens)[:, None] & (column < width)[None, :]
        at = row[:, None]
        value = tl.load(h + at * h_stride + column[None, :], inside, other=0.0).to(tl.float32)
        above = tl.load(dy + at * dy_stride + column[None, :], inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, row < tokens, other=0.0)
        normal = value * scale[:, None]
        if KEPT:
            share += above * normal
        above = above * gain[None, :]
        slope = tl.sum(above * normal, 1) / width
        result = (above - normal * slope[:, None]) * scale[:, None]
        if FUSED:
            result += tl.load(dh + at * dh_stride + column[None, :], inside, other=0.0).to(
                tl.float32
            )
        tl.store(dx + at * width + column[None, :], result.to(dx.dtype.element_ty), inside)
    if KEPT:
        out = tl.program_id(0).to(tl.int64) * width + column
        tl.store(shares + out, tl.sum(share, 0), column < width)


@triton.jit
def column_kernel(
    dy,
    h,
    rstd,
    shares,
    tokens,
    width,
    dy_stride,
    h_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up dweight of COLUMNS columns over every num_programs(1)-th tile of rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(tokens, ROWS), tl.num_programs(1)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < tokens)[:, None] & (column < width)[None, :]
        at = row[:, None]
        value = tl.load(h + at * h_stride + column[None, :], inside, other=0.0).to(tl.float32)
        above = tl.load(dy + at * dy_stride + column[None, :], inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, row < tokens, other=0.0)
        share += above * value * scale[:, None]
    out = tl.program_id(1).to(tl.int64) * width + column
    tl.store(shares + out, tl.sum(share, 0), column < width)


@triton.jit
def shares_kernel(shares, dweight, programs, width, SHARES: tl.constexpr, COLUMNS: tl.constexpr):
    """Add the programs' shares of dweight, in a fixed order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([SHARES, COLUMNS], tl.float32)
    for start in range(0, programs, SHARES):
        program = start + tl.arange(0, SHARES)
        inside = (program < programs)[:, None] & (column < width)[None, :]
        at = program.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(shares + at, inside, other=0.0)
    tl.store(dweight + column, tl.sum(total, 0).to(dweight.dtype.element_ty), column < width)


def _rows(x_TD: Tensor) -> Tensor:
    """Leave strided rows as they are; copy only when the elements of a row are apart."""
    return x_TD if x_TD.stride(1) == 1 or x_TD.shape[1] == 1 else x_TD.contiguous()


def forward(
    x_TD: Tensor, weight_D: Tensor, residual_TD: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward.

    Args:
        x_TD: `[T, D]`.
        weight_D: `[D]`.
        residual_TD: `[T, D]` or None.
        eps: Added to the mean square.

    Returns:
        y and h `[T, D]` (h is x without a residual), rstd `[T]` float32.
    """
    tokens, width = x_TD.shape
    chosen = configuration(width)
    x_TD, fused = _rows(x_TD), residual_TD is not None
    residual = x_TD if residual_TD is None else _rows(residual_TD)
    y_TD = x_TD.new_empty(tokens, width)
    h_TD = x_TD.new_empty(tokens, width) if fused else x_TD
    rstd_T = x_TD.new_empty(tokens, dtype=torch.float32)
    if tokens:
        with on_device(x_TD):
            forward_kernel[(triton.cdiv(tokens, chosen["ROWS"]),)](
                x_TD,
                residual,
                weight_D.contiguous(),
                y_TD,
                h_TD,
                rstd_T,
                tokens,
                width,
                x_TD.stride(0),
                residual.stride(0),
                eps,
                FUSED=fused,
                **chosen,
            )
    return y_TD, h_TD, rstd_T


def _column_shares(dy_TD: Tensor, h_TD: Tensor, rstd_T: Tensor, shares: Tensor) -> None:
    """Fill `shares`, `[parts, D]`, whose rows add up to dweight."""
    tokens, width = h_TD.shape
    column_kernel[(triton.cdiv(width, COLUMN_TILE["COLUMNS"]), shares.shape[0])](
        dy_TD,
        h_TD,
        rstd_T,
        shares,
        tokens,
        width,
        dy_TD.stride(0),
        h_TD.stride(0),
        **COLUMN_TILE,
    )


def backward(
    dy_TD: Tensor, dh_TD: Tensor | None, h_TD: Tensor, weight_D: Tensor, rstd_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the backward and the addition of the shares of dweight.

    Args:
        dy_TD: Gradient of y, `[T, D]`.
        dh_TD: Gradient of h, `[T, D]`, or None.
        h_TD: What was normalised, `[T, D]`.
        weight_D: `[D]`.
        rstd_T: `[T]` float32.

    Returns:
        dx `[T, D]` and dweight `[D]`.
    """
    tokens, width = h_TD.shape
    chosen = configuration(width)
    dx_TD = h_TD.new_empty(tokens, width)
    if not tokens:
        return dx_TD, torch.zeros_like(weight_D)
    dy_TD, h_TD = _rows(dy_TD), _rows(h_TD)
    dh = dy_TD if dh_TD is None else _rows(dh_TD)
    kept = width <= KEEP
    programs = min(2 * processors(h_TD.device), triton.cdiv(tokens, chosen["ROWS"]))
    tiles = triton.cdiv(tokens, COLUMN_TILE["ROWS"])
    parts = programs if kept else min(tiles, _COLUMN_PARTS)
    rstd_T = rstd_T.contiguous()
    shares = h_TD.new_empty(parts, width, dtype=torch.float32)
    dweight_D = weight_D.new_empty(width)
    with on_device(h_TD):
        backward_kernel[(programs,)](
            dy_TD,
            dh,
            h_TD,
            weight_D.contiguous(),
            rstd_T,
            dx_TD,
            shares,
            tokens,
            width,
            dy_TD.stride(0),
            dh.stride(0),
            h_TD.stride(0),
            FUSED=dh_TD is not None,
            KEPT=kept,
            **chosen,
        )
        if not kept:
            _column_shares(dy_TD, h_TD, rstd_T, shares)
        shares_kernel[(triton.cdiv(width, _COLUMNS),)](
            shares, dweight_D, parts, width, SHARES=_SHARES, COLUMNS=_COLUMNS, num_warps=4
        )
    return dx_TD, dweight_D
