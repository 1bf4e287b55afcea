"""Quantisation to the MX formats: blocks of 32 along the last dimension, scales powers of two.

    a = max |x| of a block, in float32
    floor:  scale = 2^(floor(log2 a) - e)          e: exponent of the largest number, 8 or 15
    ceil:   scale = 2^ceil(log2(a / MAX))          a / MAX rounded to nearest; nothing saturates
    data = round(clamp(x / scale, -MAX, MAX)),     x is about data scale

    dx = the gradient of the value: the rounding is passed straight through

A scale is a byte, its exponent + 127 (E8M0), at least 2^-127. A NaN or an inf makes the scale of
its block NaN (255). MAX is 448 for e4m3 and 57344 for e5m2. With `floor`, the specification's rule,
what lies above MAX times the scale saturates.

Shapes: T tokens, D width. Bound by memory. Roof: one read of x and 33 / 32 bytes written for each
element, twice with the transposed copy, over the bandwidth.

Source: Open Compute Project 2023, Microscaling Formats (MX) Specification v1.0, sections 5 and 6.3;
Mishra et al. 2025, https://arxiv.org/abs/2506.08027, section 3 (rounding the scale up).
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from ..library import below_autograd, first_derivative_only, need_tensors, register
from .formats import EXPONENTS, MAXIMA
from .formats import MX_BLOCK as BLOCK
from .fp8 import carrier_of, dequantize

Rounding = Literal["floor", "ceil"]
_SCALE = torch.float8_e8m0fnu
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Mx(NamedTuple):
    """A tensor in an MX format: data times scale is its value.

    Attributes:
        data: `[..., D]`, float8_e4m3fn or float8_e5m2.
        scale: `[..., ceil(D / 32)]`, float8_e8m0fnu.
        carrier: Shape and dtype of what was quantised, of one element's storage; its gradient is
            the gradient of the value.
        data_t: The transposed matrix `[D, T]`, quantised along T; None unless asked for.
        scale_t: `[D, ceil(T / 32)]`, or None.
    """

    data: Tensor
    scale: Tensor
    carrier: Tensor
    data_t: Tensor | None = None
    scale_t: Tensor | None = None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Multiply data by scale; differentiable: the gradient goes to what was quantised.

        Args:
            dtype: Of the result; None takes that of what was quantised.

        Returns:
            `[..., D]`.
        """
        return dequantize(self.carrier, self.data, self.scale.to(torch.float32), BLOCK, dtype)


