"""Tokens sorted by expert, and back with their weights.

    permute     rows[m] = x[order[m] // k]                 sorted by expert, then by token
    unpermute   y[t] = sum over j of w[t, j] rows[place[t, j]]     w weights; place inverts order

    dx[t] = sum over j of drows[place[t, j]]
    drows[m] = w[order[m]] dy[order[m] // k],    dw[t, j] = dy[t] . rows[place[t, j]]

`order[m]` is the slot t k + j that row m serves. A slot with index -1 (padding, dropped) has no
row: rows beyond the sum of the counts are zero, and their order is -1. Sums run over j in order, so
that the same input gives the same bits.

Shapes: T tokens, D width, k experts a token, E experts, M rows. Bound by memory. Roof of permute:
(T + M) D elements / bandwidth; of unpermute the same. Saved: the order; for unpermute also rows and
weights.

Source: Gale et al. 2022, https://arxiv.org/abs/2211.15841, section 5 (no token is dropped).
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..library import below_autograd, first_derivative_only, register, wide


def permute_reference(
    x_TD: Tensor, indices_TK: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Specify `permute`, differentiably in `x_TD`."""
    slots = indices_TK.flatten()
    if slots.numel() and int(slots.max()) >= experts:
        raise ValueError(f"permute: indices must be below {experts}, got {int(slots.max())}")
    slots = torch.where(slots < 0, experts, slots)
    counts = torch.bincount(slots, minlength=experts + 1)[:experts]
    order = slots.argsort(stable=True)
    beyond = torch.arange(len(order), device=order.device) >= counts.sum()
    rows = x_TD.index_select(0, order // indices_TK.shape[1])
    return rows.masked_fill(beyond.unsqueeze(1), 0.0), counts, order.masked_fill(beyond, -1)


def _places(order_M: Tensor, slots: int) -> Tensor:
    """Invert `order`: the row of each slot `[slots]`, -1 where it has none."""
    places = order_M.new_full((slots + 1,), -1)
    target = torch.where(order_M < 0, slots, order_M)
    return places.scatter_(0, target, torch.arange(len(order_M), device=order_M.device))[:slots]


def unpermute_reference(rows_MD: Tensor, order_M: Tensor, weights_TK: Tensor) -> Tensor:
    """Specify `unpermute`, differentiably in `rows_MD` and `weights_TK`."""
    accumulate = wide(rows_MD.dtype)
    tokens, top_k = weights_TK.shape
    y_TD = rows_MD.new_zeros(tokens, rows_MD.shape[1], dtype=accumulate)
    if not rows_MD.shape[0]:
        return y_TD.to(rows_MD.dtype)
    places_TK = _places(order_M, tokens * top_k).view(tokens, top_k)
    for place_T, weight_T in zip(places_TK.unbind(1), weights_TK.unbind(1), strict=True):
        part_TD = rows_MD.index_select(0, place_T.clamp(min=0)).to(accumulate)
        part_TD = part_TD.masked_fill((place_T < 0).unsqueeze(1), 0.0)
        y_TD = y_TD + torch.where(place_T < 0, 0.0, weight_T).to(accumulate).unsqueeze(1) * part_TD
    return y_TD.to(rows_MD.dtype)


def _permute_fake(x: Tensor, indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = indices.numel()
    return (
        x.new_empty(rows, x.shape[1]),
        indices.new_empty(experts),
        indices.new_empty(rows),
    )


def _unpermute_fake(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty(weights.shape[0], rows.shape[1])


def _unpermute_backward(
    dy_TD: Tensor, rows_MD: Tensor, order_M: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    accumulate = wide(rows_MD.dtype)
    top_k = weights_TK.shape[1]
    absent_M = (order_M < 0).unsqueeze(1)
    held_M = order_M.clamp(min=0)
    dy_MD = dy_TD.index_select(0, held_M // top_k).to(accumulate)
    dots_M = (dy_MD * rows_MD).sum(1, keepdim=True).masked_fill(absent_M, 0.0)
    drows_MD = dy_MD * weights_TK.flatten().index_select(0, held_M).to(accumulate).unsqueeze(1)
    places = _places(order_M, weights_TK.numel())
    dweights = torch.zeros_like(weights_TK)
    if len(order_M):
        dots = dots_M[:, 0].index_select(0, places.clamp(min=0))
        dweights.copy_(dots.masked_fill(places < 0, 0.0).view_as(weights_TK))
    return drows_MD.masked_fill(absent_M, 0.0).to(rows_MD.dtype), dweights


def _unpermute_backward_fake(
    dy: Tensor, rows: Tensor, order: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, indices: Tensor, experts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, counts, order = below_autograd(_PERMUTE, x, indices, experts)
        ctx.save_for_backward(order)
        ctx.slots = indices.shape
        ctx.mark_non_differentiable(counts, order)
        return rows, counts, order

    @staticmethod
    def backward(ctx: Any, drows: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        first_derivative_only("permute")
        (order,) = ctx.saved_tensors
        ones = drows.new_ones(ctx.slots, dtype=wide(drows.dtype))
        return _UNPERMUTE(drows, order, ones), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, order, weights)
        y: Tensor = below_autograd(_UNPERMUTE, rows, order, weights)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor]:
        first_derivative_only("unpermute")
        drows, dweights = _UNPERMUTE_BACKWARD(dy, *ctx.saved_tensors)
        return drows, None, dweights


_PERMUTE = register(
    "permute_forward(Tensor x, Tensor indices, int experts) -> (Tensor, Tensor, Tensor)",
    permute_reference,
    _permute_fake,
    _Permute,
)
_UNPERMUTE = register(
    "unpermute_forward(Tensor rows, Tensor order, Tensor weights) -> Tensor",
    unpermute_reference,
    _unpermute_fake,
    _Unpermute,
)
_UNPERMUTE_BACKWARD = register(
    "unpermute_backward(Tensor dy, Tensor rows, Tensor order, Tensor weights) -> (Tensor, Tensor)",
    _unpermute_backward,
    _unpermute_backward_fake,
)


def permute(
    x: Tensor, indices: Tensor, experts: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy each token once for each of its experts, sorted by expert.

    Args:
        x: Tokens `[T, D]`.
        indices: Experts of each token `[T, k]` int64, from 0 to `experts` - 1; -1 gives no row.
        experts: How many there are.
        backend: `reference`; None takes the fastest that is proven here.

    Returns:
        rows `[T k, D]` in the dtype of `x`, of which those beyond the sum of the counts are zero;
        counts `[experts]` int64; order `[T k]` int64, for `unpermute`.

    Raises:
        ValueError: If `indices` does not have a row for each token, or holds `experts` or more.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    if x.dim() != 2 or indices.dim() != 2 or len(x) != len(indices):
        raise ValueError(
            f"permute: x must be [T, D] and indices [T, k], got {[*x.shape]} and {[*indices.shape]}"
        )
    choose("permute", x.device, x.dtype, backend)
    rows, counts, order = _PERMUTE(x, indices, experts)
    return rows, counts, order


def unpermute(
    rows: Tensor, order: Tensor, weights: Tensor, *, backend: str | None = None
) -> Tensor:
    """Sum the rows of each token, times their weights.

    Args:
        rows: `[M, D]`; a row whose order is -1 is not read.
        order: The slot of each row `[M]` int64, from `permute`, or its first M elements.
        weights: `[T, k]`, float32 at least.
        backend: `reference`; None takes the fastest that is proven here.

    Returns:
        `[T, D]` in the dtype of `rows`, summed in float32 at least; a token without rows is zero.

    Raises:
        ValueError: If `order` does not have an element for each row.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    if rows.dim() != 2 or weights.dim() != 2 or order.shape != rows.shape[:1]:
        raise ValueError(
            f"unpermute: rows must be [M, D], order [M] and weights [T, k], got {[*rows.shape]}, "
            f"{[*order.shape]} and {[*weights.shape]}"
        )
    choose("unpermute", rows.device, rows.dtype, backend)
    y: Tensor = _UNPERMUTE(rows, order, weights)
    return y
