"""Ulysses attention, and its hybrid with the ring: ranks exchange tokens for heads.

U ranks of a group, N tokens of each, H query heads, G key/value heads, K head dimension (here that
of values too; it may differ). What one rank brings, its own part included:

                     forward                            backward
    q, k and v       one all-to-all of N(H + 2G')K      one all-to-all of NHK
    output           one all-to-all of NHK              one all-to-all of N(H + 2G')K

Between the two a rank has H / U query heads of all tokens, and the key/value heads that these read:
G' = G where U divides G; else heads go to several ranks, at most U copies in all where G divides U,
and the backward sums over the copies. Of the sinks each rank reads those of its heads.

In the hybrid the U ranks are neighbours that share one member's part of the sequence, and the ring
(or the all-gather) runs over the members with what the exchange has put together.

Source: Jacobs et al. 2023, https://arxiv.org/abs/2309.14509, section 3; Fang and Zhao 2024,
https://arxiv.org/abs/2405.07719, section 3 (the hybrid).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..collectives import Group, place, swap
from ..mesh import check_degree
from .blocks import Options
from .entry import Tensors, attend, attend_whole, check
from .gathered import all_gather
from .ring import ring
from .split import Split

KINDS = {"ring": ring, "all_gather": all_gather}


def _enter(q: Tensor, k: Tensor, v: Tensor, group: Group) -> Tensors:
    """Exchange tokens for heads: `[N, H, K]` to `[U * N, H / U, K]`."""
    _, size = place(group)
    heads, kv_heads = q.shape[1] // size, k.shape[1]
    sharing = math.gcd(heads, q.shape[1] // kv_heads)  # query heads that read one, on one rank
    copies = q.shape[1] // kv_heads // sharing
    if copies > 1:
        k, v = (x.unsqueeze(2).expand(-1, -1, copies, -1).flatten(1, 2) for x in (k, v))
    parts = [x.unflatten(1, (size, -1)).flatten(2) for x in (q, k, v)]
    mine = swap(torch.cat(parts, 2).transpose(0, 1).flatten(0, 1), group)
    received = mine.split([x.shape[2] for x in parts], 1)
    q, k, v = (y.unflatten(1, (-1, x.shape[2])) for x, y in zip((q, k, v), received, strict=True))
    return q, k, v


def _own_sinks(sinks: Tensor | None, group: Group) -> Tensor | None:
    """Cut out those of this rank's heads."""
    rank, size = place(group)
    return None if sinks is None else sinks.chunk(size)[rank]


def _leave(out: Tensor, group: Group) -> Tensor:
    """Exchange heads for tokens: `[U * N, H / U, L]` to `[N, H, L]`."""
    _, size = place(group)
    parts: Tensor = swap(out, group).unflatten(0, (size, -1))
    return parts.transpose(0, 1).flatten(1, 2)


def _exchange(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, split: Split, group: Group,
    options: Options,
) -> Tensor:  # fmt: skip
    check_degree("uly", place(group)[1], {"query heads": q.shape[1]})
    own = *_enter(q, k, v, group), _own_sinks(sinks, group)
    return _leave(attend_whole(*own, split, options), group)


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, split: Split | None = None, *, group: Group,
    document_lengths: Sequence[int] | Tensor | None = None, causal: bool = True,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend over a sequence whose tokens lie on the ranks of a group, by exchanging heads.

    Args:
        q: As in `ring_attention`, and so are the others; the group's size must divide H.
        k: Keys; G need not be divisible.
        v: Values.
        split: Which tokens each rank holds; `None` for zigzag.
        group: The context-parallel ranks; `None` for one rank.
        document_lengths: Of all documents, where no split is given.
        causal: Whether a query sees the keys up to its own position only.
        scale: Multiplies the scores; `None` for 1 / sqrt(K).
        window: As in `ring_attention`.
        softcap: As in `ring_attention`.
        sinks: As in `ring_attention`: its gradient is partial over the ranks.

    Returns:
        As `q` with L for K, in its dtype; 0 for padding tokens.

    Raises:
        ValueError: If shapes, dtypes, group and split do not fit each other, or the group's size
            does not divide the query heads.
    """
    options = Options(causal=causal, scale=scale, window=window, softcap=softcap)
    where = split, document_lengths, group
    return attend(_exchange, q, k, v, sinks, *where, options, axis="Ulysses")


def attention(
    q: Tensor, k: Tensor, v: Tensor, split: Split, *, ring: Group = None, ulysses: Group = None,
    kind: str = "ring", causal: bool = True, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend by any kind, or by Ulysses within a member of the ring and the ring between them.

    Args:
        q: This rank's queries, `[N, H, K]`; N is `split.tokens`.
        k: Its keys, `[N, G, K]`.
        v: Its values, `[N, G, L]`.
        split: Which tokens each rank holds: rank = ring coordinate * ulysses + Ulysses coordinate.
        ring: Ranks between which keys and values travel, `Mesh.ring`.
        ulysses: Neighbouring ranks that exchange heads, `Mesh.ulysses`.
        kind: What happens over `ring`: `ring` or `all_gather`.
        causal: Whether a query sees the keys up to its own position only.
        scale: Multiplies the scores; `None` for 1 / sqrt(K).
        window: As in `ring_attention`.
        softcap: As in `ring_attention`.
        sinks: As in `ring_attention`: its gradient is partial over the ranks.

    Returns:
        `[N, H, L]` in the dtype of `q`; 0 for padding tokens.

    Raises:
        ValueError: If shapes, dtypes, groups and split do not fit each other, or the Ulysses
            group's size does not divide the query heads.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    options = Options(causal=causal, scale=scale, window=window, softcap=softcap)
    if ring is None:
        return attend(_exchange, q, k, v, sinks, split, None, ulysses, options, axis="Ulysses")
    members, ranks = place(ring)[1], place(ulysses)[1]
    check(q, k, v, sinks, tokens=split.tokens, size=members, wanted=split.members, axis="ring")
    if ranks != split.ulysses:
        raise ValueError(
            f"the Ulysses group ({ranks} ranks) must be as large as the split says "
            f"({split.ulysses}): build the split for these ranks"
        )
    check_degree("uly", ranks, {"query heads": q.shape[1]})
    if ulysses is None:
        return KINDS[kind](q, k, v, sinks, split, ring, options)
    own = *_enter(q, k, v, ulysses), _own_sinks(sinks, ulysses)
    return _leave(KINDS[kind](*own, split, ring, options), ulysses)
