"""Triton code of `permute`, `permute_fp8` and `unpermute`.

A slot's row is where its expert starts, plus the slots of that expert before it: `rank_kernel`
counts these inside a tile of slots, by comparing each slot with every other, a prefix sum over
(expert, tile) gives the rest, and `place_kernel` adds the two. There are no atomics, so that the
order is stable. A slot without an expert counts as one of an expert after the last: its row lies
beyond the sum of the counts and becomes zero, and each row is written once. `copy_kernel` reads a
token once and writes its k rows. The way back gathers: `invert_kernel` finds the row of each slot,
and a program sums the rows of its tokens in the order of the slots. Offsets are 64-bit.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launch import near, next_power_of_two, on_device
from ..quant.fp8 import BLOCK, MAXIMA
from ..quant.fp8_triton import fp8_amax, fp8_bits, fp8_cast, fp8_scale

SLOT_TILE = {"SLOTS": 256, "CHUNK": 32, "num_warps": 8}
_INVERT = {"ROWS": 32, "COLUMNS": 64, "num_warps": 4}
_TILE = 2048  # elements that a program holds at a time
_ZERO_SCALE = tl.constexpr(2.0**-126)  # of a row of zeros


def configuration(width: int, *, least: int = 1) -> dict[str, int]:
    """Choose tile and warps for a width.

    Args:
        width: D.
        least: Columns that a tile must have: 128 for blocks of FP8.

    Returns:
        TOKENS and COLUMNS, the shape of a tile, and num_warps.
    """
    columns = min(max(next_power_of_two(width), least), _TILE)
    return {"TOKENS": _TILE // columns if columns < 512 else 1, "COLUMNS": columns, "num_warps": 4}


@triton.jit
def _expert(indices, slot, slots, experts):
    """Load the expert of a slot; `experts` where it has none."""
    expert = tl.load(indices + slot, slot < slots, other=-1)
    return tl.where((expert < 0) | (expert >= experts), experts, expert)


@triton.jit
def rank_kernel(
    indices, ranks, counts, slots, tiles, experts, SLOTS: tl.constexpr, CHUNK: tl.constexpr
):
    """Count in a tile the slots of the same expert before each; the last one knows them all."""
    tile = tl.program_id(0).to(tl.int64)
    indices += tile * SLOTS
    left = tl.minimum(slots - tile * SLOTS, SLOTS).to(tl.int32)
    slot = tl.arange(0, SLOTS)
    expert = _expert(indices, slot, left, experts).to(tl.int32)
    before = tl.zeros([SLOTS], tl.int32)
    after = tl.zeros([SLOTS], tl.int32)
    for start in range(0, left, CHUNK):
        other = start + tl.arange(0, CHUNK)
        same = expert[:, None] == _expert(indices, other, left, experts).to(tl.int32)[None, :]
        before += tl.sum((same & (other[None, :] < slot[:, None])).to(tl.int32), 1)
        same = same & (other < left)[None, :]
        after += tl.sum((same & (other[None, :] > slot[:, None])).to(tl.int32), 1)
    tl.store(ranks + tile * SLOTS + slot, before.to(tl.int64), slot < left)
    to = counts + expert.to(tl.int64) * tiles + tile
    tl.store(to, before + 1, (slot < left) & (after == 0))


@triton.jit
def place_kernel(indices, places, ends, order, slots, tiles, experts, SLOTS: tl.constexpr):
    """Turn ranks into rows, negative from -1 where the row is to be zero, and write the order."""
    tile = tl.program_id(0).to(tl.int64)
    slot = tile * SLOTS + tl.arange(0, SLOTS)
    inside = slot < slots
    expert = _expert(indices, slot, slots, experts)
    at = expert * tiles + tile
    row = tl.load(ends + at - 1, inside & (at > 0), other=0)
    row += tl.load(places + slot, inside, other=0)
    held = expert < experts
    tl.store(places + slot, tl.where(held, row, -1 - row), inside)
    tl.store(order + row, tl.where(held, slot, -1), inside)


@triton.jit
def copy_kernel(
    x, places, rows, scale, tokens, width, x_stride, pieces, K: tl.constexpr, SCALING: tl.constexpr,
    MAX: tl.constexpr, POWER_OF_TWO: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write each of TOKENS tokens to its K rows; with SCALING as bytes of FP8, and the scales."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    known = token < tokens
    if SCALING == "row":
        largest = tl.zeros([TOKENS], tl.int32)
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = known[:, None] & (column < width)[None, :]
            value = tl.load(x + token[:, None] * x_stride + column[None, :], inside, other=0.0)
            largest = tl.maximum(largest, tl.max(fp8_bits(value.to(tl.float32)), 1))
        factor, inverse = fp8_scale(largest.to(tl.float32, bitcast=True), MAX, POWER_OF_TWO)
        inverse = inverse[:, None]
        for j in range(K):
            place = tl.load(places + token * K + j, known, other=0)
            to = scale + tl.where(place < 0, -1 - place, place)
            tl.store(to, tl.where(place < 0, _ZERO_SCALE, factor), known)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = known[:, None] & (column < width)[None, :]
        value = tl.load(x + token[:, None] * x_stride + column[None, :], inside, other=0.0)
        if SCALING == "block":
            groups: tl.constexpr = COLUMNS // 128
            group = start // 128 + tl.arange(0, groups)
            value = tl.reshape(value, [TOKENS, groups, 128]).to(tl.float32)
            factor, inverse = fp8_scale(fp8_amax(value, 2), MAX, POWER_OF_TWO)
            value = fp8_cast(value, inverse[:, :, None], MAX, tl.float8e4nv).to(
                tl.uint8, bitcast=True
            )
            value = tl.reshape(value, [TOKENS, COLUMNS])
        if SCALING == "row":
            value = fp8_cast(value.to(tl.float32), inverse, MAX, tl.float8e4nv).to(
                tl.uint8, bitcast=True
            )
        for j in range(K):
            place = tl.load(places + token * K + j, known, other=0)
            absent = (place < 0)[:, None]
            row = tl.where(place < 0, -1 - place, place)[:, None]
            to = rows + row * width + column[None, :]
            tl.store(to, tl.where(absent, tl.zeros_like(value), value), inside)
            if SCALING == "block":
                to = scale + row * pieces + group[None, :]
                factors = tl.where(absent, _ZERO_SCALE, factor)
                tl.store(to, factors, known[:, None] & (group < pieces)[None, :])


@triton.jit
def invert_kernel(
    order, places, drows, count, slots, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write the row of each slot, and zeros to the `width` columns of rows that serve no slot."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(order + row, row < count, other=0)
    tl.store(places + slot, row, (row < count) & (slot >= 0) & (slot < slots))
    nothing = tl.zeros([ROWS, COLUMNS], drows.dtype.element_ty)
    for start in range(0, tl.where(tl.min(slot, 0) < 0, width, 0), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        clear = (slot < 0)[:, None] & (column < width)[None, :]
        tl.store(drows + row[:, None] * width + column[None, :], nothing, clear)


@triton.jit
def gather_kernel(
    rows, places, weights, y, tokens, width, pieces, stride, WEIGHTED: tl.constexpr,
    K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the K rows of each token, in their order; with WEIGHTED times their weights."""
    program = tl.program_id(0)
    token = (program // pieces).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = (program % pieces) * COLUMNS + tl.arange(0, COLUMNS)
    known = token < tokens
    inside = known[:, None] & (column < width)[None, :]
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for j in tl.range(0, K, loop_unroll_factor=4):
        place = tl.load(places + token * K + j, known, other=-1)
        held = place >= 0
        at = rows + place[:, None] * stride + column[None, :]
        part = tl.load(at, inside & held[:, None], other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights + token * K + j, held, other=0.0).to(tl.float32)
            part = weight[:, None] * part
        total += part
    to = y + token[:, None] * width + column[None, :]
    tl.store(to, total.to(y.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    dy, rows, places, weights, drows, dweights, tokens, width, dy_stride, stride, K: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write drows and dweights of TOKENS tokens; dy comes from memory once, then from the cache."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    known = token < tokens
    for j in range(K):
        place = tl.load(places + token * K + j, known, other=-1)
        held = place >= 0
        weight = tl.load(weights + token * K + j, held, other=0.0).to(tl.float32)
        dots = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = held[:, None] & (column < width)[None, :]
            above = tl.load(dy + token[:, None] * dy_stride + column[None, :], inside, other=0.0)
            above = above.to(tl.float32)
            part = tl.load(rows + place[:, None] * stride + column[None, :], inside, other=0.0)
            dots += above * part.to(tl.float32)
            to = drows + place[:, None] * width + column[None, :]
            tl.store(to, (weight[:, None] * above).to(drows.dtype.element_ty), inside)
        dot = tl.sum(dots, 1).to(dweights.dtype.element_ty)
        tl.store(dweights + token * K + j, dot, known)


def _place(indices_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of the slots, as `place_kernel` writes them, the counts and the order."""
    slots = indices_TK.numel()
    tiles = triton.cdiv(slots, SLOT_TILE["SLOTS"])
    places, order = (indices_TK.new_empty(slots, dtype=torch.int64) for _ in range(2))
    if not slots:
        return places, indices_TK.new_zeros(experts, dtype=torch.int64), order
    indices_TK = indices_TK.contiguous()
    counts = indices_TK.new_zeros(experts + 1, tiles, dtype=torch.int32)
    with on_device(indices_TK):
        rank_kernel[(tiles,)](indices_TK, places, counts, slots, tiles, experts, **SLOT_TILE)
        ends = counts.flatten().cumsum(0)
        place_kernel[(tiles,)](
            indices_TK, places, ends, order, slots, tiles, experts, SLOTS=SLOT_TILE["SLOTS"]
        )
    return places, counts[:experts].sum(1), order


def permute(x_TD: Tensor, indices_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `permute`.

    Args:
        x_TD: `[T, D]`.
        indices_TK: `[T, k]` int64; what is not from 0 to `experts` - 1 gives no row.
        experts: E.

    Returns:
        rows `[T k, D]`, counts `[E]`, order `[T k]`.
    """
    places, counts, order = _place(indices_TK, experts)
    rows = x_TD.new_empty(indices_TK.numel(), x_TD.shape[1])
    _copy(x_TD, places, rows, rows, indices_TK.shape[1], "", False)
    return rows, counts, order


def permute_fp8(
    x_TD: Tensor, indices_TK: Tensor, experts: int, scaling: str, power_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch `permute_fp8`.

    Args:
        x_TD: `[T, D]`.
        indices_TK: `[T, k]` int64; what is not from 0 to `experts` - 1 gives no row.
        experts: E.
        scaling: "row" or "block".
        power_of_two: Whether scales are powers of two.

    Returns:
        codes `[T k, D]` uint8, scale `[T k, 1]` or `[T k, ceil(D / 128)]`, counts `[E]` and order
        `[T k]`.
    """
    places, counts, order = _place(indices_TK, experts)
    slots, width = indices_TK.numel(), x_TD.shape[1]
    codes = x_TD.new_empty(slots, width, dtype=torch.uint8)
    groups = 1 if scaling == "row" else triton.cdiv(width, BLOCK)
    scale = x_TD.new_empty(slots, groups, dtype=torch.float32)
    _copy(x_TD, places, codes, scale, indices_TK.shape[1], scaling, power_of_two)
    return codes, scale, counts, order


def _copy(
    x_TD: Tensor, places: Tensor, rows: Tensor, scale: Tensor, top_k: int, scaling: str,
    power_of_two: bool,
) -> None:  # fmt: skip
    """Fill rows, and scale where `scaling` is not empty."""
    x_TD, (tokens, width) = near(x_TD), x_TD.shape
    if not places.numel():
        return

    def start(chosen: dict[str, int]) -> None:
        copy_kernel[(triton.cdiv(tokens, chosen["TOKENS"]),)](
            x_TD, places, rows, scale, tokens, width, x_TD.stride(0), scale.shape[1], K=top_k,
            SCALING=scaling, MAX=MAXIMA[torch.float8_e4m3fn], POWER_OF_TWO=power_of_two, **chosen,
        )  # fmt: skip

    first = configuration(width, least=BLOCK if scaling == "block" else 1)
    key = scaling, width, top_k
    tuning.launch("permute", key, tuning.by_warps(first), start, x_TD)


def _invert(order: Tensor, slots: int, drows: Tensor | None) -> Tensor:
    """Return the row of each slot, -1 where it has none; clear the rows of drows without a slot."""
    places = order.new_full((slots,), -1)
    if len(order):
        invert_kernel[(triton.cdiv(len(order), _INVERT["ROWS"]),)](
            order.contiguous(), places, places if drows is None else drows, len(order), slots,
            0 if drows is None else drows.shape[1], **_INVERT,
        )  # fmt: skip
    return places


def unpermute(
    rows_MD: Tensor, order_M: Tensor, weights_TK: Tensor | None, tokens: int, top_k: int
) -> Tensor:
    """Launch `unpermute`.

    Args:
        rows_MD: `[M, D]`.
        order_M: `[M]` int64.
        weights_TK: `[T, k]`; None is ones.
        tokens: T.
        top_k: k.

    Returns:
        `[T, D]`.
    """
    width = rows_MD.shape[1]
    y_TD = rows_MD.new_empty(tokens, width)
    if not y_TD.numel():
        return y_TD
    rows_MD, first = near(rows_MD), configuration(width)
    pieces = triton.cdiv(width, first["COLUMNS"])
    with on_device(rows_MD):
        places = _invert(order_M, tokens * top_k, None)
    weights = places if weights_TK is None else weights_TK.contiguous()

    def start(chosen: dict[str, int]) -> None:
        gather_kernel[(triton.cdiv(tokens, chosen["TOKENS"]) * pieces,)](
            rows_MD, places, weights, y_TD, tokens, width, pieces, rows_MD.stride(0),
            WEIGHTED=weights_TK is not None, K=top_k, **chosen,
        )  # fmt: skip

    key = "forward", width, top_k
    tuning.launch("unpermute", key, tuning.by_warps(first), start, rows_MD)
    return y_TD


def unpermute_backward(
    dy_TD: Tensor, rows_MD: Tensor, order_M: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the backward of `unpermute`.

    Args:
        dy_TD: `[T, D]`.
        rows_MD: `[M, D]`.
        order_M: `[M]` int64.
        weights_TK: `[T, k]`.

    Returns:
        drows `[M, D]` and dweights `[T, k]`.
    """
    (tokens, top_k), width = weights_TK.shape, rows_MD.shape[1]
    drows_MD = rows_MD.new_empty(rows_MD.shape)
    dweights_TK = weights_TK.new_empty(weights_TK.shape)
    if not tokens or not width:
        return drows_MD.zero_(), dweights_TK.zero_()
    dy_TD, rows_MD = near(dy_TD), near(rows_MD)
    with on_device(rows_MD):
        places = _invert(order_M, weights_TK.numel(), drows_MD)
    weights = weights_TK.contiguous()

    def start(chosen: dict[str, int]) -> None:
        backward_kernel[(triton.cdiv(tokens, chosen["TOKENS"]),)](
            dy_TD, rows_MD, places, weights, drows_MD, dweights_TK, tokens, width, dy_TD.stride(0),
            rows_MD.stride(0), K=top_k, **chosen,
        )  # fmt: skip

    key, first = ("backward", width, top_k), configuration(width)
    tuning.launch("unpermute", key, tuning.by_warps(first), start, rows_MD)
    return drows_MD, dweights_TK
