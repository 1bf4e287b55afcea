"""Cross-entropy over a vocabulary that is sharded over a tensor-parallel group.

R ranks, T tokens, D width, W own rows of the vocabulary; for each chunk of C tokens:

    logits [C, W] = hidden weight^T                        own slice
    m, s, t = partial maximum, sum of exp, target logit    own slice, [C] each
    M = max m                                              all-reduce
    S = sum s exp(m - M),  t = sum t                       all-reduce, in one
    lse = M + ln S,  nll = lse - t                         equal on all ranks
    logits <- g_nll (softmax - onehot) + g_lse softmax     own slice
    dhidden [C, D] = logits weight                         partial: the caller's `gather` sums it
    dweight [W, D] += logits^T hidden                      own slice

Without a z-loss the gradient is linear in one upstream scalar and is computed in the forward, so
that the logits are computed once; with it, the backward computes them again. No rank ever holds
[T, V], nor [T, W].

Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3 (the fused, parallel
cross-entropy).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from warploom.kernels import loss as kernel

from ..collectives import Group, all_reduce_
from .product import autocast

_CHUNK_BYTES = 1 << 26
_IGNORED = -100

Pair = tuple[Tensor, Tensor]


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_WD: Tensor,
    targets_T: Tensor,
    *,
    group: Group,
    start: int = 0,
    z_loss: bool = False,
) -> tuple[Pair, ...]:
    """Return the `(sum, count)` of the cross-entropy, and with `z_loss` that of lse^2.

    Under autocast the logits are in its dtype, and what is computed of them in float32.

    Args:
        hidden_TD: `[T, D]`, equal on all ranks of the group.
        weight_WD: Own rows `[W, D]` of the head, without padding.
        targets_T: Ids `[T]` int64 in the whole vocabulary; -100 is not trained.
        group: The tensor-parallel process group; `None` for one rank.
        start: First own row of the vocabulary.
        z_loss: Whether the second pair is wanted.

    Returns:
        Pairs of 0-dim tensors, equal on all ranks; sums in float32 at least, counts int64.
    """
    hidden_TD, weight_WD = autocast(hidden_TD, weight_WD)
    if group is None:
        found: Any = kernel.linear_cross_entropy(hidden_TD, weight_WD, targets_T, z_loss=z_loss)
        return found if z_loss else (found,)
    count = (targets_T != _IGNORED).sum()
    if not z_loss:
        total: Tensor = _Sum.apply(hidden_TD, weight_WD, targets_T, group, start)
        return ((total, count),)
    nll, lse = _PerToken.apply(hidden_TD, weight_WD, targets_T, group, start)
    return ((nll.sum(), count), (lse.square().sum(), count))


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    rows = max(1, _CHUNK_BYTES // (4 * max(vocabulary, 1)))
    for first in range(0, tokens, rows):
        yield slice(first, min(first + rows, tokens))


def _merge(logits: Tensor, targets: Tensor, group: dist.ProcessGroup, start: int) -> Pair:
    """Return `(nll, lse)` `[C]` of a chunk, merged over the slices; nll is 0 if not trained."""
    largest, total, target = kernel.cross_entropy_partials(logits, targets, start)
    joint = all_reduce_(largest.clone(), group, op="max")
    both = all_reduce_(torch.stack((total * torch.exp(largest - joint), target)), group)
    lse = joint + both[0].log()
    return torch.where(targets != _IGNORED, lse - both[1], 0.0), lse


class _Sum(torch.autograd.Function):
    """The sum, with its gradient computed in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup,
        start: int,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        sum_nll = torch.zeros((), dtype=wide, device=hidden.device)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dhidden = torch.empty_like(hidden) if wanted else None
        dweight = torch.zeros_like(weight, dtype=wide) if wanted else None
        for part in _chunks(hidden.shape[0], weight.shape[0]):
            logits = hidden[part] @ weight.t()
            nll, lse = _merge(logits, targets[part], group, start)
            sum_nll += nll.sum()
            if dhidden is not None and dweight is not None:
                trained = (targets[part] != _IGNORED).to(lse.dtype)
                kernel.cross_entropy_gradient_(logits, targets[part], start, lse, trained)
                torch.mm(logits, weight, out=dhidden[part])
                dweight += logits.t() @ hidden[part]
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return sum_nll

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dhidden, dweight = ctx.saved_tensors
        scale = upstream[0]
        return dhidden * scale.to(dhidden.dtype), (dweight * scale).to(ctx.dtype), None, None, None


class _PerToken(torch.autograd.Function):
    """Loss and log-sum-exp a token; the backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup,
        start: int,
    ) -> Pair:
        parts = [
            _merge(hidden[part] @ weight.t(), targets[part], group, start)
            for part in _chunks(hidden.shape[0], weight.shape[0])
        ]
        nll, lse = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.start = start
        return nll, torch.where(targets != _IGNORED, lse, 0.0)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, targets, lse = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=lse.dtype)
        by_nll, by_lse = (torch.where(targets != _IGNORED, g, 0.0) for g in upstream)
        for part in _chunks(hidden.shape[0], weight.shape[0]):
            logits = hidden[part] @ weight.t()
            kernel.cross_entropy_gradient_(
                logits, targets[part], ctx.start, lse[part], by_nll[part], by_lse[part]
            )
            torch.mm(logits, weight, out=dhidden[part])
            dweight += logits.t() @ hidden[part]
        return dhidden, dweight.to(weight.dtype), None, None, None
