"""Triton code of `fp8_gemm`: a program a tile of y, one sum for each group of K.

Tensor cores sum a group of K (128 elements, 32 for MX) from zero; the sum is multiplied by the
scales of the group and added to a float32 accumulator, which on Hopper keeps more bits than theirs.
Scales that span all of K multiply the accumulator at the end. Both operands lie along K, as
Hopper's FP8 instructions take them, and come from shared memory. Tiles are walked in bands of rows,
so that programs that run together share operands in the L2 cache.

Scales of groups are laid out along the rows first, with room for whole tiles, so that a thread
reads them at constant distances. Operands whose rows are no multiple of 16 bytes are copied to
wider ones. Rows beyond the end are read as the last one and not written; the end of K is masked.
Offsets of rows are 64 bits wide. Not run on a GPU yet.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..quant.formats import BLOCK, MX_BLOCK

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_BAND = 8  # tiles of rows that a band has
_WIDE = 16  # bytes that a row must be a multiple of


def configurations(rows: int, scaling: str) -> list[dict[str, int]]:
    """List tiles that may serve a product, the default first.

    Args:
        rows: M.
        scaling: As the table of `fp8` names it.

    Returns:
        For each ROWS, COLUMNS (both divide 128), num_warps and num_stages.
    """
    if rows <= 64:
        shapes = [(64, 128, 4, 4), (64, 64, 4, 4)]
    else:
        shapes = [(128, 128, 8, 4), (128, 128, 8, 3), (64, 128, 4, 4), (128, 64, 4, 4)]
    names = "ROWS", "COLUMNS", "num_warps", "num_stages"
    return [dict(zip(names, shape, strict=True)) for shape in shapes]


@triton.jit
def _ready(x):
    """Return operands as the product takes them; the interpreter's cast knows no NaN."""
    if _INTERPRETED:
        bits = x.to(tl.uint8, bitcast=True) & 0x7F
        most: tl.constexpr = 0x7C if x.dtype == tl.float8e5 else 0x7E
        return tl.where(bits > most, float("nan"), x.to(tl.float32))
    return x


@triton.jit
def gemm_kernel(
    a, a_scale, b, b_scale, y, M, N, K, a_stride, b_stride, a_groups, b_groups,
    SCALING: tl.constexpr, GROUP: tl.constexpr, TAIL: tl.constexpr, BAND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Multiply ROWS rows of a by COLUMNS rows of b."""
    down, across = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    program = tl.program_id(0)
    band = program // (BAND * across)
    high = tl.minimum(down - band * BAND, BAND)
    within = program % (BAND * across)
    first = (band * BAND + within % high).to(tl.int64) * ROWS
    second = (within // high).to(tl.int64) * COLUMNS
    row, column = first + tl.arange(0, ROWS), second + tl.arange(0, COLUMNS)
    k = tl.arange(0, GROUP)
    a_at = a + tl.minimum(row, M - 1)[:, None] * a_stride + k[None, :]
    b_at = b + tl.minimum(column, N - 1)[None, :] * b_stride + k[:, None]
    if SCALING == "tile":
        b_scale += second // 128 * b_groups
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for group in range(0, tl.cdiv(K, GROUP)):
        if TAIL:
            rest = K - group * GROUP
            a_part = tl.load(a_at, (k < rest)[None, :], other=0.0)
            b_part = tl.load(b_at, (k < rest)[:, None], other=0.0)
        else:
            a_part, b_part = tl.load(a_at), tl.load(b_at)
        part = tl.dot(_ready(a_part), _ready(b_part))
        if SCALING == "tensor" or SCALING == "row":
            total += part
        elif SCALING == "tile":
            factor = tl.load(a_scale + row) * tl.load(b_scale + group)
            total += part * factor[:, None]
            a_scale += a_groups
        else:
            total += part * tl.load(a_scale + row)[:, None] * tl.load(b_scale + column)[None, :]
            a_scale += a_groups
            b_scale += b_groups
        a_at += GROUP
        b_at += GROUP
    if SCALING == "tensor":
        total = total * tl.load(a_scale) * tl.load(b_scale)
    elif SCALING == "row":
        total = total * tl.load(a_scale + row)[:, None] * tl.load(b_scale + column)[None, :]
    inside = (row < M)[:, None] & (column < N)[None, :]
    tl.store(y + row[:, None] * N + column[None, :], total.to(y.dtype.element_ty), inside)


def _wide(codes: Tensor) -> Tensor:
    """Have rows of elements side by side, at distances that are multiples of 16 bytes."""
    (rows, width), dtype = codes.shape, codes.dtype
    if codes.stride(1) == 1 and not codes.stride(0) % _WIDE:
        return codes
    wider = codes.new_empty(rows, -(-width // _WIDE) * _WIDE, dtype=torch.uint8)
    wider[:, :width].copy_(codes.view(torch.uint8))
    return wider[:, :width].view(dtype)


def _along_rows(scale: Tensor) -> Tensor:
    """Lay scales of groups, `[R, G]`, out as float32 `[G, R]`, with room for whole tiles."""
    rows, groups = scale.shape
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    laid = scale.new_empty(groups, -(-rows // BLOCK) * BLOCK, dtype=torch.float32)
    laid[:, :rows].copy_(scale.t())
    return laid


def gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, scaling: str, y: Tensor) -> None:
    """Launch the product.

    Args:
        a: `[M, K]` in an FP8 dtype.
        a_scale: Of `a`; bytes with "mx".
        b: `[N, K]` in an FP8 dtype.
        b_scale: Of `b`.
        scaling: As the table of `fp8` names it.
        y: `[M, N]`, contiguous, takes the result; nothing is empty.
    """
    (rows, depth), columns = a.shape, b.shape[0]
    a, b = _wide(a), _wide(b)
    if scaling != "tensor":
        a_scale = _along_rows(a_scale)
        b_scale = b_scale.contiguous() if scaling == "tile" else _along_rows(b_scale)
    strides = (s.stride(0) if s.dim() else 0 for s in (a, b, a_scale, b_scale))
    group = MX_BLOCK if scaling == "mx" else BLOCK
    sizes = rows, columns, depth, *strides

    def start(chosen: dict[str, int]) -> None:
        grid = triton.cdiv(rows, chosen["ROWS"]) * triton.cdiv(columns, chosen["COLUMNS"])
        gemm_kernel[(grid,)](
            a, a_scale, b, b_scale, y, *sizes,
            SCALING=scaling, GROUP=group, TAIL=depth % group != 0, BAND=_BAND, **chosen,
        )  # fmt: skip

    key = "gemm_kernel", scaling, rows, columns, depth, str(y.dtype), str(b.dtype)
    tuning.launch("fp8_gemm", key, configurations(rows, scaling), start, a)
