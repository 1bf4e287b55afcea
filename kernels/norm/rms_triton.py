"""Triton code of `rms_norm` and `layer_norm`, alone and with the result quantised to FP8.

Forward: a program normalises a tile of rows that it holds in registers; with CENTRED it subtracts
their means first, so that the variance is that of what is left. Backward: a persistent grid of two
programs a multiprocessor strides over the tiles and keeps its share of dweight (and of dbias) in
float32 registers; a second kernel adds the shares in a fixed order, so that the same inputs give
the same bits. Rows wider than KEEP leave no registers for a share: a column kernel reads dy and h
once more. Row offsets are 64-bit.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launch import near, next_power_of_two, on_device, processors
from ..quant.fp8 import BLOCK, MAXIMA
from ..quant.fp8_triton import fp8_amax, fp8_cast, fp8_scale

MAX_WIDTH = 16384
KEEP = 8192  # widest row whose share of dweight stays in registers without a spill
_TILE = 2048  # elements a tile of narrow rows
_COLUMNS = 32  # columns of dweight a program of the second kernel adds up
_SHARES = 64  # shares it adds at a time
COLUMN_TILE = {"ROWS": 32, "COLUMNS": 128, "num_warps": 4}
_COLUMN_PARTS = 16  # programs that share the rows of a column tile
_TYPE = torch.float8_e4m3fn
_DENSE = torch.contiguous_format


def configuration(width: int, least: int = 1) -> dict[str, int]:
    """Choose tile and warps for a width.

    Args:
        width: D.
        least: Columns that a tile has at least.

    Returns:
        ROWS and BLOCK, the shape of a tile, and num_warps.

    Raises:
        RuntimeError: If a row does not fit in the registers of one program.
    """
    if width > MAX_WIDTH:
        raise RuntimeError(
            f"norm: triton serves widths to {MAX_WIDTH}, x has {width}: use backend='reference'"
        )
    block = max(next_power_of_two(width), least)
    warps = 8 if width % 16 else 4  # elements that are loaded one by one take more registers
    return {
        "ROWS": max(1, _TILE // block),
        "BLOCK": block,
        "num_warps": min(max(block // 512, warps), 32),
    }


def configurations(width: int, least: int = 1) -> list[dict[str, int]]:
    """List tiles and warps that may serve the forward, the default first.

    Args:
        width: D.
        least: Columns that a tile has at least.

    Raises:
        RuntimeError: As `configuration`.
    """
    first = configuration(width, least)
    rows, warps = first["ROWS"], first["num_warps"]
    others = [
        (rows, 2 * warps), (2 * rows, warps), (2 * rows, 2 * warps), (max(1, rows // 2), warps),
    ]  # fmt: skip
    found = [first]
    for r, w in others:
        other = first | {"ROWS": r, "num_warps": w}
        if w <= 32 and r * first["BLOCK"] <= MAX_WIDTH and other not in found:
            found.append(other)
    return found


@triton.jit
def forward_kernel(
    x, residual, weight, y, h, rstd, tokens, width, x_stride, residual_stride, eps,
    FUSED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, bias=None, mean=None, scales=None,
    CENTRED: tl.constexpr = False, GROUP: tl.constexpr = 0, MAX: tl.constexpr = 0,
    POWER_OF_TWO: tl.constexpr = False,
):  # fmt: skip
    """Normalise ROWS rows; with FUSED add the residual first and write the rounded sum to h.

    With GROUP the result is quantised, GROUP elements of a row to a scale.
    """
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
    if CENTRED:
        centre = tl.sum(value, 1) / width
        tl.store(mean + row, centre, row < tokens)
        value = tl.where(inside, value - centre[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    tl.store(rstd + row, scale, row < tokens)
    gain = tl.load(weight + column, column < width, other=0.0).to(tl.float32)
    normal = value * scale[:, None] * gain[None, :]
    if bias is not None:
        normal += tl.load(bias + column, column < width, other=0.0).to(tl.float32)[None, :]
    if GROUP:
        groups = tl.reshape(normal, [ROWS, BLOCK // GROUP, GROUP])
        factor, inverse = fp8_scale(fp8_amax(groups, 2), MAX, POWER_OF_TWO)
        codes = fp8_cast(groups, inverse[:, :, None], MAX, y.dtype.element_ty)
        tl.store(y + to, tl.reshape(codes, [ROWS, BLOCK]), inside)
        count = tl.cdiv(width, GROUP)
        group = tl.arange(0, BLOCK // GROUP)
        there = (row < tokens)[:, None] & (group < count)[None, :]
        tl.store(scales + row[:, None] * count + group[None, :], factor, there)
    else:
        tl.store(y + to, normal.to(y.dtype.element_ty), inside)


@triton.jit
def _read(h_rows, dy_rows, inside, rstd, mean, row, tokens, POLICY: tl.constexpr):
    """Read a tile of h and of dy; return the normalised h, dy and rstd, in float32."""
    value = tl.load(h_rows, inside, other=0.0, eviction_policy=POLICY).to(tl.float32)
    above = tl.load(dy_rows, inside, other=0.0, eviction_policy=POLICY).to(tl.float32)
    scale = tl.load(rstd + row, row < tokens, other=0.0)
    if mean is not None:
        value -= tl.load(mean + row, row < tokens, other=0.0)[:, None]
    return value * scale[:, None], above, scale


@triton.jit
def backward_kernel(
    dy, dh, h, weight, rstd, dx, shares, tokens, width, dy_stride, dh_stride, h_stride,
    FUSED: tl.constexpr, KEPT: tl.constexpr, AGAIN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, mean=None, bias_shares=None,
):  # fmt: skip
    """Stride over tiles of rows: write dx; with KEPT keep this program's share of dweight.

    With AGAIN a tile is read a second time, from the cache, because its registers would spill.
    """
    column = tl.arange(0, BLOCK)
    gain = tl.load(weight + column, column < width, other=0.0).to(tl.float32)
    if KEPT:
        share = tl.zeros([ROWS, BLOCK], tl.float32)
        if bias_shares is not None:
            bias_share = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < tokens)[:, None] & (column < width)[None, :]
        at = row[:, None]
        h_rows, dy_rows = h + at * h_stride + column[None, :], dy + at * dy_stride + column[None, :]
        normal, above, scale = _read(h_rows, dy_rows, inside, rstd, mean, row, tokens, "")
        if KEPT:
            share += above * normal
            if bias_shares is not None:
                bias_share += above
        above = above * gain[None, :]
        slope = tl.sum(above * normal, 1) / width
        if mean is not None:
            level = tl.sum(above, 1) / width
        if AGAIN:
            normal, above, scale = _read(
                h_rows, dy_rows, inside, rstd, mean, row, tokens, "evict_first"
            )
            above = above * gain[None, :]
        if mean is not None:
            above -= level[:, None]
        result = (above - normal * slope[:, None]) * scale[:, None]
        if FUSED:
            result += tl.load(dh + at * dh_stride + column[None, :], inside, other=0.0).to(
                tl.float32
            )
        tl.store(dx + at * width + column[None, :], result.to(dx.dtype.element_ty), inside)
    if KEPT:
        out = tl.program_id(0).to(tl.int64) * width + column
        tl.store(shares + out, tl.sum(share, 0), column < width)
        if bias_shares is not None:
            tl.store(bias_shares + out, tl.sum(bias_share, 0), column < width)


@triton.jit
def column_kernel(
    dy, h, rstd, shares, tokens, width, dy_stride, h_stride, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, mean=None, bias_shares=None,
):  # fmt: skip
    """Add up dweight of COLUMNS columns over every num_programs(1)-th tile of rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias_share = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(tokens, ROWS), tl.num_programs(1)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < tokens)[:, None] & (column < width)[None, :]
        at = row[:, None]
        h_rows, dy_rows = h + at * h_stride + column[None, :], dy + at * dy_stride + column[None, :]
        normal, above, _ = _read(h_rows, dy_rows, inside, rstd, mean, row, tokens, "")
        share += above * normal
        bias_share += above
    out = tl.program_id(1).to(tl.int64) * width + column
    tl.store(shares + out, tl.sum(share, 0), column < width)
    if bias_shares is not None:
        tl.store(bias_shares + out, tl.sum(bias_share, 0), column < width)


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


