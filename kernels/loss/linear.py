"""Cross-entropy and log-probabilities of a linear head, without the logits of all tokens.

    z = hidden @ weight^T,    log_prob = z_target - lse(z),    sum = -sum over trained of log_prob
    dhidden = dz @ weight,    dweight = dz^T @ hidden

A chunk of tokens at a time: C V logits are alive, never T V. `linear_cross_entropy` overwrites
each chunk by its gradient in the forward, so that a step costs three matrix products; what is
saved is the gradient itself, and the backward multiplies it by the upstream scalar on the device.
Outputs per token (log-probabilities, the log-sum-exp of the z-loss) have an upstream gradient each:
their backward computes the logits of a chunk again, four products a step.

Shapes: T tokens, C tokens of a chunk, D model width, V vocabulary. Bound by arithmetic: 6 T D V
FLOPs (8 with z-loss). Products run in the input's dtype; softmax, loss and the accumulation of
dweight over chunks in float32 at least.

Source: z-loss: Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, section 5; chunks with the
gradient in the forward: Hsu et al. 2024, https://arxiv.org/abs/2410.10989, section 3.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import choose
from ..library import below_autograd, register, wide
from .cross_entropy import (
    cross_entropy_gradient_,
    cross_entropy_partials,
    nll_and_gradient_,
)

_CPU_BYTES = 64 << 20  # of float32 logits a chunk
_CUDA_BYTES = 1 << 30
_CUDA_TOKENS = 4096  # enough to fill the device in each product

Pair = tuple[Tensor, Tensor]


def chunk_tokens(hidden_TD: Tensor, vocabulary: int) -> int:
    """Choose how many tokens' logits are alive at a time.

    Args:
        hidden_TD: `[T, D]`; its device and dtype decide.
        vocabulary: Columns of the logits, on this rank.

    Returns:
        At least 1: 64 MiB of float32 logits on the CPU, 4096 tokens and 1 GiB elsewhere.
    """
    if hidden_TD.device.type == "cpu":
        return max(1, _CPU_BYTES // (4 * max(vocabulary, 1)))
    return max(1, min(_CUDA_TOKENS, _CUDA_BYTES // (hidden_TD.element_size() * max(vocabulary, 1))))


class _Chunks:
    """The chunks of one call: which rows, and buffers that all chunks share.

    On the CPU only the rows that train are met. Elsewhere counting them would wait for the device:
    all rows are met, and the ignored ones enter as zeros, so that a NaN in them stays out.
    """

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        ignore: int,
        chunk: int | None,
    ) -> None:
        self.hidden_TD, self.weight_VD, self.targets_T = hidden_TD, weight_VD, targets_T
        self.trained_T = targets_T != ignore
        self.rows: Tensor | None = None
        tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
        if hidden_TD.device.type == "cpu":
            self._check_range(vocabulary)
            rows = self.trained_T.nonzero()[:, 0]
            if len(rows) < tokens:
                self.rows, tokens = rows, len(rows)
        limit = chunk or chunk_tokens(hidden_TD, vocabulary)
        count = max(1, -(-tokens // limit))
        self.tokens, self.step = tokens, max(1, -(-tokens // count))
        self.logits_CV = hidden_TD.new_empty(min(self.step, tokens), vocabulary)

    def _check_range(self, vocabulary: int) -> None:
        outside = self.trained_T & ((self.targets_T < 0) | (self.targets_T >= vocabulary))
        if outside.any():
            at = int(outside.nonzero()[0])
            raise ValueError(
                f"targets must be in [0, {vocabulary}) or the ignore_index, "
                f"got {int(self.targets_T[at])} at position {at}"
            )

    def __iter__(self) -> Iterator[tuple[slice | Tensor, Tensor, Tensor, Tensor]]:
        """Yield rows of the call, their hidden states `[C, D]`, targets `[C]`, logits `[C, V]`."""
        for start in range(0, self.tokens, self.step):
            rows: slice | Tensor = slice(start, min(start + self.step, self.tokens))
            count = min(self.step, self.tokens - start)
            if self.rows is not None:
                rows = self.rows[rows]
            hidden_CD = self.hidden_TD[rows]
            if hidden_CD.device.type != "cpu":
                hidden_CD = torch.where(self.trained_T[rows, None], hidden_CD, 0)
            logits_CV = torch.mm(hidden_CD, self.weight_VD.t(), out=self.logits_CV[:count])
            yield rows, hidden_CD, self.targets_T[rows], logits_CV


class _Gradients:
    """dhidden in the input's dtype and dweight in float32 at least, empty where not asked for."""

    def __init__(self, chunks: _Chunks, hidden: bool, weight: bool) -> None:
        self.weight_VD, wide_dtype = chunks.weight_VD, wide(chunks.weight_VD.dtype)
        new = chunks.hidden_TD.new_zeros
        self.dhidden = new(chunks.hidden_TD.shape if hidden else 0)
        self.dweight = new(self.weight_VD.shape if weight else 0, dtype=wide_dtype)
        narrow_cpu = self.dweight.device.type == "cpu" and wide_dtype != self.weight_VD.dtype
        self.product = torch.empty_like(self.weight_VD) if weight and narrow_cpu else None
        self.needs = hidden, weight

    def add_(self, rows: slice | Tensor, dlogits_CV: Tensor, hidden_CD: Tensor) -> None:
        if self.needs[0]:
            self.dhidden[rows] = dlogits_CV @ self.weight_VD
        if not self.needs[1]:
            return
        if self.product is not None:  # the CPU has no product of bfloat16 into float32
            self.dweight.add_(torch.mm(dlogits_CV.t(), hidden_CD, out=self.product))
        elif self.dweight.dtype == hidden_CD.dtype:
            self.dweight.addmm_(dlogits_CV.t(), hidden_CD)
        else:
            torch.ops.aten.addmm.dtype_out(
                self.dweight, dlogits_CV.t(), hidden_CD, self.dweight.dtype, out=self.dweight
            )


