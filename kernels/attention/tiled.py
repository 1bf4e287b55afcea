"""The backend `torch`: PyTorch's fused operators where they serve, in tiles where they do not.

FlashAttention 2 on CUDA knows windows. PyTorch's operator on the CPU knows causal squares, and a
mask: there a window is cut into tiles of queries, each with the keys that it sees, and a mask of
the tile alone. What neither knows (a soft cap; other dtypes on CUDA) is computed in explicit maths,
tile by tile. Memory grows with the sequence, never with its square.

PyTorch's operator on the CPU takes a query whose scores are all NaN, over keys that do not fill a
vector, for one that sees no key: output and log-sum-exp are 0. The tiles of such queries are
computed again, in explicit maths, so that the NaN arrives.

Tiles of 128 queries took 81 ms where one causal call took 90 (2,048 tokens, 8 heads of 64, one
core), 64 took 97 and 512 took 102.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..library import wide
from . import sdpa
from .reference import attention_backward_reference, attention_reference
from .scores import Scores

_TILE = 128  # queries

Dense = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


class Tile(NamedTuple):
    """Queries, the keys that they see, and their scores."""

    rows: slice
    keys: slice
    scores: Scores


def tiles(
    queries: int, keys: int, scores: Scores, *, squares: bool, windows: bool
) -> Iterator[Tile]:
    """Cut attention into tiles that hold every pair of a query and a key that it sees.

    Args:
        queries: S.
        keys: U.
        scores: The window.
        squares: Whether what has no mask, and a causal square, may be one tile.
        windows: Whether anything may be one tile.

    Yields:
        Tiles in the order of their queries; each query of one sees a key, and each key is seen.
        Queries that see none are in no tile.
    """
    first = scores.first(queries, keys)
    start, stop = scores.seeing(queries, keys)
    causal = scores.left < 0 and scores.right == 0 and first == 0 and queries <= keys
    one = windows or (squares and (causal or not scores.masked))
    step = max(stop - start, 1) if one else _TILE
    for low in range(start, stop, step):
        high = min(low + step, stop)
        a, b = scores.seen(low, high, queries, keys)
        yield Tile(slice(low, high), slice(a, b), replace(scores, offset=first + low - a))


def on_cuda(q: Tensor) -> bool:
    """Tell whether FlashAttention 2 is the fused operator."""
    return q.is_cuda


def _tiles(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, dlse: Tensor | None = None
) -> tuple[bool, Iterator[Tile]]:
    """Say whether a fused operator serves, and which tiles it wants."""
    fused = sdpa.lacks(q, v, scores, dlse) is None
    if not (q.numel() and k.numel() and v.numel()):
        return fused, iter(())
    sizes = q.shape[1], k.shape[1]
    return fused, tiles(*sizes, scores, squares=fused, windows=fused and on_cuda(q))


def _run(run: Callable[..., Dense], q: Tensor, k: Tensor, v: Tensor, plan: Iterator[Tile]) -> Dense:
    batch, queries, heads, _ = q.shape
    lse = q.new_full((batch, heads, queries), -torch.inf, dtype=wide(q.dtype))
    out = q.new_zeros(batch, queries, heads, v.shape[-1])
    for rows, seen, tile in plan:
        part, part_lse = run(q[:, rows], k[:, seen], v[:, seen], scores=tile)
        if part.shape == out.shape:
            return part, part_lse
        out[:, rows], lse[:, :, rows] = part, part_lse
    return out, lse


def forward(q_BSHK: Tensor, k_BUGK: Tensor, v_BUGL: Tensor, scores: Scores) -> Dense:
    """Attend; as `attention_reference`.

    Args:
        q_BSHK: `[B, S, H, K]`.
        k_BUGK: `[B, U, G, K]`.
        v_BUGL: `[B, U, G, L]`.
        scores: Scale, window, soft cap.

    Returns:
        `[B, S, H, L]` and the log-sum-exp `[B, H, S]`.
    """
    fused, plan = _tiles(q_BSHK, k_BUGK, v_BUGL, scores)
    run: Callable[..., Dense] = attention_reference
    if fused:
        run = partial(sdpa.forward_cuda, packed=None) if on_cuda(q_BSHK) else sdpa.forward_cpu
    out, lse = _run(run, q_BSHK, k_BUGK, v_BUGL, plan)
    if not fused or on_cuda(q_BSHK) or not (lse == 0).any():
        return out, lse
    lost_BSH = (lse == 0).mT & (out == 0).all(-1)  # or a score of 0 and a value of 0
    if lost_BSH.any():
        small = tiles(q_BSHK.shape[1], k_BUGK.shape[1], scores, squares=False, windows=False)
        again = (tile for tile in small if lost_BSH[:, tile.rows].any())
        exact, exact_lse = _run(attention_reference, q_BSHK, k_BUGK, v_BUGL, again)
        out = out.where(~lost_BSH[..., None], exact)
        lse = lse.where(~lost_BSH.mT, exact_lse)
    return out, lse


def backward(
    dout_BSHL: Tensor, dlse_BHS: Tensor | None, q_BSHK: Tensor, k_BUGK: Tensor, v_BUGL: Tensor,
    out_BSHL: Tensor, lse_BHS: Tensor, scores: Scores, deterministic: bool = False,
) -> Gradients:  # fmt: skip
    """Differentiate `forward`; as `attention_backward_reference`.

    Args:
        dout_BSHL: Upstream gradient of the output.
        dlse_BHS: Upstream gradient of the log-sum-exp, None for 0.
        q_BSHK: As in the forward.
        k_BUGK: As in the forward.
        v_BUGL: As in the forward.
        out_BSHL: What the forward gave.
        lse_BHS: What the forward gave.
        scores: As in the forward.
        deterministic: Whether the gradients must be the same bits each time.

    Returns:
        The gradients of q, k and v.
    """
    saved = q_BSHK, k_BUGK, v_BUGL
    fused, plan = _tiles(*saved, scores, dlse_BHS)
    narrow = fused and on_cuda(q_BSHK)
    run: Callable[..., Gradients] = attention_backward_reference
    if fused:
        on_device = partial(sdpa.backward_cuda, packed=None, deterministic=deterministic)
        run = on_device if narrow else sdpa.backward_cpu
    dtype = q_BSHK.dtype if narrow else wide(q_BSHK.dtype)  # that of sums over tiles
    dout, q, k, v, out = (x.to(dtype) for x in (dout_BSHL, *saved, out_BSHL))
    dq, dk, dv = (x.new_zeros(x.shape, dtype=dtype) for x in saved)
    for rows, seen, tile in plan:
        dlse = None if dlse_BHS is None else dlse_BHS[:, :, rows]
        parts = run(
            dout[:, rows], dlse, q[:, rows], k[:, seen], v[:, seen], out[:, rows],
            lse_BHS[:, :, rows].contiguous(), scores=tile,
        )  # fmt: skip
        if parts[0].shape == dq.shape and parts[1].shape == dk.shape:
            dq, dk, dv = parts
            break
        dq[:, rows] = parts[0]
        dk[:, seen] += parts[1]
        dv[:, seen] += parts[2]
    dq, dk, dv = (d.to(x.dtype).contiguous() for d, x in zip((dq, dk, dv), saved, strict=True))
    return dq, dk, dv
