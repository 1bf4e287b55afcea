"""Triton code of `grouped_gemm`: tiles found on the device, nothing waits for the counts.

`tiles_kernel` lists the tiles of rows, expert after expert: whose they are, their first row and the
row where their expert ends. A program of `rows_kernel` reads one line of the list; the list has
room for one partial tile an expert, and programs of lines that are not used leave at once. Columns
of tiles are walked in bands, so that programs that run together share rows and weights in the L2
cache. `weight_kernel` has a program for each tile of each expert's gradient, which walks over the
expert's rows; without rows it writes zeros.

Rows may be gathered through an order, as `permute` gives it: row m is then row order[m] // k of the
tensor, and the permuted copy is never made.

A negative count is taken for 0, and rows end where the tensor ends, so that no count can lead
outside of it. Row offsets are 64 bits wide. Both factors of each product come from memory. Not run
on a GPU yet.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launch import next_power_of_two, on_device

_LIST = 128  # lines that a program of `tiles_kernel` writes at a time
_BAND = 8  # tiles of rows a band


class Rows(NamedTuple):
    """Rows of a product: those of a matrix, or those that an order takes from it.

    Attributes:
        matrix: `[N, D]`.
        order: `[M]` int64: row m is row order[m] // top_k of the matrix; None takes them as they
            are.
        top_k: Slots a row of the matrix.
    """

    matrix: Tensor
    order: Tensor | None = None
    top_k: int = 0

    def ready(self) -> "Rows":
        """Copy only where the elements of a row, or of the order, are apart."""
        matrix = self.matrix
        if matrix.stride(1) != 1 and matrix.shape[1] > 1:
            matrix = matrix.contiguous()
        order = None if self.order is None else self.order.contiguous()
        return Rows(matrix, order, self.top_k if order is not None else 0)

    @property
    def total(self) -> int:
        """Return M."""
        return len(self.matrix if self.order is None else self.order)


def configurations(rows: int, experts: int, itemsize: int) -> list[dict[str, int]]:
    """List tiles that may serve the forward and the input gradient, the default first.

    Args:
        rows: M.
        experts: E.
        itemsize: Bytes an element.

    Returns:
        For each ROWS, COLUMNS, DEPTH, num_warps and num_stages.
    """
    if itemsize == 4:
        shapes = [(64, 64, 32, 4, 3), (32, 64, 32, 4, 3)]
    elif rows > 64 * max(experts, 1):
        shapes = [(128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 4)]
        shapes += [(128, 128, 32, 8, 4), (64, 256, 64, 8, 4)]
    else:
        shapes = [(64, 128, 64, 4, 4), (64, 256, 64, 8, 3), (32, 128, 64, 4, 4)]
    names = "ROWS", "COLUMNS", "DEPTH", "num_warps", "num_stages"
    return [dict(zip(names, shape, strict=True)) for shape in shapes]


def weight_configurations(itemsize: int) -> list[dict[str, int]]:
    """List tiles that may serve the weight gradient, the default first.

    Args:
        itemsize: Bytes an element.

    Returns:
        For each HEIGHT, WIDTH, DEPTH, num_warps and num_stages.
    """
    if itemsize == 4:
        shapes = [(64, 64, 32, 4, 3)]
    else:
        shapes = [(128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 32, 8, 4)]
        shapes += [(128, 128, 64, 4, 3)]
    names = "HEIGHT", "WIDTH", "DEPTH", "num_warps", "num_stages"
    return [dict(zip(names, shape, strict=True)) for shape in shapes]


@triton.jit
def _bounds(counts, rows, experts, EXPERTS: tl.constexpr):
    """Load the first row and the end of each expert, within the tensor whatever the counts."""
    e = tl.arange(0, EXPERTS)
    count = tl.maximum(tl.load(counts + e, e < experts, other=0).to(tl.int64), 0)
    stops = tl.cumsum(count, 0)
    return e, tl.minimum(stops - count, rows), tl.minimum(stops, rows)


@triton.jit
def tiles_kernel(
    counts, tiles, rows, experts, most, ROWS: tl.constexpr, REST: tl.constexpr,
    EXPERTS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """List the tiles of an expert; the last program those of the rest, and what is not used."""
    expert = tl.program_id(0)
    e, starts, stops = _bounds(counts, rows, experts, EXPERTS)
    if REST:
        starts = tl.where(e == experts, tl.max(stops, 0), starts)
        stops = tl.where(e == experts, rows, stops)
    lines = (stops - starts + ROWS - 1) // ROWS
    first = tl.sum(tl.where(e < expert, lines, 0), 0)
    used = first + tl.sum(tl.where(e == expert, lines, 0), 0)
    start = tl.sum(tl.where(e == expert, starts, 0), 0)
    stop = tl.sum(tl.where(e == expert, stops, 0), 0)
    for at in range(first, tl.where(expert < experts, used, most), LIST):
        line = at + tl.arange(0, LIST)
        inside = line < tl.where(expert < experts, used, most)
        tl.store(tiles + line, tl.where(line < used, expert, -1).to(tl.int64), inside)
        tl.store(tiles + most + line, start + (line - first) * ROWS, inside)
        tl.store(tiles + most + most + line, tl.zeros_like(line) + stop, inside)


@triton.jit
def _taken(row, known, order, TOP_K: tl.constexpr):
    """Return where rows lie: in place, or where the order takes them from."""
    if TOP_K:
        row = tl.load(order + row, known, other=0) // TOP_K
    return row


@triton.jit
def rows_kernel(
    x, weight, y, tiles, order, most, experts, width, columns, pieces, x_stride, expert_stride,
    column_stride, depth_stride, TOP_K: tl.constexpr, BAND: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute a tile of y; zeros for rows beyond the counts where these are listed."""
    program = tl.program_id(0)
    band = program // (BAND * pieces) * BAND
    inner = program % (BAND * pieces)
    height = tl.minimum(most - band, BAND)
    line = band + inner % height
    expert = tl.load(tiles + line)
    if expert >= 0:
        row = tl.load(tiles + most + line) + tl.arange(0, ROWS)
        known = (row < tl.load(tiles + most + most + line))[:, None]
        column = (inner // height).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (column < columns)[None, :]
        depth = tl.arange(0, DEPTH)
        source = _taken(row, row < tl.load(tiles + most + most + line), order, TOP_K)
        left = x + source[:, None] * x_stride + depth[None, :]
        right = weight + expert * expert_stride + column[None, :] * column_stride
        right += depth.to(tl.int64)[:, None] * depth_stride
        step = tl.full((), DEPTH, tl.int64) * depth_stride
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for at in range(0, tl.where(expert < experts, width, 0), DEPTH):
            within = at + depth < width
            a = tl.load(left, known & within[None, :], other=0.0)
            b = tl.load(right, within[:, None] & inside, other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
            left += DEPTH
            right += step
        to = y + row[:, None] * columns + column[None, :]
        tl.store(to, total.to(y.dtype.element_ty), known & inside)


@triton.jit
def weight_kernel(
    dy, x, out, counts, dy_order, x_order, rows, experts, height, width, across, pieces, dy_stride,
    x_stride, DY_TOP_K: tl.constexpr, X_TOP_K: tl.constexpr, ACCUMULATE: tl.constexpr,
    EXPERTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute a tile of an expert's gradient; ACCUMULATE adds it to what is there."""
    program = tl.program_id(0)
    expert = program // pieces
    inner = program % pieces
    e, starts, stops = _bounds(counts, rows, experts, EXPERTS)
    start = tl.sum(tl.where(e == expert, starts, 0), 0)
    stop = tl.sum(tl.where(e == expert, stops, 0), 0)
    f = inner // across * HEIGHT + tl.arange(0, HEIGHT)
    d = inner % across * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    depth = tl.arange(0, DEPTH)
    left = dy + f[:, None] + (start + depth)[None, :] * dy_stride
    right = x + d[None, :] + (start + depth)[:, None] * x_stride
    dy_step = tl.full((), DEPTH, tl.int64) * dy_stride
    x_step = tl.full((), DEPTH, tl.int64) * x_stride
    for at in range(start, stop, DEPTH):
        known = at + depth < stop
        if DY_TOP_K:
            source = _taken(at + depth, known, dy_order, DY_TOP_K)
            left = dy + f[:, None] + source[None, :] * dy_stride
        if X_TOP_K:
            source = _taken(at + depth, known, x_order, X_TOP_K)
            right = x + d[None, :] + source[:, None] * x_stride
        a = tl.load(left, known[None, :] & (f < height)[:, None], other=0.0)
        b = tl.load(right, known[:, None] & (d < width)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += dy_step
        right += x_step
    to = out + (expert.to(tl.int64) * height + f)[:, None] * width + d[None, :]
    inside = (f < height)[:, None] & (d < width)[None, :]
    if ACCUMULATE:
        total += tl.load(to, inside, other=0.0)
    tl.store(to, total.to(out.dtype.element_ty), inside)


def forward(x: Rows, weight_EFD: Tensor, counts_E: Tensor, zero_rest: bool) -> Tensor:
    """Launch the forward, or with a transposed weight the input gradient.

    Args:
        x: M rows of width D.
        weight_EFD: `[E, F, D]`, any strides.
        counts_E: `[E]` int64.
        zero_rest: Whether rows beyond the counts are zero; else they are not written.

    Returns:
        `[M, F]`.
    """
    x, rows = x.ready(), x.total
    experts, columns, width = weight_EFD.shape
    y_MF = x.matrix.new_empty(rows, columns)
    if not y_MF.numel():
        return y_MF
    counts_E = counts_E.contiguous()

    def start(chosen: dict[str, int]) -> None:
        most = min(rows, rows // chosen["ROWS"] + experts + 1)
        tiles = counts_E.new_empty(3, most)
        tiles_kernel[(experts + 1,)](
            counts_E, tiles, rows, experts, most, ROWS=chosen["ROWS"], REST=zero_rest,
            EXPERTS=next_power_of_two(experts + 1), LIST=_LIST,
        )  # fmt: skip
        pieces = triton.cdiv(columns, chosen["COLUMNS"])
        rows_kernel[(most * pieces,)](
            x.matrix, weight_EFD, y_MF, tiles, tiles if x.order is None else x.order, most,
            experts, width, columns, pieces, x.matrix.stride(0), *weight_EFD.stride(),
            TOP_K=x.top_k, BAND=_BAND, **chosen,
        )  # fmt: skip

    candidates = configurations(rows, experts, y_MF.element_size())
    layout = "n" if weight_EFD.stride(1) == 1 else "k"
    key = "rows", candidates[0]["ROWS"], experts, columns, width, layout, x.top_k
    tuning.launch("grouped_gemm", key, candidates, start, x.matrix)
    return y_MF


def weight_gradient(dy: Rows, x: Rows, counts_E: Tensor, into_EFD: Tensor | None = None) -> Tensor:
    """Launch the weight gradient.

    Args:
        dy: M rows of width F.
        x: M rows of width D.
        counts_E: `[E]` int64.
        into_EFD: If given, `[E, F, D]`, contiguous, to which the gradient is added.

    Returns:
        `[E, F, D]`; `into_EFD` where that is given.
    """
    rows, dy, x, counts_E = dy.total, dy.ready(), x.ready(), counts_E.contiguous()
    experts, height, width = len(counts_E), dy.matrix.shape[1], x.matrix.shape[1]
    out_EFD = x.matrix.new_empty(experts, height, width) if into_EFD is None else into_EFD
    if not out_EFD.numel():
        return out_EFD

    def start(chosen: dict[str, int]) -> None:
        across = triton.cdiv(width, chosen["WIDTH"])
        pieces = across * triton.cdiv(height, chosen["HEIGHT"])
        weight_kernel[(experts * pieces,)](
            dy.matrix, x.matrix, out_EFD, counts_E, counts_E if dy.order is None else dy.order,
            counts_E if x.order is None else x.order, rows, experts, height, width, across, pieces,
            dy.matrix.stride(0), x.matrix.stride(0), DY_TOP_K=dy.top_k, X_TOP_K=x.top_k,
            ACCUMULATE=into_EFD is not None, EXPERTS=next_power_of_two(experts), **chosen,
        )  # fmt: skip

    key = "weight", experts, height, width, dy.top_k, x.top_k
    candidates = weight_configurations(x.matrix.element_size())
    if into_EFD is None:
        tuning.launch("grouped_gemm", key, candidates, start, x.matrix)
    else:  # a search would add it many times
        with on_device(x.matrix):
            start(candidates[0])
    return out_EFD
