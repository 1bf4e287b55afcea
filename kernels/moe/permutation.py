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
from ..library import (
    below_autograd,
    first_derivative_only,
    need_tensors,
    register,
    row_blocks,
    wide,
)
from ..quant.fp8 import (
    Fp8,
    Grouping,
    carrier_of,
    check_grouping,
    fp8_quantize_reference,
    fp8_rows_fake,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BLOCK = 1 << 18  # elements a block of rows of the backward, so that its temporaries stay in cache


def _in_order(indices_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return the counts and the slots sorted by expert, those without one last; never waits."""
    slots = indices_TK.flatten()
    if slots.device.type == "cpu" and slots.numel() and int(slots.max()) >= experts:
        raise ValueError(f"permute: indices must be below {experts}, got {int(slots.max())}")
    ordered = torch.where((slots < 0) | (slots >= experts), experts, slots).sort(stable=True)
    starts = torch.searchsorted(ordered.values, torch.arange(experts + 1, device=slots.device))
    return starts.diff(), ordered.indices


def permute_reference(
    x_TD: Tensor, indices_TK: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Specify `permute`, differentiably in `x_TD`."""
    counts, order = _in_order(indices_TK, experts)
    beyond = torch.arange(len(order), device=order.device) >= counts.sum()
    rows = x_TD.index_select(0, order // indices_TK.shape[1])
    return rows.masked_fill(beyond.unsqueeze(1), 0.0), counts, order.masked_fill(beyond, -1)


def _clear(rows: Tensor, counts: Tensor, value: float) -> Tensor:
    """Overwrite what lies beyond the sum of the counts."""
    if rows.device.type == "cpu":
        rows[int(counts.sum()) :] = value
        return rows
    beyond = torch.arange(len(rows), device=rows.device) >= counts.sum()
    return rows.masked_fill_(beyond.view(-1, *(1,) * (rows.dim() - 1)), value)


def _permute(
    x: Tensor, indices: Tensor, experts: int, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    if choose("permute", x.device, x.dtype, backend) == "triton":
        from .permutation_triton import permute

        return permute(x, indices, experts)
    counts, order = _in_order(indices, experts)
    rows = _clear(x.index_select(0, order // indices.shape[1]), counts, 0.0)
    return rows, counts, _clear(order, counts, -1)


def _permute_fake(
    x: Tensor, indices: Tensor, experts: int, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows = indices.numel()
    return (x.new_empty(rows, x.shape[1]), indices.new_empty(experts), indices.new_empty(rows))


_Fp8Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _permute_fp8(
    x: Tensor, indices: Tensor, experts: int, scaling: Any, power_of_two: bool, backend: str | None
) -> _Fp8Parts:
    if choose("permute", x.device, x.dtype, backend) == "triton":
        from .permutation_triton import permute_fp8

        codes, scale, counts, order = permute_fp8(x, indices, experts, scaling, power_of_two)
    else:
        counts, order = _in_order(indices, experts)
        tokens = order // indices.shape[1]
        data, scale, _ = fp8_quantize_reference(x, scaling, power_of_two=power_of_two)
        codes = _clear(data.view(torch.uint8).index_select(0, tokens), counts, 0)
        scale = _clear(scale.index_select(0, tokens), counts, 2.0**-126)  # as of zeros
        order = _clear(order, counts, -1)
    return carrier_of(x, codes.shape), codes, scale, counts, order


def _permute_fp8_fake(
    x: Tensor, indices: Tensor, experts: int, scaling: str, power_of_two: bool, backend: str | None
) -> _Fp8Parts:
    rows, counts, order = _permute_fake(x, indices, experts, backend)
    codes, scale = fp8_rows_fake(x, rows.shape, scaling)
    return carrier_of(x, rows.shape), codes, scale, counts, order


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
    if tokens and not rows_MD.shape[0]:
        return y_TD.to(rows_MD.dtype)
    places_TK = _places(order_M, tokens * top_k).view(tokens, top_k)
    for place_T, weight_T in zip(places_TK.unbind(1), weights_TK.unbind(1), strict=True):
        part_TD = rows_MD.index_select(0, place_T.clamp(min=0)).to(accumulate)
        part_TD = part_TD.masked_fill((place_T < 0).unsqueeze(1), 0.0)
        y_TD = y_TD + torch.where(place_T < 0, 0.0, weight_T).to(accumulate).unsqueeze(1) * part_TD
    return y_TD.to(rows_MD.dtype)


def _unpermute_cpu(rows_MD: Tensor, places_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Gather and sum in one pass, by blocks whose copies in a wider dtype stay in cache.

    A sum without weights needs no copies: it is in float32, whatever the rows are.
    """
    tokens, top_k = places_TK.shape
    copied = weights_TK is not None and rows_MD.dtype != wide(rows_MD.dtype)
    parts = []
    for block in row_blocks(tokens, rows_MD.shape[1] * top_k) if copied else [slice(tokens)]:
        held_TK = places_TK[block] >= 0
        rows, places, length_T = rows_MD, places_TK[block][held_TK], held_TK.sum(1)
        weights = None if weights_TK is None else weights_TK[block][held_TK]
        if copied:
            rows = rows_MD.index_select(0, places).to(torch.float32)
            places = torch.arange(len(places))
        if weights is not None:
            weights = weights.to(rows.dtype)
        starts_T = length_T.cumsum(0) - length_T
        y_TD = torch.embedding_bag(rows, places, starts_T, per_sample_weights=weights)[0]
        parts.append(y_TD.to(rows_MD.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _unpermute(
    rows: Tensor, order: Tensor, weights: Tensor | None, tokens: int, top_k: int,
    backend: str | None,
) -> Tensor:  # fmt: skip
    """Weights of None are ones."""
    if choose("unpermute", rows.device, rows.dtype, backend) == "triton":
        from .permutation_triton import unpermute

        return unpermute(rows, order, weights, tokens, top_k)
    if rows.device.type == "cpu" and rows.numel():
        return _unpermute_cpu(rows, _places(order, tokens * top_k).view(tokens, top_k), weights)
    weights = rows.new_ones(tokens, top_k) if weights is None else weights
    return unpermute_reference(rows, order, weights)


def _unpermute_fake(
    rows: Tensor, order: Tensor, weights: Tensor | None, tokens: int, *_: Any
) -> Tensor:
    return rows.new_empty(tokens, rows.shape[1])


def _unpermute_backward(
    dy_TD: Tensor, rows_MD: Tensor, order_M: Tensor, weights_TK: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    if choose("unpermute", rows_MD.device, rows_MD.dtype, backend) == "triton":
        from .permutation_triton import unpermute_backward

        return unpermute_backward(dy_TD, rows_MD, order_M, weights_TK)
    accumulate, slots = wide(rows_MD.dtype), weights_TK.numel()
    drows_MD = torch.empty_like(rows_MD, memory_format=torch.contiguous_format)
    dweights = weights_TK.new_zeros(slots + 1)  # the last is for the rows that serve no slot
    weights = weights_TK.flatten()
    block = _BLOCK if rows_MD.device.type == "cpu" else rows_MD.numel() + 1
    for rows in row_blocks(len(rows_MD), rows_MD.shape[1], block):
        order, drows = order_M[rows], drows_MD[rows]
        absent, held = order < 0, order.clamp(min=0)
        dy = dy_TD.index_select(0, held // weights_TK.shape[1]).to(accumulate)
        dots = (dy * rows_MD[rows]).sum(1).to(weights.dtype)
        dweights.scatter_(0, torch.where(absent, slots, order), dots)
        weight = weights.index_select(0, held).to(accumulate).unsqueeze(1)
        if accumulate == drows.dtype:
            torch.mul(dy, weight, out=drows)
        else:
            drows.copy_(dy.mul_(weight))
        if not drows.is_cpu or absent.any():
            drows.masked_fill_(absent.unsqueeze(1), 0.0)
    return drows_MD, dweights[:slots].view_as(weights_TK).clone()


def _unpermute_backward_fake(
    dy: Tensor, rows: Tensor, order: Tensor, weights: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _gradient(ctx: Any, drows: Tensor) -> Tensor:
    """Sum the gradients of the rows of each token."""
    dx: Tensor = _UNPERMUTE(drows, *ctx.saved_tensors, None, *ctx.slots, ctx.backend)
    return dx


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, indices: Tensor, experts: int, backend: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, counts, order = below_autograd(_PERMUTE, x, indices, experts, backend)
        ctx.save_for_backward(order)
        ctx.slots, ctx.backend = indices.shape, backend
        ctx.mark_non_differentiable(counts, order)
        return rows, counts, order

    @staticmethod
    def backward(ctx: Any, drows: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        first_derivative_only("permute")
        return _gradient(ctx, drows), None, None, None


class _PermuteFp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, *rest: Any) -> _Fp8Parts:
        parts: _Fp8Parts = below_autograd(_PERMUTE_FP8, x, indices, *rest)
        ctx.save_for_backward(parts[-1])
        ctx.slots, ctx.backend = indices.shape, rest[-1]
        ctx.mark_non_differentiable(*parts[1:])
        ctx.set_materialize_grads(False)
        return parts

    @staticmethod
    def backward(ctx: Any, drows: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        first_derivative_only("permute_fp8")
        dx = None if drows is None else _gradient(ctx, drows)
        return dx, None, None, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, weights: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(rows, order, weights)
        ctx.backend = rest[-1]
        y: Tensor = below_autograd(_UNPERMUTE, rows, order, weights, *rest)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("unpermute")
        drows, dweights = _UNPERMUTE_BACKWARD(dy, *ctx.saved_tensors, ctx.backend)
        return drows, None, dweights, None, None, None


_PERMUTE = register(
    "permute_forward(Tensor x, Tensor indices, int experts, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _permute, _permute_fake, _Permute,
)  # fmt: skip
_PERMUTE_FP8 = register(
    "permute_fp8_forward(Tensor x, Tensor indices, int experts, str scaling, bool power_of_two,"
    " str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _permute_fp8, _permute_fp8_fake, _PermuteFp8,
)  # fmt: skip
_UNPERMUTE = register(
    "unpermute_forward(Tensor rows, Tensor order, Tensor? weights, SymInt tokens, SymInt top_k,"
    " str? backend) -> Tensor",
    _unpermute, _unpermute_fake, _Unpermute,
)  # fmt: skip
_UNPERMUTE_BACKWARD = register(
    "unpermute_backward(Tensor dy, Tensor rows, Tensor order, Tensor weights, str? backend)"
    " -> (Tensor, Tensor)",
    _unpermute_backward, _unpermute_backward_fake,
)  # fmt: skip


def _check(op: str, x: Tensor, integers: str, indices: Tensor) -> None:
    if x.dtype not in _DTYPES or indices.dtype != torch.int64:
        raise ValueError(
            f"{op}: {'rows' if integers == 'order' else 'x'} must be float16, bfloat16, float32 or "
            f"float64 and {integers} int64, got {x.dtype} and {indices.dtype}"
        )


def _check_tokens(op: str, x: Tensor, indices: Tensor, experts: int) -> None:
    if experts < 1:
        raise ValueError(f"{op}: experts must be at least 1, got {experts}")
    need_tensors(op, x=x, indices=indices)
    if x.dim() != 2 or indices.dim() != 2 or len(x) != len(indices):
        raise ValueError(
            f"{op}: x must be [T, D] and indices [T, k], got {[*x.shape]} and {[*indices.shape]}"
        )
    _check(op, x, "indices", indices)


def permute(
    x: Tensor, indices: Tensor, experts: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy each token once for each of its experts, sorted by expert.

    Args:
        x: Tokens `[T, D]`; float16, bfloat16, float32 or float64.
        indices: Experts of each token `[T, k]` int64, from 0 to `experts` - 1; -1 gives no row.
        experts: How many there are.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        rows `[T k, D]` in the dtype of `x`, of which those beyond the sum of the counts are zero;
        counts `[experts]` int64; order `[T k]` int64, for `unpermute`.

    Raises:
        ValueError: If `indices` does not have a row for each token, a dtype is not one of these,
            or, on the CPU, `indices` holds `experts` or more (elsewhere these give no row: to know
            would be to wait for the device).
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    _check_tokens("permute", x, indices, experts)
    rows, counts, order = _PERMUTE(x, indices, experts, backend)
    return rows, counts, order


def permute_fp8(
    x: Tensor, indices: Tensor, experts: int, *, scaling: Grouping = "row",
    power_of_two: bool = False, backend: str | None = None,
) -> tuple[Fp8, Tensor, Tensor]:  # fmt: skip
    """Quantise each token to FP8 (e4m3) once, and copy it once for each of its experts.

    The same bits as `fp8_quantize` of the rows of `permute`.

    Args:
        x: Tokens `[T, D]`; float16, bfloat16, float32 or float64, taken as float32.
        indices: Experts of each token `[T, k]` int64, from 0 to `experts` - 1; -1 gives no row.
        experts: How many there are.
        scaling: What shares a scale: a "row", or a "block" of 128 elements of a row.
        power_of_two: Whether scales are rounded up to powers of two.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        rows, of data `[T k, D]`, whose carrier takes their gradient; counts and order as of
        `permute`.

    Raises:
        ValueError: As of `permute`, or if `scaling` is not one of these.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    _check_tokens("permute_fp8", x, indices, experts)
    check_grouping("permute_fp8", scaling)
    args = experts, scaling, power_of_two, backend
    carrier, codes, scale, counts, order = _PERMUTE_FP8(x, indices, *args)
    return Fp8(codes.view(torch.float8_e4m3fn), scale, carrier), counts, order


def unpermute(
    rows: Tensor, order: Tensor, weights: Tensor, *, backend: str | None = None
) -> Tensor:
    """Sum the rows of each token, times their weights.

    Args:
        rows: `[M, D]`, dtypes as of `permute`; a row whose order is -1 is not read.
        order: The slot of each row `[M]` int64, from `permute`, or its first M elements.
        weights: `[T, k]`, float32 at least.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `[T, D]` in the dtype of `rows`, summed in float32 at least; a token without rows is zero.

    Raises:
        ValueError: If `order` does not have an element for each row, or a dtype is none of these.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    need_tensors("unpermute", rows=rows, order=order, weights=weights)
    if weights.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"unpermute: weights must be float32 or float64, got {weights.dtype}")
    if rows.dim() != 2 or weights.dim() != 2 or order.shape != rows.shape[:1]:
        raise ValueError(
            f"unpermute: rows must be [M, D], order [M] and weights [T, k], got {[*rows.shape]}, "
            f"{[*order.shape]} and {[*weights.shape]}"
        )
    if len(rows) > weights.numel():
        raise ValueError(
            f"unpermute: there must be at most T k rows, got {len(rows)} for weights "
            f"{[*weights.shape]}"
        )
    _check("unpermute", rows, "order", order)
    y: Tensor = _UNPERMUTE(rows, order, weights, *weights.shape, backend)
    return y
