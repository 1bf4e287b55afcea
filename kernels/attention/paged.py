"""Attention to keys and values that lie in pages, for generation: decoding and chunked prefill.

Sequence n has lengths[n] keys; key j lies in page tables[n, j // page], row j % page. Its queries
of this call are the last ones: the last query stands at the last key, and sees what `window`
leaves. Sequences may share a page (a common prefix).

Shapes: T queries of all sequences, N sequences, P pages of `page` keys, H query heads, G key/value
heads, K head dimension of queries and keys, L of values. Decoding is bound by memory: one read of
each sequence's keys and values, G (K + L) elements a key, over the bandwidth.

Source: Kwon et al. 2023, https://arxiv.org/abs/2309.06180, section 4 (pages); Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html (decoding split over the keys).
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..cpu import lanes, operators
from ..invariant import invariant, plain
from ..library import need_tensors, register, wide
from . import tiled
from .arguments import (
    Dense,
    Window,
    check_documents,
    check_sinks,
    check_tensors,
    scores_of,
    with_sinks,
)
from .documents import check
from .invariant import forward as invariant_forward
from .reference import attention_reference
from .scores import Scores

_OP = "paged_attention"


def _sequences(
    tables: Tensor, lengths: Tensor, cu_seqlens: Tensor, queries: int, pages: int, page: int
) -> list[tuple[slice, Tensor, int]]:
    """Read and check where the sequences lie: rows of queries, pages, keys."""
    bounds, found = check(_OP, cu_seqlens, queries, None), []
    for n, ((start, stop), keys) in enumerate(zip(pairwise(bounds), lengths.tolist(), strict=True)):
        if not stop - start <= keys <= tables.shape[1] * page:
            raise ValueError(
                f"{_OP}: lengths must count a sequence's queries too and fit its pages, sequence "
                f"{n} has {stop - start} queries, room for {tables.shape[1] * page} keys and "
                f"length {keys}"
            )
        held = tables[n, : -(-keys // page)].long()
        if held.numel() and not 0 <= int(held.min()) <= int(held.max()) < pages:
            raise ValueError(
                f"{_OP}: tables must name pages from 0 to {pages - 1}, sequence {n} has "
                f"{int(held.min())} to {int(held.max())}"
            )
        found.append((slice(start, stop), held, keys))
    return found


class Decoding:
    """Where the keys of N sequences lie that have one query each; checked once for all layers.

    Args:
        tables: As in `paged_attention`, on the CPU.
        lengths: As in `paged_attention`, the new key with them.
        pages: Pages P of each layer.
        page: Keys of a page.

    Raises:
        ValueError: As `paged_attention`.
    """

    def __init__(self, tables: Tensor, lengths: Tensor, pages: int, page: int) -> None:
        cu_seqlens = torch.arange(len(lengths) + 1, dtype=torch.int32)
        _sequences(tables, lengths, cu_seqlens, len(lengths), pages, page)
        self.tables, self.lengths = tables.contiguous(), lengths.to(torch.int32)
        self.keys = int(lengths.sum())

    def serves(self, q_NHK: Tensor, k_pages: Tensor, v_pages: Tensor) -> bool:
        """Tell whether `attend` serves: `plain` tensors, heads of whole vectors."""
        return plain(q_NHK) and not (k_pages.shape[-1] % lanes() or v_pages.shape[-1] % lanes())

    def attend(
        self, q_NHK: Tensor, k_NGK: Tensor, v_NGL: Tensor, k_pages: Tensor, v_pages: Tensor, *,
        scale: float | None = None, window: Window = (-1, -1), softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Put each sequence's new key and value into its page, and attend as `paged_attention`.

        Args:
            q_NHK: A query of each sequence, `[N, H, K]`.
            k_NGK: Its new key, `[N, G, K]`.
            v_NGL: Its new value, `[N, G, L]`.
            k_pages: `[P, page, G, K]`, without gaps; as `v_pages`, float32 on the CPU.
            v_pages: `[P, page, G, L]`.
            scale: As in `paged_attention`; so are the rest.
            window: Of this, what lies before a query.
            softcap: As in `flash_attention`.
            sinks: `[H]`.

        Returns:
            `[N, H, L]`.
        """
        q, k, v = (
            x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
            for x in (q_NHK, k_NGK, v_NGL)
        )
        (n, heads, width), (groups, value_width) = q.shape, v.shape[1:]
        out = q.new_empty(n, heads, value_width)
        sinks = None if sinks is None else sinks.float().contiguous()
        given = q, k, v, sinks, k_pages, v_pages, out, self.tables, self.lengths
        strides = self.tables.stride(0), q.stride(0), k.stride(0), v.stride(0)
        operators().decode(
            lanes(), *(0 if x is None else x.data_ptr() for x in given), n, self.keys, heads,
            groups, k_pages.shape[1], *strides, width, value_width, window[0],
            width**-0.5 if scale is None else scale, softcap or 0.0,
        )  # fmt: skip
        return out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor, cu_seqlens: Tensor,
    scale: float, left: int, right: int, softcap: float, backend: str,
) -> Dense:  # fmt: skip
    scores = Scores(scale=scale, left=left, right=right, softcap=softcap)
    if backend == "triton":
        from .paged_triton import forward

        return forward(q, k, v, tables, lengths, cu_seqlens, scores)
    dense: Any = attention_reference if backend == "reference" else tiled.forward
    dense = invariant_forward if invariant() else dense
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[1], len(q), dtype=wide(q.dtype))
    sequences = _sequences(tables, lengths, cu_seqlens, len(q), len(k), k.shape[1])
    for rows, pages, keys in sequences:
        held = (
            x.flatten(1).index_select(0, pages).view(1, -1, *x.shape[2:])[:, :keys] for x in (k, v)
        )
        part, part_lse = dense(q[None, rows], *held, scores)
        out[rows], lse[:, rows] = part[0], part_lse[0]
    return out, lse


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Dense:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide(q.dtype))
    return q.new_empty(*q.shape[:-1], v.shape[-1]), lse


