"""Losses of a linear head, without the logits of all tokens.

    z = hidden @ weight^T,    log_prob = z_target - lse(z),    sum = -sum over trained of log_prob
    dhidden = dz @ weight,    dweight = dz^T @ hidden

A chunk of tokens at a time: C V logits are alive, never T V. `linear_cross_entropy` overwrites
each chunk by its gradient in the forward, so that a step costs three matrix products; what is
saved is the gradient itself, and the backward multiplies it by the upstream scalar on the device.
Outputs per token (log-probability, entropy, divergence, the log-sum-exp of the z-loss) have an
upstream gradient each: their backward computes the logits of a chunk again, four products a step.

Shapes: T tokens, C tokens of a chunk, D model width, V vocabulary, M indices a token, K statistics.
Bound by arithmetic: 6 T D V FLOPs (8 per token). Products run in the input's dtype; softmax and
loss in float32 at least, as is the accumulation of dweight where there are several chunks.

Bytes beside inputs and outputs at T = D = 4096, V = 128,256 in bfloat16, one chunk, whose dweight
is rounded once: logits 1.05 GB in the forward; the saved dweight and dhidden, 1.08 GB, in the
backward. With several chunks 4 D V bytes more, 2.1 GB, for the float32 dweight.

Source: chunks with the gradient in the forward: Hsu et al. 2024, https://arxiv.org/abs/2410.10989,
section 3; the losses: see `statistics.py`.
"""

from typing import Any, overload

import torch
from torch import Tensor

from ..backends import choose
from ..library import autocast, below_autograd, first_derivative_only, need_tensors, register, wide
from ..peers import PEERS, serve
from .chunks import Chunks, Gradients, check_linear, scaled, trained
from .logits import check_options, nll_and_gradient_
from .statistics import (
    Pair,
    finish,
    gradient_of_slice_,
    log_probability,
    reduce_slice_,
    sums,
    top_k_kl,
)


def _rows(targets: Tensor, moments: bool) -> int:
    return targets.shape[1] + 1 if targets.dim() > 1 else 4 if moments else 2


def _cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int, chunk: int | None,
    hidden_grad: bool, weight_grad: bool, softcap: float | None, smoothing: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    choose("linear_cross_entropy", hidden_TD.device, hidden_TD.dtype, backend)
    chunks = Chunks(hidden_TD, weight_VD, targets_T, ignore_index, chunk)
    gradients = Gradients(hidden_TD, weight_VD, (hidden_grad, weight_grad), chunks.count)
    total = hidden_TD.new_zeros((), dtype=wide(hidden_TD.dtype))
    gradient = hidden_grad or weight_grad
    for rows, hidden_CD, targets_C, logits_CV in chunks:
        total += nll_and_gradient_(
            logits_CV, targets_C, ignore_index, softcap, smoothing, gradient, backend
        ).sum()
        if gradient:
            gradients.add_(rows, logits_CV, hidden_CD)
    return total, chunks.trained_T.sum(), *gradients.result()