class Normed(NamedTuple):
    """What the forward wrote.

    Attributes:
        y: `[T, D]`, in the dtype of x or as FP8 codes.
        h: What was normalised; x itself without a residual.
        rstd: `[T]` float32.
        mean: `[T]` float32; empty unless it was subtracted.
        scales: `[T, groups]` float32; no groups unless y was quantised.
    """

    y: Tensor
    h: Tensor
    rstd: Tensor
    mean: Tensor
    scales: Tensor


def _empty(x_TD: Tensor, fused: bool, centred: bool, group: int) -> Normed:
    tokens, width = x_TD.shape
    statistics = x_TD.new_empty(tokens, dtype=torch.float32)
    return Normed(
        y=torch.empty_like(x_TD, dtype=_TYPE if group else None, memory_format=_DENSE),
        h=torch.empty_like(x_TD, memory_format=_DENSE) if fused else x_TD,
        rstd=statistics,
        mean=torch.empty_like(statistics) if centred else statistics.new_empty(0),
        scales=statistics.new_empty(tokens, triton.cdiv(width, group) if group else 0),
    )


def normalise(
    x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, residual_TD: Tensor | None, eps: float,
    *, centred: bool, scaling: str | None = None, power_of_two: bool = False,
) -> Normed:  # fmt: skip
    """Launch the forward.

    Args:
        x_TD: `[T, D]`.
        weight_D: `[D]`.
        bias_D: `[D]` or None.
        residual_TD: `[T, D]` or None.
        eps: Added to the mean square.
        centred: Whether the mean is subtracted.
        scaling: "row" or "block" to quantise; None does not.
        power_of_two: Whether scales are powers of two.
    """
    tokens, width = x_TD.shape
    candidates = configurations(width, BLOCK if scaling == "block" else 1)
    x_TD, fused = near(x_TD), residual_TD is not None
    residual = x_TD if residual_TD is None else near(residual_TD)
    group = {None: 0, "row": candidates[0]["BLOCK"], "block": BLOCK}[scaling]
    out = _empty(x_TD, fused, centred, group)
    if tokens:
        weight, bias = weight_D.contiguous(), None if bias_D is None else bias_D.contiguous()

        def start(chosen: dict[str, int]) -> None:
            forward_kernel[(triton.cdiv(tokens, chosen["ROWS"]),)](
                x_TD, residual, weight, out.y, out.h, out.rstd, tokens, width,
                *(rows.stride(0) for rows in (x_TD, residual)), eps, FUSED=fused, bias=bias,
                mean=out.mean if centred else None, scales=out.scales if group else None,
                CENTRED=centred, GROUP=group, MAX=MAXIMA[_TYPE] if group else 0,
                POWER_OF_TWO=power_of_two, **chosen,
            )  # fmt: skip

        key, op = ("forward", width, int(fused), group), "layer_norm" if centred else "rms_norm"
        tuning.launch(op, key, candidates, start, x_TD)
    return out


