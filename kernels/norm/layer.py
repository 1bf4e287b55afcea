"""Layer normalisation over the last dimension, with the residual addition fused.

    h = x + residual                                  (rounded to the dtype of x; or h = x)
    n = (h - mean(h)) rstd,    rstd = 1 / sqrt(mean((h - mean(h))^2) + eps)
    y = n * weight + bias

    dh = rstd * (g - mean(g) - n * mean(g * n)) + dh from above,    g = dy * weight
    dx = dresidual = dh
    dweight = sum over tokens of dy * n,    dbias = sum over tokens of dy

The variance is that of the centred values, never a difference of two large numbers.

Shapes: T tokens, D model width. Bound by memory. Roof of the forward: 2 T D elements (4 T D with
the residual) / bandwidth; of the backward, which reads dy and h and writes dh: 3 T D.
Saved for the backward: h, weight, rstd and mean; y is not. `layer_norm_fp8` quantises y in the same
pass, from the float32 that y would be rounded from.

Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450, equation 3.
"""

from typing import Any, overload

import torch
from torch import Tensor

from ..backends import choose
from ..library import below_autograd, first_derivative_only, register, wide
from ..peers import PEERS, serve
from ..quant.fp8 import Fp8, Grouping, carrier_of, fp8_rows, fp8_rows_fake
from .common import alike, check, quantiser

_EPS = 1e-5


