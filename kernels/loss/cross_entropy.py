"""Cross-entropy of one chunk of logits, or of a slice of the vocabulary of that chunk.

    m = max_v z_v,    s = sum_v exp(z_v - m),    lse = m + log s,    nll = lse - z_target
    dz_v = (g_nll + g_lse) * exp(z_v - lse) - g_nll * [v = target]

(m, s, z_target) of the slices of a vocabulary merge into those of the whole: M = max m,
S = sum s * exp(m - M), and z_target is the sum, as all slices but one give 0.

Shapes: C tokens of a chunk, V vocabulary (or a slice of it). Bound by memory. Roof: partials read
C V elements, the gradient reads and writes them; `nll_and_gradient_` does both, and reads the
logits once from memory.

Source: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867, algorithm 3 and equation 4;
slices: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..backends import choose
from ..library import register, row_blocks, wide

_OP = "linear_cross_entropy"  # the operator under which the device code of this file is proven
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _blocks(logits_CV: Tensor) -> Iterable[slice]:
    if logits_CV.device.type == "cpu":
        return row_blocks(*logits_CV.shape)
    return (slice(0, logits_CV.shape[0]),)


def _find(targets_C: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Find the column of each target in the slice, 0 where it has none, and whether it has one."""
    columns_C = targets_C.long() - start
    inside_C = (columns_C >= 0) & (columns_C < width)
    return torch.where(inside_C, columns_C, 0)[:, None], inside_C


