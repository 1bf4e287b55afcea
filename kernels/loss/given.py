"""Cross-entropy of logits that a model has already computed.

    sum over trained of (1 - e) nll + (e / V) sum_v -log p_v,    and of lse^2

The forward reads the logits, the backward reads them again and writes the gradient: three times
T V elements move, for any upstream gradient. With `inplace` and without a z-loss the forward
overwrites the logits by the gradient, which reads and writes them once (see `logits_triton.py`);
the backward multiplies that by the upstream scalar, and on the device moves nothing where the
scalar is 1.

Shapes: T tokens, V vocabulary, K statistics. Bound by memory. Roof: 3 T V elements, 2 in place.

Source: as `logits.py` and `statistics.py`.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..library import below_autograd, first_derivative_only, register, wide
from ..peers import PEERS, serve
from .chunks import check_range, trained
from .logits import (
    capped,
    check_logits,
    check_options,
    find,
    log_probabilities,
    nll_and_gradient_,
    write_gradient,
)
from .statistics import Pair, coefficients, finish, reduce_slice_, sums

_NAME = "cross_entropy"
_FAR = -64.0  # a log-probability below says little of the log-sum-exp: -inf or -1e9 says nothing


def _check_range(logits_TV: Tensor, targets_T: Tensor, ignore_index: int) -> None:
    if targets_T.device.type == "cpu":  # elsewhere that would wait for the device
        check_range(targets_T, trained(targets_T, ignore_index), logits_TV.shape[1])


def _statistics(
    logits_TV: Tensor, targets_T: Tensor, ignore_index: int, softcap: float | None, moments: bool,
    backend: str | None,
) -> Tensor:  # fmt: skip
    served = choose(_NAME, logits_TV.device, logits_TV.dtype, backend)
    _check_range(logits_TV, targets_T, ignore_index)
    if served == "reference" and logits_TV.device.type == "cpu" and not moments:
        return _statistics_cpu(logits_TV, targets_T, softcap)
    return finish(*reduce_slice_(logits_TV, targets_T, 0, softcap, moments, backend), moments)


def _statistics_cpu(logits_TV: Tensor, targets_T: Tensor, softcap: float | None) -> Tensor:
    """Take the log-sum-exp of a row from one of its log-probabilities."""
    columns_T, inside_T = find(targets_T, 0, logits_TV.shape[1])
    columns_T1 = columns_T[:, None]
    pick_T1 = capped(logits_TV.gather(1, columns_T1).to(wide(logits_TV.dtype)), softcap)
    log_p_T1 = torch.empty_like(pick_T1)
    for rows, _, log_p_CV in log_probabilities(logits_TV, softcap):
        torch.gather(log_p_CV, 1, columns_T1[rows], out=log_p_T1[rows])
    pick_T, lse_T = pick_T1[:, 0], (pick_T1 - log_p_T1)[:, 0]
    far_T = ~(log_p_T1[:, 0] >= _FAR)
    if far_T.any():
        z_FV = capped(logits_TV[far_T].to(lse_T.dtype), softcap)
        lse_T[far_T] = torch.logsumexp(z_FV, 1)
    return torch.stack((torch.where(inside_T, pick_T, 0.0), lse_T))


def _statistics_fake(
    logits_TV: Tensor, targets_T: Tensor, ignore_index: int, softcap: float | None, moments: bool,
    backend: str | None,
) -> Tensor:  # fmt: skip
    shape = 4 if moments else 2, logits_TV.shape[0]
    return logits_TV.new_empty(shape, dtype=wide(logits_TV.dtype))


def _backward(
    g: Tensor, logits_TV: Tensor, targets_T: Tensor, statistics: Tensor, softcap: float | None,
    backend: str | None,
) -> Tensor:  # fmt: skip
    dlogits_TV = torch.empty_like(logits_TV, memory_format=torch.contiguous_format)
    args = statistics[1], coefficients(statistics, g), softcap, dlogits_TV, backend
    write_gradient(logits_TV, targets_T, 0, *args, whole=True)
    return dlogits_TV


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        statistics: Tensor = below_autograd(_STATISTICS, *args)
        _, _, _, ctx.softcap, _, ctx.backend = args
        ctx.save_for_backward(*args[:2], statistics)
        return statistics

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only(_NAME)
        dlogits_TV = _BACKWARD(g, *ctx.saved_tensors, ctx.softcap, ctx.backend)
        return dlogits_TV, *(5 * (None,))


def _overwrite(
    logits_TV: Tensor, targets_T: Tensor, ignore_index: int, softcap: float | None,
    smoothing: float, backend: str | None,
) -> Tensor:  # fmt: skip
    choose(_NAME, logits_TV.device, logits_TV.dtype, backend)
    _check_range(logits_TV, targets_T, ignore_index)
    return nll_and_gradient_(
        logits_TV, targets_T, ignore_index, softcap, smoothing, True, backend
    ).sum()


def _overwrite_fake(logits_TV: Tensor, *_: Any) -> Tensor:
    return logits_TV.new_empty((), dtype=wide(logits_TV.dtype))


def _scale_(x_TV: Tensor, g: Tensor, backend: str | None) -> None:
    if choose(_NAME, x_TV.device, x_TV.dtype, backend) == "triton":
        from .logits_triton import scale_

        scale_(x_TV, g)
    elif x_TV.device.type != "cpu" or g != 1:
        torch.mul(x_TV, g.reshape(1), out=x_TV)  # a scalar with a dimension keeps its precision


class _Overwrite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, *args: Any) -> Tensor:
        total: Tensor = below_autograd(_OVERWRITE_, logits_TV, *args)
        torch.autograd.graph.increment_version(logits_TV)  # who saved the logits is told
        ctx.gradient, ctx.backend = logits_TV.detach(), args[-1]
        ctx.version = logits_TV._version
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only(_NAME)
        if ctx.gradient is None:
            raise RuntimeError(
                f"{_NAME}: with inplace=True the gradient is scaled where it lies, once; "
                "for a second backward use inplace=False"
            )
        gradient_TV, ctx.gradient = ctx.gradient, None
        if gradient_TV._version != ctx.version:
            raise RuntimeError(
                f"{_NAME}: with inplace=True the logits hold their gradient, and someone wrote to "
                f"them (version {gradient_TV._version}, expected {ctx.version}): use inplace=False"
            )
        _SCALE_(gradient_TV, g, ctx.backend)
        return gradient_TV, *(5 * (None,))


_STATISTICS = register(
    "cross_entropy_forward(Tensor logits, Tensor targets, int ignore_index, float? softcap,"
    " bool moments, str? backend) -> Tensor",
    _statistics, _statistics_fake, _Statistics,
)  # fmt: skip
_BACKWARD = register(
    "cross_entropy_backward(Tensor g, Tensor logits, Tensor targets, Tensor statistics,"
    " float? softcap, str? backend) -> Tensor",
    _backward, lambda g, logits_TV, *_: logits_TV.new_empty(logits_TV.shape),
)  # fmt: skip
_OVERWRITE_ = register(
    "cross_entropy_overwrite_(Tensor(a!) logits, Tensor targets, int ignore_index, float? softcap,"
    " float label_smoothing, str? backend) -> Tensor",
    _overwrite, _overwrite_fake, _Overwrite,
)  # fmt: skip
_SCALE_ = register(
    "cross_entropy_scale_(Tensor(a!) x, Tensor g, str? backend) -> ()", _scale_, lambda *_: None
)


def cross_entropy(
    logits_TV: Tensor, targets_T: Tensor, *, z_loss: bool = False, ignore_index: int = -100,
    softcap: float | None = None, label_smoothing: float = 0.0, inplace: bool = False,
    backend: str | None = None,
) -> Pair | tuple[Pair, Pair]:  # fmt: skip
    """Sum the cross-entropy of logits over the positions that train.

    Args:
        logits_TV: `[T, V]`; float16, bfloat16, float32 or float64.
        targets_T: `[T]`, int32 or int64, each in [0, V) or `ignore_index`. On the CPU this is
            checked; elsewhere the result of another is undefined.
        z_loss: Whether to sum lse^2 too.
        ignore_index: The target of positions that do not train.
        softcap: Bound c that the logits approach, c tanh(z / c); -inf stays -inf. Or None.
        label_smoothing: Share e of the loss that is the mean of -log p over the vocabulary, from 0
            to 1, as in `linear_cross_entropy`.
        inplace: Whether the logits may be overwritten by their gradient, where one is asked for.
            They must be contiguous and no leaf, nobody else may need them, there is one backward
            and no z-loss.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `(sum, count)`: sum in nats, `[]`, float32 at least, differentiable; count, `[]`, int64, the
        positions that train. With `z_loss` also `(sum of lse^2, count)`, as a second pair.

    Raises:
        ValueError: If shapes, dtypes or options are not these.
        RuntimeError: If `backend` cannot serve these tensors here, or at a second backward in
            place.
    """
    check_logits(_NAME, logits_TV, targets_T)
    check_options(_NAME, softcap, label_smoothing)
    if not logits_TV.shape[1]:
        raise ValueError(f"{_NAME}: logits must have a column at least, got {[*logits_TV.shape]}")
    trained_T = trained(targets_T, ignore_index)
    if backend in PEERS:
        plain = not (z_loss or softcap or label_smoothing or inplace)
        args = _NAME, backend, logits_TV, targets_T
        return serve(*args, ignore_index=ignore_index, plain=plain), trained_T.sum()
    if inplace:
        _check_inplace(logits_TV, z_loss)
        if torch.is_grad_enabled() and logits_TV.requires_grad:
            options = ignore_index, softcap, label_smoothing, backend
            total: Tensor = _OVERWRITE_(logits_TV, targets_T, *options)
            return total, trained_T.sum()
    statistics = _STATISTICS(
        logits_TV, targets_T, ignore_index, softcap, label_smoothing > 0, backend
    )
    return sums(statistics, trained_T, label_smoothing, logits_TV.shape[1], z_loss)


def _check_inplace(logits_TV: Tensor, z_loss: bool) -> None:
    if z_loss:
        raise ValueError(f"{_NAME}: inplace=True must come without z_loss, got z_loss=True")
    if logits_TV.requires_grad and (logits_TV.is_leaf or not logits_TV.is_contiguous()):
        raise ValueError(
            f"{_NAME}: with inplace=True the logits must be contiguous and no leaf, "
            f"got strides {logits_TV.stride()}, leaf {logits_TV.is_leaf}"
        )