def _cross_entropy_fake(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int, chunk: int | None,
    hidden_grad: bool, weight_grad: bool, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        hidden_TD.new_empty((), dtype=wide(hidden_TD.dtype)),
        targets_T.new_empty((), dtype=torch.int64),
        hidden_TD.new_empty(hidden_TD.shape if hidden_grad else 0),
        hidden_TD.new_empty(weight_VD.shape if weight_grad else 0),
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *inputs, _, _, softcap, smoothing, backend = args
        ctx.needs = ctx.needs_input_grad[:2]
        total, count, dhidden, dweight = below_autograd(
            _CROSS_ENTROPY, *inputs, *ctx.needs, softcap, smoothing, backend
        )
        ctx.mark_non_differentiable(count, dhidden, dweight)
        ctx.save_for_backward(dhidden, dweight)
        return total, count, dhidden, dweight

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        first_derivative_only("linear_cross_entropy")
        found = zip(ctx.saved_tensors, ctx.needs, strict=True)
        return *(scaled(d, g) if needed else None for d, needed in found), *(8 * (None,))


def _statistics(
    hidden_TD: Tensor, weight_VD: Tensor, targets: Tensor, ignore_index: int, chunk: int | None,
    softcap: float | None, moments: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    choose("linear_log_probs", hidden_TD.device, hidden_TD.dtype, backend)
    chunks = Chunks(hidden_TD, weight_VD, targets, ignore_index, chunk)
    shape = _rows(targets, moments), hidden_TD.shape[0]
    statistics = hidden_TD.new_zeros(shape, dtype=wide(hidden_TD.dtype))
    for rows, _, targets_C, logits_CV in chunks:
        reduced = reduce_slice_(logits_CV, targets_C, 0, softcap, moments, backend)
        found = finish(*reduced, moments)
        statistics[:, rows] = torch.where(chunks.trained_T[rows], found, 0)
    return statistics


def _statistics_fake(
    hidden_TD: Tensor, weight_VD: Tensor, targets: Tensor, ignore_index: int, chunk: int | None,
    softcap: float | None, moments: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    shape = _rows(targets, moments), hidden_TD.shape[0]
    return hidden_TD.new_empty(shape, dtype=wide(hidden_TD.dtype))


def _statistics_backward(
    g: Tensor, hidden_TD: Tensor, weight_VD: Tensor, targets: Tensor, statistics: Tensor,
    ignore_index: int, chunk: int | None, softcap: float | None, hidden_grad: bool,
    weight_grad: bool, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    chunks = Chunks(hidden_TD, weight_VD, targets, ignore_index, chunk)
    gradients = Gradients(hidden_TD, weight_VD, (hidden_grad, weight_grad), chunks.count)
    g = torch.where(chunks.trained_T, g, 0)
    for rows, hidden_CD, targets_C, logits_CV in chunks:
        found, by = statistics[:, rows], g[:, rows]
        gradient_of_slice_(logits_CV, targets_C, 0, found, by, softcap, backend, whole=True)
        gradients.add_(rows, logits_CV, hidden_CD)
    return gradients.result()


def _statistics_backward_fake(
    g: Tensor, hidden_TD: Tensor, weight_VD: Tensor, targets: Tensor, statistics: Tensor,
    ignore_index: int, chunk: int | None, softcap: float | None, hidden_grad: bool,
    weight_grad: bool, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    new = hidden_TD.new_empty
    return new(hidden_TD.shape if hidden_grad else 0), new(weight_VD.shape if weight_grad else 0)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        hidden_TD, weight_VD, targets, *ctx.options = args
        ctx.needs = ctx.needs_input_grad[:2]
        statistics: Tensor = below_autograd(_STATISTICS, *args)
        ctx.save_for_backward(hidden_TD, weight_VD, targets, statistics)
        return statistics

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("linear_log_probs")
        ignore_index, chunk, softcap, _, backend = ctx.options
        options = ignore_index, chunk, softcap, *ctx.needs, backend
        found = zip(_STATISTICS_BACKWARD(g, *ctx.saved_tensors, *options), ctx.needs, strict=True)
        return *(d if needed else None for d, needed in found), *(6 * (None,))


_CROSS_ENTROPY = register(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor targets, int ignore_index,"
    " int? chunk, bool hidden_grad, bool weight_grad, float? softcap, float label_smoothing,"
    " str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _cross_entropy, _cross_entropy_fake, _CrossEntropy,
)  # fmt: skip
_STATISTICS = register(
    "linear_log_probs_forward(Tensor hidden, Tensor weight, Tensor targets, int ignore_index,"
    " int? chunk, float? softcap, bool moments, str? backend) -> Tensor",
    _statistics, _statistics_fake, _Statistics,
)  # fmt: skip
_STATISTICS_BACKWARD = register(
    "linear_log_probs_backward(Tensor g, Tensor hidden, Tensor weight, Tensor targets,"
    " Tensor statistics, int ignore_index, int? chunk, float? softcap, bool hidden_grad,"
    " bool weight_grad, str? backend) -> (Tensor, Tensor)",
    _statistics_backward, _statistics_backward_fake,
)  # fmt: skip


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, z_loss: bool = False,
    ignore_index: int = -100, softcap: float | None = None, label_smoothing: float = 0.0,
    chunk: int | None = None, backend: str | None = None,
) -> Pair | tuple[Pair, Pair]:  # fmt: skip
    """Sum the cross-entropy of a linear head over the positions that train.

    Args:
        hidden_TD: `[T, D]`; float16, bfloat16, float32 or float64.
        weight_VD: `[V, D]` in the same dtype; under autocast both are cast first.
        targets_T: `[T]`, int32 or int64, each in [0, V) or `ignore_index`. On the CPU this is
            checked; elsewhere the check would wait for the device: there the result of a target
            out of range is undefined.
        z_loss: Whether to sum lse^2 too; costs a fourth matrix product.
        ignore_index: The target of positions that do not train; they cost nothing on the CPU.
        softcap: Bound c that the logits approach, c tanh(z / c), as in Gemma 2; or None.
        label_smoothing: Share e of the loss that is the mean of -log p over the vocabulary, from 0
            to 1: (1 - e) nll + e mean, as PyTorch defines it.
        chunk: Tokens whose logits are alive at a time; None bounds them at 64 MiB on the CPU,
            4096 tokens and 1 GiB elsewhere.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `(sum, count)`: sum in nats, `[]`, float32 at least, differentiable; count, `[]`, int64, the
        positions that train. With `z_loss` also `(sum of lse^2, count)`, as a second pair.

    Raises:
        ValueError: If shapes, dtypes or options are not these, or a target on the CPU is out of
            range.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    hidden_TD, weight_VD = autocast(hidden_TD, weight_VD)
    check_linear("linear_cross_entropy", hidden_TD, weight_VD, targets_T, chunk)
    check_options("linear_cross_entropy", softcap, label_smoothing)
    if backend in PEERS:
        plain = not (z_loss or softcap or label_smoothing or chunk)
        args = "linear_cross_entropy", backend, hidden_TD, weight_VD, targets_T
        total = serve(*args, ignore_index=ignore_index, plain=plain)
        return total, trained(targets_T, ignore_index).sum()
    inputs = hidden_TD, weight_VD, targets_T, ignore_index, chunk
    if not z_loss:
        found = _CROSS_ENTROPY(*inputs, False, False, softcap, label_smoothing, backend)
        return found[0], found[1]
    statistics = _STATISTICS(*inputs, softcap, label_smoothing > 0, backend)
    trained_T = trained(targets_T, ignore_index)
    return sums(statistics, trained_T, label_smoothing, weight_VD.shape[0], True)


@overload
def linear_log_probs(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, ignore_index: int = ...,
    softcap: float | None = ..., chunk: int | None = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def linear_log_probs(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, entropy: bool,
    ignore_index: int = ..., softcap: float | None = ..., chunk: int | None = ...,
    backend: str | None = ...,
) -> Tensor | Pair: ...  # fmt: skip


def linear_log_probs(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, entropy: bool = False,
    ignore_index: int = -100, softcap: float | None = None, chunk: int | None = None,
    backend: str | None = None,
) -> Tensor | Pair:  # fmt: skip
    """Compute the log-probability of each target under a linear head.

    Args:
        hidden_TD: `[T, D]`; float16, bfloat16, float32 or float64.
        weight_VD: `[V, D]` in the same dtype.
        targets_T: `[T]`, as `linear_cross_entropy` takes them.
        entropy: Whether the entropy of each distribution is wanted too, from the same pass.
        ignore_index: The target of positions that have no log-probability.
        softcap: Bound that the logits approach, as in `linear_cross_entropy`.
        chunk: Tokens whose logits are alive at a time, as in `linear_cross_entropy`.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `[T]` in nats, 0 where ignored; float32 at least, differentiable token by token. With
        `entropy` the pair of it and the entropies `[T]`, in nats, 0 where ignored.

    Raises:
        ValueError: If shapes or dtypes are not these, or a target on the CPU is out of range.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    hidden_TD, weight_VD = autocast(hidden_TD, weight_VD)
    check_linear("linear_log_probs", hidden_TD, weight_VD, targets_T, chunk)
    check_options("linear_log_probs", softcap)
    statistics = _STATISTICS(
        hidden_TD, weight_VD, targets_T, ignore_index, chunk, softcap, entropy, backend
    )
    log_probs_T = log_probability(statistics, trained(targets_T, ignore_index))
    return (log_probs_T, statistics[3]) if entropy else log_probs_T


def linear_top_k_kl(
    hidden_TD: Tensor, weight_VD: Tensor, teacher_indices_TM: Tensor, teacher_log_probs_TM: Tensor,
    *, direction: str = "forward", tail: bool = True, ignore_index: int = -100,
    softcap: float | None = None, chunk: int | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Compute the divergence between a teacher, known by its top M, and a linear head.

    With the tail it is that of M + 1 outcomes, the last of which stands for all other tokens: at
    least 0, at most the divergence over the whole vocabulary, and equal to it where M = V. The
    student's tail is summed over its columns, the teacher's is what its probabilities leave of 1,
    2^-23 (float64: 2^-52) at least, as they are rounded.

    Args:
        hidden_TD: `[T, D]` of the student; float16, bfloat16, float32 or float64.
        weight_VD: `[V, D]` in the same dtype.
        teacher_indices_TM: `[T, M]`, int32 or int64, distinct in a row, in [0, V); a row that
            begins with `ignore_index` is ignored.
        teacher_log_probs_TM: `[T, M]`, floating, in nats, over the whole vocabulary; -inf for none.
            A constant: no gradient flows into it.
        direction: `forward`, KL(teacher || student), or `reverse`, KL(student || teacher).
        tail: Whether the tail is an outcome; False normalises both over the M instead.
        ignore_index: The first index of positions that do not count.
        softcap: Bound that the logits approach, as in `linear_cross_entropy`.
        chunk: Tokens whose logits are alive at a time, as in `linear_cross_entropy`.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `[T]` in nats, 0 where ignored; float32 at least, differentiable token by token.

    Raises:
        ValueError: If shapes, dtypes or options are not these, or an index on the CPU is out of
            range.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    name = "linear_top_k_kl"
    check_top_k(name, teacher_indices_TM, teacher_log_probs_TM, direction)
    hidden_TD, weight_VD = autocast(hidden_TD, weight_VD)
    check_linear(name, hidden_TD, weight_VD, teacher_indices_TM, chunk)
    check_options(name, softcap)
    statistics = _STATISTICS(
        hidden_TD, weight_VD, teacher_indices_TM, ignore_index, chunk, softcap, False, backend
    )
    tail = tail and teacher_indices_TM.shape[1] < weight_VD.shape[0]
    trained_T = trained(teacher_indices_TM, ignore_index)
    return top_k_kl(statistics, teacher_log_probs_TM, trained_T, direction, tail)


def check_top_k(name: str, indices_TM: Tensor, log_probs_TM: Tensor, direction: str) -> None:
    """Refuse a teacher that is not one.

    Args:
        name: Operator, for the message.
        indices_TM: `[T, M]`, M at least 1.
        log_probs_TM: The same shape, floating.
        direction: `forward` or `reverse`.

    Raises:
        ValueError: If they are not these.
    """
    need_tensors(name, teacher_indices=indices_TM, teacher_log_probs=log_probs_TM)
    if indices_TM.dim() != 2 or not indices_TM.shape[1] or log_probs_TM.shape != indices_TM.shape:
        raise ValueError(
            f"{name}: teacher_indices and teacher_log_probs must be [T, M] with M at least 1, "
            f"got {[*indices_TM.shape]} and {[*log_probs_TM.shape]}"
        )
    if log_probs_TM.device != indices_TM.device:
        raise ValueError(
            f"{name}: all tensors must be on one device, "
            f"got {indices_TM.device} and {log_probs_TM.device}"
        )
    if not log_probs_TM.is_floating_point():
        raise ValueError(f"{name}: teacher_log_probs must be floating, got {log_probs_TM.dtype}")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"{name}: direction must be forward or reverse, got {direction!r}")
