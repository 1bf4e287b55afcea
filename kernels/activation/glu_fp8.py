"""The activations of `glu.py` with their result in FP8.

    data, scale = quantise(f(gate) * up)        (or of f(x) for relu2)

    the gradient: that of the activation, at the gradient of the carrier

The float32 value is quantised, never rounded to the input's dtype before. Shapes: T tokens, F
feed-forward width. Bound by memory. Roof: 2 T F elements read (T F without a gate) and T F bytes
written, over the bandwidth.

Source: that of `glu.py`, and of `quant/fp8.py`.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from ..library import below_autograd, first_derivative_only, register
from ..quant.fp8 import Fp8, Grouping, carrier_of, check_grouping, fp8_rows, fp8_rows_fake
from .glu import BACKWARD, check, forward_cpu, geglu_kind, matrix, served, width_of

_E4M3 = torch.float8_e4m3fn


def _forward(
    x: Tensor, kind: str, scaling: str, power_of_two: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the carrier, the codes as bytes and the scales."""
    x_TF, shape = matrix(x), (*x.shape[:-1], width_of(x, kind))
    if served(x, kind, backend) == "triton":
        from .glu_triton import forward_fp8

        data, scale = forward_fp8(x_TF, kind, scaling, power_of_two)
    else:
        y_TF = forward_cpu(x_TF, kind, torch.float32)
        data, scale = fp8_rows(y_TF, scaling, _E4M3, power_of_two)
    scale = scale.view(*shape[:-1], scale.shape[1])
    return carrier_of(x, shape), data.view(shape).view(torch.uint8), scale


def _forward_fake(x: Tensor, kind: str, scaling: str, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:-1], width_of(x, kind))
    codes, scale = fp8_rows_fake(x, shape, scaling)
    return carrier_of(x, shape), codes, scale


class _ActivationFp8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kind: str, scaling: str, power_of_two: bool, backend: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.kind, ctx.backend = kind, backend
        carrier, codes, scale = below_autograd(_FORWARD, x, kind, scaling, power_of_two, backend)
        ctx.mark_non_differentiable(codes, scale)
        return carrier, codes, scale

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only(f"{ctx.kind}_fp8")
        return BACKWARD(dy, *ctx.saved_tensors, ctx.kind, ctx.backend), None, None, None, None


_FORWARD = register(
    "glu_fp8_forward(Tensor x, str kind, str scaling, bool power_of_two, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _ActivationFp8,
)  # fmt: skip


def _quantized(x: Tensor, kind: str, scaling: str, power_of_two: bool, backend: str | None) -> Fp8:
    check_grouping(f"{kind}_fp8", scaling)
    carrier, codes, scale = _FORWARD(x, kind, scaling, power_of_two, backend)
    return Fp8(data=codes.view(_E4M3), scale=scale, carrier=carrier)


def swiglu_fp8(
    gate_up: Tensor, *, scaling: Grouping, power_of_two: bool = False, backend: str | None = None
) -> Fp8:
    """Apply `swiglu` and quantise the float32 value, which is never rounded to the input's dtype.

    Args:
        gate_up: As in `swiglu`.
        scaling: What shares a scale: a "row" or a "block" of 128 elements of a row.
        power_of_two: Whether scales are rounded up to powers of two.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `[..., F]` in float8_e4m3fn, to the last bit what `fp8_quantize` makes of the float32 value
        of the same backend. The gradient of its carrier goes through `swiglu`'s backward.

    Raises:
        ValueError: As in `swiglu`, or if `scaling` is neither.
        RuntimeError: If `backend` cannot serve this tensor here.
    """
    check("swiglu_fp8", gate_up)
    return _quantized(gate_up, "swiglu", scaling, power_of_two, backend)


def geglu_fp8(
    gate_up: Tensor, *, approximate: Literal["tanh", "none"] = "tanh", scaling: Grouping,
    power_of_two: bool = False, backend: str | None = None,
) -> Fp8:  # fmt: skip
    """Apply `geglu` and quantise the float32 value, as `swiglu_fp8` does.

    Args:
        gate_up: As in `geglu`.
        approximate: As in `geglu`.
        scaling: What shares a scale: a "row" or a "block" of 128 elements of a row.
        power_of_two: Whether scales are rounded up to powers of two.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `[..., F]` in float8_e4m3fn.

    Raises:
        ValueError: As in `geglu`, or if `scaling` is neither.
        RuntimeError: If `backend` cannot serve this tensor here.
    """
    check("geglu_fp8", gate_up)
    return _quantized(gate_up, geglu_kind(approximate), scaling, power_of_two, backend)


def relu2_fp8(
    x: Tensor, *, scaling: Grouping, power_of_two: bool = False, backend: str | None = None
) -> Fp8:
    """Apply `relu2` and quantise the float32 value, as `swiglu_fp8` does.

    Args:
        x: As in `relu2`.
        scaling: What shares a scale: a "row" or a "block" of 128 elements of a row.
        power_of_two: Whether scales are rounded up to powers of two.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `[..., F]` in float8_e4m3fn.

    Raises:
        ValueError: As in `relu2`, or if `scaling` is neither.
        RuntimeError: If `backend` cannot serve this tensor here.
    """
    check("relu2_fp8", x, "x")
    return _quantized(x, "relu2", scaling, power_of_two, backend)
