"""Statistics of each token's distribution over the vocabulary, and what the losses make of them.

    pick_i = z at index i,    lse = log sum_v exp z_v,    sum = sum_v z_v,    entropy
    nll = (1 - e) (lse - pick) + e (lse - sum / V)    with label smoothing e

For targets `[T]` the pick is the target's logit. For indices `[T, M]` there are M picks, and lse is
over the other columns: the tail. Then (pick_1 .. pick_M, lse) are the logits of M + 1 outcomes, and
log-probabilities of them are exact where 1 - sum of probabilities would have no digit left.

`reduce_slice_` and `finish` do this for a chunk, and between them `rescale` merges slices of the
vocabulary: all that it returns is summed over them.

Shapes: T tokens, C of a chunk, M indices a token, V vocabulary (or a slice of it), K statistics.

Source: label smoothing: Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, section 7, as
PyTorch defines it; z-loss: Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, section 5.
"""

import torch
from torch import Tensor

from ..library import wide
from .logits import cap_slope, capped, cross_entropy_partials, find, write_gradient

Pair = tuple[Tensor, Tensor]


def _place_(logits_CV: Tensor, columns_CM: Tensor, inside_CM: Tensor, values_CM: Tensor) -> None:
    """Write values where they lie inside; what lies outside repeats a value that is written."""
    first_C1 = inside_CM.int().argmax(-1, keepdim=True)
    some_C1 = inside_CM.gather(-1, first_C1)
    values_CM = values_CM.to(logits_CV.dtype)
    other_CM = torch.where(some_C1, values_CM.gather(-1, first_C1), logits_CV[:, :1])
    columns_CM = torch.where(inside_CM, columns_CM, columns_CM.gather(-1, first_C1))
    logits_CV.scatter_(-1, columns_CM, torch.where(inside_CM, values_CM, other_CM))