def _partials_block(x_CV: Tensor, targets_C: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    column_C1, inside_C = _find(targets_C, start, x_CV.shape[1])
    max_C = x_CV.amax(-1)
    shift_C = torch.where(max_C == -torch.inf, 0.0, max_C)  # a row of -inf has the sum 0, not NaN
    sum_C = (x_CV - shift_C[:, None]).exp_().sum(-1)
    return max_C, sum_C, torch.where(inside_C, x_CV.gather(-1, column_C1)[:, 0], 0.0)


def cross_entropy_partials_reference(
    logits_CV: Tensor, targets_C: Tensor, start: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Specify `cross_entropy_partials`; the tests hold the kernel to this.

    Args:
        logits_CV: `[C, V]`.
        targets_C: `[C]`, integers.
        start: Column of the whole vocabulary that is column 0 here.

    Returns:
        Maximum, sum of exponentials and target logit, each `[C]`, float32 at least.
    """
    dtype = wide(logits_CV.dtype)
    parts = logits_CV.new_zeros(3, logits_CV.shape[0], dtype=dtype)
    parts[0] = -torch.inf
    if logits_CV.shape[1]:
        for rows in _blocks(logits_CV):
            block = _partials_block(logits_CV[rows].to(dtype), targets_C[rows], start)
            for part, value in zip(parts, block, strict=True):
                part[rows] = value
    return parts[0].clone(), parts[1].clone(), parts[2].clone()


def cross_entropy_gradient_reference_(
    logits_CV: Tensor,
    targets_C: Tensor,
    start: int,
    lse_C: Tensor,
    g_nll_C: Tensor,
    g_lse_C: Tensor,
) -> None:
    """Specify `cross_entropy_gradient_`; the tests hold the kernel to this.

    Args:
        logits_CV: `[C, V]`; overwritten.
        targets_C: `[C]`, integers.
        start: Column of the whole vocabulary that is column 0 here.
        lse_C: `[C]`, log-sum-exp over the whole vocabulary.
        g_nll_C: `[C]`, gradient of the loss by each negative log-likelihood.
        g_lse_C: `[C]`, gradient of the loss by each log-sum-exp, beside that through `nll`.
    """
    if not logits_CV.shape[1]:
        return
    for rows in _blocks(logits_CV):
        x_CV = logits_CV[rows].to(wide(logits_CV.dtype))
        g_C = g_nll_C[rows]
        column_C1, inside_C = _find(targets_C[rows], start, x_CV.shape[1])
        x_CV.sub_(lse_C[rows, None]).exp_().mul_((g_C + g_lse_C[rows])[:, None])
        true_C = x_CV.gather(-1, column_C1)[:, 0] - torch.where(inside_C, g_C, 0.0)
        x_CV.scatter_(-1, column_C1, true_C[:, None])
        if x_CV.dtype != logits_CV.dtype:
            logits_CV[rows] = x_CV


def _nll_and_gradient_reference_(logits_CV: Tensor, targets_C: Tensor, ignore_index: int) -> Tensor:
    nll_C = logits_CV.new_empty(logits_CV.shape[0], dtype=wide(logits_CV.dtype))
    for rows in _blocks(logits_CV):
        x_CV = logits_CV[rows].to(nll_C.dtype)
        column_C1, trained_C = _find(targets_C[rows], 0, x_CV.shape[1])
        max_C, true_C = x_CV.amax(-1), x_CV.gather(-1, column_C1)[:, 0]
        torch.softmax(x_CV, -1, out=x_CV)  # one pass: PyTorch holds a row in cache
        # The largest probability is exp(0) / s: it gives the sum without another pass over exp.
        nll_C[rows] = torch.where(trained_C, max_C - x_CV.amax(-1).log() - true_C, 0.0)
        x_CV.scatter_(-1, column_C1, x_CV.gather(-1, column_C1) - 1)
        if x_CV.device.type != "cpu":  # the CPU never comes here with ignored rows
            x_CV.mul_(trained_C[:, None])
        if x_CV.dtype != logits_CV.dtype:
            logits_CV[rows] = x_CV
    return nll_C


def nll_and_gradient_(
    logits_CV: Tensor, targets_C: Tensor, ignore_index: int, backend: str | None
) -> Tensor:
    """Overwrite logits over the whole vocabulary by the gradient of the summed loss.

    Args:
        logits_CV: `[C, V]`, contiguous; overwritten by softmax - onehot, or 0 where ignored.
        targets_C: `[C]`, in [0, V) or `ignore_index`; on the CPU none may be ignored.
        ignore_index: The target of positions that do not train.
        backend: As `linear_cross_entropy` takes it.

    Returns:
        Negative log-likelihoods `[C]`, 0 where ignored; float32 at least.
    """
    if choose(_OP, logits_CV.device, logits_CV.dtype, backend) == "triton":
        from .cross_entropy_triton import nll_and_gradient_ as run

        return run(logits_CV, targets_C, ignore_index)
    return _nll_and_gradient_reference_(logits_CV, targets_C, ignore_index)


def _partials(
    logits_CV: Tensor, targets_C: Tensor, start: int, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    if choose(_OP, logits_CV.device, logits_CV.dtype, backend) == "triton":
        from .cross_entropy_triton import partials

        return partials(logits_CV, targets_C, start)
    return cross_entropy_partials_reference(logits_CV, targets_C, start)


def _partials_fake(
    logits_CV: Tensor, targets_C: Tensor, start: int, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = logits_CV.shape[:1], wide(logits_CV.dtype)
    new = logits_CV.new_empty
    return new(shape, dtype=dtype), new(shape, dtype=dtype), new(shape, dtype=dtype)


def _gradient_(
    logits_CV: Tensor,
    targets_C: Tensor,
    start: int,
    lse_C: Tensor,
    g_nll_C: Tensor,
    g_lse_C: Tensor,
    backend: str | None,
) -> None:
    if choose(_OP, logits_CV.device, logits_CV.dtype, backend) == "triton":
        from .cross_entropy_triton import gradient_

        gradient_(logits_CV, targets_C, start, lse_C, g_nll_C, g_lse_C)
    else:
        cross_entropy_gradient_reference_(logits_CV, targets_C, start, lse_C, g_nll_C, g_lse_C)


_PARTIALS = register(
    "cross_entropy_partials(Tensor logits, Tensor targets, int start, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _partials,
    _partials_fake,
)
_GRADIENT_ = register(
    "cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, int start, Tensor lse,"
    " Tensor g_nll, Tensor g_lse, str? backend) -> ()",
    _gradient_,
    lambda *_: None,
)


def _check(name: str, logits_CV: Tensor, targets_C: Tensor) -> None:
    if logits_CV.dim() != 2 or targets_C.shape != logits_CV.shape[:1]:
        raise ValueError(
            f"{name}: logits must be [C, V] and targets [C], "
            f"got {[*logits_CV.shape]} and {[*targets_C.shape]}"
        )
    if logits_CV.dtype not in _DTYPES:
        raise ValueError(
            f"{name}: logits must be float16, bfloat16, float32 or float64, got {logits_CV.dtype}"
        )
    if targets_C.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: targets must be int32 or int64, got {targets_C.dtype}")


def cross_entropy_partials(
    logits_CV: Tensor, targets_C: Tensor, start: int = 0, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce a slice of the vocabulary to what merging needs.

    Merge over slices: `M = max(max)`, `S = sum(sum_exp * exp(max - M))`, `lse = M + log(S)`,
    `nll = lse - sum(target_logit)`. A slice without columns, or of -inf only, gives (-inf, 0, 0).
    Not differentiable: `cross_entropy_gradient_` is its backward.

    Args:
        logits_CV: `[C, V]`; float16, bfloat16, float32 or float64.
        targets_C: `[C]`, int32 or int64, in columns of the whole vocabulary.
        start: Column of the whole vocabulary that is column 0 of `logits_CV`.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `max_C`, `sum_exp_C` = sum of exp(logits - max) and `target_logit_C` (0 where the target
        is outside [start, start + V), as an ignored one is), float32 at least.

    Raises:
        ValueError: If shapes or dtypes are not these.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    _check("cross_entropy_partials", logits_CV, targets_C)
    parts: tuple[Tensor, Tensor, Tensor] = _PARTIALS(logits_CV, targets_C, start, backend)
    return parts


def cross_entropy_gradient_(
    logits_CV: Tensor,
    targets_C: Tensor,
    start: int,
    lse_C: Tensor,
    g_nll: Tensor | float = 1.0,
    g_lse: Tensor | float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Overwrite a slice of logits by (g_nll + g_lse) * softmax - g_nll * onehot.

    Args:
        logits_CV: `[C, V]`, contiguous; overwritten.
        targets_C: `[C]`, int32 or int64, in columns of the whole vocabulary.
        start: Column of the whole vocabulary that is column 0 of `logits_CV`.
        lse_C: `[C]`, log-sum-exp over the whole vocabulary; finite also where `g_nll` is 0.
        g_nll: Gradient by the negative log-likelihoods, a number, `[]` or `[C]`; must be 0 at
            positions that do not train.
        g_lse: The same by the log-sum-exps, beside their part in the likelihoods.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `logits_CV`, which now holds the gradient.

    Raises:
        ValueError: If shapes or dtypes are not these, or the logits are not contiguous.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    _check("cross_entropy_gradient_", logits_CV, targets_C)
    if not logits_CV.is_contiguous():
        raise ValueError(
            f"cross_entropy_gradient_: logits must be contiguous, got strides {logits_CV.stride()}"
        )
    wide_lse_C = lse_C.to(wide(logits_CV.dtype))
    if lse_C.shape != targets_C.shape:
        raise ValueError(
            f"cross_entropy_gradient_: lse must be {[*targets_C.shape]} as the targets, "
            f"got {[*lse_C.shape]}"
        )
    upstream = []
    for g in (g_nll, g_lse):
        g_C = g.to(wide_lse_C) if isinstance(g, Tensor) else wide_lse_C.new_full((), g)
        upstream.append(g_C.expand_as(wide_lse_C))
    _GRADIENT_(logits_CV, targets_C, start, wide_lse_C, *upstream, backend)
    return logits_CV
