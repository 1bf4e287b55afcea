"""What stands before every kind of attention: whole or by rows, the split, and what is refused."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from warploom.kernels.attention import flash_attention, flash_attention_varlen

from ..collectives import Group, place
from .blocks import Options
from .split import Split

Tensors = tuple[Tensor, Tensor, Tensor]


def check(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *, tokens: int, size: int, wanted: int,
    axis: str,
) -> None:  # fmt: skip
    """Refuse, before anything is sent, what cannot be attended to.

    Args:
        q: Must be `[tokens, H, K]`.
        k: Must be `[tokens, G, K]`, H a multiple of G.
        v: Must be `[tokens, G, L]`.
        sinks: Must be `[H]`, or `None`.
        tokens: Tokens that the split gives to this rank.
        size: Ranks of the group.
        wanted: Ranks that the split is for.
        axis: Which group.

    Raises:
        ValueError: If one of these does not hold.
    """
    if size != wanted:
        raise ValueError(
            f"the {axis} group ({size} ranks) must be as large as the split says ({wanted}): "
            f"build the split for these ranks"
        )
    shapes = f"got q {[*q.shape]}, k {[*k.shape]} and v {[*v.shape]}"
    fits = q.dim() == k.dim() == v.dim() == 3 and k.shape[:2] == v.shape[:2]
    if not fits or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q must be [tokens, H, K], k [tokens, G, K] and v [tokens, G, L]; {shapes}"
        )
    if not len(q) == len(k) == tokens:
        raise ValueError(f"q, k and v must hold the {tokens} tokens of the split; {shapes}")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads ({q.shape[1]}) must be a multiple of key/value heads ({k.shape[1]})"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks must be [{q.shape[1]}], one a query head, got {[*sinks.shape]}")


def _flat(
    q: Tensor, split: Split | None, document_lengths: Sequence[int] | Tensor | None, ranks: int
) -> Split:
    """Make the zigzag split of flat tokens or rows `q` where none is given."""
    if split is None:
        rows, tokens = len(q) if q.dim() == 4 else 1, q.shape[:-2].numel() * ranks
        lengths = [tokens // max(rows, 1)] * rows if document_lengths is None else document_lengths
        return Split.build(lengths, ranks, rows=rows)
    if document_lengths is not None:
        raise ValueError(
            f"document_lengths must be left out where a split is given "
            f"({len(split.bounds) - 1} documents): it has them"
        )
    return split


def order(split: Split, device: torch.device) -> Tensor:
    """Return `split.inverse` on `device`, sent there once a batch."""
    return split.kept(("inverse", device), lambda: split.inverse.to(device))


def attend_whole(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, split: Split, options: Options
) -> Tensor:
    """Attend where all tokens, of every rank one after the other, are here.

    Args:
        q: `[ranks * tokens, H, K]`.
        k: `[ranks * tokens, G, K]`.
        v: `[ranks * tokens, G, L]`.
        sinks: `[H]`, or `None`.
        split: Whose order the tokens are in.
        options: What makes the scores.

    Returns:
        `[ranks * tokens, H, L]`, 0 for padding.
    """

    def make() -> tuple[bool, Tensor, int]:
        ordered = torch.equal(split.inverse, torch.arange(split.total))
        bounds = torch.tensor(split.bounds, dtype=torch.int32, device=q.device)
        return ordered, bounds, int(torch.tensor(split.bounds).diff().max())

    ordered, cu_seqlens, longest = split.kept(("whole", q.device), make)
    padding = len(q) - split.total
    own = None if ordered else order(split, q.device)

    def flat(x: Tensor) -> Tensor:
        if own is not None:
            return x.index_select(0, own)
        return x[: split.total] if padding else x

    given: dict[str, Any] = {"max_seqlen": longest, "sinks": sinks, **options.kernel()}
    mixed: Any = flash_attention_varlen(flat(q), flat(k), flat(v), cu_seqlens, **given)
    if own is None:
        mixed = F.pad(mixed, (0, 0, 0, 0, 0, padding)) if padding else mixed
    else:
        mixed = q.new_zeros(len(q), *mixed.shape[1:]).index_copy(0, own, mixed)
    out: Tensor = mixed
    return out


def attend(
    run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    split: Split | None, document_lengths: Sequence[int] | Tensor | None, group: Group,
    options: Options, *, axis: str,
) -> Tensor:  # fmt: skip
    """Attend to flat tokens or rows over one group; see `ring_attention`.

    Args:
        run: What to do with `(q, k, v, sinks, split, group, options)` of flat tokens, checked.
        q: `[N, H, K]`, or rows `[B, S / R, H, K]`.
        k: `[N, G, K]`, or rows.
        v: `[N, G, L]`, or rows.
        sinks: `[H]`, or `None`.
        split: Who holds what; `None` for zigzag.
        document_lengths: Of the whole batch, where there is no split.
        group: The ranks; `None` for one.
        options: What makes the scores.
        axis: What the group is: `ring`, `context-parallel` or `Ulysses`.

    Raises:
        ValueError: If shapes, dtypes, group and split do not fit each other.
    """
    _, size = place(group)
    if q.dim() == 4 and group is None and split is None and document_lengths is None:
        rows: Any = flash_attention(q, k, v, sinks=sinks, **options.kernel())
        whole: Tensor = rows
        return whole
    split = _flat(q, split, document_lengths, size)
    a, b, c = (x.flatten(0, 1) if x.dim() == 4 else x for x in (q, k, v))
    wanted = split.ranks if axis == "Ulysses" else split.members
    check(a, b, c, sinks, tokens=split.tokens, size=size, wanted=wanted, axis=axis)
    if group is None:
        out = attend_whole(a, b, c, sinks, split, options)
    else:
        out = run(a, b, c, sinks, split, group, options)
    return out.view(*q.shape[:-1], v.shape[-1])
