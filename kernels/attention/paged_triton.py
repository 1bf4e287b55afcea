# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202
"""Device code of `paged.py`: the products of `flash_triton.py`, with keys and values in pages.

The H / G query heads that read one head of keys lie in one tile of M rows, query after query, so
that keys and values are read once for all of them. Where sequences have few queries (decoding)
there would be few programs: the keys are split, each program writes a part in float32 with its
log-sum-exp, and a second kernel merges the parts in their order. Lengths stay on the device: the
parts are of the longest sequence that the tables could hold, those past a sequence's end are empty.

Roof: decoding reads G (K + L) elements a key, once. Not run on a GPU yet.

Source: Kwon et al. 2023, https://arxiv.org/abs/2309.06180, section 4; Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launch import next_power_of_two, on_device
from .flash_triton import (
    Configuration,
    candidates,
    exact,
    factors,
    finish,
    is_seen,
    largest,
    last_dense,
    mask_of,
    place,
    products,
    seen_range,
    store_columns,
    take_in,
    tanh,
    tiles_of,
)
from .flash_triton import configuration as flash_configuration
from .scores import Packed, Scores

_PARTS = 32  # of a sequence's keys, at most
_PART = 512  # keys of a part, at least


@triton.jit
def _load(ptr, rows, inside, first, K: tl.constexpr, KB: tl.constexpr, MASK: tl.constexpr):
    """Load KB columns from `first` of the rows of K elements that begin at `rows`."""
    columns = first + tl.arange(0, KB)
    at = ptr + rows[:, None] + columns[None, :]
    if MASK or first + KB > K:
        x = tl.load(at, mask=inside[:, None] & (columns < K)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _walk(
    acc, high, total, q, q_rest, k_ptr, v_ptr, table_ptr, k_p, k_s, v_p, v_s, begin, end, skip,
    gap, positions, keys, left, right, inner, c,
    CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, EDGE: tl.constexpr,
    PAGE: tl.constexpr, K: tl.constexpr, L: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr,
    LB: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Walk over keys from `begin` to `end`, of which those from `skip` lie `gap` further on."""
    for at in tl.range(begin, end, N):
        if EDGE:
            at += tl.where(at >= skip, gap, 0)
        columns = at + tl.arange(0, N)
        inside = columns < keys
        page = tl.load(table_ptr + columns // PAGE, mask=inside, other=0).to(tl.int64)
        row = (columns % PAGE).to(tl.int64)
        k_rows = page * k_p + row * k_s
        k = _load(k_ptr, k_rows, inside, 0, K, KA, EDGE)
        k_rest = k
        if KB:
            k_rest = _load(k_ptr, k_rows, inside, KA, K, KB, EDGE)
        v = _load(v_ptr, page * v_p + row * v_s, inside, 0, L, LB, EDGE)
        r = products(q, q_rest, k, k_rest, KB)
        if CAPPED:
            r = tanh(r * inner)
        if EDGE:
            seen = is_seen(positions[:, None], columns[None, :], keys, left, right, LEFT, RIGHT)
            r = tl.where(seen, r, -float("inf"))
        acc, high, total = take_in(acc, high, total, r, v, c)
    return acc, high, total


@triton.jit(do_not_specialize=["left", "right"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tables_ptr, lengths_ptr, cu_ptr, doc_ptr, tile_ptr,
    q_s, q_h, k_p, k_s, k_h, v_p, v_s, v_h, table_s, T, H, tiles, documents, left, right, inner, c,
    GROUP: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, CAPPED: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PAGE: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, LB: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Attend from M rows of one group of heads to one part of the keys, PART of them."""
    place = tl.program_id(0)
    tile = place % tiles
    part = (place // tiles) % PARTS
    group = (place // tiles // PARTS).to(tl.int64)
    n = tl.load(doc_ptr + tile)
    if n < documents:
        at_q = tl.load(cu_ptr + n).to(tl.int64)
        queries = (tl.load(cu_ptr + n + 1) - at_q).to(tl.int32)
        keys = tl.load(lengths_ptr + n)
        start = (tile - tl.load(tile_ptr + n)) * M
        rows = start + tl.arange(0, M)
        query = rows // GROUP
        head = group * GROUP + rows % GROUP
        inside = query < queries
        q_rows = (at_q + query) * q_s + head * q_h
        q = _load(q_ptr, q_rows, inside, 0, K, KA, True)
        q_rest = q
        if KB:
            q_rest = _load(q_ptr, q_rows, inside, KA, K, KB, True)
        first = start // GROUP
        offset = keys - queries
        low, full, clear, high = seen_range(
            first, queries, keys, offset, left, right, LEFT, RIGHT,
            (start + M - 1) // GROUP - first + 1, N,
        )  # fmt: skip
        begin = part * PART
        end = begin + PART
        if PARTS == 1:
            end = tl.maximum(keys, 0)
        low = tl.minimum(tl.maximum(low, begin), end)
        full = tl.minimum(tl.maximum(full, begin), end)
        clear = tl.minimum(tl.maximum(clear, begin), end)
        high = tl.minimum(tl.maximum(high, begin), end)
        k_ptr += group * k_h
        v_ptr += group * v_h
        table_ptr = tables_ptr + n.to(tl.int64) * table_s
        acc = tl.zeros([LB, M], tl.float32)
        top = tl.full([M], -float("inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc, top, total = _walk(
            acc, top, total, q, q_rest, k_ptr, v_ptr, table_ptr, k_p, k_s, v_p, v_s,
            low, high - clear + full, full, clear - full, query + offset, keys, left, right,
            inner, c, CAPPED, LEFT, RIGHT, True, PAGE, K, L, KA, KB, LB, N,
        )  # fmt: skip
        acc, top, total = _walk(
            acc, top, total, q, q_rest, k_ptr, v_ptr, table_ptr, k_p, k_s, v_p, v_s,
            full, clear, clear, 0, query + offset, keys, left, right,
            inner, c, CAPPED, LEFT, RIGHT, False, PAGE, K, L, KA, KB, LB, N,
        )  # fmt: skip
        acc, lse = finish(acc, top, total)
        row = part.to(tl.int64) * T + at_q + query
        tl.store(lse_ptr + (part.to(tl.int64) * H + head) * T + at_q + query, lse, mask=inside)
        store_columns(out_ptr, acc, row, H, head, inside, 0, L, LB)


@triton.jit
def merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, T, H,
    PARTS: tl.constexpr, PB: tl.constexpr, L: tl.constexpr, LB: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one query of one head; parts without a key are not read."""
    row = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    part = tl.arange(0, PB).to(tl.int64)
    lse = tl.load(
        part_lse_ptr + (part * H + head) * T + row, mask=part < PARTS, other=-float("inf")
    )
    top = tl.max(lse, 0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp(lse - shift)
    total = tl.sum(weight, 0)
    columns = tl.arange(0, LB)
    at = (((part * T + row) * H + head) * L)[:, None] + columns[None, :]
    used = (lse != -float("inf"))[:, None] & (columns < L)[None, :]
    mixed = tl.sum(tl.load(part_ptr + at, mask=used, other=0.0) * weight[:, None], 0)
    empty = total == 0.0
    mixed = mixed / tl.where(empty, 1.0, total)
    at_out = out_ptr + (row * H + head) * L + columns
    tl.store(at_out, mixed.to(out_ptr.dtype.element_ty), mask=columns < L)
    tl.store(lse_ptr + head.to(tl.int64) * T + row, shift + tl.log(total))


def configuration(head: int, value: int, itemsize: int, rows: int) -> Configuration:
    """Choose the tiles; the pages' numbers come two stages before what lies in them.

    Args:
        head: K, of queries and keys.
        value: L, of values.
        itemsize: Bytes an element.
        rows: Queries of a sequence on average, times the heads of a group.

    Returns:
        M, N, num_warps and num_stages.
    """
    if itemsize == 4:
        return exact(head)
    first = flash_configuration(head, value, itemsize, False)
    first |= {"N": 64 if largest(head, value) <= 64 else 32, "num_stages": 5}
    if rows > 64:
        return first
    return first | {"M": 16 if rows <= 16 else 32, "num_warps": 4}


def parts_of(rows: int, keys: int) -> tuple[int, int]:
    """Split the keys: the number of parts, and the keys of each, a multiple of any tile.

    Args:
        rows: As in `configuration`; many of them need no split.
        keys: Of the longest sequence that the tables can hold.
    """
    if rows > 64 or keys <= _PART:
        return 1, max(keys, 1)
    part = max(_PART, next_power_of_two(-(-keys // _PARTS)))
    return -(-keys // part), part


def forward(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor, cu_seqlens: Tensor,
    scores: Scores,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward; there is no backward.

    Args:
        q: `[T, H, K]`.
        k: `[P, page, G, K]`.
        v: `[P, page, G, L]`.
        tables: `[N, pages]` int32.
        lengths: `[N]` int32.
        cu_seqlens: `[N + 1]` int32.
        scores: What a query sees; the last query stands at the last key.

    Returns:
        The output `[T, H, L]` in the dtype of `q`, and the natural log-sum-exp `[H, T]` in float32.
    """
    q, k, v, tables = (last_dense(x) for x in (q, k, v, tables))
    lengths, cu_seqlens = lengths.contiguous(), cu_seqlens.contiguous()
    (queries, heads, size), (page, groups, value) = q.shape, v.shape[1:]
    out = q.new_empty(queries, heads, value)
    lse = q.new_empty(heads, queries, dtype=torch.float32)
    if not out.numel():
        return out, lse
    group, sequences = heads // groups, len(cu_seqlens) - 1
    rows = -(-queries * group // max(sequences, 1))
    parts, part = parts_of(rows, tables.shape[1] * page)
    (left, right, _), flags = mask_of(scores)
    del flags["OFFSET"]
    (ka, kb), lb = tiles_of(size), max(16, next_power_of_two(value))
    split = out, lse
    if parts > 1:
        split = (
            out.new_empty(parts, *out.shape, dtype=torch.float32),
            lse.new_empty(parts, *lse.shape),
        )
    stretched = cu_seqlens * group  # in rows of tiles

    def start(chosen: Configuration) -> None:
        packed = Packed(stretched, stretched, None, None)
        (_, _, document, at), tiles, _ = place(packed, False, queries * group, chosen["M"], lse)
        forward_kernel[(tiles * parts * groups,)](
            q, k, v, *split, tables, lengths, cu_seqlens, document, at,
            *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], tables.stride(0), queries, heads,
            tiles, sequences, left, right, *factors(scores), GROUP=group, PARTS=parts, PART=part,
            **flags, PAGE=page, K=size, L=value, KA=ka, KB=kb, LB=lb, **chosen,
        )  # fmt: skip

    choices = candidates(configuration(size, value, q.element_size(), rows), "N")
    tuning.launch("paged_attention", (min(rows, 65), size, value), choices, start, q)
    if parts > 1:
        with on_device(q):
            merge_kernel[(queries * heads,)](
                *split, out, lse, queries, heads,
                PARTS=parts, PB=next_power_of_two(parts), L=value, LB=lb, num_warps=4,
            )  # fmt: skip
    return out, lse