def _pick(
    logits_CV: Tensor, indices_CM: Tensor, start: int, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the columns of the indices, which of them lie inside, and their capped logits."""
    columns_CM, inside_CM = find(indices_CM, start, logits_CV.shape[1])
    if not logits_CV.shape[1]:
        return columns_CM, inside_CM, inside_CM.to(wide(logits_CV.dtype))
    picks_CM = capped(logits_CV.gather(-1, columns_CM).to(wide(logits_CV.dtype)), softcap)
    return columns_CM, inside_CM, torch.where(inside_CM, picks_CM, 0)


def _hide_(logits_CV: Tensor, columns_CM: Tensor, inside_CM: Tensor) -> None:
    if logits_CV.shape[1]:
        _place_(logits_CV, columns_CM, inside_CM, logits_CV.new_full(columns_CM.shape, -torch.inf))


def reduce_slice_(
    logits_CV: Tensor, targets: Tensor, start: int, softcap: float | None, moments: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Reduce a slice of a chunk's logits to what merging needs.

    Args:
        logits_CV: `[C, V]`; where targets are `[C, M]` their columns are overwritten by -inf.
        targets: `[C]` or `[C, M]`, in columns of the whole vocabulary.
        start: Column of the whole vocabulary that is column 0 here.
        softcap: Soft-cap of the logits, or None.
        moments: Whether sum and entropy are wanted; only for `[C]`.
        backend: As `linear_cross_entropy` takes it.

    Returns:
        The maximum `[C]`, and `[1 + M, C]`: sum of exponentials and picks (0 where outside); with
        moments two more, sum of logits and sum of exponentials times logits less the maximum.
    """
    if targets.dim() == 1:
        high_C, total_C, *rest = cross_entropy_partials(
            logits_CV, targets, start, softcap=softcap, moments=moments, backend=backend
        )
        return high_C, torch.stack((total_C, *rest))
    columns_CM, inside_CM, picks_CM = _pick(logits_CV, targets, start, softcap)
    _hide_(logits_CV, columns_CM, inside_CM)
    high_C, total_C, _ = cross_entropy_partials(
        logits_CV, targets[:, 0], start, softcap=softcap, backend=backend
    )
    return high_C, torch.cat((total_C[None], picks_CM.t()))


def rescale(high_C: Tensor, joint_C: Tensor, rest: Tensor, moments: bool) -> Tensor:
    """Refer the sums of a slice to the maximum of all slices.

    Args:
        high_C: Maximum of the slice, `[C]`.
        joint_C: Maximum of all.
        rest: What `reduce_slice_` returned.
        moments: As it took them.

    Returns:
        As `rest`; to be summed over the slices.
    """
    fall_C = torch.where(high_C == -torch.inf, 0, high_C - joint_C)
    scale_C = fall_C.exp()
    rows = [scale_C * rest[0], *rest[1:]]
    if moments:
        rows[-1] = scale_C * (rest[-1] + fall_C * rest[0])
    return torch.stack(rows)


def finish(joint_C: Tensor, rest: Tensor, moments: bool) -> Tensor:
    """Compute the statistics from sums over the whole vocabulary.

    Args:
        joint_C: Maximum, `[C]`.
        rest: As `reduce_slice_` returns it.
        moments: As it took them.

    Returns:
        `[K, C]`: picks, lse, and with moments sum and entropy.
    """
    log_C = rest[0].log()
    if not moments:
        return torch.cat((rest[1:], (joint_C + log_C)[None]))
    return torch.stack((rest[1], joint_C + log_C, rest[2], log_C - rest[3] / rest[0]))


def gradient_of_slice_(
    logits_CV: Tensor, targets: Tensor, start: int, statistics: Tensor, g: Tensor,
    softcap: float | None, backend: str | None, whole: bool = False,
) -> None:  # fmt: skip
    """Overwrite a slice of a chunk's logits by the gradient.

    Args:
        logits_CV: `[C, V]`, contiguous; overwritten.
        targets: As `reduce_slice_` takes them.
        start: Column of the whole vocabulary that is column 0 here.
        statistics: `[K, C]`, of the whole vocabulary.
        g: `[K, C]`, gradient of the loss by each.
        softcap: Soft-cap of the logits, or None.
        backend: As `linear_cross_entropy` takes it.
        whole: As `cross_entropy_gradient_reference`.
    """
    if not logits_CV.shape[1]:
        return
    options = softcap, logits_CV, backend, whole
    if targets.dim() == 1:
        c = coefficients(statistics, g)
        write_gradient(logits_CV, targets, start, statistics[1], c, *options)
        return
    columns_CM, inside_CM, picks_CM = _pick(logits_CV, targets, start, softcap)
    _hide_(logits_CV, columns_CM, inside_CM)
    c = torch.stack((g[-1], torch.zeros_like(g[-1])))
    write_gradient(logits_CV, targets[:, 0], start, statistics[-1], c, *options)
    g_CM = g[:-1].t() if softcap is None else g[:-1].t() * cap_slope(picks_CM, softcap)
    _place_(logits_CV, columns_CM, inside_CM, g_CM)


def coefficients(statistics: Tensor, g: Tensor) -> Tensor:
    """Turn the gradients by the statistics of targets `[C]` into those of the formula.

    Args:
        statistics: `[2, C]` or `[4, C]`.
        g: The same shape.

    Returns:
        Slope and hit `[2, C]`, with flat and tilt `[4, C]`: see `logits.py`.
    """
    if len(g) == 2:
        return torch.stack((g[1], -g[0]))
    tilted_C = torch.where(g[3] == 0, 0, g[3] * statistics[3])  # an unused entropy may be NaN
    return torch.stack((g[1] - tilted_C, -g[0], g[2], -g[3]))


def smoothed(statistics: Tensor, label_smoothing: float, vocabulary: int | Tensor) -> Tensor:
    """Compute the losses of tokens from their statistics.

    Args:
        statistics: `[2, T]`, or `[4, T]` where labels are smoothed.
        label_smoothing: Share of the target's weight that all columns divide.
        vocabulary: Columns of the whole vocabulary.

    Returns:
        `[T]`.
    """
    nll_T = statistics[1] - statistics[0]
    if not label_smoothing:
        return nll_T
    even_T = statistics[1] - statistics[2] / vocabulary
    return (1 - label_smoothing) * nll_T + label_smoothing * even_T


def sums(
    statistics: Tensor,
    trained_T: Tensor,
    label_smoothing: float,
    vocabulary: int | Tensor,
    z_loss: bool,
) -> Pair | tuple[Pair, Pair]:
    """Sum loss and lse^2 over the positions that train.

    Args:
        statistics: `[2, T]`, or `[4, T]` where labels are smoothed; differentiable.
        trained_T: Which positions train.
        label_smoothing: Share of the target's weight that all columns divide.
        vocabulary: Columns of the whole vocabulary.
        z_loss: Whether the second pair is wanted.

    Returns:
        `(sum, count)`, with `z_loss` also `(sum of lse^2, count)`.
    """
    count = trained_T.sum()
    nll_T = torch.where(trained_T, smoothed(statistics, label_smoothing, vocabulary), 0)
    if not z_loss:
        return nll_T.sum(), count
    return (nll_T.sum(), count), (torch.where(trained_T, statistics[1], 0).square().sum(), count)


def log_probability(statistics: Tensor, trained_T: Tensor) -> Tensor:
    """Compute the log-probability of each target, 0 where ignored.

    Args:
        statistics: `[2, T]` or `[4, T]`.
        trained_T: Which positions have one.

    Returns:
        `[T]`.
    """
    return torch.where(trained_T, statistics[0] - statistics[1], 0)


def top_k_kl(
    statistics: Tensor, teacher_log_probs_TM: Tensor, trained_T: Tensor, direction: str, tail: bool
) -> Tensor:
    """Compute the divergence of M + 1 outcomes, or of M that are normalised.

    Args:
        statistics: Picks and the tail's lse of the student, `[M + 1, T]`; differentiable.
        teacher_log_probs_TM: `[T, M]`, a constant.
        trained_T: Which positions have one.
        direction: `forward` or `reverse`.
        tail: Whether the outcomes beyond the M count, as one.

    Returns:
        `[T]`, 0 where ignored.
    """
    teacher = teacher_log_probs_TM.detach().to(statistics.dtype)
    teacher = teacher.masked_fill(~trained_T[:, None], 0)
    if tail:
        least = torch.finfo(teacher.dtype).eps
        rest = (1 - teacher.exp().sum(-1, keepdim=True)).clamp(min=least).log()
        teacher = torch.cat((teacher, rest), -1)
    p = teacher.log_softmax(-1)
    q = (statistics if tail else statistics[:-1]).t().log_softmax(-1)
    if direction == "reverse":
        p, q = q, p
    none = p.exp() == 0  # an outcome without probability adds nothing
    p = p.masked_fill(none, 0)
    kl_T = (p.exp() * (p - q)).masked_fill(none, 0).sum(-1)
    return torch.where(trained_T, kl_T, 0)