def mx_quantize_reference(
    x_TD: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, rounding: Rounding = "floor"
) -> tuple[Tensor, Tensor]:
    """Specify `mx_quantize` without the transposed copy; every backend gives these bits.

    Args:
        x_TD: `[T, D]`.
        dtype: float8_e4m3fn or float8_e5m2.
        rounding: "floor" or "ceil".

    Returns:
        data `[T, D]` and the bytes of the scales `[T, ceil(D / 32)]`.
    """
    tokens, width = x_TD.shape
    x = torch.nn.functional.pad(x_TD.to(torch.float32), (0, -width % BLOCK))
    x = x.view(tokens, x.shape[1] // BLOCK, BLOCK)
    limit = x.new_full((), MAXIMA[dtype])  # a tensor: division by a number is not exact on CUDA
    a = x.abs().amax(2, keepdim=True)
    finite = a.isfinite()
    if rounding == "floor":
        exponent = (a.view(torch.int32) >> 23) - EXPONENTS[dtype]
    else:
        bits = torch.div(a, limit).view(torch.int32)
        exponent = torch.where(bits > 1 << 22, (bits + 0x7FFFFF) >> 23, 0)  # 1 << 22 is 2^-127
    exponent = torch.where(finite, exponent.clamp_(min=0), 255)
    inverse = ((254 - exponent).clamp_(min=0) << 23).view(torch.float32)
    data = torch.mul(x, inverse).clamp_(-MAXIMA[dtype], MAXIMA[dtype]).to(dtype)
    return data.flatten(1)[:, :width].contiguous(), exponent.squeeze(2).to(torch.uint8)


_Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def _quantize_cpu(x_TD: Tensor, dtype: torch.dtype, rounding: Rounding, transpose: bool) -> _Parts:
    parts = mx_quantize_reference(x_TD, dtype, rounding)
    if not transpose:
        return *parts, parts[0].new_empty(0), parts[1].new_empty(0)
    return *parts, *mx_quantize_reference(x_TD.t().contiguous(), dtype, rounding)


def _forward(
    x: Tensor, dtype: torch.dtype, rounding: Rounding, transpose: bool, backend: str | None
) -> tuple[Tensor, ...]:
    """Return the carrier, then bytes: opcheck adds outputs up, which PyTorch cannot do in FP8."""
    args = x.reshape(x.shape[:-1].numel(), x.shape[-1]), dtype, rounding, transpose
    if choose("mx_quantize", x.device, x.dtype, backend) == "triton":
        from .mx_triton import quantize

        data, scale, data_t, scale_t = quantize(*args)
    else:
        data, scale, data_t, scale_t = _quantize_cpu(*args)
    codes, scale = data.view(x.shape).view(torch.uint8), scale.view(*x.shape[:-1], scale.shape[1])
    return carrier_of(x), codes, scale, data_t.view(torch.uint8), scale_t


def _forward_fake(
    x: Tensor, dtype: torch.dtype, rounding: Rounding, transpose: bool, backend: str | None
) -> tuple[Tensor, ...]:
    shapes: list[tuple[Any, ...]] = [x.shape, (*x.shape[:-1], (x.shape[-1] + BLOCK - 1) // BLOCK)]
    if transpose:
        tokens, width = x.shape
        shapes += [(width, tokens), (width, (tokens + BLOCK - 1) // BLOCK)]
    else:
        shapes += [(0,), (0,)]
    return carrier_of(x), *(x.new_empty(shape, dtype=torch.uint8) for shape in shapes)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = below_autograd(_FORWARD, x, *rest)
        ctx.mark_non_differentiable(*parts[1:])
        ctx.set_materialize_grads(False)
        return parts

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        first_derivative_only("mx_quantize")
        return dy, None, None, None, None


_FORWARD = register(
    "mx_quantize_forward(Tensor x, ScalarType dtype, str rounding, bool transpose, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _Quantize,
)  # fmt: skip


def mx_quantize(
    x: Tensor, *, dtype: torch.dtype = torch.float8_e4m3fn, rounding: Rounding = "floor",
    transpose: bool = False, backend: str | None = None,
) -> Mx:  # fmt: skip
    """Quantise to MXFP8.

    Args:
        x: `[..., D]`, any strides; float16, bfloat16, float32 or float64, taken as float32.
        dtype: float8_e4m3fn or float8_e5m2.
        rounding: Of the scale: "floor" is the rule of the specification, "ceil" keeps the largest
            value of a block from saturating.
        transpose: Whether to add the transposed copy `[D, T]`, quantised along T (two dimensions).
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        The quantised tensor; the same bits from every backend.

    Raises:
        ValueError: If a dtype, the shape or the rounding is not one of these.
        RuntimeError: If `backend` cannot serve this tensor here.
    """
    need_tensors("mx_quantize", x=x)
    if rounding not in ("floor", "ceil"):
        raise ValueError(f"mx_quantize: rounding must be floor or ceil, got {rounding!r}")
    if x.dtype not in _DTYPES or dtype not in EXPONENTS:
        raise ValueError(
            "mx_quantize: x must be float16, bfloat16, float32 or float64 and dtype float8_e4m3fn "
            f"or float8_e5m2, got {x.dtype} and {dtype}"
        )
    if not x.dim() or (transpose and x.dim() != 2):
        raise ValueError(
            f"mx_quantize: x must have a dimension, two for a transposed copy, got {[*x.shape]}"
        )
    carrier, codes, scale, codes_t, scale_t = _FORWARD(x, dtype, rounding, transpose, backend)
    return Mx(
        data=codes.view(dtype), scale=scale.view(_SCALE), carrier=carrier,
        data_t=codes_t.view(dtype) if transpose else None,
        scale_t=scale_t.view(_SCALE) if transpose else None,
    )  # fmt: skip
