"""Cross-entropy of logits that exist: a chunk of a linear head's, or a slice of the vocabulary.

    z = x, or with a soft-cap c  z = c tanh(x / c), where -inf stays -inf
    m = max_v z_v,    s = sum_v exp(z_v - m),    w = sum_v exp(z_v - m) (z_v - m)
    lse = m + log s,    nll = lse - z_target,    entropy = log s - w / s
    dx_v = (p_v (slope + tilt (z_v - lse)) - hit [v = target] + flat) (1 - (z_v / c)^2)

with p_v = exp(z_v - lse), and of the upstream gradients slope = g_nll + g_lse - g_entropy entropy,
hit = g_nll, flat = g_sum (of sum_v z_v, which label smoothing needs), tilt = -g_entropy. A row
whose four coefficients are 0 has the gradient 0, whatever it holds.

(m, s, z_target, sum z, w) of the slices of a vocabulary merge into those of the whole: M = max m,
S = sum s exp(m - M), W = sum exp(m - M) (w + (m - M) s); the others are sums, as all slices but one
give 0 for z_target.

Shapes: C tokens of a chunk, V vocabulary (or a slice of it). Bound by memory. Roof: the partials
read C V elements, the gradient reads and writes them; `nll_and_gradient_` does both, and should
read the logits from memory once: see `logits_triton.py`.

Source: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867, algorithm 3 and equation 4;
slices: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3; soft-cap: Gemma Team 2024,
https://arxiv.org/abs/2408.00118, section 2.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..library import need_tensors, register, row_blocks, wide

_OP = "linear_cross_entropy"  # the operator under which the device code of this file is proven
_LEAST = -1e30  # in the place of -inf, which times a probability of 0 would be NaN
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BLOCK = 1 << 19  # elements: a row is long, and a block costs a dozen small calls


def _blocks(logits_CV: Tensor) -> Iterable[slice]:
    if logits_CV.device.type == "cpu":
        return row_blocks(logits_CV.shape[0], logits_CV.shape[1], _BLOCK)
    return (slice(0, logits_CV.shape[0]),)


def _any(x: Tensor) -> bool:
    """Say whether an element may differ from 0: yes where asking would wait for the device."""
    return x.device.type != "cpu" or bool(x.any())


def find(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Find the columns of targets in a slice of the vocabulary.

    Args:
        targets: Integers, any shape, in columns of the whole vocabulary.
        start: Column of the whole vocabulary that is column 0 of the slice.
        width: Columns of the slice.

    Returns:
        The column in the slice, int64, 0 where it has none; and whether it has one.
    """
    columns = targets.long() - start
    inside = (columns >= 0) & (columns < width)
    return torch.where(inside, columns, 0), inside


def capped(x: Tensor, softcap: float | None) -> Tensor:
    """Apply a soft-cap c: c tanh(x / c); -inf, a column that is masked out, stays -inf.

    Args:
        x: Logits, any shape, float32 or float64.
        softcap: c, or None for `x` itself.

    Returns:
        The capped logits.
    """
    if softcap is None:
        return x
    return (x / softcap).tanh_().mul_(softcap).masked_fill_(x == -torch.inf, -torch.inf)


