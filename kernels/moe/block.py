"""The experts of a layer as one operator, which keeps for the backward next to nothing.

    rows[m] = x[order[m] // k]                          as `permute` sorts them
    h[m] = rows[m] gate_up[e]^T,    a[m] = silu(gate) * up,    h = [gate, up]
    y[t] = sum over j of w[t, j] a[m] down[e]^T,    m the row of slot t k + j

    b[m] = dy[order[m] // k] down[e]                    what w a would have as its gradient
    dw[t, j] = b[m] . a[m]                              the product a down^T is not needed
    da[m] = w b[m],    dh = the gradient of SwiGLU at da
    ddown[e] = sum over the rows m of e of dy[order[m] // k]^T (w a[m])
    dgate_up[e] = sum over the rows m of e of dh[m]^T rows[m],    dx[t] = sum of dh[m] gate_up[e]

Shapes: T tokens, D width, k experts a token, E experts, F hidden width, M = T k rows. Bound by the
matrix units where experts have many rows: 6 M D F FLOPs forward, 12 backward, and 4 more with
`recompute`; where they have few, by the memory of the weights, 3 E F D elements. Saved: x, T D
elements, h, 2 M F, and the routing, two numbers a row. With `recompute` h is made again, and what
is saved does not grow with k but for the routing. Layers of `permute`, `grouped_gemm`, `swiglu`,
`unpermute` save 2 M D + 3 M F. Rows are gathered from x and dy again where they are needed; the
Triton products read them there and never have a permuted copy.

Source: Guo et al. 2025, https://arxiv.org/abs/2512.14080, section 3 (what is saved, and dw from b).
"""

from typing import Any

import torch
from torch import Tensor

from ..activation.glu import backward_cpu, swiglu, swiglu_reference
from ..backends import case_key, choose
from ..gemm.grouped import grouped_gemm, grouped_gemm_reference, grouped_gemm_weight_gradient
from ..library import (
    autocast,
    below_autograd,
    first_derivative_only,
    need_tensors,
    register,
    row_blocks,
    wide,
)
from .permutation import permute, permute_reference, unpermute, unpermute_reference

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Four = tuple[Tensor, Tensor, Tensor, Tensor]


