"""Losses over a vocabulary that is sharded over a tensor-parallel group.

R ranks, T tokens, D width, W own rows of the vocabulary, M indices a token; for each chunk of C
tokens:

    logits [C, W] = hidden weight^T                        own slice
    m, s, picks, sum z, w = partials                       own slice, [C] each, picks [C, M]
    M = max m                                              all-reduce
    S = sum s exp(m - M), picks, sum z, W                  all-reduce, in one
    lse = M + ln S, entropy, ...                           equal on all ranks
    logits <- gradient                                     own slice
    dhidden [C, D] = logits weight                         partial: the caller's `gather` sums it
    dweight [W, D] += logits^T hidden                      own slice

A cross-entropy without a z-loss has a gradient that is linear in one upstream scalar: it is
computed in the forward, so that the logits are computed once. What is asked for by token, and the
z-loss, compute them again in the backward. No rank ever holds [T, V], nor [T, W].

Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3 (the fused, parallel
cross-entropy); the statistics and how they merge: `warploom/kernels/loss`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from warploom.kernels import loss as kernel
from warploom.kernels.invariant import linear
from warploom.kernels.library import autocast, wide
from warploom.kernels.loss import statistics as merge
from warploom.kernels.loss.chunks import Gradients, scaled, trained
from warploom.kernels.loss.linear import check_top_k
from warploom.kernels.loss.logits import check_options

from ..collectives import Group, all_reduce_

_CHUNK_BYTES = 1 << 26
_IGNORED = -100

Pair = tuple[Tensor, Tensor]


def linear_cross_entropy(
    hidden_TD: Tensor, weight_WD: Tensor, targets_T: Tensor, *, group: Group, start: int = 0,
    z_loss: bool = False, softcap: float | None = None, label_smoothing: float = 0.0,
) -> tuple[Pair, ...]:  # fmt: skip
    """Return the `(sum, count)` of the cross-entropy, and with `z_loss` that of lse^2.

    Under autocast the logits are in its dtype, and what is computed of them in float32.

    Args:
        hidden_TD: `[T, D]`, equal on all ranks of the group.
        weight_WD: Own rows `[W, D]` of the head, without padding; as many on all ranks, but fewer
            on those after the last full one.
        targets_T: Ids `[T]` int64 in the whole vocabulary; -100 is not trained.
        group: The tensor-parallel process group; `None` for one rank.
        start: First own row of the vocabulary.
        z_loss: Whether the second pair is wanted.
        softcap: Bound that the logits approach, or None.
        label_smoothing: Share of the loss that is the mean of -log p over the vocabulary.

    Returns:
        Pairs of 0-dim tensors, equal on all ranks; sums in float32 at least, counts int64.

    Raises:
        ValueError: If an option is out of its range.
    """
    hidden_TD, weight_WD = autocast(hidden_TD, weight_WD)
    check_options("linear_cross_entropy", softcap, label_smoothing)
    if group is None:
        found: Any = kernel.linear_cross_entropy(
            hidden_TD, weight_WD, targets_T, z_loss=z_loss, softcap=softcap,
            label_smoothing=label_smoothing,
        )  # fmt: skip
        both: tuple[Pair, ...] = found if z_loss else (found,)
        return both
    options = targets_T, group, start, softcap
    if not z_loss:
        total: Tensor = _Sum.apply(hidden_TD, weight_WD, *options, label_smoothing)
        return ((total, (targets_T != _IGNORED).sum()),)
    statistics, vocabulary = _Statistics.apply(hidden_TD, weight_WD, *options, label_smoothing > 0)
    trained_T = trained(targets_T, _IGNORED)
    pairs: Any = merge.sums(statistics, trained_T, label_smoothing, vocabulary, True)
    return tuple(pairs)


def linear_log_probs(
    hidden_TD: Tensor, weight_WD: Tensor, targets_T: Tensor, *, group: Group, start: int = 0,
    entropy: bool = False, softcap: float | None = None,
) -> Tensor | Pair:  # fmt: skip
    """Compute the log-probability of each target, and the entropy, from one pass.

    Args:
        hidden_TD: `[T, D]`, equal on all ranks of the group.
        weight_WD: Own rows `[W, D]` of the head, as `linear_cross_entropy` takes them.
        targets_T: Ids `[T]` int64 in the whole vocabulary; -100 has none.
        group: The tensor-parallel process group; `None` for one rank.
        start: First own row of the vocabulary.
        entropy: Whether the entropies are wanted too.
        softcap: Bound that the logits approach, or None.

    Returns:
        `[T]`, or a pair of them; equal on all ranks, 0 where ignored, float32 at least.

    Raises:
        ValueError: If the soft-cap is not above 0 and finite.
    """
    hidden_TD, weight_WD = autocast(hidden_TD, weight_WD)
    check_options("linear_log_probs", softcap)
    if group is None:
        return kernel.linear_log_probs(
            hidden_TD, weight_WD, targets_T, entropy=entropy, softcap=softcap
        )
    statistics = _Statistics.apply(hidden_TD, weight_WD, targets_T, group, start, softcap, entropy)[
        0
    ]
    log_probs_T = merge.log_probability(statistics, trained(targets_T, _IGNORED))
    return (log_probs_T, statistics[3]) if entropy else log_probs_T


def linear_top_k_kl(
    hidden_TD: Tensor, weight_WD: Tensor, teacher_indices_TM: Tensor, teacher_log_probs_TM: Tensor,
    *, group: Group, start: int = 0, direction: str = "forward", tail: bool = True,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Compute the divergence between a teacher, known by its top M, and a sharded head.

    Args:
        hidden_TD: `[T, D]` of the student, equal on all ranks of the group.
        weight_WD: Own rows `[W, D]` of the head, as `linear_cross_entropy` takes them.
        teacher_indices_TM: Ids `[T, M]` int64 in the whole vocabulary, distinct in a row; a row
            that begins with -100 is ignored.
        teacher_log_probs_TM: `[T, M]`, floating; a constant.
        group: The tensor-parallel process group; `None` for one rank.
        start: First own row of the vocabulary.
        direction: `forward`, KL(teacher || student), or `reverse`.
        tail: Whether all other tokens are one outcome more; at least one must be left.
        softcap: Bound that the logits approach, or None.

    Returns:
        `[T]`, equal on all ranks, 0 where ignored, float32 at least.

    Raises:
        ValueError: If shapes, dtypes or options are not these.
    """
    hidden_TD, weight_WD = autocast(hidden_TD, weight_WD)
    teacher = teacher_indices_TM, teacher_log_probs_TM
    check_options("linear_top_k_kl", softcap)
    if group is None:
        return kernel.linear_top_k_kl(
            hidden_TD, weight_WD, *teacher, direction=direction, tail=tail, softcap=softcap
        )
    check_top_k("linear_top_k_kl", *teacher, direction)
    options = teacher_indices_TM, group, start, softcap, False
    statistics = _Statistics.apply(hidden_TD, weight_WD, *options)[0]
    trained_T = trained(teacher_indices_TM, _IGNORED)
    return merge.top_k_kl(statistics, teacher_log_probs_TM, trained_T, direction, tail)