def log_probabilities(
    logits_CV: Tensor, softcap: float | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Walk over blocks of rows; PyTorch holds a row of log_softmax in cache.

    Args:
        logits_CV: `[C, V]`.
        softcap: Soft-cap of the logits, or None.

    Yields:
        The rows, their capped logits and log-probabilities, which the next block writes over.
    """
    room_CV = None
    for rows in _blocks(logits_CV):
        z_CV = capped(logits_CV[rows].to(wide(logits_CV.dtype)), softcap)
        room_CV = torch.empty_like(z_CV) if room_CV is None else room_CV[: len(z_CV)]
        yield rows, z_CV, torch.log_softmax(z_CV, -1, out=room_CV)


def cap_slope(z: Tensor, softcap: float) -> Tensor:
    """Differentiate the soft-cap.

    Args:
        z: Capped logits.
        softcap: c.

    Returns:
        1 - (z / c)^2, and 0 where `z` is -inf.
    """
    return 1 - (z / softcap).square_().clamp_(max=1)


def cross_entropy_partials_reference(
    logits_CV: Tensor, targets_C: Tensor, start: int = 0, softcap: float | None = None,
    moments: bool = False,
) -> Tensor:  # fmt: skip
    """Specify `cross_entropy_partials`; the tests hold the kernel to this.

    Args:
        logits_CV: `[C, V]`.
        targets_C: `[C]`, integers.
        start: Column of the whole vocabulary that is column 0 here.
        softcap: Soft-cap of the logits, or None.
        moments: Whether the last two are wanted.

    Returns:
        `[3, C]`, with `moments` `[5, C]`, float32 at least: maximum, sum of exponentials, target
        logit, sum of logits, sum of exponentials times logits, both less the maximum.
    """
    dtype = wide(logits_CV.dtype)
    parts = logits_CV.new_zeros(5 if moments else 3, logits_CV.shape[0], dtype=dtype)
    parts[0] = -torch.inf
    if not logits_CV.numel():
        return parts
    columns_C, inside_C = find(targets_C, start, logits_CV.shape[1])
    true_C = capped(logits_CV.gather(-1, columns_C[:, None])[:, 0].to(dtype), softcap)
    parts[2] = torch.where(inside_C, true_C, 0.0)
    if moments:
        for rows in _blocks(logits_CV):
            z_CV = capped(logits_CV[rows].to(dtype), softcap)
            max_C = torch.amax(z_CV, -1, out=parts[0, rows])
            below_CV = z_CV - max_C.masked_fill(max_C == -torch.inf, 0.0)[:, None]
            exp_CV = below_CV.exp()
            weighted_CV = below_CV.clamp_(min=_LEAST).mul_(exp_CV)
            for n, x_CV in ((1, exp_CV), (3, z_CV), (4, weighted_CV)):
                # of one row all threads would sum, in their own order
                parts[n, rows] = x_CV.expand(max(len(x_CV), 2), -1).sum(-1)[: len(x_CV)]
    else:
        for rows, z_CV, log_p_CV in log_probabilities(logits_CV, softcap):
            torch.amax(z_CV, -1, out=parts[0, rows])
            torch.amax(log_p_CV, -1, out=parts[1, rows])
        parts[1].neg_().exp_()  # the largest is -log(sum)
    parts[1].masked_fill_(parts[0] == -torch.inf, 0.0)  # a row of -inf has the sum 0, not NaN
    return parts


def cross_entropy_gradient_reference(
    logits_CV: Tensor, targets_C: Tensor, start: int, lse_C: Tensor, g: Tensor,
    softcap: float | None, out_CV: Tensor, whole: bool = False,
) -> None:  # fmt: skip
    """Specify `cross_entropy_gradient_`; the tests hold the kernel to this.

    Args:
        logits_CV: `[C, V]`.
        targets_C: `[C]`, integers.
        start: Column of the whole vocabulary that is column 0 here.
        lse_C: `[C]`, log-sum-exp over the whole vocabulary.
        g: `[2, C]` slope and hit, or `[4, C]` slope, hit, flat and tilt.
        softcap: Soft-cap of the logits, or None.
        out_CV: `[C, V]`, receives the gradient; may be `logits_CV`.
        whole: Whether these columns are the whole vocabulary, as a promise that spares a pass.
    """
    if not logits_CV.numel():
        return
    columns_C, inside_C = find(targets_C, start, logits_CV.shape[1])
    slope_C1, hit_C1, *rest = g.unsqueeze(-1)
    columns_C1, hit_C1 = columns_C[:, None], torch.where(inside_C[:, None], hit_C1, 0.0)
    idle_C1 = (g == 0).all(0)[:, None]
    scaled, some_idle, tilted = _any(slope_C1 != 1), _any(idle_C1), bool(rest) and _any(rest[1])
    for rows in _blocks(logits_CV):
        z_CV = capped(logits_CV[rows].to(lse_C.dtype), softcap)
        p_CV = out_CV[rows] if out_CV.dtype == z_CV.dtype else torch.empty_like(z_CV)
        if tilted:
            below_CV = torch.sub(z_CV, lse_C[rows, None])
            torch.exp(below_CV, out=p_CV)
            p_CV.mul_(below_CV.clamp_(min=_LEAST).mul_(rest[1][rows]).add_(slope_C1[rows]))
        else:
            if whole:
                torch.softmax(z_CV, -1, out=p_CV)  # one pass: PyTorch holds a row in cache
            else:
                torch.sub(z_CV, lse_C[rows, None], out=p_CV).exp_()
            if scaled:
                p_CV.mul_(slope_C1[rows])
        if rest:
            p_CV.add_(rest[0][rows])
        at_C1 = columns_C1[rows]
        p_CV.scatter_(-1, at_C1, p_CV.gather(-1, at_C1) - hit_C1[rows])
        if softcap is not None:
            p_CV.mul_(cap_slope(z_CV, softcap))
        if some_idle:
            p_CV.masked_fill_(idle_C1[rows], 0)
        if p_CV.dtype != out_CV.dtype:
            out_CV[rows] = p_CV


def _nll_and_gradient_reference_(
    logits_CV: Tensor, targets_C: Tensor, ignore: int, softcap: float | None, smoothing: float,
    gradient: bool,
) -> Tensor:  # fmt: skip
    nll_C = logits_CV.new_empty(logits_CV.shape[0], dtype=wide(logits_CV.dtype))
    for rows in _blocks(logits_CV):
        z_CV = capped(logits_CV[rows].to(nll_C.dtype), softcap)
        columns_C1 = find(targets_C[rows], 0, z_CV.shape[1])[0][:, None]
        slope_CV = None if softcap is None or not gradient else cap_slope(z_CV, softcap)
        max_C, true_C = z_CV.amax(-1), z_CV.gather(-1, columns_C1)[:, 0]
        mean_C = z_CV.mean(-1) if smoothing else 0.0
        torch.softmax(z_CV, -1, out=z_CV)  # one pass: PyTorch holds a row in cache
        # The largest probability is exp(0) / s: it gives the sum without another pass over exp.
        lse_C = max_C - z_CV.amax(-1).log()
        nll_C[rows] = lse_C - true_C
        if smoothing:
            nll_C[rows] = (1 - smoothing) * nll_C[rows] + smoothing * (lse_C - mean_C)
        ignored_C = targets_C[rows] == ignore
        nll_C[rows].masked_fill_(ignored_C, 0)
        if not gradient:
            continue
        if smoothing:
            z_CV.sub_(smoothing / z_CV.shape[1])
        z_CV.scatter_(-1, columns_C1, z_CV.gather(-1, columns_C1) - (1 - smoothing))
        if slope_CV is not None:
            z_CV.mul_(slope_CV)
        if z_CV.device.type != "cpu" or ignored_C.any():
            z_CV.masked_fill_(ignored_C[:, None], 0)
        if softcap is not None or z_CV.dtype != logits_CV.dtype:
            logits_CV[rows] = z_CV
    return nll_C


def nll_and_gradient_(
    logits_CV: Tensor, targets_C: Tensor, ignore_index: int, softcap: float | None,
    label_smoothing: float, gradient: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    """Overwrite logits over the whole vocabulary by the gradient of the summed loss.

    Args:
        logits_CV: `[C, V]`, contiguous; overwritten by softmax - onehot (smoothed, through the
            soft-cap), or 0 where ignored.
        targets_C: `[C]`, in [0, V) or `ignore_index`.
        ignore_index: The target of positions that do not train.
        softcap: Soft-cap of the logits, or None.
        label_smoothing: Share of the target's weight that all columns divide.
        gradient: Whether it is wanted; else the logits' content is undefined. The losses have the
            same bits with it and without.
        backend: As `linear_cross_entropy` takes it.

    Returns:
        Losses `[C]`, 0 where ignored; float32 at least.
    """
    args = (logits_CV, targets_C, ignore_index, softcap, label_smoothing, gradient)
    if choose(_OP, logits_CV.device, logits_CV.dtype, backend) == "triton":
        from .logits_triton import nll_and_gradient_ as run

        return run(*args)
    return _nll_and_gradient_reference_(*args)


def _partials(
    logits_CV: Tensor, targets_C: Tensor, start: int, softcap: float | None, moments: bool,
    backend: str | None,
) -> Tensor:  # fmt: skip
    if choose(_OP, logits_CV.device, logits_CV.dtype, backend) == "triton":
        from .logits_triton import partials

        return partials(logits_CV, targets_C, start, softcap, moments)
    return cross_entropy_partials_reference(logits_CV, targets_C, start, softcap, moments)


def _partials_fake(
    logits_CV: Tensor, targets_C: Tensor, start: int, softcap: float | None, moments: bool, *_: Any
) -> Tensor:
    shape = 5 if moments else 3, logits_CV.shape[0]
    return logits_CV.new_empty(shape, dtype=wide(logits_CV.dtype))


def write_gradient(
    logits_CV: Tensor, targets_C: Tensor, start: int, lse_C: Tensor, g: Tensor,
    softcap: float | None, out_CV: Tensor, backend: str | None, whole: bool = False,
) -> None:  # fmt: skip
    """Write the gradient by the logits into `out_CV`, which may be the logits themselves.

    Args:
        logits_CV: `[C, V]`.
        targets_C: `[C]`, integers.
        start: Column of the whole vocabulary that is column 0 here.
        lse_C: `[C]`, float32 at least.
        g: `[2, C]` or `[4, C]` in the dtype of `lse_C`: slope, hit, flat, tilt.
        softcap: Soft-cap of the logits, or None.
        out_CV: `[C, V]`, contiguous, in the dtype of the logits.
        backend: As `linear_cross_entropy` takes it.
        whole: As `cross_entropy_gradient_reference`.
    """
    args = logits_CV, targets_C, start, lse_C, g, softcap, out_CV
    if choose(_OP, logits_CV.device, logits_CV.dtype, backend) == "triton":
        from .logits_triton import write_gradient as run

        run(*args)
    else:
        cross_entropy_gradient_reference(*args, whole)


def _gradient_(
    logits_CV: Tensor, targets_C: Tensor, start: int, lse_C: Tensor, g: Tensor,
    softcap: float | None, backend: str | None,
) -> None:  # fmt: skip
    write_gradient(logits_CV, targets_C, start, lse_C, g, softcap, logits_CV, backend)


_PARTIALS = register(
    "cross_entropy_partials(Tensor logits, Tensor targets, int start, float? softcap, bool moments,"
    " str? backend) -> Tensor",
    _partials, _partials_fake,
)  # fmt: skip
_GRADIENT_ = register(
    "cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, int start, Tensor lse, Tensor g,"
    " float? softcap, str? backend) -> ()",
    _gradient_, lambda *_: None,
)  # fmt: skip


def check_options(name: str, softcap: float | None, label_smoothing: float = 0.0) -> None:
    """Refuse a soft-cap or a label smoothing that means nothing.

    Args:
        name: Operator, for the message.
        softcap: None, or above 0 and finite.
        label_smoothing: From 0 to 1.

    Raises:
        ValueError: If they are not these.
    """
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{name}: softcap must be above 0 and finite, or None, got {softcap}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be from 0 to 1, got {label_smoothing}")


def check_logits(name: str, logits_CV: Tensor, targets_C: Tensor) -> None:
    """Refuse logits and targets that do not belong together.

    Args:
        name: Operator, for the message.
        logits_CV: `[C, V]`, floating.
        targets_C: `[C]`, int32 or int64.

    Raises:
        ValueError: If they are not these.
    """
    need_tensors(name, logits=logits_CV, targets=targets_C)
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
    logits_CV: Tensor, targets_C: Tensor, start: int = 0, *, softcap: float | None = None,
    moments: bool = False, backend: str | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Reduce a slice of the vocabulary to what merging needs.

    Merge over slices: `M = max(max)`, `S = sum(sum_exp * exp(max - M))`, `lse = M + log(S)`,
    `nll = lse - sum(target_logit)`. A slice without columns, or of -inf only, gives (-inf, 0, 0).
    Not differentiable: `cross_entropy_gradient_` is its backward.

    Args:
        logits_CV: `[C, V]`; float16, bfloat16, float32 or float64.
        targets_C: `[C]`, int32 or int64, in columns of the whole vocabulary.
        start: Column of the whole vocabulary that is column 0 of `logits_CV`.
        softcap: Bound that the logits approach, or None.
        moments: Whether label smoothing or the entropy will need the last two.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `max_C`, `sum_exp_C` = sum of exp(logits - max) and `target_logit_C` (0 where the target
        is outside [start, start + V), as an ignored one is), float32 at least; with `moments` also
        `sum_logit_C` and `weighted_C` = sum of exp(logits - max) * (logits - max).

    Raises:
        ValueError: If shapes, dtypes or the soft-cap are not these.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    check_logits("cross_entropy_partials", logits_CV, targets_C)
    check_options("cross_entropy_partials", softcap)
    parts: Tensor = _PARTIALS(logits_CV, targets_C, start, softcap, moments, backend)
    return parts.unbind()


def cross_entropy_gradient_(
    logits_CV: Tensor, targets_C: Tensor, start: int, lse_C: Tensor, g_nll: Tensor | float = 1.0,
    g_lse: Tensor | float = 0.0, *, g_sum: Tensor | float = 0.0, softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Overwrite a slice of logits by (g_nll + g_lse) * softmax - g_nll * onehot + g_sum.

    Args:
        logits_CV: `[C, V]`, contiguous; overwritten.
        targets_C: `[C]`, int32 or int64, in columns of the whole vocabulary.
        start: Column of the whole vocabulary that is column 0 of `logits_CV`.
        lse_C: `[C]`, log-sum-exp over the whole vocabulary.
        g_nll: Gradient by the negative log-likelihoods, a number, `[]` or `[C]`; must be 0 at
            positions that do not train.
        g_lse: The same by the log-sum-exps, beside their part in the likelihoods.
        g_sum: The same by the sums of logits.
        softcap: Bound that the logits approach, or None.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `logits_CV`, which now holds the gradient.

    Raises:
        ValueError: If shapes or dtypes are not these, or the logits are not contiguous.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    check_logits("cross_entropy_gradient_", logits_CV, targets_C)
    check_options("cross_entropy_gradient_", softcap)
    if not logits_CV.is_contiguous():
        raise ValueError(
            f"cross_entropy_gradient_: logits must be contiguous, got strides {logits_CV.stride()}"
        )
    if lse_C.shape != targets_C.shape:
        raise ValueError(
            f"cross_entropy_gradient_: lse must be {[*targets_C.shape]} as the targets, "
            f"got {[*lse_C.shape]}"
        )
    lse_C = lse_C.to(wide(logits_CV.dtype))
    rows = [g.to(lse_C) if isinstance(g, Tensor) else g for g in (g_nll, g_lse, g_sum)]
    nll_C, by_lse_C, sum_C = (lse_C.new_zeros(lse_C.shape) + g for g in rows)
    flat = isinstance(g_sum, Tensor) or g_sum != 0
    more = (sum_C, torch.zeros_like(sum_C)) if flat else ()
    g = torch.stack((nll_C + by_lse_C, nll_C, *more))
    _GRADIENT_(logits_CV, targets_C, start, lse_C, g, softcap, backend)
    return logits_CV