def layer_norm_reference(
    x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None = None, *, residual: Tensor | None = None,
    eps: float = _EPS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Specify `layer_norm`, differentiably: y and the normalised sum.

    Args:
        x_TD: Activations `[..., D]`.
        weight_D: Scale `[D]`.
        bias_D: Shift `[D]`.
        residual: Added first, `[..., D]`.
        eps: Added to the variance; dimensionless.

    Returns:
        y and h, both `[..., D]` in the dtype of `x_TD`.
    """
    h_TD = x_TD if residual is None else x_TD + residual
    h = h_TD.to(wide(h_TD.dtype))
    h = h - h.mean(-1, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight_D.to(h.dtype)
    return (y if bias_D is None else y + bias_D.to(h.dtype)).to(x_TD.dtype), h_TD


def _narrow(h: Tensor) -> Tensor:
    """Leave what PyTorch's own operator normalises in float32 by itself; convert the rest."""
    return h if h.device.type == "cpu" else h.to(wide(h.dtype))


def _normalise(
    h_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Call PyTorch's operator with float32 weights, which also makes its statistics float32."""
    weight = weight_D.to(wide(h_TD.dtype))
    bias = None if bias_D is None else bias_D.to(weight.dtype)
    y_TD, mean, rstd = torch.native_layer_norm(h_TD, weight.shape, weight, bias, eps)
    return y_TD, rstd.view(-1), mean.view(-1)


def _sum(x_TD: Tensor, residual: Tensor | None) -> Tensor:
    return x_TD if residual is None else torch.add(x_TD, residual).contiguous()


def _forward(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None, residual: Tensor | None, eps: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x_TD = x.reshape(-1, x.shape[-1])
    other = None if residual is None else residual.reshape(x_TD.shape)
    if choose("layer_norm", x.device, x.dtype, backend) == "triton":
        from .layer_triton import normalise

        y_TD, h_TD, rstd_T, mean_T, _ = normalise(x_TD, weight_D, bias_D, other, eps, centred=True)
    else:
        h_TD = _sum(x_TD, other)
        y_TD, rstd_T, mean_T = _normalise(_narrow(h_TD), weight_D, bias_D, eps)
        y_TD = y_TD.to(x.dtype)
    rows, h = x.shape[:-1], x.new_empty(0) if residual is None else h_TD.view(x.shape)
    return y_TD.view(x.shape), h, rstd_T.view(rows), mean_T.view(rows)


def _forward_fake(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=wide(x.dtype))
    return x.new_empty(x.shape), h, rstd, torch.empty_like(rstd)


def _forward_fp8(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None, residual: Tensor | None, eps: float,
    scaling: Grouping, power_of_two: bool, backend: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    x_TD = x.reshape(-1, x.shape[-1])
    other = None if residual is None else residual.reshape(x_TD.shape)
    if quantiser("layer_norm", x, scaling, backend) == "triton":
        from .layer_triton import normalise

        data, h_TD, rstd_T, mean_T, scale = normalise(
            x_TD, weight_D, bias_D, other, eps, centred=True, scaling=scaling,
            power_of_two=power_of_two,
        )  # fmt: skip
    else:
        h_TD = _sum(x_TD, other)
        y_TD, rstd_T, mean_T = _normalise(h_TD.to(wide(x.dtype)), weight_D, bias_D, eps)
        data, scale = fp8_rows(y_TD.float(), scaling, torch.float8_e4m3fn, power_of_two)
    rows, h = x.shape[:-1], x.new_empty(0) if residual is None else h_TD.view(x.shape)
    scale = scale.view(*rows, scale.shape[-1])
    return (
        carrier_of(x),
        h,
        rstd_T.view(rows),
        mean_T.view(rows),
        data.view(x.shape).view(torch.uint8),
        scale,
    )


def _forward_fp8_fake(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None, residual: Tensor | None, eps: float,
    scaling: Grouping, power_of_two: bool, backend: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    _, *statistics = _forward_fake(x, weight_D, bias_D, residual)
    return carrier_of(x), *statistics, *fp8_rows_fake(x, x.shape, scaling)


def _backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight_D: Tensor, bias_D: Tensor | None, rstd: Tensor,
    mean: Tensor, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape, none = (-1, h.shape[-1]), weight_D.new_empty(0)
    dy_TD, h_TD = dy.reshape(shape), h.reshape(shape)
    dh_TD = None if dh is None else dh.reshape(shape)
    rstd_T, mean_T = rstd.reshape(-1), mean.reshape(-1)
    if choose("layer_norm", h.device, h.dtype, backend) == "triton":
        from .layer_triton import gradients

        dx_TD, dweight_D, dbias_D = gradients(dy_TD, dh_TD, h_TD, weight_D, bias_D, rstd_T, mean_T)
        return dx_TD.view(h.shape), dweight_D, none if dbias_D is None else dbias_D
    weight = weight_D.to(wide(h.dtype))
    wanted = [True, True, bias_D is not None]
    args = mean_T.unsqueeze(1), rstd_T.unsqueeze(1), weight, weight if wanted[2] else None, wanted
    dx_TD, dweight_D, dbias = torch.ops.aten.native_layer_norm_backward(
        _narrow(dy_TD), _narrow(h_TD), weight.shape, *args
    )
    dx_TD = dx_TD.to(h.dtype) if dh_TD is None else torch.add(dx_TD, dh_TD).to(h.dtype)
    dbias_D = none if bias_D is None else dbias.to(bias_D.dtype)
    return dx_TD.view(h.shape), dweight_D.to(weight_D.dtype), dbias_D


def _backward_fake(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight_D: Tensor, bias_D: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dbias_D = weight_D.new_empty(0) if bias_D is None else bias_D.new_empty(bias_D.shape)
    return h.new_empty(h.shape), weight_D.new_empty(weight_D.shape), dbias_D


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_D: Tensor, bias_D: Tensor | None, residual: Tensor | None,
        eps: float, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        op = _FORWARD if len(rest) == 1 else _FORWARD_FP8
        parts: tuple[Tensor, ...] = below_autograd(op, x, weight_D, bias_D, residual, eps, *rest)
        _, h, rstd, mean, *codes = parts
        ctx.fused, ctx.rest = residual is not None, rest
        ctx.save_for_backward(h if ctx.fused else x, weight_D, bias_D, rstd, mean)
        ctx.mark_non_differentiable(rstd, mean, *codes, *(() if ctx.fused else (h,)))
        ctx.set_materialize_grads(False)
        return parts

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        first_derivative_only("layer_norm")
        none = (None,) * (1 + len(ctx.rest))
        if dy is None:
            return dh, None, None, dh, *none
        saved, dh = ctx.saved_tensors, dh if ctx.fused else None
        dx, dweight_D, dbias_D = _BACKWARD(dy, dh, *saved, ctx.rest[-1])
        dbias_D = None if saved[2] is None else dbias_D
        return dx, dweight_D, dbias_D, dx if ctx.fused else None, *none


_FORWARD = register(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps,"
    " str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _LayerNorm,
)  # fmt: skip
_FORWARD_FP8 = register(
    "layer_norm_fp8_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps,"
    " str scaling, bool power_of_two, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_fp8, _forward_fp8_fake, _LayerNorm,
)  # fmt: skip
_BACKWARD = register(
    "layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor? bias, Tensor rstd,"
    " Tensor mean, str? backend) -> (Tensor, Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, residual: None = None,
    eps: float = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, residual: Tensor, eps: float = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None,
    eps: float = _EPS, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Normalise each row of `x` (plus `residual`) to mean 0 and variance 1, scale and shift it.

    Args:
        x: Activations `[..., D]`, any strides; float16, bfloat16, float32 or float64.
        weight: Scale `[D]`, any of these dtypes.
        bias: Shift `[D]`, any of these dtypes; None adds none.
        residual: Added to `x` before, `[..., D]`; the sum is rounded to the dtype of both, and the
            rounded sum is what is normalised. Of two dtypes, as under autocast, the sum has the
            wider one.
        eps: Added to the variance; dimensionless.
        backend: `reference` or `triton`, or a peer, `liger`, `te` or `apex`; None takes the fastest
            of ours that is proven here.

    Returns:
        y, `[..., D]` in the dtype of `x`; with `residual` the pair (y, x + residual). Statistics
        and gradients are accumulated in float32, in float64 for float64.

    Raises:
        ValueError: If the shapes do not match, the width is 0, a dtype is not supported, or `eps`
            is negative or not finite.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    check("layer_norm", x, weight, bias, residual, eps)
    if backend in PEERS:
        found: Tensor | tuple[Tensor, Tensor] = serve(
            "layer_norm", backend, x, weight, bias, residual=residual, eps=eps
        )
        return found
    dtype = x.dtype
    if residual is not None and residual.dtype != dtype:
        x, residual = alike(x, residual)
    y, h, _, _ = _FORWARD(x, weight, bias, residual, eps, backend)
    y = y.to(dtype)
    return y if residual is None else (y, h)


def layer_norm_fp8(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None,
    eps: float = _EPS, scaling: Grouping = "row", power_of_two: bool = False,
    backend: str | None = None,
) -> Fp8 | tuple[Fp8, Tensor]:  # fmt: skip
    """Compute `layer_norm` and quantise its result to float8_e4m3fn in the same pass.

    Args:
        x: As in `layer_norm`.
        weight: The same.
        bias: The same.
        residual: The same.
        eps: The same.
        scaling: What shares a scale: a "row", or a "block" of 128 elements of one.
        power_of_two: Whether scales are rounded up to powers of two.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        The quantised y, bit for bit that of the unfused float32 result before it is rounded to the
        dtype of `x`; with `residual` the pair (y, x + residual). The backward is that of
        `layer_norm`, at the gradient of y's carrier.

    Raises:
        ValueError: As `layer_norm`; if `scaling` is neither.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    check("layer_norm_fp8", x, weight, bias, residual, eps)
    if residual is not None:
        x, residual = alike(x, residual)
    carrier, h, _, _, data, scale = _FORWARD_FP8(
        x, weight, bias, residual, eps, scaling, power_of_two, backend
    )
    y = Fp8(data=data.view(torch.float8_e4m3fn), scale=scale, carrier=carrier)
    return y if residual is None else (y, h)
