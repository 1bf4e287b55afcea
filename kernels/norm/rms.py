"""Root-mean-square normalisation over the last dimension, with the residual addition fused.

    h = x + residual                                  (rounded to the dtype of x; or h = x)
    y = h * rstd * weight,    rstd = 1 / sqrt(mean(h^2) + eps)

    dh = rstd * (g - h * rstd^2 * mean(g * h)) + dh from above,    g = dy * weight
    dx = dresidual = dh
    dweight = sum over tokens of dy * h * rstd

Shapes: T tokens, D model width. Bound by memory. Roof of the forward: 2 T D elements (4 T D with
the residual) / bandwidth; of the backward, which reads dy and h and writes dh: 3 T D.
Saved for the backward: h, weight and rstd; y is not.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4.
"""

from typing import Any, overload

import torch
from torch import Tensor

from ..backends import choose
from ..library import below_autograd, first_derivative_only, register, row_blocks, wide

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BLOCK = 1 << 21  # elements a block of rows: the passes are few, so that calls cost more than cache


def rms_norm_reference(
    x_TD: Tensor, weight_D: Tensor, *, residual: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Specify `rms_norm`, differentiably: y and the normalised sum; tests hold every backend to it.

    Args:
        x_TD: Activations `[..., D]`.
        weight_D: Scale `[D]`.
        residual: Added first, `[..., D]`.
        eps: Added to the mean square; dimensionless.

    Returns:
        y and h, both `[..., D]` in the dtype of `x_TD`.
    """
    h_TD = x_TD if residual is None else x_TD + residual
    h = h_TD.to(wide(h_TD.dtype))
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * rstd * weight_D.to(h.dtype)).to(x_TD.dtype), h_TD


def _forward_cpu(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise rows with few passes: the norm, two products in place, one rounding."""
    accumulate = wide(x_TD.dtype)
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    rstd_T = torch.empty(x_TD.shape[0], dtype=accumulate, device=x_TD.device)
    weight = weight_D.to(accumulate)
    for rows in row_blocks(x_TD.shape[0], x_TD.shape[1], _BLOCK):
        h, rstd = x_TD[rows].to(accumulate), rstd_T[rows].unsqueeze(1)
        torch.linalg.vector_norm(h, dim=-1, keepdim=True, out=rstd)
        rstd.square_().div_(x_TD.shape[1]).add_(eps).rsqrt_()
        if accumulate == x_TD.dtype:
            torch.mul(h, rstd, out=y_TD[rows]).mul_(weight)
        else:
            y_TD[rows].copy_(h.mul_(rstd).mul_(weight))
    return y_TD, rstd_T


def _backward_cpu(
    dy_TD: Tensor, dh_TD: Tensor | None, h_TD: Tensor, weight_D: Tensor, rstd_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Share the product dy * h: times weight it gives mean(g * h), times rstd dweight."""
    accumulate = wide(h_TD.dtype)
    dx_TD = torch.empty_like(h_TD, memory_format=torch.contiguous_format)
    weight = weight_D.to(accumulate)
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    for rows in row_blocks(h_TD.shape[0], h_TD.shape[1], _BLOCK):
        h, dy, rstd = h_TD[rows].to(accumulate), dy_TD[rows].to(accumulate), rstd_T[rows]
        product = h * dy
        dweight.addmv_(product.t(), rstd)
        slope = torch.mv(product, weight).mul_(rstd).mul_(rstd).mul_(rstd)
        dx = dx_TD[rows] if accumulate == h_TD.dtype else product
        torch.mul(dy, weight, out=dx).mul_(rstd.unsqueeze(1))
        dx.addcmul_(h, slope.unsqueeze(1), value=-1.0 / h_TD.shape[1])
        if dh_TD is not None:
            dx.add_(dh_TD[rows])
        if dx is product:
            dx_TD[rows].copy_(dx)
    return dx_TD, dweight.to(weight_D.dtype)


def _forward(
    x: Tensor, weight_D: Tensor, residual: Tensor | None, eps: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    x_TD = x.reshape(-1, x.shape[-1])
    served = choose("rms_norm", x.device, x.dtype, backend)
    if served in ("triton", "cuda"):
        if served == "triton":
            from .rms_triton import forward
        else:
            from .rms_cuda import forward
        y_TD, h_TD, rstd_T = forward(
            x_TD, weight_D, None if residual is None else residual.reshape(x_TD.shape), eps
        )
    else:
        h_TD = x_TD if residual is None else torch.add(x, residual).reshape(x_TD.shape)
        y_TD, rstd_T = _forward_cpu(h_TD, weight_D, eps)
    h = x.new_empty(0) if residual is None else h_TD.view(x.shape)
    return y_TD.view(x.shape), h, rstd_T.view(x.shape[:-1])


def _forward_fake(
    x: Tensor, weight_D: Tensor, residual: Tensor | None, eps: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), h, x.new_empty(x.shape[:-1], dtype=wide(x.dtype))


def _backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight_D: Tensor,
    rstd: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    shape = (-1, h.shape[-1])
    args = (
        dy.reshape(shape),
        None if dh is None else dh.reshape(shape),
        h.reshape(shape),
        weight_D,
        rstd.reshape(-1),
    )
    served = choose("rms_norm", h.device, h.dtype, backend)
    if served in ("triton", "cuda"):
        if served == "triton":
            from .rms_triton import backward
        else:
            from .rms_cuda import backward
        dx_TD, dweight_D = backward(*args)
    else:
        dx_TD, dweight_D = _backward_cpu(*args)
    return dx_TD.view(h.shape), dweight_D


def _backward_fake(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight_D: Tensor,
    rstd: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), weight_D.new_empty(weight_D.shape)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_D: Tensor, residual: Tensor | None, eps: float, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, h, rstd = below_autograd(_FORWARD, x, weight_D, residual, eps, backend)
        ctx.fused, ctx.backend = residual is not None, backend
        ctx.save_for_backward(h if ctx.fused else x, weight_D, rstd)
        ctx.mark_non_differentiable(*((rstd,) if ctx.fused else (h, rstd)))
        ctx.set_materialize_grads(False)
        return y, h, rstd

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh: Tensor | None, _drstd: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        first_derivative_only("rms_norm")
        if dy is None:
            return dh, None, dh, None, None
        h, weight_D, rstd = ctx.saved_tensors
        dx, dweight_D = _BACKWARD(dy, dh if ctx.fused else None, h, weight_D, rstd, ctx.backend)
        return dx, dweight_D, dx if ctx.fused else None, None, None


_FORWARD = register(
    "rms_norm_forward(Tensor x, Tensor weight, Tensor? residual, float eps, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _RmsNorm,
)
_BACKWARD = register(
    "rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, str? backend)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: None = None,
    eps: float = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor, eps: float = ..., backend: str | None = ...
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise each row of `x` (plus `residual`) to unit root-mean-square and scale it.

    Args:
        x: Activations `[..., D]`, any strides; float16, bfloat16, float32 or float64.
        weight: Scale `[D]`, any of these dtypes.
        residual: Added to `x` before, `[..., D]` in the dtype of `x`; the sum is rounded to that
            dtype, and the rounded sum is what is normalised.
        eps: Added to the mean square; dimensionless.
        backend: `reference`, `triton` or `cuda`; None takes the fastest that is proven here.

    Returns:
        y, `[..., D]` in the dtype of `x`; with `residual` the pair (y, x + residual). Statistics
        and gradients are accumulated in float32, in float64 for float64.

    Raises:
        ValueError: If the shapes do not match, the width is 0, a dtype is not supported, or `eps`
            is negative or not finite.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    if weight.shape != x.shape[-1:] or not weight.numel():
        raise ValueError(f"rms_norm: weight has shape {[*weight.shape]}, x has {[*x.shape]}")
    if x.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        raise ValueError(
            f"rms_norm: x and weight must be float16, bfloat16, float32 or float64, "
            f"got {x.dtype} and {weight.dtype}"
        )
    if not 0 <= eps < float("inf"):
        raise ValueError(f"rms_norm: eps must be at least 0 and finite, got {eps}")
    if residual is None:
        y: Tensor = _FORWARD(x, weight, None, eps, backend)[0]
        return y
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"rms_norm: residual must have the shape and dtype of x ({[*x.shape]}, {x.dtype}), "
            f"got {[*residual.shape]}, {residual.dtype}"
        )
    y, h, _ = _FORWARD(x, weight, residual, eps, backend)
    return y, h
