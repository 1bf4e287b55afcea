"""Triton code of `newton_schulz`: products of a matrix with its own transpose.

A program computes one square tile on or below the diagonal and stores it and its mirror image; the
programs above the diagonal leave at once. b add + the product is formed before the rounding. Tiles
on the diagonal mirror their lower half, so that the result is symmetric bit for bit.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device


def configuration(n: int, itemsize: int) -> dict[str, int]:
    """Choose the tile: 128 x 128 of 16 bits on the tensor cores, smaller for small matrices.

    Args:
        n: Rows of the matrix.
        itemsize: Bytes an element.

    Returns:
        TILE, DEPTH, num_warps and num_stages.
    """
    if itemsize == 4:
        return {"TILE": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 3}
    if n <= 1024:
        return {"TILE": 64, "DEPTH": 64, "num_warps": 8, "num_stages": 4}
    return {"TILE": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 4}


@triton.jit
def symmetric_kernel(
    x, add, out, n, m, alpha, beta, ADD: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute a tile of out = alpha x x^T + beta add, and its mirror image."""
    if tl.program_id(0) >= tl.program_id(1):
        batch = tl.program_id(2).to(tl.int64)
        x += batch * n * m
        row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
        depth = tl.arange(0, DEPTH)
        left = x + row[:, None] * m + depth[None, :]
        right = x + column[:, None] * m + depth[None, :]
        total = tl.zeros([TILE, TILE], tl.float32)
        for at in range(0, m, DEPTH):
            inside = (at + depth < m)[None, :]
            a = tl.load(left + at, (row < n)[:, None] & inside, other=0.0)
            b = tl.load(right + at, (column < n)[:, None] & inside, other=0.0)
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        total *= alpha
        inside = (row < n)[:, None] & (column < n)[None, :]
        at = batch * n * n + row[:, None] * n + column[None, :]
        if ADD:
            total += beta * tl.load(add + at, inside, other=0.0).to(tl.float32)
        total = total.to(out.dtype.element_ty)
        if tl.program_id(0) == tl.program_id(1):
            total = tl.where(row[:, None] >= column[None, :], total, tl.trans(total))
        tl.store(out + at, total, inside)
        if tl.program_id(0) > tl.program_id(1):
            mirror = batch * n * n + column[:, None] * n + row[None, :]
            within = (column < n)[:, None] & (row < n)[None, :]
            tl.store(out + mirror, tl.trans(total), within)


def symmetric(
    x: Tensor, *, add: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """Launch the product.

    Args:
        x: `[n, m]` or `[B, n, m]`, contiguous.
        add: `[n, n]` or `[B, n, n]`, symmetric, or None.
        alpha: Factor of the product.
        beta: Factor of `add`.

    Returns:
        `alpha x x^T + beta add`, `[n, n]` or `[B, n, n]`, in the dtype of `x`.
    """
    n, m = x.shape[-2:]
    batch = x.shape[0] if x.dim() == 3 else 1
    out = x.new_empty(*x.shape[:-1], n)
    chosen = configuration(n, x.element_size())
    tiles = triton.cdiv(n, chosen["TILE"])
    most = 65535  # programs in the third dimension of a grid
    with on_device(x):
        for first in range(0, batch, most):
            some = slice(first, first + most)
            parts = [t if x.dim() == 2 else t[some] for t in (x, x if add is None else add, out)]
            symmetric_kernel[(tiles, tiles, min(most, batch - first))](
                *parts, n, m, alpha, beta, ADD=add is not None, **chosen
            )
    return out
