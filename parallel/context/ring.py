"""Ring attention: keys and values travel from rank to rank, and each sees all of them in turn.

M members of the ring, N tokens of each, G key/value heads, K head dimension. What one rank sends:

                forward                     backward
    k and v     M - 1 exchanges of 2NGK     M - 1 exchanges of 2NGK
    dk and dv                               M - 1 exchanges of 2NGK, in float32 at least

The next block is on its way while the current one is attended to. In the backward the gradient of
a block follows it round the ring: each rank but the owner adds its part, and the last step brings
the sum home, where the owner adds its own. Saved are this rank's q, k, v, output and log-sum-exp:
memory is O(S / M). What a mask hides entirely is not computed, and every sum has a fixed order.
Forward and backward are collective: a rank whose tokens are all padding takes part in both.

Source: Liu et al. 2023, https://arxiv.org/abs/2310.01889, algorithm 1; the zigzag order: Dubey et
al. 2024, https://arxiv.org/abs/2407.21783, section 3.3.2.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from warploom.kernels.library import first_derivative_only

from ..collectives import Group, exchange_begin, observers, place, watched
from .blocks import Attention, own_keys, pair_blocks
from .entry import attend
from .split import Split


def _round(block: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """Yield (member, its block) from this rank on backwards; `block` is overwritten."""
    rank, size = place(group)
    spare = torch.empty_like(block)
    for step in range(size - 1):
        to, source = (rank + 1) % size, (rank - 1) % size
        pending = exchange_begin([(block, to)], [(spare, source)], group)
        yield (rank - step) % size, block
        pending.wait()
        block, spare = spare, block
    yield (rank + 1) % size, block


class _Ring(torch.autograd.Function):
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
        rank, _ = place(group)
        attention = Attention.begin(split, own_keys(split, rank), causal, scale, q)
        for source, block in _round(torch.stack((k, v)), group):
            if source == rank:
                attention.add_own(*block)
            else:
                attention.add(pair_blocks(split, rank, source, causal=causal), *block)
        out = attention.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, attention.lse)
        ctx.options = split, group, causal, scale
        ctx.observers = observers()
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("ring_attention")
        q, k, v, out, lse = ctx.saved_tensors
        split, group, causal, scale = ctx.options
        rank, _ = place(group)
        attention = Attention(split, own_keys(split, rank), causal, scale, q, out, lse)
        with watched(ctx.observers or observers()):
            dq, dkv = _backward(attention, dout.contiguous(), torch.stack((k, v)), group)
        dk, dv = dkv.to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None, None, None


def _backward(
    attention: Attention, dout: Tensor, kv: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return dq, and dk and dv of this rank's keys, summed over the ring."""
    rank, size = place(group)
    split, causal = attention.split, attention.causal
    dq = home = torch.empty(0)
    pending = None
    for source, block in _round(kv, group):
        if source == rank:
            dq, *parts = attention.own_gradients(dout, block[0], block[1])
            home = torch.stack(parts)
            continue
        part = torch.zeros_like(home)
        blocks = pair_blocks(split, rank, source, causal=causal)
        attention.add_gradients(blocks, dout, block.unbind(), (dq, *part.unbind()))
        if pending is not None:
            part += pending.wait()[0]
        to, back = (rank + 1) % size, (rank - 1) % size
        pending = exchange_begin([(part, to)], [(torch.empty_like(part), back)], group)
    if pending is not None:
        home += pending.wait()[0]
    return dq, home


ring: Callable[..., Tensor] = _Ring.apply  # of flat tokens whose shapes were checked


def ring_attention(
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

    Without `split` the tokens are in zigzag order, as `shard_sequence` cuts them by
    `Split.build(lengths, ranks)`, or by `Split.build([S] * B, ranks, rows=B)` for rows. A split
    that is passed in keeps its plans: with many documents, make it once a batch for all layers.

    Args:
        q: This rank's queries, `[N, H, K]`, or rows `[B, S / R, H, K]`.
        k: Its keys, `[N, G, K]` or `[B, S / R, G, K]`; H is a multiple of G.
        v: Its values, as `k`.
        split: Which tokens each rank holds.
        group: The ranks of the ring; `None` for one rank.
        document_lengths: Of all documents, where no split is given; they sum to the tokens of all
            ranks, and none crosses a row. `None`: each row is one, or all tokens are.
        causal: Whether a query sees the keys up to its own position only.
        scale: Multiplies the scores; `None` for 1 / sqrt(K).

    Returns:
        As `q`, in its dtype; 0 for padding tokens.

    Raises:
        ValueError: If shapes, dtypes, group and split do not fit each other.
    """
    options = document_lengths, group, causal, scale
    return attend(ring, q, k, v, split, *options, axis="ring")