class _Slices:
    """The chunks of one call: logits of the own slice, and how the slices merge."""

    def __init__(self, *args: Any) -> None:
        self.hidden, self.weight, self.targets, self.group, self.start, self.softcap = args
        rank = self.group.rank()
        widest = -(-self.start // rank) if rank else self.weight.shape[0]
        # equal on all ranks, though the last slices are narrower: they reduce chunk by chunk
        self.step = max(1, _CHUNK_BYTES // (4 * max(widest, 1)))
        self.trained = trained(self.targets, _IGNORED)
        self.vocabulary: Tensor = self.hidden.new_ones((), dtype=torch.float64)

    def gradients(self, needs: tuple[bool, bool]) -> Gradients:
        count = -(-self.hidden.shape[0] // self.step)
        return Gradients(self.hidden, self.weight, needs, count)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for first in range(0, max(1, self.hidden.shape[0]), self.step):
            rows = slice(first, min(first + self.step, self.hidden.shape[0]))
            hidden = torch.where(self.trained[rows, None], self.hidden[rows], 0)  # NaN stays out
            yield rows, hidden, linear(hidden, self.weight)

    def statistics(self, rows: slice, logits: Tensor, moments: bool) -> Tensor:
        """Return `[K, C]` over the whole vocabulary, 0 where not trained."""
        high, rest = merge.reduce_slice_(
            logits, self.targets[rows], self.start, self.softcap, moments, None
        )
        joint = all_reduce_(high.clone(), self.group, op="max")
        rest = merge.rescale(high, joint, rest, moments)
        if moments:  # the size of the vocabulary, which smoothing divides by, comes with them
            rest = torch.cat((rest, torch.full_like(rest[:1], logits.shape[1])))
        rest = all_reduce_(rest, self.group)
        if moments:
            self.vocabulary, rest = rest[-1, :1].sum(), rest[:-1]
        return torch.where(self.trained[rows], merge.finish(joint, rest, moments), 0)

    def gradient_(self, rows: slice, logits: Tensor, statistics: Tensor, g: Tensor) -> None:
        merge.gradient_of_slice_(
            logits, self.targets[rows], self.start, statistics, g, self.softcap, None
        )


class _Sum(torch.autograd.Function):
    """The sum, with its gradient computed in the forward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, smoothing = args
        slices, moments = _Slices(*inputs), smoothing > 0
        ctx.needs = ctx.needs_input_grad[:2]
        gradients = slices.gradients(ctx.needs)
        total: Tensor = inputs[0].new_zeros((), dtype=wide(inputs[0].dtype))
        for rows, hidden, logits in slices:
            found = slices.statistics(rows, logits, moments)
            mask = slices.trained[rows]
            nll = merge.smoothed(found, smoothing, slices.vocabulary)
            total += torch.where(mask, nll, 0).sum()
            if any(ctx.needs):
                flat = (-smoothing / slices.vocabulary).to(nll)
                g = torch.zeros_like(found)
                g[0], g[1] = smoothing - 1, 1
                if moments:
                    g[2] = flat
                slices.gradient_(rows, logits, found, torch.where(mask, g, 0))
                gradients.add_(rows, logits, hidden)
        ctx.save_for_backward(*gradients.result())
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = zip(ctx.saved_tensors, ctx.needs, strict=True)
        return *(scaled(d, upstream[0]) if needed else None for d, needed in found), *(5 * (None,))


class _Statistics(torch.autograd.Function):
    """Statistics a token and the size of the vocabulary; the backward computes logits again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Pair:
        *inputs, moments = args
        slices = _Slices(*inputs)
        parts = [slices.statistics(rows, logits, moments) for rows, _, logits in slices]
        statistics = torch.cat(parts, -1)
        ctx.save_for_backward(*inputs[:3], statistics)
        ctx.rest, ctx.needs = inputs[3:], ctx.needs_input_grad[:2]
        ctx.mark_non_differentiable(slices.vocabulary)
        return statistics, slices.vocabulary

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, statistics = ctx.saved_tensors
        slices = _Slices(*inputs, *ctx.rest)
        gradients = slices.gradients(ctx.needs)
        g = torch.where(slices.trained, upstream[0], 0)
        for rows, hidden, logits in slices:
            slices.gradient_(rows, logits, statistics[:, rows], g[:, rows])
            gradients.add_(rows, logits, hidden)
        found = zip(gradients.result(), ctx.needs, strict=True)
        return *(d if needed else None for d, needed in found), *(5 * (None,))
