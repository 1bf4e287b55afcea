# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202
"""Device code of `flash.py`, forward: one program a tile of M queries of one head.

It walks over the tiles of N keys that its queries see: first those at the edges of the mask, where
every pair is tested, then those in between, where none is. A tile that nobody sees is not read.
Products accumulate transposed, o^T[L, M] += v^T[L, N] p^T[N, M]: the computed factor p is the
second one, which Hopper reads from shared memory; as the first it would come from registers, which
some compilers get wrong (see `toolchain.py`). p^T is a view of p in shared memory: what Triton
3.4 to 3.7.0 miscompiles is a transposed, computed *first* factor.

Exponentials are of base 2: s = c r, with r the product q k^T and c = scale log2(e); with a
soft-cap r = tanh(scale q k^T / cap) and c = cap log2(e). A head size over 128 and up to 192 is two
tiles, 128 and 64: padded to 256 a third of the products and of shared memory would be zeros. Other
sizes are padded to a power of two.

Packed documents have their tiles counted on the device (`Tiles`), so that nothing waits for it and
1,000 short documents cost at most 1,000 tiles more than one long. Tiles begin where their document
does and the configuration does not depend on lengths: a document's bits are those it has alone.

Letters as in `flash.py`, and KA, KB the two tiles of the head size, LB that of the values'.

Roof: arithmetic, 4 S U H K FLOPs. Not run on a GPU yet. Offsets of rows are 64 bits wide.

Source: Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 1.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launch import next_power_of_two
from .scores import Packed, Scores

LOG2E = math.log2(math.e)
_FAR = 1 << 30  # a window as wide as any sequence, whose sums with positions fit 32 bits
_NEAR = 1 << 28  # an offset beyond any sequence; what is more goes into the window

Configuration = dict[str, int]


@triton.jit
def find_tile(
    cu_q, cu_k, doc_ptr, tile_ptr, Q, U, H, tiles, documents, offset,
    PACKED: tl.constexpr, OFFSET: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Find what a program works on; LATE: the last tile of a document goes first.

    Returns:
        head, batch, tile within the document (-1: none), queries and keys of the document, the
        first of each (64 bits), position of query 0.
    """
    place = tl.program_id(0)
    tile = place % tiles
    head = ((place // tiles) % H).to(tl.int64)
    batch = (place // tiles // H).to(tl.int64)
    if PACKED:
        n = tl.load(doc_ptr + tile)
        none = n >= documents
        n = tl.where(none, 0, n)
        tile = tl.load(tile_ptr + n + 1) - 1 - tile if LATE else tile - tl.load(tile_ptr + n)
        tile = tl.where(none, -1, tile)
        at_q = tl.load(cu_q + n).to(tl.int64)
        at_k = tl.load(cu_k + n).to(tl.int64)
        queries = (tl.load(cu_q + n + 1) - at_q).to(tl.int32)
        keys = (tl.load(cu_k + n + 1) - at_k).to(tl.int32)
    else:
        if LATE:
            tile = tiles - 1 - tile
        at_q = batch * 0
        at_k = batch * 0
        queries = Q
        keys = U
    if not OFFSET:
        offset = keys - queries
    return head, batch, tile, queries, keys, at_q, at_k, offset


@triton.jit
def seen_range(
    start, queries, keys, offset, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, M,
    N: tl.constexpr,
):  # fmt: skip
    """Find the keys that M queries from `start` see: some see low to high, all full to clear."""
    last = tl.minimum(start + M, queries) - 1
    low = 0
    full = 0
    high = keys
    clear = keys
    if LEFT:
        low = tl.maximum(start + offset - left, 0)
        low -= low % N
        full = tl.maximum(last + offset - left, 0) + N - 1
        full -= full % N
    if RIGHT:
        high = tl.minimum(keys, last + offset + right + 1)
        clear = tl.minimum(keys, tl.maximum(start + offset + right + 1, 0))
    clear = tl.maximum(clear - clear % N, full)
    return low, full, clear, high


@triton.jit
def is_seen(rows, columns, stop, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Tell which pairs have a score: positions `rows` of queries, `columns` of keys to `stop`."""
    seen = (columns < stop) & (rows == rows)
    if LEFT:
        seen = seen & (rows - columns <= left)
    if RIGHT:
        seen = seen & (columns - rows <= right)
    return seen


@triton.jit
def load_rows(
    ptr, rows, stop, stride, first, K: tl.constexpr, KB: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    """Load KB columns from `first` of rows of K elements; zeros outside."""
    columns = first + tl.arange(0, KB)
    at = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if MASK and first + KB > K:
        x = tl.load(at, mask=(rows < stop)[:, None] & (columns < K)[None, :], other=0.0)
    elif MASK:
        x = tl.load(at, mask=(rows < stop)[:, None], other=0.0)
    elif first + KB > K:
        x = tl.load(at, mask=(columns < K)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def tanh(y):
    """Compute tanh, by its series where the closed form would cancel."""
    square = y * y
    near = y * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(square < 0.04, near, 1.0 - 2.0 / (1.0 + tl.exp2(y * 2.8853900817779268)))


@triton.jit
def products(a, a_rest, b, b_rest, KB: tl.constexpr):
    """Multiply a b^T, where the head size may be in two tiles."""
    total = tl.dot(a, tl.trans(b), input_precision="ieee")
    if KB:
        total = tl.dot(a_rest, tl.trans(b_rest), total, input_precision="ieee")
    return total


@triton.jit
def take_in(acc, high, total, r, v, c):
    """Add the values of a tile of keys, by products r, to what was taken of others."""
    higher = tl.maximum(high, tl.max(r, 1) * c)
    shift = tl.where(higher == -float("inf"), 0.0, higher)  # else -inf + inf is NaN
    p = tl.exp2(r * c - shift[:, None])
    fall = tl.exp2(high - shift)
    total = total * fall + tl.sum(p, 1)
    acc = acc * fall[None, :]
    acc = tl.dot(tl.trans(v), tl.trans(p.to(v.dtype)), acc, input_precision="ieee")
    return acc, higher, total


@triton.jit
def finish(acc, high, total):
    """Return the mean of the values and the natural log-sum-exp, 0 and -inf without a key."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, -float("inf"), (high + tl.log2(total)) * 0.6931471805599453)
    return acc * (1.0 / total)[None, :], lse


@triton.jit
def _walk(
    state, q, q_rest, k_ptr, v_ptr, k_s, v_s, begin, end, skip, gap, start, keys, offset, left,
    right, inner, c,
    CAPPED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, EDGE: tl.constexpr,
    K: tl.constexpr, L: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, LB: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Walk over keys from `begin` to `end`, of which those from `skip` lie `gap` further on."""
    acc, high, total = state
    for at in tl.range(begin, end, N):
        if EDGE:
            at += tl.where(at >= skip, gap, 0)
        columns = at + tl.arange(0, N)
        k = load_rows(k_ptr, columns, keys, k_s, 0, K, KA, EDGE)
        k_rest = k
        if KB:
            k_rest = load_rows(k_ptr, columns, keys, k_s, KA, K, KB, EDGE)
        v = load_rows(v_ptr, columns, keys, v_s, 0, L, LB, EDGE)
        r = products(q, q_rest, k, k_rest, KB)
        if CAPPED:
            r = tanh(r * inner)
        if EDGE:
            rows = start + offset + tl.arange(0, M)
            seen = is_seen(rows[:, None], columns[None, :], keys, left, right, LEFT, RIGHT)
            r = tl.where(seen, r, -float("inf"))
        acc, high, total = take_in(acc, high, total, r, v, c)
    return acc, high, total


@triton.jit(do_not_specialize=["left", "right", "offset"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q, cu_k, doc_ptr, tile_ptr,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    Q, U, H, tiles, documents, left, right, offset, inner, c,
    GROUP: tl.constexpr, PACKED: tl.constexpr, CAPPED: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, OFFSET: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, LB: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Attend from M queries of one head."""
    head, batch, tile, queries, keys, at_q, at_k, offset = find_tile(
        cu_q, cu_k, doc_ptr, tile_ptr, Q, U, H, tiles, documents, offset, PACKED, OFFSET, RIGHT
    )
    if tile >= 0:
        at_q += tile.to(tl.int64) * M
        q_ptr += batch * q_b + at_q * q_s + head * q_h
        k_ptr += batch * k_b + at_k * k_s + head // GROUP * k_h
        v_ptr += batch * v_b + at_k * v_s + head // GROUP * v_h
        start = tile * M
        rows = tl.arange(0, M)
        q = load_rows(q_ptr, rows, queries - start, q_s, 0, K, KA, True)
        q_rest = q
        if KB:
            q_rest = load_rows(q_ptr, rows, queries - start, q_s, KA, K, KB, True)
        low, full, clear, high = seen_range(
            start, queries, keys, offset, left, right, LEFT, RIGHT, M, N
        )
        lowest = tl.full([M], -float("inf"), tl.float32)
        state = tl.zeros([LB, M], tl.float32), lowest, tl.zeros([M], tl.float32)
        state = _walk(
            state, q, q_rest, k_ptr, v_ptr, k_s, v_s, low, high - clear + full, full, clear - full,
            start, keys, offset, left, right, inner, c, CAPPED, LEFT, RIGHT, True,
            K, L, KA, KB, LB, M, N,
        )  # fmt: skip
        acc, top, total = _walk(
            state, q, q_rest, k_ptr, v_ptr, k_s, v_s, full, clear, clear, 0,
            start, keys, offset, left, right, inner, c, CAPPED, LEFT, RIGHT, False,
            K, L, KA, KB, LB, M, N,
        )  # fmt: skip
        acc, lse = finish(acc, top, total)
        tl.store(lse_ptr + (batch * H + head) * Q + at_q + rows, lse, mask=rows < queries - start)
        rows_out = batch * Q + at_q + rows
        store_columns(out_ptr, acc, rows_out, H, head, rows < queries - start, 0, L, LB)


@triton.jit
def store_columns(ptr, tile, rows, H, head, inside, first, L: tl.constexpr, LB: tl.constexpr):
    """Store a transposed tile into a contiguous [rows, H, L], from column `first` on."""
    columns = first + tl.arange(0, LB)
    at = ptr + ((rows * H + head) * L)[None, :] + columns[:, None]
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=inside[None, :] & (columns < L)[:, None])


def tiles_of(size: int) -> tuple[int, int]:
    """Cut a head size into one or two tiles of powers of two, the second 0 where there is one."""
    if 128 < size <= 192:
        return 128, 64
    return max(16, next_power_of_two(size)), 0


def exact(head: int) -> Configuration:
    """Choose for float32 as IEEE 754 has it, without the matrix units: what registers hold."""
    return {"M": 16, "N": 16, "num_warps": 8 if tiles_of(head)[1] else 4, "num_stages": 1}


def largest(head: int, value: int) -> int:
    """Return the padded size of the wider of two heads."""
    return max(sum(tiles_of(head)), next_power_of_two(value))


def configuration(head: int, value: int, itemsize: int, capped: bool) -> Configuration:
    """Choose the tiles of the forward; lengths must not count, so that a document keeps its bits.

    On Hopper the first side of a product is shared among 8 warps at 16 rows each, so that M is
    128, unless that takes too many registers (64: each half of the warps computes all scores).
    Tiles of 128 keys for heads of 64 spill on Blackwell, by 24 to 32 bytes.
    The loads of a tile of keys run two tiles ahead, which takes 3 stages; beside a soft cap the
    registers of a head over 128 suffice for one.

    Args:
        head: K, of queries and keys.
        value: L, of values.
        itemsize: Bytes an element.
        capped: Whether there is a soft cap.

    Returns:
        M, N, num_warps and num_stages.
    """
    size = largest(head, value)
    if itemsize == 4:
        return exact(head)
    keys = 64 if size <= 128 else 32
    stages = 2 if capped and size > 128 else 3
    return {"M": 128 if size <= 192 else 64, "N": keys, "num_warps": 8, "num_stages": stages}


def candidates(first: Configuration, walked: str) -> list[Configuration]:
    """Return what a search may choose from: no larger tile, which would not fit the registers.

    Args:
        first: The default.
        walked: M or N, of the tile that a program walks over.
    """
    half = first | {walked: max(32, first[walked] // 2)}
    if first["num_stages"] == 1:
        return [first]
    more = [half, first | {"num_stages": 2}, half | {"num_stages": 2}, half | {"num_stages": 4}]
    return [first, *(c for c in more if c["num_stages"] == 2 or c[walked] < first[walked])]


def place(
    packed: Packed | None, keys: bool, rows: int, block: int, unused: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], int, int]:
    """Count the tiles of rows, those of every document where packed, without waiting for a device.

    Args:
        packed: Where documents lie.
        keys: Whether the tiles are of keys.
        rows: Rows of a sequence, or of all documents.
        block: Rows a tile.
        unused: Stands for what is not packed.

    Returns:
        First queries and keys of each document, the document of each tile (N past the last one),
        and the tiles before each document; tiles of a head, or more; N.
    """
    if packed is None:
        return (unused, unused, unused, unused), triton.cdiv(rows, block), 0
    cu = packed.k if keys else packed.q
    documents = len(cu) - 1
    most = min(rows, (rows + documents * (block - 1)) // block)
    at = torch.zeros_like(cu)
    torch.cumsum((cu.diff() + (block - 1)) // block, 0, dtype=torch.int32, out=at[1:])
    tiles = torch.arange(most, dtype=torch.int32, device=cu.device)
    document = torch.searchsorted(at[1:], tiles, right=True, out_int32=True)
    return (packed.q, packed.k, document, at), most, documents


def last_dense(x: Tensor) -> Tensor:
    """Return `x`, copied where its last dimension is not dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of batch, row and head; packed rows have no batch."""
    return (0 if x.dim() == 3 else x.stride(0), x.stride(-3), x.stride(-2))


def mask_of(scores: Scores) -> tuple[list[int], dict[str, bool]]:
    """Return left, right and offset, and which of them there are."""
    flags = {"LEFT": scores.left >= 0, "RIGHT": scores.right >= 0}
    flags |= {"OFFSET": scores.offset is not None, "CAPPED": scores.softcap > 0}
    offset = scores.offset or 0
    near = max(-_NEAR, min(offset, _NEAR))
    sides = scores.left + near - offset, scores.right + offset - near
    return [*(max(-_FAR, min(side, _FAR)) for side in sides), near], flags


def factors(scores: Scores) -> tuple[float, float]:
    """Return what multiplies a product, and then, after tanh, makes it a power of 2."""
    if scores.softcap:
        return scores.scale / scores.softcap, scores.softcap * LOG2E
    return 1.0, scores.scale * LOG2E


def forward(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed | None, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Launch the forward.

    Args:
        q: `[B, S, H, K]`, or `[T, H, K]` of packed documents.
        k: `[B, U, G, K]` or `[Tk, G, K]`.
        v: `[B, U, G, L]` or `[Tk, G, L]`.
        packed: Where the documents lie; None where nothing is packed.
        scores: What a query sees.

    Returns:
        The output `[B, S, H, L]` or `[T, H, L]`, contiguous, in the dtype of `q`, and the natural
        log-sum-exp `[B, H, S]` or `[H, T]` in float32.
    """
    q, k, v = last_dense(q), last_dense(k), last_dense(v)
    heads, size, value = q.shape[-2], q.shape[-1], v.shape[-1]
    out = q.new_empty(*q.shape[:-1], value)
    rows = q.shape[-3]
    lse = q.new_empty(*q.shape[:-3], heads, rows, dtype=torch.float32)
    if not out.numel():
        return out, lse
    mask, flags = mask_of(scores)
    ka, kb = tiles_of(size)

    def start(chosen: Configuration) -> None:
        maps, tiles, documents = place(packed, False, rows, chosen["M"], lse)
        forward_kernel[(tiles * heads * (q.shape[0] if packed is None else 1),)](
            q, k, v, out, lse, *maps, *strides(q), *strides(k), *strides(v),
            rows, k.shape[-3], heads, tiles, documents, *mask, *factors(scores),
            GROUP=heads // k.shape[-2], PACKED=packed is not None, **flags, K=size, L=value,
            KA=ka, KB=kb, LB=max(16, next_power_of_two(value)), **chosen,
        )  # fmt: skip

    capped = scores.softcap > 0
    choices = candidates(configuration(size, value, q.element_size(), capped), "N")
    key = "forward", size, value, int(capped)
    tuning.launch("flash_attention", key, choices, start, q)
    return out, lse