def _column_shares(
    dy_TD: Tensor, h_TD: Tensor, rstd_T: Tensor, mean_T: Tensor | None, shares: Tensor,
    bias_shares: Tensor | None,
) -> None:  # fmt: skip
    """Fill the shares, `[parts, D]`, whose rows add up to dweight and dbias."""
    tokens, width = h_TD.shape
    column_kernel[(triton.cdiv(width, COLUMN_TILE["COLUMNS"]), shares.shape[0])](
        dy_TD, h_TD, rstd_T, shares, tokens, width, dy_TD.stride(0), h_TD.stride(0), mean=mean_T,
        bias_shares=bias_shares, **COLUMN_TILE,
    )  # fmt: skip


def add_shares(shares: Tensor, like: Tensor | None) -> Tensor:
    """Launch the addition of the programs' shares of a weight's gradient.

    Args:
        shares: `[parts, D]` float32.
        like: The weight, `[D]`; None stands for float32.

    Returns:
        `[D]` in the dtype of the weight.
    """
    parts, width = shares.shape
    out = shares.new_empty(width, dtype=None if like is None else like.dtype)
    shares_kernel[(triton.cdiv(width, _COLUMNS),)](
        shares, out, parts, width, SHARES=_SHARES, COLUMNS=_COLUMNS, num_warps=4
    )
    return out


