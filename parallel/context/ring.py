"""Ring attention: keys and values travel from rank to rank, and each sees all of them in turn.

M members of the ring, N tokens of each, G key/value heads, K head dimension (L of values; where it
differs, 2K reads K + L). What one rank sends:

                forward                     backward
    k and v     M - 1 exchanges of 2NGK     M - 1 exchanges of 2NGK
    dk and dv                               M - 1 exchanges of 2NGK, in float32 at least

The next block is on its way while the current one is attended to. In the backward the gradient of
a block follows it round the ring: each rank but the owner adds its part, and the last step brings
the sum home, where the owner adds its own. Saved are this rank's q, k, v, output and log-sum-exp:
memory is O(S / M). What a mask hides entirely is not computed, and every sum has a fixed order.
Forward and backward are collective: a rank whose tokens are all padding takes part in both, and
with a window all keys go round too, though each rank then attends to those within it alone.

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
from .blocks import Attention, Block, Options, Own, own_keys, pair_blocks
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
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, split: Split,
        group: dist.ProcessGroup, options: Options,
    ) -> Tensor:  # fmt: skip
        rank, _ = place(group)
        attention = Attention.begin(split, _own(split, rank, options), options, q, v)
        for source, block in _round(_pack(k, v), group):
            keys, values = _unpack(block, k, v)
            if source == rank:
                attention.add_own(keys, values)
            attention.add(_blocks(attention, rank, source), keys, values)
        out, lse = attention.finish(sinks)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.options = split, group, options
        ctx.observers = observers()
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("ring_attention")
        q, k, v, sinks, out, lse = ctx.saved_tensors
        split, group, options = ctx.options
        rank, _ = place(group)
        attention = Attention(split, _own(split, rank, options), options, q, out, lse)
        dout = dout.contiguous()
        with watched(ctx.observers or observers()):
            dq, dkv = _backward(attention, dout, k, v, group)
        dk, dv = _unpack(dkv.to(k.dtype), k, v)
        dsinks = attention.sinks_gradient(sinks, dout)
        return dq.to(q.dtype), dk, dv, dsinks, None, None, None


def _pack(k: Tensor, v: Tensor) -> Tensor:
    return torch.cat((k.flatten(), v.flatten()))


def _unpack(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """View what `_pack` put together, in the shapes of `k` and `v`."""
    return packed[: k.numel()].view(k.shape), packed[k.numel() :].view(v.shape)


def _own(split: Split, rank: int, options: Options) -> Own:
    return own_keys(split, rank, by_segment=options.window is not None)


def _blocks(attention: Attention, rank: int, source: int) -> tuple[Block, ...]:
    options = attention.options
    mask: dict[str, Any] = {"causal": options.causal, "window": options.window}
    return pair_blocks(attention.split, rank, source, **mask)


def _backward(
    attention: Attention, dout: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return dq, and dk and dv of this rank's keys in one, summed over the ring."""
    rank, size = place(group)
    dq = home = torch.empty(0)
    pending = None
    for source, block in _round(_pack(k, v), group):
        blocks, kv = _blocks(attention, rank, source), _unpack(block, k, v)
        if source == rank:
            dq, *parts = attention.own_gradients(dout, *kv)
            attention.add_gradients(blocks, dout, kv, (dq, *parts))
            home = _pack(*parts)
            continue
        part = torch.zeros_like(home)
        attention.add_gradients(blocks, dout, kv, (dq, *_unpack(part, k, v)))
        if pending is not None:
            part += pending.wait()[0]
        to, back = (rank + 1) % size, (rank - 1) % size
        pending = exchange_begin([(part, to)], [(torch.empty_like(part), back)], group)
    if pending is not None:
        home += pending.wait()[0]
    return dq, home


ring: Callable[..., Tensor] = _Ring.apply  # of flat tokens whose shapes were checked


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, split: Split | None = None, *, group: Group,
    document_lengths: Sequence[int] | Tensor | None = None, causal: bool = True,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend over a sequence whose tokens lie on the ranks of a group.

    Without `split` the tokens are in zigzag order, as `shard_sequence` cuts them by
    `Split.build(lengths, ranks)`, or by `Split.build([S] * B, ranks, rows=B)` for rows. A split
    that is passed in keeps its plans: with many documents, make it once a batch for all layers.

    Args:
        q: This rank's queries, `[N, H, K]`, or rows `[B, S / R, H, K]`.
        k: Its keys, `[N, G, K]` or `[B, S / R, G, K]`; H is a multiple of G.
        v: Its values, `[N, G, L]` or `[B, S / R, G, L]`; L may differ from K.
        split: Which tokens each rank holds.
        group: The ranks of the ring; `None` for one rank.
        document_lengths: Of all documents, where no split is given; they sum to the tokens of all
            ranks, and none crosses a row. `None`: each row is one, or all tokens are.
        causal: Whether a query sees the keys up to its own position only.
        scale: Multiplies the scores; `None` for 1 / sqrt(K).
        window: Keys that a query sees, itself and those before it; `None` for all.
        softcap: Bound c of the scores, c tanh(score / c); `None` for none.
        sinks: A score `[H]` for each query head that takes its share of the softmax without a
            value; its gradient is this rank's part, to be summed over the group.

    Returns:
        As `q` with L for K, in its dtype; 0 for padding tokens.

    Raises:
        ValueError: If shapes, dtypes, group and split do not fit each other.
    """
    options = Options(causal=causal, scale=scale, window=window, softcap=softcap)
    return attend(ring, q, k, v, sinks, split, document_lengths, group, options, axis="ring")
