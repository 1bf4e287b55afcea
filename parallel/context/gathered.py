"""All-gather attention: each rank gathers all keys and values, and attends with its own queries.

R ranks, N tokens of each, T tokens of the batch, G key/value heads, K head dimension.

                forward                     backward
    k and v     one all-gather of 2NGK      one reduce-scatter of 2RNGK, in float32 at least

A query attends to its own segment while the rest is on its way, then to its document outside the
segment. Saved are all keys and values, 2TGK, beside what the ring saves: fewer, larger calls than
the ring's, for more memory.

Source: Dubey et al. 2024, https://arxiv.org/abs/2407.21783, section 3.3.2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from warploom.kernels.library import first_derivative_only

from ..collectives import (
    Group,
    all_gather_rows_begin,
    observers,
    place,
    reduce_scatter_rows_begin,
    watched,
)
from .blocks import Attention, flat_blocks, own_keys
from .entry import attend, order
from .split import Split


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        split: Split,
        group: dist.ProcessGroup,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        pending = all_gather_rows_begin(torch.stack((k, v), 1), group)
        rank, _ = place(group)
        own = own_keys(split, rank, by_segment=True)
        attention = Attention.begin(split, own, causal, scale, q)
        attention.add_own(k, v)
        whole = pending.wait().index_select(0, order(split, q.device))
        attention.add(flat_blocks(split, rank, causal=causal), *whole.unbind(1))
        out = attention.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, whole, out, attention.lse)
        ctx.options = split, group, causal, scale
        ctx.observers = observers()
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("all_gather_attention")
        q, k, v, whole, out, lse = ctx.saved_tensors
        split, group, causal, scale = ctx.options
        rank, size = place(group)
        own = own_keys(split, rank, by_segment=True)
        attention = Attention(split, own, causal, scale, q, out, lse)
        dout = dout.contiguous()
        dq = torch.zeros_like(lse).unsqueeze(-1).repeat(1, 1, q.shape[2])
        dwhole = lse.new_zeros(whole.shape)
        blocks = flat_blocks(split, rank, causal=causal)
        attention.add_gradients(blocks, dout, whole.unbind(1), (dq, *dwhole.unbind(1)))
        padded = dwhole.new_zeros(size * len(k), *dwhole.shape[1:])
        padded.index_copy_(0, order(split, q.device), dwhole)
        with watched(ctx.observers or observers()):
            pending = reduce_scatter_rows_begin(padded, group)
        parts = attention.own_gradients(dout, k, v)
        dk, dv = pending.wait().unbind(1)
        grads = (a + b for a, b in zip((dq, dk, dv), parts, strict=True))
        return *(d.to(q.dtype) for d in grads), None, None, None, None


all_gather: Callable[..., Tensor] = _AllGather.apply  # of flat tokens, shapes checked


def all_gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    split: Split | None = None,
    *,
    group: Group,
    document_lengths: Sequence[int] | Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Attend over a sequence whose tokens lie on the ranks of a group.

    Args:
        q: As in `ring_attention`, and so are the others.
        k: Keys.
        v: Values.
        split: Which tokens each rank holds; `None` for zigzag.
        group: The context-parallel ranks; `None` for one rank.
        document_lengths: Of all documents, where no split is given.
        causal: Whether a query sees the keys up to its own position only.
        scale: Multiplies the scores; `None` for 1 / sqrt(K).

    Returns:
        As `q`, in its dtype; 0 for padding tokens.

    Raises:
        ValueError: If shapes, dtypes, group and split do not fit each other.
    """
    options = document_lengths, group, causal, scale
    return attend(all_gather, q, k, v, split, *options, axis="context-parallel")
