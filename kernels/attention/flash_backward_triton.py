# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202
"""Device code of `flash.py`, backward: what `flash_triton.py` says of tiles holds here too.

One kernel has a program a tile of M queries and makes dq; it also writes delta = rowsum(do o) -
dlse, for the other: a program a tile of N keys, which walks over the queries of all heads of its
group and makes dk and dv. Scores are computed in both, 7 products instead of 5, and nothing is
added atomically: the bits of a run are those of the next.

Again the computed factor of a product is the second: dv^T[L, N] += do^T p, dk^T[K, N] += q^T ds,
with p and ds of [M, N], and dq^T[K, M] += k^T ds^T, with ds^T of [N, M] computed as k q^T is.

Roof: arithmetic, 14 S U H K FLOPs. Not run on a GPU yet.

Source: Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 2.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launch import next_power_of_two
from ..toolchain import pipelines_two_tiles
from .flash_triton import (
    Configuration,
    candidates,
    exact,
    factors,
    find_tile,
    is_seen,
    largest,
    last_dense,
    load_rows,
    mask_of,
    products,
    seen_range,
    store_columns,
    strides,
    tanh,
    tiles_of,
)
from .flash_triton import place as place_tiles
from .scores import Packed, Scores


@triton.jit
def _weights(r, lse, inner, c, seen, CAPPED: tl.constexpr, EDGE: tl.constexpr):
    """Compute p of products r, and the slope of the soft-cap."""
    slope = r
    if CAPPED:
        r = tanh(r * inner)
        slope = 1.0 - r * r
    if EDGE:
        r = tl.where(seen, r, -float("inf"))
    return tl.exp2(r * c - lse), slope


@triton.jit
def _dscores(p, slope, dp, delta, seen, CAPPED: tl.constexpr, EDGE: tl.constexpr):
    """Compute the gradient of the scores, without their scale."""
    ds = p * (dp - delta)
    if CAPPED:
        ds *= slope
    if EDGE:
        ds = tl.where(seen, ds, 0.0)
    return ds


@triton.jit
def _base_2(lse):
    """Turn a log-sum-exp to base 2; that of a row that sees nothing makes its weights 0."""
    return tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)


@triton.jit
def _walk_keys(
    dq, dq_rest, q, q_rest, do, lse, delta, k_ptr, v_ptr, k_s, v_s, begin, end, skip, gap,
    start, keys, offset, left, right, inner, c,
    CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, EDGE: tl.constexpr,
    K: tl.constexpr, L: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, LB: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Walk over keys from `begin` to `end`, of which those from `skip` lie `gap` further on."""
    for at in tl.range(begin, end, N):
        if EDGE:
            at += tl.where(at >= skip, gap, 0)
        columns = at + tl.arange(0, N)
        k = load_rows(k_ptr, columns, keys, k_s, 0, K, KA, EDGE)
        k_rest = k
        if KB:
            k_rest = load_rows(k_ptr, columns, keys, k_s, KA, K, KB, EDGE)
        v = load_rows(v_ptr, columns, keys, v_s, 0, L, LB, EDGE)
        seen = EDGE
        if EDGE:
            rows = start + offset + tl.arange(0, M)
            seen = is_seen(rows[:, None], columns[None, :], keys, left, right, LEFT, RIGHT)
        r = products(q, q_rest, k, k_rest, KB)
        p, slope = _weights(r, lse[:, None], inner, c, seen, CAPPED, EDGE)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = _dscores(p, slope, dp, delta[:, None], seen, CAPPED, EDGE).to(k.dtype)
        dq = tl.dot(tl.trans(k), tl.trans(ds), dq, input_precision="ieee")
        if KB:
            dq_rest = tl.dot(tl.trans(k_rest), tl.trans(ds), dq_rest, input_precision="ieee")
    return dq, dq_rest