_PAGED = register(
    "paged_attention_forward(Tensor q, Tensor k, Tensor v, Tensor tables, Tensor lengths,"
    " Tensor cu_seqlens, float scale, SymInt left, SymInt right, float softcap, str backend)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake,
)


def _check(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor, cu: Tensor) -> None:
    need_tensors(_OP, tables=tables, lengths=lengths)
    check_tensors(_OP, q, k, v, "q must be [T, H, K], k_pages [P, page, G, K] and v_pages", (3, 4))
    check_documents(_OP, "cu_seqlens", cu, q)
    sequences = len(cu) - 1
    fits = tables.dim() == 2 and len(tables) == sequences and lengths.shape == (sequences,)
    if not fits or tables.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise ValueError(
            f"{_OP}: tables must be int32 [{sequences}, pages] and lengths int32 [{sequences}], by "
            f"cu_seqlens, got {tables.dtype} {[*tables.shape]} and {lengths.dtype} "
            f"{[*lengths.shape]}"
        )
    if not k.shape[1]:
        raise ValueError(f"{_OP}: a page must hold at least one key, got k_pages {[*k.shape]}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise RuntimeError(
            f"{_OP}: has no gradient: call it under torch.no_grad(), or take flash_attention_varlen"
        )


def paged_attention(
    q_THK: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, lengths: Tensor,
    cu_seqlens: Tensor, *, causal: bool = True, window: Window = (-1, -1),
    softcap: float | None = None, sinks: Tensor | None = None, scale: float | None = None,
    return_lse: bool = False, backend: str | None = None,
) -> Tensor | Dense:  # fmt: skip
    """Attend from the last queries of each sequence to its keys, which lie in pages.

    Args:
        q_THK: `[T, H, K]`, sequence after sequence; float16, bfloat16, float32 or float64.
        k_pages: `[P, page, G, K]`; H is a multiple of G. The keys of this call's queries are in
            it already.
        v_pages: `[P, page, G, L]`.
        tables: Pages of each sequence in order, `[N, pages]` int32; entries behind the last page of
            a sequence are not read.
        lengths: Keys of each sequence `[N]` int32, those of this call's queries with them.
        cu_seqlens: `[N + 1]` int32: sequence n has queries cu_seqlens[n] to cu_seqlens[n + 1];
            values are checked on the CPU alone, as those of `tables` and `lengths`.
        causal: Whether a query sees no key after its own position.
        window: As in `flash_attention`.
        softcap: As in `flash_attention`.
        sinks: As in `flash_attention`.
        scale: Multiplies the scores, positive; None is 1 / sqrt(K).
        return_lse: Whether to return the log-sum-exp of the scores too.
        backend: `reference` or `torch` (both gather a sequence's pages, and read the tables on the
            host), `triton`; None takes the fastest proven one.

    Returns:
        `[T, H, L]` in the dtype of `q_THK`; with `return_lse` also the log-sum-exp `[H, T]`.

    Raises:
        ValueError: If shapes, dtypes or values are not these.
        RuntimeError: If a gradient is asked for, or `backend` cannot serve these tensors here.
    """
    _check(q_THK, k_pages, v_pages, tables, lengths, cu_seqlens)
    s = scores_of(_OP, q_THK, causal, window, scale, softcap, None)
    if sinks is not None:
        check_sinks(_OP, sinks, q_THK)
    chosen = choose(_OP, q_THK.device, q_THK.dtype, backend)
    where = tables, lengths, cu_seqlens
    part = _PAGED(q_THK, k_pages, v_pages, *where, s.scale, s.left, s.right, s.softcap, chosen)
    out, lse = part if sinks is None else with_sinks(part, sinks)
    return (out, lse) if return_lse else out
