"""A matrix product for each group of rows: the linear layers of experts.

    y[m] = x[m] weight[e]^T                 for the rows m of expert e: those of expert 0 first

    dx[m] = dy[m] weight[e],    dweight[e] = sum over the rows m of e of dy[m]^T x[m]

Rows beyond the sum of the counts are not read; in y they are not written, in dx they are zero.

Shapes: M rows, D input width, F output width, E experts. Bound by the matrix units where an expert
has many rows (2 M D F FLOPs), by the memory of the weights (E F D elements) where it has few.
Saved for the backward: x, weight, counts.

Source: Gale et al. 2022, https://arxiv.org/abs/2211.15841, section 3 (experts of unequal load).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..library import below_autograd, first_derivative_only, register


def _groups(counts_E: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, with its rows."""
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count < 0 or start + count > rows:
            raise ValueError(f"grouped_gemm: counts {counts_E.tolist()} must sum to at most {rows}")
        if count:
            yield expert, slice(start, start + count)
        start += count


def grouped_gemm_reference(x_MD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Specify `grouped_gemm`, differentiably; rows beyond the counts are zero."""
    groups = _groups(counts_E, x_MD.shape[0])
    parts = [x_MD[rows] @ weight_EFD[expert].t() for expert, rows in groups]
    rest = x_MD.shape[0] - int(counts_E.sum())
    return torch.cat([*parts, x_MD.new_zeros(rest, weight_EFD.shape[1])])


def _forward(x_MD: Tensor, weight_EFD: Tensor, counts_E: Tensor, zero_rest: bool) -> Tensor:
    y_MF = x_MD.new_empty(x_MD.shape[0], weight_EFD.shape[1])
    end = 0
    for expert, rows in _groups(counts_E, x_MD.shape[0]):
        torch.mm(x_MD[rows], weight_EFD[expert].t(), out=y_MF[rows])
        end = rows.stop
    if zero_rest:
        y_MF[end:].zero_()
    return y_MF


def _forward_fake(x: Tensor, weight: Tensor, counts: Tensor, zero_rest: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _weight_gradient(dy_MF: Tensor, x_MD: Tensor, counts_E: Tensor) -> Tensor:
    dweight_EFD = x_MD.new_zeros(counts_E.shape[0], dy_MF.shape[1], x_MD.shape[1])
    for expert, rows in _groups(counts_E, x_MD.shape[0]):
        torch.mm(dy_MF[rows].t(), x_MD[rows], out=dweight_EFD[expert])
    return dweight_EFD


def _weight_gradient_fake(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], dy.shape[1], x.shape[1])


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, zero_rest: bool) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        y: Tensor = below_autograd(_FORWARD, x, weight, counts, zero_rest)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        first_derivative_only("grouped_gemm")
        x, weight, counts = ctx.saved_tensors
        x_wanted, weight_wanted, _, _ = ctx.needs_input_grad
        dx = _FORWARD(dy, weight.transpose(1, 2), counts, True) if x_wanted else None
        dweight = _WEIGHT_GRADIENT(dy, x, counts) if weight_wanted else None
        return dx, dweight, None, None


_FORWARD = register(
    "grouped_gemm_forward(Tensor x, Tensor weight, Tensor counts, bool zero_rest) -> Tensor",
    _forward,
    _forward_fake,
    _GroupedGemm,
)
_WEIGHT_GRADIENT = register(
    "grouped_gemm_weight_gradient(Tensor dy, Tensor x, Tensor counts) -> Tensor",
    _weight_gradient,
    _weight_gradient_fake,
)


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    *,
    zero_rest: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Multiply each expert's rows by its weight.

    Args:
        x: Rows `[M, D]`, sorted by expert.
        weight: `[E, F, D]` in the dtype of `x`, any strides.
        counts: Rows of each expert `[E]` int64; any may be 0; they sum to at most M.
        zero_rest: Whether rows of the result beyond the counts are zero; else they are not written.
        backend: `reference`; None takes the fastest that is proven here.

    Returns:
        `[M, F]` in the dtype of `x`.

    Raises:
        ValueError: If the shapes or dtypes do not fit, or the counts sum to more than M.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"grouped_gemm: x must be [M, D] and weight [E, F, D], got {[*x.shape]} and "
            f"{[*weight.shape]}"
        )
    if counts.shape != weight.shape[:1] or x.dtype != weight.dtype:
        raise ValueError(
            f"grouped_gemm: counts must be [{weight.shape[0]}] and weight in the dtype of x, got "
            f"{[*counts.shape]}, {weight.dtype} and {x.dtype}"
        )
    choose("grouped_gemm", x.device, x.dtype, backend)
    y: Tensor = _FORWARD(x, weight, counts, zero_rest)
    return y


def grouped_gemm_weight_gradient(
    dy: Tensor, x: Tensor, counts: Tensor, *, backend: str | None = None
) -> Tensor:
    """Return the weight gradient of `grouped_gemm` alone, for schedules that defer it.

    Args:
        dy: Upstream gradient `[M, F]`.
        x: Rows `[M, D]` of the forward.
        counts: Rows of each expert `[E]` int64.
        backend: `reference`; None takes the fastest that is proven here.

    Returns:
        `[E, F, D]`; zero for an expert without rows.

    Raises:
        ValueError: If the rows differ, or the counts sum to more than they are.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    if dy.dim() != 2 or x.dim() != 2 or len(dy) != len(x):
        raise ValueError(
            f"grouped_gemm: dy must be [M, F] and x [M, D], got {[*dy.shape]} and {[*x.shape]}"
        )
    choose("grouped_gemm", x.device, x.dtype, backend)
    dweight: Tensor = _WEIGHT_GRADIENT(dy, x, counts)
    return dweight