@triton.jit(do_not_specialize=["left", "right", "offset"])
def queries_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr,
    cu_q, cu_k, doc_ptr, tile_ptr,
    do_b, do_s, do_h, q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, out_b, out_s, out_h,
    Q, U, H, tiles, documents, left, right, offset, inner, c, scale,
    GROUP: tl.constexpr, PACKED: tl.constexpr, CAPPED: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, OFFSET: tl.constexpr, DLSE: tl.constexpr, K: tl.constexpr,
    L: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, LB: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Compute dq and delta of M queries of one head."""
    head, batch, tile, queries, keys, at_q, at_k, offset = find_tile(
        cu_q, cu_k, doc_ptr, tile_ptr, Q, U, H, tiles, documents, offset, PACKED, OFFSET, RIGHT
    )
    if tile >= 0:
        at_q += tile.to(tl.int64) * M
        do_ptr += batch * do_b + at_q * do_s + head * do_h
        out_ptr += batch * out_b + at_q * out_s + head * out_h
        q_ptr += batch * q_b + at_q * q_s + head * q_h
        k_ptr += batch * k_b + at_k * k_s + head // GROUP * k_h
        v_ptr += batch * v_b + at_k * v_s + head // GROUP * v_h
        start = tile * M
        rows = tl.arange(0, M)
        inside = rows < queries - start
        do = load_rows(do_ptr, rows, queries - start, do_s, 0, L, LB, True)
        out = load_rows(out_ptr, rows, queries - start, out_s, 0, L, LB, True)
        at = (batch * H + head) * Q + at_q + rows
        lse = tl.load(lse_ptr + at, mask=inside, other=-float("inf"))
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
        if DLSE:
            delta -= tl.load(dlse_ptr + at, mask=inside, other=0.0)
        delta = tl.where(lse == -float("inf"), 0.0, delta)
        tl.store(delta_ptr + at, delta, mask=inside)
        q = load_rows(q_ptr, rows, queries - start, q_s, 0, K, KA, True)
        dq = tl.zeros([KA, M], tl.float32)
        q_rest = q
        dq_rest = dq
        if KB:
            q_rest = load_rows(q_ptr, rows, queries - start, q_s, KA, K, KB, True)
            dq_rest = tl.zeros([KB, M], tl.float32)
        low, full, clear, high = seen_range(
            start, queries, keys, offset, left, right, LEFT, RIGHT, M, N
        )
        dq, dq_rest = _walk_keys(
            dq, dq_rest, q, q_rest, do, _base_2(lse), delta, k_ptr, v_ptr, k_s, v_s,
            low, high - clear + full, full, clear - full, start, keys, offset, left, right,
            inner, c, CAPPED, LEFT, RIGHT, True, K, L, KA, KB, LB, M, N,
        )  # fmt: skip
        dq, dq_rest = _walk_keys(
            dq, dq_rest, q, q_rest, do, _base_2(lse), delta, k_ptr, v_ptr, k_s, v_s,
            full, clear, clear, 0, start, keys, offset, left, right,
            inner, c, CAPPED, LEFT, RIGHT, False, K, L, KA, KB, LB, M, N,
        )  # fmt: skip
        rows = batch * Q + at_q + rows
        store_columns(dq_ptr, dq * scale, rows, H, head, inside, 0, K, KA)
        if KB:
            store_columns(dq_ptr, dq_rest * scale, rows, H, head, inside, KA, K, KB)


@triton.jit
def _walk_queries(
    dk, dk_rest, dv, k, k_rest, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_s, q_h, do_s, do_h, lse_h,
    begin, end, skip, gap, start, queries, keys, offset, left, right, inner, c,
    GROUP: tl.constexpr, CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    EDGE: tl.constexpr, K: tl.constexpr, L: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr,
    LB: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Walk over queries of one head after the other, as `_walk_keys`; past the end they weigh 0."""
    tiles = (end - begin + M - 1) // M
    for step in tl.range(0, tiles * GROUP):
        head = (step // tiles).to(tl.int64)
        row = begin + (step % tiles).to(tl.int64) * M
        if EDGE:
            row += tl.where(row >= skip, gap, 0)
        at = row.to(tl.int32)
        lanes = tl.arange(0, M)
        q_rows = q_ptr + head * q_h + row * q_s
        q = load_rows(q_rows, lanes, queries - at, q_s, 0, K, KA, EDGE)
        q_rest = q
        if KB:
            q_rest = load_rows(q_rows, lanes, queries - at, q_s, KA, K, KB, EDGE)
        do_rows = do_ptr + head * do_h + row * do_s
        do = load_rows(do_rows, lanes, queries - at, do_s, 0, L, LB, EDGE)
        inside = lanes < queries - at
        rows = at + lanes
        row = head * lse_h + row + lanes
        lse = _base_2(tl.load(lse_ptr + row, mask=inside, other=float("inf")))
        delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        seen = EDGE
        if EDGE:
            columns = start + tl.arange(0, N)
            seen = is_seen(rows[None, :] + offset, columns[:, None], keys, left, right, LEFT, RIGHT)
        r = products(k, k_rest, q, q_rest, KB)
        p, slope = _weights(r, lse[None, :], inner, c, seen, CAPPED, EDGE)
        if DV:
            dv = tl.dot(tl.trans(do), tl.trans(p.to(do.dtype)), dv, input_precision="ieee")
        if DK:
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = _dscores(p, slope, dp, delta[None, :], seen, CAPPED, EDGE).to(q.dtype)
            dk = tl.dot(tl.trans(q), tl.trans(ds), dk, input_precision="ieee")
            if KB:
                dk_rest = tl.dot(tl.trans(q_rest), tl.trans(ds), dk_rest, input_precision="ieee")
    return dk, dk_rest, dv


@triton.jit(do_not_specialize=["left", "right", "offset"])
def keys_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    cu_q, cu_k, doc_ptr, tile_ptr,
    do_b, do_s, do_h, q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    Q, U, G, tiles, documents, left, right, offset, inner, c, scale,
    GROUP: tl.constexpr, PACKED: tl.constexpr, CAPPED: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, OFFSET: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, LB: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Compute dk or dv or both of N keys of one head."""
    group, batch, tile, queries, keys, at_q, at_k, offset = find_tile(
        cu_q, cu_k, doc_ptr, tile_ptr, Q, U, G, tiles, documents, offset, PACKED, OFFSET, False
    )
    if tile >= 0:
        at_k += tile.to(tl.int64) * N
        k_ptr += batch * k_b + at_k * k_s + group * k_h
        v_ptr += batch * v_b + at_k * v_s + group * v_h
        start = (tile.to(tl.int64) * N).to(tl.int32)  # positions in a sequence are 32 bits
        columns = tl.arange(0, N)
        k = load_rows(k_ptr, columns, keys - start, k_s, 0, K, KA, True)
        v = load_rows(v_ptr, columns, keys - start, v_s, 0, L, LB, True)
        dk = tl.zeros([KA, N], tl.float32)
        dv = tl.zeros([LB, N], tl.float32)
        k_rest = k
        dk_rest = dk
        if KB:
            k_rest = load_rows(k_ptr, columns, keys - start, k_s, KA, K, KB, True)
            dk_rest = tl.zeros([KB, N], tl.float32)
        low, full, clear, high = seen_range(
            start, keys, queries, -offset, right, left, RIGHT, LEFT, N, M
        )
        head = group * GROUP
        q_ptr += batch * q_b + at_q * q_s + head * q_h
        do_ptr += batch * do_b + at_q * do_s + head * do_h
        row = (batch * G * GROUP + head) * Q + at_q
        dk, dk_rest, dv = _walk_queries(
            dk, dk_rest, dv, k, k_rest, v, q_ptr, do_ptr, lse_ptr + row, delta_ptr + row,
            q_s, q_h, do_s, do_h, Q, low, high - clear + full, full, clear - full, start,
            queries, keys, offset, left, right, inner, c, GROUP, CAPPED, LEFT, RIGHT, True,
            K, L, KA, KB, LB, M, N, DK, DV,
        )  # fmt: skip
        dk, dk_rest, dv = _walk_queries(
            dk, dk_rest, dv, k, k_rest, v, q_ptr, do_ptr, lse_ptr + row, delta_ptr + row,
            q_s, q_h, do_s, do_h, Q, full, clear, clear, 0, start,
            queries, keys, offset, left, right, inner, c, GROUP, CAPPED, LEFT, RIGHT, False,
            K, L, KA, KB, LB, M, N, DK, DV,
        )  # fmt: skip
        inside = columns < keys - start
        rows = batch * U + at_k + columns
        if DK:
            store_columns(dk_ptr, dk * scale, rows, G, group, inside, 0, K, KA)
            if KB:
                store_columns(dk_ptr, dk_rest * scale, rows, G, group, inside, KA, K, KB)
        if DV:
            store_columns(dv_ptr, dv, rows, G, group, inside, 0, L, LB)


def _stages(head: int, size: int) -> int:
    """Run two tiles ahead; a head so wide leaves room for one, an old Triton none for two tiles."""
    if tiles_of(head)[1] and not pipelines_two_tiles():
        return 1
    return 3 if size <= 192 else 2


def queries_configuration(head: int, value: int, itemsize: int, capped: bool) -> Configuration:
    """Choose the tiles of the kernel of dq, as `flash_triton.configuration` does."""
    size = largest(head, value)
    if itemsize == 4:
        return exact(head)
    keys = 64 if size <= 128 else 32
    rows = 64 if capped and tiles_of(head)[1] else 128
    return {"M": rows, "N": keys, "num_warps": 8, "num_stages": _stages(head, size)}


def keys_configuration(head: int, value: int, itemsize: int, capped: bool) -> Configuration:
    """Choose the tiles of the kernel of dk and dv, smaller where a soft cap takes registers."""
    size = largest(head, value)
    if itemsize == 4:
        return exact(head)
    rows = 64 if size <= 64 and not capped else 32
    return {"M": rows, "N": 128, "num_warps": 8, "num_stages": _stages(head, size)}


def keys_parts(head: int, value: int) -> list[tuple[str, bool, bool]]:
    """Say what one launch makes: name, dk, dv. Both of over 128 exceed a thread's registers."""
    if largest(head, value) <= 128:
        return [("dk dv", True, True)]
    return [("dv", False, True), ("dk", True, False)]


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    packed: Packed | None, scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward.

    Args:
        dout: Gradient of `out`, of its shape and dtype, any strides.
        dlse: Gradient of `lse`, or None.
        q: As in `flash_triton.forward`, as are `k` and `v`.
        k: Keys.
        v: Values.
        out: What the forward returned.
        lse: The same.
        packed: As in the forward.
        scores: As in the forward.

    Returns:
        Gradients of `q`, `k` and `v`, contiguous, in their dtypes.
    """
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if not (q.numel() and k.numel() and v.numel()):
        return dq.zero_(), dk.zero_(), dv.zero_()
    do, q, k, v, out = (last_dense(x) for x in (dout, q, k, v, out))
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    rows, heads, size = q.shape[-3:]
    columns, groups, value = v.shape[-3:]
    batch = q.shape[0] if packed is None else 1
    (mask, flags), (ka, kb) = mask_of(scores), tiles_of(size)
    sizes = {"K": size, "L": value, "KA": ka, "KB": kb, "LB": max(16, next_power_of_two(value))}
    constants = {"GROUP": heads // groups, "PACKED": packed is not None, **sizes, **flags}
    inputs = [*strides(do), *strides(q), *strides(k), *strides(v)]
    numbers = [*mask, *factors(scores), scores.scale]

    def start_queries(chosen: Configuration) -> None:
        maps, tiles, documents = place_tiles(packed, False, rows, chosen["M"], lse)
        queries_kernel[(tiles * heads * batch,)](
            do, q, k, v, out, lse, lse if dlse is None else dlse.contiguous(), delta, dq, *maps,
            *inputs, *strides(out), rows, columns, heads, tiles, documents, *numbers,
            **constants, DLSE=dlse is not None, **chosen,
        )  # fmt: skip

    def start_keys(chosen: Configuration, dk_too: bool, dv_too: bool) -> None:
        maps, tiles, documents = place_tiles(packed, True, columns, chosen["N"], lse)
        keys_kernel[(tiles * groups * batch,)](
            do, q, k, v, lse, delta, dk, dv, *maps,
            *inputs, rows, columns, groups, tiles, documents, *numbers, **constants, **chosen,
            DK=dk_too, DV=dv_too,
        )  # fmt: skip

    item, capped = q.element_size(), scores.softcap > 0
    choices = candidates(queries_configuration(size, value, item, capped), "N")
    tuning.launch("flash_attention", ("dq", size, value, int(capped)), choices, start_queries, q)
    choices = candidates(keys_configuration(size, value, item, capped), "M")
    for name, dk_too, dv_too in keys_parts(size, value):
        start = functools.partial(start_keys, dk_too=dk_too, dv_too=dv_too)
        tuning.launch("flash_attention", (name, size, value, int(capped)), choices, start, q)
    return dq, dk, dv
