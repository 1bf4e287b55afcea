"""Root-mean-square normalisation over the last dimension, with the residual addition fused.

    h = x + residual                                  (rounded to the dtype of x; or h = x)
    y = h * rstd * weight,    rstd = 1 / sqrt(mean(h^2) + eps)

    dh = rstd * (g - h * rstd^2 * mean(g * h)) + dh from above,    g = dy * weight
    dx = dresidual = dh
    dweight = sum over tokens of dy * h * rstd

Shapes: T tokens, D model width. Bound by memory. Roof of the forward: 2 T D elements (4 T D with
the residual) / bandwidth; of the backward, which reads dy and h and writes dh: 3 T D.
Saved for the backward: h, weight and rstd; y is not. `rms_norm_fp8` quantises y in the same pass,
from the float32 that y would be rounded from: it writes half the bytes.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4.
"""

from typing import Any, overload

import torch
from torch import Tensor

from .. import cpu
from ..backends import choose
from ..invariant import plain
from ..library import below_autograd, first_derivative_only, register, row_blocks, wide
from ..peers import PEERS, serve
from ..quant.fp8 import Fp8, Grouping, carrier_of, fp8_rows, fp8_rows_fake
from .common import alike, check, quantiser

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


def forward_cpu(
    x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Normalise rows with few passes: the norm, two products in place, one rounding.

    Args:
        x_TD: `[T, D]`.
        weight_D: `[D]`.
        eps: Added to the mean square.
        dtype: Of y; None takes that of x.

    Returns:
        y `[T, D]` and rstd `[T]`, float32 at least.
    """
    accumulate = wide(x_TD.dtype)
    y_TD = torch.empty_like(x_TD, dtype=dtype, memory_format=torch.contiguous_format)
    rstd_T = torch.empty(x_TD.shape[0], dtype=accumulate, device=x_TD.device)
    weight = weight_D.to(accumulate)
    for rows in row_blocks(x_TD.shape[0], x_TD.shape[1], _BLOCK):
        h, rstd = x_TD[rows].to(accumulate), rstd_T[rows].unsqueeze(1)
        torch.linalg.vector_norm(h, dim=-1, keepdim=True, out=rstd)
        rstd.square_().div_(x_TD.shape[1]).add_(eps).rsqrt_()
        if accumulate == y_TD.dtype:
            torch.mul(h, rstd, out=y_TD[rows]).mul_(weight)
        else:
            y_TD[rows].copy_(h.mul_(rstd).mul_(weight))
    return y_TD, rstd_T


def backward_cpu(
    dy_TD: Tensor, dh_TD: Tensor | None, h_TD: Tensor, weight_D: Tensor, rstd_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Share the product dy * h: times weight it gives mean(g * h), times rstd dweight.

    Args:
        dy_TD: `[T, D]`.
        dh_TD: `[T, D]` or None.
        h_TD: What was normalised, `[T, D]`.
        weight_D: `[D]`.
        rstd_T: `[T]`.

    Returns:
        dx `[T, D]` in the dtype of h and dweight `[D]` in that of the weight.
    """
    accumulate = wide(h_TD.dtype)
    dx_TD = torch.empty_like(h_TD, memory_format=torch.contiguous_format)
    weight = weight_D.to(accumulate)
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    for rows in row_blocks(h_TD.shape[0], h_TD.shape[1], _BLOCK):
        h, dy, rstd = h_TD[rows].to(accumulate), dy_TD[rows].to(accumulate), rstd_T[rows]
        normal = h * rstd.unsqueeze(1)  # first: the product of h and dy may overflow
        product = normal * dy
        dweight += product.sum(0)
        slope = torch.mv(product, weight)
        dx = dx_TD[rows] if accumulate == h_TD.dtype else product
        torch.mul(dy, weight, out=dx)
        dx.addcmul_(normal, slope.unsqueeze(1), value=-1.0 / h_TD.shape[1])
        dx.mul_(rstd.unsqueeze(1))
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
        h_TD = x_TD if residual is None else torch.add(x, residual).reshape(x_TD.shape).contiguous()
        y_TD, rstd_T = forward_cpu(h_TD, weight_D, eps)
    h = x.new_empty(0) if residual is None else h_TD.view(x.shape)
    return y_TD.view(x.shape), h, rstd_T.view(x.shape[:-1])


def _forward_fake(
    x: Tensor, weight_D: Tensor, residual: Tensor | None, eps: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), h, x.new_empty(x.shape[:-1], dtype=wide(x.dtype))


def _backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight_D: Tensor, rstd: Tensor, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (-1, h.shape[-1])
    args = (
        dy.reshape(shape), None if dh is None else dh.reshape(shape), h.reshape(shape), weight_D,
        rstd.reshape(-1),
    )  # fmt: skip
    served = choose("rms_norm", h.device, h.dtype, backend)
    if served in ("triton", "cuda"):
        if served == "triton":
            from .rms_triton import backward
        else:
            from .rms_cuda import backward
        dx_TD, dweight_D = backward(*args)
    else:
        dx_TD, dweight_D = backward_cpu(*args)
    return dx_TD.view(h.shape), dweight_D


def _backward_fake(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight_D: Tensor, rstd: Tensor, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return h.new_empty(h.shape), weight_D.new_empty(weight_D.shape)


def _forward_fp8(
    x: Tensor, weight_D: Tensor, residual: Tensor | None, eps: float, scaling: Grouping,
    power_of_two: bool, backend: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    x_TD = x.reshape(-1, x.shape[-1])
    if quantiser("rms_norm", x, scaling, backend) == "triton":
        from .rms_triton import normalise

        other = None if residual is None else residual.reshape(x_TD.shape)
        data, h_TD, rstd_T, _, scale = normalise(
            x_TD, weight_D, None, other, eps, centred=False, scaling=scaling,
            power_of_two=power_of_two,
        )  # fmt: skip
    else:
        h_TD = x_TD if residual is None else torch.add(x, residual).reshape(x_TD.shape).contiguous()
        y_TD, rstd_T = forward_cpu(h_TD, weight_D, eps, torch.float32)
        data, scale = fp8_rows(y_TD, scaling, torch.float8_e4m3fn, power_of_two)
    h, rows = x.new_empty(0) if residual is None else h_TD.view(x.shape), x.shape[:-1]
    scale = scale.view(*rows, scale.shape[-1])
    return carrier_of(x), h, rstd_T.view(rows), data.view(x.shape).view(torch.uint8), scale


def _forward_fp8_fake(
    x: Tensor, weight_D: Tensor, residual: Tensor | None, eps: float, scaling: Grouping,
    power_of_two: bool, backend: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    _, h, rstd = _forward_fake(x, weight_D, residual, eps, backend)
    return carrier_of(x), h, rstd, *fp8_rows_fake(x, x.shape, scaling)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_D: Tensor, residual: Tensor | None, eps: float, *rest: Any
    ) -> tuple[Tensor, ...]:
        op = _FORWARD if len(rest) == 1 else _FORWARD_FP8
        parts: tuple[Tensor, ...] = below_autograd(op, x, weight_D, residual, eps, *rest)
        _, h, rstd, *codes = parts
        ctx.fused, ctx.rest = residual is not None, rest
        ctx.save_for_backward(h if ctx.fused else x, weight_D, rstd)
        ctx.mark_non_differentiable(rstd, *codes, *(() if ctx.fused else (h,)))
        ctx.set_materialize_grads(False)
        return parts

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        first_derivative_only("rms_norm")
        none = (None,) * (1 + len(ctx.rest))
        if dy is None:
            return dh, None, dh, *none
        h, weight_D, rstd = ctx.saved_tensors
        dx, dweight_D = _BACKWARD(dy, dh if ctx.fused else None, h, weight_D, rstd, ctx.rest[-1])
        return dx, dweight_D, dx if ctx.fused else None, *none


_FORWARD = register(
    "rms_norm_forward(Tensor x, Tensor weight, Tensor? residual, float eps, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _RmsNorm,
)  # fmt: skip
_FORWARD_FP8 = register(
    "rms_norm_fp8_forward(Tensor x, Tensor weight, Tensor? residual, float eps, str scaling,"
    " bool power_of_two, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_fp8, _forward_fp8_fake, _RmsNorm,
)  # fmt: skip
_BACKWARD = register(
    "rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, str? backend)"
    " -> (Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, residual: None = None, eps: float = ...,
    backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor, eps: float = ..., backend: str | None = ...
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Normalise each row of `x` (plus `residual`) to unit root-mean-square and scale it.

    Args:
        x: Activations `[..., D]`, any strides; float16, bfloat16, float32 or float64.
        weight: Scale `[D]`, any of these dtypes.
        residual: Added to `x` before, `[..., D]`; the sum is rounded to the dtype of both, and the
            rounded sum is what is normalised. Of two dtypes, as under autocast, the sum has the
            wider one.
        eps: Added to the mean square; dimensionless.
        backend: `reference`, `triton` or `cuda`, or a peer, `liger`, `te` or `apex`; None takes the
            fastest of ours that is proven here.

    Returns:
        y, `[..., D]` in the dtype of `x`; with `residual` the pair (y, x + residual). Statistics
        and gradients are accumulated in float32, in float64 for float64.

    Raises:
        ValueError: If the shapes do not match, the width is 0, a dtype is not supported, or `eps`
            is negative or not finite.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    check("rms_norm", x, weight, None, residual, eps)
    tensors = (x, weight) if residual is None else (x, weight, residual)
    if backend is None and plain(*tensors):
        normal = cpu.rms_norm(x, weight, residual, eps)
        return normal[0] if residual is None else normal
    if backend in PEERS:
        found: Tensor | tuple[Tensor, Tensor] = serve(
            "rms_norm", backend, x, weight, residual=residual, eps=eps
        )
        return found
    if residual is None:
        y: Tensor = _FORWARD(x, weight, None, eps, backend)[0]
        return y
    dtype = x.dtype
    if residual.dtype != dtype:
        x, residual = alike(x, residual)
    y, h, _ = _FORWARD(x, weight, residual, eps, backend)
    return y.to(dtype), h


@overload
def rms_norm_fp8(
    x: Tensor, weight: Tensor, *, residual: None = None, eps: float = ..., scaling: Grouping = ...,
    power_of_two: bool = ..., backend: str | None = ...,
) -> Fp8: ...  # fmt: skip


@overload
def rms_norm_fp8(
    x: Tensor, weight: Tensor, *, residual: Tensor, eps: float = ..., scaling: Grouping = ...,
    power_of_two: bool = ..., backend: str | None = ...,
) -> tuple[Fp8, Tensor]: ...  # fmt: skip


def rms_norm_fp8(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-6,
    scaling: Grouping = "row", power_of_two: bool = False, backend: str | None = None,
) -> Fp8 | tuple[Fp8, Tensor]:  # fmt: skip
    """Compute `rms_norm` and quantise its result to float8_e4m3fn in the same pass.

    Args:
        x: As in `rms_norm`.
        weight: The same.
        residual: The same.
        eps: The same.
        scaling: What shares a scale: a "row", or a "block" of 128 elements of one.
        power_of_two: Whether scales are rounded up to powers of two.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        The quantised y, bit for bit that of the unfused float32 result before it is rounded to the
        dtype of `x`; with `residual` the pair (y, x + residual). The backward is that of
        `rms_norm`, at the gradient of y's carrier.

    Raises:
        ValueError: As `rms_norm`; if `scaling` is neither.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    check("rms_norm_fp8", x, weight, None, residual, eps)
    if residual is not None:
        x, residual = alike(x, residual)
    carrier, h, _, data, scale = _FORWARD_FP8(
        x, weight, residual, eps, scaling, power_of_two, backend
    )
    y = Fp8(data=data.view(torch.float8_e4m3fn), scale=scale, carrier=carrier)
    return y if residual is None else (y, h)