def moe_block_reference(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, indices_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Specify `moe_block`, differentiably; the tests hold every backend to this."""
    rows_MD, counts_E, order_M = permute_reference(x_TD, indices_TK, gate_up_EFD.shape[0])
    a_MF = swiglu_reference(grouped_gemm_reference(rows_MD, gate_up_EFD, counts_E))
    return unpermute_reference(
        grouped_gemm_reference(a_MF, down_EDF, counts_E), order_M, weights_TK
    )


def _serve(
    x: Tensor, down: Tensor, weights: Tensor, backend: str | None
) -> tuple[bool, str | None, str | None]:
    """Return whether Triton serves the whole, else the backends of the products and of the rest."""
    case = None
    if x.is_cuda:
        experts, width, hidden = down.shape
        case = case_key(experts=experts, width=width, hidden=hidden, rows=weights.numel())
    chosen = choose("moe_block", x.device, x.dtype, backend, case)
    if chosen == "torch":
        return False, "torch", None
    return chosen == "triton", backend, backend


def _forward(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, keep: bool,
    backend: str | None,
) -> _Four:  # fmt: skip
    """Return y, h (empty unless it is to be kept), the counts and the order."""
    experts = gate_up.shape[0]
    if indices.is_cpu and indices.numel() and int(indices.max()) >= experts:
        raise ValueError(f"moe_block: indices must be below {experts}, got {int(indices.max())}")
    whole, products, parts = _serve(x, down, weights, backend)
    if whole:
        from .block_triton import forward

        y, h, counts, order = forward(x, gate_up, down, indices, weights)
    else:
        rows, counts, order = permute(x, indices, experts, backend=parts)
        h = grouped_gemm(rows, gate_up, counts, backend=products)
        out = grouped_gemm(swiglu(h, backend=parts), down, counts, backend=products)
        y = unpermute(out, order, weights, backend=parts)
    return y, h if keep else x.new_empty(0), counts, order


def _forward_fake(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, keep: bool, *_: Any
) -> _Four:
    rows = indices.numel()
    h = x.new_empty(rows, gate_up.shape[1]) if keep else x.new_empty(0)
    counts, order = indices.new_empty(gate_up.shape[0]), indices.new_empty(rows)
    return x.new_empty(x.shape), h, counts, order


def _between(
    b_MF: Tensor, h_MF: Tensor, weights_TK: Tensor, order_M: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dh, w a and the gradient of the routing weights; rows of nobody are anything."""
    accumulate, slots = wide(b_MF.dtype), weights_TK.numel()
    weights_M = weights_TK.flatten()[order_M.clamp(min=0)].to(accumulate).unsqueeze(1)
    dh_MF, a_MF = torch.empty_like(h_MF), torch.empty_like(b_MF)
    dots_M = b_MF.new_empty(len(b_MF), dtype=accumulate)
    for rows in row_blocks(*b_MF.shape) if b_MF.is_cpu else [slice(len(b_MF))]:
        b, weight, a = b_MF[rows].to(accumulate), weights_M[rows], a_MF[rows]
        dh_MF[rows] = backward_cpu(b * weight, h_MF[rows], a)
        dots_M[rows] = (b * a).sum(1)
        a.mul_(weight)
    dweights = weights_TK.new_zeros(slots + 1)  # the last is for the rows that serve no slot
    dweights.scatter_(0, torch.where(order_M < 0, slots, order_M), dots_M.to(dweights.dtype))
    return dh_MF, a_MF, dweights[:slots].view_as(weights_TK).clone()


def _backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, h: Tensor,
    counts: Tensor, order: Tensor, kept: bool, wanted: list[bool], backend: str | None,
) -> _Four:  # fmt: skip
    """Return the gradients of x, gate_up, down (empty where not wanted) and the weights."""
    whole, products, parts = _serve(x, down, weights, backend)
    if whole:
        from .block_triton import backward

        return backward(dy, x, gate_up, down, weights, h, counts, order, kept, wanted)
    (tokens, top_k), nothing = weights.shape, x.new_empty(0)
    source = order.clamp(min=0) // max(top_k, 1)
    rows = nothing if kept and not wanted[1] else x.index_select(0, source)
    if not kept:
        h = grouped_gemm(rows, gate_up, counts, backend=products)
    dy = dy.index_select(0, source)
    b = grouped_gemm(dy, down.transpose(1, 2), counts, backend=products)
    dh, a, dweights = _between(b, h, weights, order)
    dx = dgate_up = ddown = nothing
    if wanted[2]:
        ddown = grouped_gemm_weight_gradient(dy, a, counts, backend=products)
    if wanted[1]:
        dgate_up = grouped_gemm_weight_gradient(dh, rows, counts, backend=products)
    if wanted[0]:
        drows = grouped_gemm(dh, gate_up.transpose(1, 2), counts, backend=products)
        dx = torch.ops.warploom.unpermute_forward(drows, order, None, tokens, top_k, parts)
    return dx, dgate_up, ddown, dweights


def _backward_fake(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, h: Tensor,
    counts: Tensor, order: Tensor, kept: bool, wanted: list[bool], backend: str | None,
) -> _Four:  # fmt: skip
    dx, dgate_up, ddown = (
        t.new_empty(t.shape if asked else (0,))
        for t, asked in zip((x, gate_up, down), wanted, strict=True)
    )
    return dx, dgate_up, ddown, weights.new_empty(weights.shape)