def gradients(
    dy_TD: Tensor, dh_TD: Tensor | None, h_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None,
    rstd_T: Tensor, mean_T: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Launch the backward and the addition of the shares.

    Args:
        dy_TD: Gradient of y, `[T, D]`.
        dh_TD: Gradient of h, `[T, D]`, or None.
        h_TD: What was normalised, `[T, D]`.
        weight_D: `[D]`.
        bias_D: `[D]` or None.
        rstd_T: `[T]` float32.
        mean_T: `[T]` float32, or None where no mean was subtracted.

    Returns:
        dx `[T, D]`, dweight `[D]` and dbias `[D]` (None without a bias).
    """
    tokens, width = h_TD.shape
    chosen = configuration(width)
    dx_TD = h_TD.new_empty(tokens, width)
    if not tokens:
        dbias_D = None if bias_D is None else torch.zeros_like(bias_D, memory_format=_DENSE)
        return dx_TD, torch.zeros_like(weight_D, memory_format=_DENSE), dbias_D
    dy_TD, h_TD, weight = near(dy_TD), near(h_TD), weight_D.contiguous()
    dh = dy_TD if dh_TD is None else near(dh_TD)
    kept = width <= (KEEP if bias_D is None else KEEP // 2)
    programs = min(2 * processors(h_TD.device), triton.cdiv(tokens, chosen["ROWS"]))
    parts = programs if kept else min(triton.cdiv(tokens, COLUMN_TILE["ROWS"]), _COLUMN_PARTS)
    rstd_T, mean_T = rstd_T.contiguous(), None if mean_T is None else mean_T.contiguous()
    shares = h_TD.new_empty(parts, width, dtype=torch.float32)
    bias_shares = None if bias_D is None else torch.empty_like(shares)

    def start(chosen: dict[str, int]) -> None:
        backward_kernel[(programs,)](
            *(dy_TD, dh, h_TD, weight, rstd_T, dx_TD, shares), tokens, width,
            *(x.stride(0) for x in (dy_TD, dh, h_TD)), FUSED=dh_TD is not None, KEPT=kept,
            AGAIN=chosen["BLOCK"] > KEEP, mean=mean_T, bias_shares=bias_shares if kept else None,
            **chosen,
        )  # fmt: skip

    op = "rms_norm" if mean_T is None else "layer_norm"
    key = "backward", width, int(dh_TD is not None), int(bias_D is not None)
    tuning.launch(op, key, tuning.by_warps(chosen), start, h_TD)
    with on_device(h_TD):
        if not kept:
            _column_shares(dy_TD, h_TD, rstd_T, mean_T, shares, bias_shares)
        dbias_D = None if bias_shares is None else add_shares(bias_shares, bias_D)
        return dx_TD, add_shares(shares, weight_D), dbias_D


def forward(
    x_TD: Tensor, weight_D: Tensor, residual_TD: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward of `rms_norm`: see `normalise`; returns y, h and rstd."""
    return normalise(x_TD, weight_D, None, residual_TD, eps, centred=False)[:3]


def backward(
    dy_TD: Tensor, dh_TD: Tensor | None, h_TD: Tensor, weight_D: Tensor, rstd_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the backward of `rms_norm`: see `gradients`; returns dx and dweight."""
    return gradients(dy_TD, dh_TD, h_TD, weight_D, None, rstd_T, None)[:2]
