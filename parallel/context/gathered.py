"""All-gather attention: each rank gathers all keys and values, and attends with its own queries.

R ranks, N tokens of each, T tokens of the batch, G key/value heads, K head dimension
(L of values; where it differs, 2K reads K + L).

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
from .blocks import Attention, Options, flat_blocks, own_keys
from .entry import attend, order
from .split import Split


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, split: Split,
        group: dist.ProcessGroup, options: Options,
    ) -> Tensor:  # fmt: skip
        pending = all_gather_rows_begin(torch.cat((k, v), -1), group)
        rank, _ = place(group)
        own = own_keys(split, rank, by_segment=True)
        attention = Attention.begin(split, own, options, q, v)
        attention.add_own(k, v)
        whole = pending.wait().index_select(0, order(split, q.device))
        blocks = flat_blocks(split, rank, causal=options.causal, window=options.window)
        attention.add(blocks, *whole.split([k.shape[2], v.shape[2]], -1))
        out, lse = attention.finish(sinks)
        ctx.save_for_backward(q, k, v, sinks, whole, out, lse)
        ctx.options = split, group, options
        ctx.observers = observers()
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("all_gather_attention")
        q, k, v, sinks, whole, out, lse = ctx.saved_tensors
        split, group, options = ctx.options
        rank, size = place(group)
        own = own_keys(split, rank, by_segment=True)
        attention = Attention(split, own, options, q, out, lse)
        dout = dout.contiguous()
        dq = torch.zeros_like(lse).unsqueeze(-1).repeat(1, 1, q.shape[2])
        dwhole = lse.new_zeros(whole.shape)
        blocks = flat_blocks(split, rank, causal=options.causal, window=options.window)
        widths = [k.shape[2], v.shape[2]]
        parts = dq, *dwhole.split(widths, -1)
        attention.add_gradients(blocks, dout, whole.split(widths, -1), parts)
        padded = dwhole.new_zeros(size * len(k), *dwhole.shape[1:])
        padded.index_copy_(0, order(split, q.device), dwhole)
        with watched(ctx.observers or observers()):
            pending = reduce_scatter_rows_begin(padded, group)
        own_parts = attention.own_gradients(dout, k, v)
        parts = dq, *pending.wait().split(widths, -1)
        grads = ((a + b).to(q.dtype) for a, b in zip(parts, own_parts, strict=True))
        return *grads, attention.sinks_gradient(sinks, dout), None, None, None


all_gather: Callable[..., Tensor] = _AllGather.apply  # of flat tokens, shapes checked


def all_gather_attention(
    q: Tensor, k: Tensor, v: Tensor, split: Split | None = None, *, group: Group,
    document_lengths: Sequence[int] | Tensor | None = None, causal: bool = True,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
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
        window: As in `ring_attention`.
        softcap: As in `ring_attention`.
        sinks: As in `ring_attention`: its gradient is partial over the ranks.

    Returns:
        As `q` with L for K, in its dtype; 0 for padding tokens.

    Raises:
        ValueError: If shapes, dtypes, group and split do not fit each other.
    """
    options = Options(causal=causal, scale=scale, window=window, softcap=softcap)
    where = split, document_lengths, group
    return attend(all_gather, q, k, v, sinks, *where, options, axis="context-parallel")