def linear_cross_entropy_reference(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Specify the operators here, differentiably, with all logits at once.

    Args:
        hidden_TD: `[T, D]`.
        weight_VD: `[V, D]`.
        targets_T: `[T]`, in [0, V) or `ignore_index`.
        ignore_index: The target of positions that do not train.

    Returns:
        `log_probs_T` and `lse_T`, both 0 where ignored; float32 at least.
    """
    dtype = wide(hidden_TD.dtype)
    trained_T = targets_T != ignore_index
    logits_TV = hidden_TD.to(dtype) @ weight_VD.to(dtype).t()
    lse_T = logits_TV.logsumexp(-1)
    target_T = logits_TV.gather(-1, torch.where(trained_T, targets_T, 0).long()[:, None])[:, 0]
    return torch.where(trained_T, target_T - lse_T, 0), torch.where(trained_T, lse_T, 0)


def _cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int,
    chunk: int | None,
    hidden_grad: bool,
    weight_grad: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chunks = _Chunks(hidden_TD, weight_VD, targets_T, ignore_index, chunk)
    gradients = _Gradients(chunks, hidden_grad, weight_grad)
    total = hidden_TD.new_zeros((), dtype=wide(hidden_TD.dtype))
    for rows, hidden_CD, targets_C, logits_CV in chunks:
        if hidden_grad or weight_grad:
            total += nll_and_gradient_(logits_CV, targets_C, ignore_index, backend).sum()
            gradients.add_(rows, logits_CV, hidden_CD)
        else:
            max_C, sum_C, true_C = cross_entropy_partials(logits_CV, targets_C, backend=backend)
            nll_C = max_C + sum_C.log() - true_C
            total += torch.where(chunks.trained_T[rows], nll_C, 0).sum()
    return total, chunks.trained_T.sum(), gradients.dhidden, gradients.dweight


def _cross_entropy_fake(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int,
    chunk: int | None,
    hidden_grad: bool,
    weight_grad: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = wide(hidden_TD.dtype)
    return (
        hidden_TD.new_empty((), dtype=dtype),
        targets_T.new_empty((), dtype=torch.int64),
        hidden_TD.new_empty(hidden_TD.shape if hidden_grad else 0),
        hidden_TD.new_empty(weight_VD.shape if weight_grad else 0, dtype=dtype),
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        hidden_TD, weight_VD, targets_T, ignore_index, chunk, _, _, backend = args
        ctx.needs = ctx.needs_input_grad[:2]
        ctx.dtype = weight_VD.dtype
        total, count, dhidden, dweight = below_autograd(
            _CROSS_ENTROPY,
            hidden_TD,
            weight_VD,
            targets_T,
            ignore_index,
            chunk,
            *ctx.needs,
            backend,
        )
        ctx.mark_non_differentiable(count, dhidden, dweight)
        ctx.save_for_backward(dhidden, dweight)
        return total, count, dhidden, dweight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        # Multiplied in the wide dtype: a bfloat16 upstream scalar would scale every gradient wrong.
        dx = (dhidden.to(g.dtype) * g).to(dhidden.dtype) if ctx.needs[0] else None
        dw = (dweight * g).to(ctx.dtype) if ctx.needs[1] else None
        return dx, dw, None, None, None, None, None, None


def _log_probs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int,
    chunk: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    chunks = _Chunks(hidden_TD, weight_VD, targets_T, ignore_index, chunk)
    log_probs_T = hidden_TD.new_zeros(hidden_TD.shape[0], dtype=wide(hidden_TD.dtype))
    lse_T = torch.zeros_like(log_probs_T)
    for rows, _, targets_C, logits_CV in chunks:
        max_C, sum_C, true_C = cross_entropy_partials(logits_CV, targets_C, backend=backend)
        lse_C, trained_C = max_C + sum_C.log(), chunks.trained_T[rows]
        lse_T[rows] = torch.where(trained_C, lse_C, 0)
        log_probs_T[rows] = torch.where(trained_C, true_C - lse_C, 0)
    return log_probs_T, lse_T


def _log_probs_fake(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    ignore_index: int,
    chunk: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    shape, dtype = hidden_TD.shape[:1], wide(hidden_TD.dtype)
    return hidden_TD.new_empty(shape, dtype=dtype), hidden_TD.new_empty(shape, dtype=dtype)


def _log_probs_backward(
    g_log_probs_T: Tensor,
    g_lse_T: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    lse_T: Tensor,
    ignore_index: int,
    chunk: int | None,
    hidden_grad: bool,
    weight_grad: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    chunks = _Chunks(hidden_TD, weight_VD, targets_T, ignore_index, chunk)
    gradients = _Gradients(chunks, hidden_grad, weight_grad)
    g_nll_T = torch.where(chunks.trained_T, -g_log_probs_T, 0)
    g_lse_T = torch.where(chunks.trained_T, g_lse_T, 0)
    for rows, hidden_CD, targets_C, logits_CV in chunks:
        cross_entropy_gradient_(
            logits_CV, targets_C, 0, lse_T[rows], g_nll_T[rows], g_lse_T[rows], backend=backend
        )
        gradients.add_(rows, logits_CV, hidden_CD)
    return gradients.dhidden, gradients.dweight.to(weight_VD.dtype)


def _log_probs_backward_fake(
    g_log_probs_T: Tensor,
    g_lse_T: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    lse_T: Tensor,
    ignore_index: int,
    chunk: int | None,
    hidden_grad: bool,
    weight_grad: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    new = hidden_TD.new_empty
    return new(hidden_TD.shape if hidden_grad else 0), new(weight_VD.shape if weight_grad else 0)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        hidden_TD, weight_VD, targets_T, *ctx.options = args
        ctx.needs = ctx.needs_input_grad[:2]
        log_probs_T, lse_T = below_autograd(_LOG_PROBS, *args)
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, lse_T)
        return log_probs_T, lse_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        ignore_index, chunk, backend = ctx.options
        gradients = _LOG_PROBS_BACKWARD(
            *g, *ctx.saved_tensors, ignore_index, chunk, *ctx.needs, backend
        )
        dx, dw = (d if needed else None for d, needed in zip(gradients, ctx.needs, strict=True))
        return dx, dw, None, None, None, None


_CROSS_ENTROPY = register(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor targets, int ignore_index,"
    " int? chunk, bool hidden_grad, bool weight_grad, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _cross_entropy,
    _cross_entropy_fake,
    _CrossEntropy,
)
_LOG_PROBS = register(
    "linear_log_probs_forward(Tensor hidden, Tensor weight, Tensor targets, int ignore_index,"
    " int? chunk, str? backend) -> (Tensor, Tensor)",
    _log_probs,
    _log_probs_fake,
    _LogProbs,
)
_LOG_PROBS_BACKWARD = register(
    "linear_log_probs_backward(Tensor g_log_probs, Tensor g_lse, Tensor hidden, Tensor weight,"
    " Tensor targets, Tensor lse, int ignore_index, int? chunk, bool hidden_grad, bool weight_grad,"
    " str? backend) -> (Tensor, Tensor)",
    _log_probs_backward,
    _log_probs_backward_fake,
)


def _check(
    name: str, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int | None
) -> None:
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or targets_T.shape != hidden_TD.shape[:1]:
        raise ValueError(
            f"{name}: hidden must be [T, D], weight [V, D] and targets [T], got "
            f"{[*hidden_TD.shape]}, {[*weight_VD.shape]} and {[*targets_T.shape]}"
        )
    if hidden_TD.shape[1] != weight_VD.shape[1] or not weight_VD.shape[0]:
        raise ValueError(
            f"{name}: hidden and weight must have one width and weight a row at least, "
            f"got {[*hidden_TD.shape]} and {[*weight_VD.shape]}"
        )
    if hidden_TD.dtype != weight_VD.dtype or not hidden_TD.is_floating_point():
        raise ValueError(
            f"{name}: hidden and weight must have one floating dtype, "
            f"got {hidden_TD.dtype} and {weight_VD.dtype}"
        )
    if targets_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: targets must be int32 or int64, got {targets_T.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{name}: chunk must be at least 1 token, got {chunk}")


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    z_loss: bool = False,
    ignore_index: int = -100,
    chunk: int | None = None,
    backend: str | None = None,
) -> Pair | tuple[Pair, Pair]:
    """Sum the cross-entropy of a linear head over the positions that train.

    Args:
        hidden_TD: `[T, D]`; float16, bfloat16, float32 or float64.
        weight_VD: `[V, D]` in the same dtype.
        targets_T: `[T]`, int32 or int64, each in [0, V) or `ignore_index`. On the CPU this is
            checked; elsewhere the check would wait for the device: there the result of a target
            out of range is undefined.
        z_loss: Whether to sum lse^2 too; costs a fourth matrix product.
        ignore_index: The target of positions that do not train; they cost nothing on the CPU.
        chunk: Tokens whose logits are alive at a time; None bounds them at 64 MiB on the CPU,
            4096 tokens and 1 GiB elsewhere.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `(sum, count)`: sum in nats, `[]`, float32 at least, differentiable; count, `[]`, int64, the
        positions that train. With `z_loss` also `(sum of lse^2, count)`, as a second pair.

    Raises:
        ValueError: If shapes or dtypes are not these, or a target on the CPU is out of range.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    _check("linear_cross_entropy", hidden_TD, weight_VD, targets_T, chunk)
    choose("linear_cross_entropy", hidden_TD.device, hidden_TD.dtype, backend)
    if not z_loss:
        total, count, _, _ = _CROSS_ENTROPY(
            hidden_TD, weight_VD, targets_T, ignore_index, chunk, False, False, backend
        )
        return total, count
    log_probs_T, lse_T = _LOG_PROBS(hidden_TD, weight_VD, targets_T, ignore_index, chunk, backend)
    count = (targets_T != ignore_index).sum()
    return (-log_probs_T.sum(), count), (lse_T.square().sum(), count)


def linear_log_probs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the log-probability of each target under a linear head.

    Args:
        hidden_TD: `[T, D]`; float16, bfloat16, float32 or float64.
        weight_VD: `[V, D]` in the same dtype.
        targets_T: `[T]`, as `linear_cross_entropy` takes them.
        ignore_index: The target of positions that have no log-probability.
        chunk: Tokens whose logits are alive at a time, as in `linear_cross_entropy`.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `[T]` in nats, 0 where ignored; float32 at least, differentiable token by token.

    Raises:
        ValueError: If shapes or dtypes are not these, or a target on the CPU is out of range.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    _check("linear_log_probs", hidden_TD, weight_VD, targets_T, chunk)
    choose("linear_log_probs", hidden_TD.device, hidden_TD.dtype, backend)
    log_probs_T: Tensor = _LOG_PROBS(hidden_TD, weight_VD, targets_T, ignore_index, chunk, backend)[
        0
    ]
    return log_probs_T