class _MoeBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor,
        keep: bool, backend: str | None,
    ) -> _Four:  # fmt: skip
        found: _Four = below_autograd(_FORWARD, x, gate_up, down, indices, weights, keep, backend)
        ctx.save_for_backward(x, gate_up, down, weights, *found[1:])
        ctx.kept, ctx.backend = keep, backend
        ctx.mark_non_differentiable(*found[1:])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        first_derivative_only("moe_block")
        if dy is None:
            return (None,) * 7
        wanted = list(ctx.needs_input_grad[:3])
        found = _BACKWARD(dy, *ctx.saved_tensors, ctx.kept, wanted, ctx.backend)
        dx, dgate_up, ddown = (d if w else None for d, w in zip(found[:3], wanted, strict=True))
        return dx, dgate_up, ddown, None, found[3], None, None


_FORWARD = register(
    "moe_block_forward(Tensor x, Tensor gate_up, Tensor down, Tensor indices, Tensor weights,"
    " bool keep, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _MoeBlock,
)  # fmt: skip
_BACKWARD = register(
    "moe_block_backward(Tensor dy, Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor h,"
    " Tensor counts, Tensor order, bool kept, bool[] wanted, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip


def _check(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> None:
    if x.dtype not in _DTYPES or {gate_up.dtype, down.dtype} != {x.dtype}:
        raise ValueError(
            f"moe_block: x, gate_up and down must have one dtype of float16, bfloat16, float32 and "
            f"float64, got {x.dtype}, {gate_up.dtype} and {down.dtype}"
        )
    if indices.dtype != torch.int64 or weights.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"moe_block: indices must be int64 and weights float32 or float64, got {indices.dtype} "
            f"and {weights.dtype}"
        )
    fits = x.dim() == indices.dim() == 2 and gate_up.dim() == down.dim() == 3
    if not fits or indices.shape != weights.shape or x.shape[0] != indices.shape[0]:
        raise ValueError(
            f"moe_block: x must be [T, D], gate_up [E, 2F, D], down [E, D, F], indices and weights "
            f"[T, k], got {[*x.shape]}, {[*gate_up.shape]}, {[*down.shape]}, {[*indices.shape]} "
            f"and {[*weights.shape]}"
        )
    experts, width, hidden = down.shape
    if experts < 1 or gate_up.shape != (experts, 2 * hidden, width) or x.shape[1] != width:
        raise ValueError(
            f"moe_block: gate_up must be [E, 2F, D] and down [E, D, F] for x [T, D], E at least 1, "
            f"got {[*gate_up.shape]} and {[*down.shape]} for {[*x.shape]}"
        )


def moe_block(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, *,
    recompute: bool = False, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Send each token through its experts, SwiGLU layers, and sum their answers by weight.

    Args:
        x: Tokens `[T, D]`; float16, bfloat16, float32 or float64. Under autocast it and both
            weights are cast, as in `linear`.
        gate_up: `[E, 2F, D]` in the dtype of `x`: each expert's gate, then its up.
        down: `[E, D, F]` in the dtype of `x`.
        indices: Experts of each token `[T, k]` int64, from `route`; -1 is none.
        weights: Of these `[T, k]`, float32 or float64.
        recompute: Whether the first product is computed again in the backward, for which then x
            and the routing alone are kept.
        backend: `reference` or `triton`, for all parts, or `torch`, PyTorch's grouped product as
            `grouped_gemm` has it, and what is proven for the rest; None takes the fastest that is
            proven here, for the whole or else for each part.

    Returns:
        `[T, D]` in the dtype of `x`, or in autocast's; a token without experts is zero.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If shapes or dtypes do not fit, or, on the CPU, `indices` holds E or more
            (elsewhere these give no row: to know would be to wait for the device).
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    need_tensors("moe_block", x=x, gate_up=gate_up, down=down, indices=indices, weights=weights)
    x, gate_up, down = autocast(x, gate_up, down)
    _check(x, gate_up, down, indices, weights)
    keep = torch.is_grad_enabled() and not recompute
    y: Tensor = _FORWARD(x, gate_up, down, indices, weights, keep, backend)[0]
    return y
