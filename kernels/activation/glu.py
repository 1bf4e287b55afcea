"""Activations of feed-forward layers: SwiGLU and GeGLU on packed halves, and the squared ReLU.

    swiglu, geglu:    y = f(gate) * up,    gate_up = [gate, up]
                      dup = dy * f(gate),    dgate = dy * up * f'(gate)
    relu2:            y = f(x),    dx = dy * f'(x)

    silu(z) = z * s(z),                  silu'(z) = s (1 + z (1 - s)),    s = sigmoid
    gelu(z) = z * P(z)                   gelu'(z) = P + z p,    P, p of the standard normal
       about  z * s(2 u)                 s + z s (1 - s) 2 u',  u = sqrt(2/pi) (z + 0.044715 z^3)
    relu2(z) = max(z, 0)^2               relu2'(z) = 2 max(z, 0)

Shapes: T tokens, F feed-forward width. Bound by memory. Roof of the gated forward: 3 T F elements /
bandwidth; of the backward, which computes f again from the input, the one tensor saved: 5 T F;
without a gate 2 T F and 3 T F. With FP8 the elements written are one byte each.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, equations 5 and 6 (without biases);
Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2; So et al. 2021,
https://arxiv.org/abs/2109.08668, section 4 (the squared ReLU).
"""

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..backends import choose
from ..invariant import invariant, sigmoid
from ..library import (
    below_autograd,
    first_derivative_only,
    need_tensors,
    register,
    row_blocks,
    wide,
)
from ..peers import PEERS, serve

_U1 = 2 * math.sqrt(2 / math.pi)  # 2 u = _U1 z + _U3 z^3
_U3 = 0.044715 * _U1
_BOUND = 32.0  # beyond it s (1 - s) is 0, in float64 too
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A kind is the operator's name; geglu's has "_tanh" where the normal distribution is approximated.
_SPECIFICATION: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": lambda z: z * torch.sigmoid(z),
    "geglu": lambda z: z * (1 + torch.erf(z * 0.5**0.5)) / 2,
    "geglu_tanh": lambda z: z * torch.sigmoid(1.5957691216057308 * (z + 0.044715 * z**3)),
    "relu2": lambda z: torch.relu(z).square(),
}


def _reference(x: Tensor, kind: str) -> Tensor:
    z = x.to(wide(x.dtype))
    if kind == "relu2":
        return _SPECIFICATION[kind](z).to(x.dtype)
    gate, up = z.chunk(2, -1)
    return (_SPECIFICATION[kind](gate) * up).to(x.dtype)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Specify `swiglu`, differentiably; the tests hold every backend to this.

    Args:
        gate_up: `[..., 2F]`, the gate first.

    Returns:
        `[..., F]` in the dtype of `gate_up`.
    """
    return _reference(gate_up, "swiglu")


def geglu_reference(gate_up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """Specify `geglu`, differentiably; the tests hold every backend to this.

    Args:
        gate_up: `[..., 2F]`, the gate first.
        approximate: "tanh" or "none".

    Returns:
        `[..., F]` in the dtype of `gate_up`.
    """
    return _reference(gate_up, geglu_kind(approximate))


def relu2_reference(x: Tensor) -> Tensor:
    """Specify `relu2`, differentiably; the tests hold every backend to this.

    Args:
        x: `[..., F]`.

    Returns:
        `[..., F]` in the dtype of `x`.
    """
    return _reference(x, "relu2")


def _gate(z: Tensor, kind: str) -> Tensor:
    """Return f(z) / z: the share of z that passes."""
    if kind == "swiglu":
        return sigmoid(z)
    if kind == "geglu":
        return torch.mul(z, 0.5**0.5).erf_().add_(1).mul_(0.5)
    apart = z.new_empty(z.shape[0], z.shape[1] + 16)[:, :-16]  # as one row, the last elements of
    # all of them would be those that are not vectorised, and a row would depend on the others
    torch.mul(z, z, out=apart).mul_(_U3).add_(_U1).mul_(z)
    return sigmoid(apart) if invariant() else apart.sigmoid_()


def _activate_(gate: Tensor, kind: str, out: Tensor | None = None) -> Tensor:
    """Apply f without a temporary where PyTorch has f: into `out`, or in place."""
    out = gate if out is None else out
    if kind == "geglu_tanh" or (invariant() and kind != "relu2"):
        return torch.mul(gate, _gate(gate, kind), out=out)
    if kind == "relu2":
        return torch.clamp(gate, min=0, out=out).square_()
    f = torch.ops.aten.silu if kind == "swiglu" else torch.ops.aten.gelu
    y: Tensor = f.out(gate, out=out)
    return y


def forward_cpu(x_TF: Tensor, kind: str, dtype: torch.dtype | None = None) -> Tensor:
    """Compute in blocks that stay in cache.

    Args:
        x_TF: `[T, 2F]`, for relu2 `[T, F]`.
        kind: "swiglu", "geglu", "geglu_tanh" or "relu2".
        dtype: Of the result; None takes that of `x_TF`.

    Returns:
        `[T, F]`.
    """
    tokens, width = x_TF.shape[0], width_of(x_TF, kind)
    accumulate = x_TF.dtype if kind == "relu2" and dtype is None else wide(x_TF.dtype)
    y_TF = x_TF.new_empty(tokens, width, dtype=dtype)
    for rows in row_blocks(tokens, width):
        gate = x_TF[rows, :width]
        if accumulate == x_TF.dtype == y_TF.dtype:
            value = _activate_(gate, kind, y_TF[rows])
        else:
            value = _activate_(gate.to(accumulate, copy=True), kind)
        if kind != "relu2":
            value.mul_(x_TF[rows, width:])
        if value.dtype != y_TF.dtype or accumulate != x_TF.dtype:
            y_TF[rows].copy_(value)
    return y_TF


def _slopes(z: Tensor, kind: str) -> tuple[Tensor | None, Tensor]:
    """Return f(z), unless nobody needs it, and f'(z)."""
    if kind == "relu2":
        return None, torch.clamp(z, min=0).mul_(2)
    share = _gate(z, kind)
    value = z * share
    if kind == "geglu":
        return value, share.addcmul_((z * z).mul_(-0.5).exp_(), z, value=(2 * math.pi) ** -0.5)
    rest = torch.rsub(share, 1).mul_(value)  # z s (1 - s)
    if kind == "geglu_tanh":  # where z is not within the bound the rest is 0, and its factor huge
        rest.mul_(z.clamp(-_BOUND, _BOUND).square_().mul_(3 * _U3).add_(_U1))
    return value, share.add_(rest)


def backward_cpu(
    dy_TF: Tensor, x_TF: Tensor, y_TF: Tensor | None = None, kind: str = "swiglu"
) -> Tensor:
    """Take one sigmoid a gate; the rest are products within a block that stays in cache.

    Args:
        dy_TF: Upstream gradient `[T, F]`.
        x_TF: `[T, 2F]`, or `[T, F]` for relu2.
        y_TF: If given, `[T, F]` that receives the activation's value, which is a by-product.
        kind: "swiglu", "geglu", "geglu_tanh" or "relu2", which has no by-product.

    Returns:
        In the shape of `x_TF`.
    """
    dx_TF = torch.empty_like(x_TF, memory_format=torch.contiguous_format)
    width = dy_TF.shape[1]
    accumulate = dx_TF.dtype if kind == "relu2" else wide(dx_TF.dtype)  # relu2 rounds but once
    for rows in row_blocks(x_TF.shape[0], width):
        x, dy = x_TF[rows].to(accumulate), dy_TF[rows].to(accumulate)
        value, slope = _slopes(x[:, :width], kind)
        if value is None:
            factor = dy
        else:
            up = x[:, width:]
            factor = dy * up
            if y_TF is not None:
                y_TF[rows].copy_(value * up)
            if accumulate == dx_TF.dtype:
                torch.mul(dy, value, out=dx_TF[rows, width:])
            else:
                dx_TF[rows, width:].copy_(value.mul_(dy))
        if accumulate == dx_TF.dtype:
            torch.mul(slope, factor, out=dx_TF[rows, :width])
        else:
            dx_TF[rows, :width].copy_(slope.mul_(factor))
    return dx_TF


def width_of(x: Tensor, kind: str) -> Any:
    """Return F, an int or a symbol, of an input `[..., 2F]`, for relu2 `[..., F]`."""
    return x.shape[-1] if kind == "relu2" else x.shape[-1] // 2


def matrix(x: Tensor) -> Tensor:
    """Return `[..., N]` as `[T, N]`, a view where that can be."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def served(x: Tensor, kind: str, backend: str | None) -> str:
    """Choose the backend for a kind, by the name of its operator."""
    return choose(kind.removesuffix("_tanh"), x.device, x.dtype, backend)


def _forward(x: Tensor, kind: str, backend: str | None) -> Tensor:
    if served(x, kind, backend) == "triton":
        from .glu_triton import forward

        y_TF = forward(matrix(x), kind)
    else:
        y_TF = forward_cpu(matrix(x), kind)
    return y_TF.view(*x.shape[:-1], width_of(x, kind))


def _forward_fake(x: Tensor, kind: str, backend: str | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], width_of(x, kind))


def _backward(dy: Tensor, x: Tensor, kind: str, backend: str | None) -> Tensor:
    if served(x, kind, backend) == "triton":
        from .glu_triton import backward

        return backward(matrix(dy), matrix(x), kind).view(x.shape)
    return backward_cpu(matrix(dy), matrix(x), kind=kind).view(x.shape)


def _backward_fake(dy: Tensor, x: Tensor, kind: str, backend: str | None) -> Tensor:
    return x.new_empty(x.shape)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, backend: str | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind, ctx.backend = kind, backend
        y: Tensor = below_autograd(_FORWARD, x, kind, backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        first_derivative_only(ctx.kind)
        return BACKWARD(dy, *ctx.saved_tensors, ctx.kind, ctx.backend), None, None


_FORWARD = register(
    "glu_forward(Tensor x, str kind, str? backend) -> Tensor", _forward, _forward_fake, _Activation
)
BACKWARD = register(
    "glu_backward(Tensor dy, Tensor x, str kind, str? backend) -> Tensor", _backward, _backward_fake
)


def geglu_kind(approximate: str) -> str:
    """Return the kind of `geglu`; ValueError unless `approximate` is "tanh" or "none"."""
    if approximate not in ("tanh", "none"):
        raise ValueError(f"geglu: approximate must be tanh or none, got {approximate!r}")
    return "geglu_tanh" if approximate == "tanh" else "geglu"


def check(op: str, x: Tensor, name: str = "gate_up") -> None:
    """Refuse what the operator `op` cannot take as its argument `name`, with a ValueError."""
    need_tensors(op, **{name: x})
    if not x.dim():
        raise ValueError(f"{op}: {name} must have a last dimension, got {[*x.shape]}")
    if name == "gate_up" and x.shape[-1] % 2:
        raise ValueError(f"{op}: the last dimension must be even (gate, up), got {[*x.shape]}")
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"{op}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}"
        )


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """Multiply silu of the first half of the last dimension by the second half.

    Args:
        gate_up: `[..., 2F]`, the gate first, any strides; float16, bfloat16, float32 or float64.
            It is the only tensor saved for the backward.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `[..., F]` in the dtype of `gate_up`; computed in float32 at least.

    Raises:
        ValueError: If the last dimension is odd, or the dtype is not supported.
        RuntimeError: If `backend` cannot serve this tensor here.
    """
    check("swiglu", gate_up)
    if backend in PEERS:
        return cast(Tensor, serve("swiglu", backend, gate_up))
    y: Tensor = _FORWARD(gate_up, "swiglu", backend)
    return y


def geglu(
    gate_up: Tensor, *, approximate: Literal["tanh", "none"] = "tanh", backend: str | None = None
) -> Tensor:
    """Multiply gelu of the first half of the last dimension by the second half.

    Args:
        gate_up: `[..., 2F]`, the gate first, any strides; float16, bfloat16, float32 or float64.
            It is the only tensor saved for the backward.
        approximate: "tanh", or "none" for the error function.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `[..., F]` in the dtype of `gate_up`; computed in float32 at least.

    Raises:
        ValueError: If the last dimension is odd, the dtype is not supported, or `approximate` is
            neither.
        RuntimeError: If `backend` cannot serve this tensor here.
    """
    check("geglu", gate_up)
    kind = geglu_kind(approximate)
    if backend in PEERS:
        return cast(Tensor, serve("geglu", backend, gate_up, plain=approximate == "tanh"))
    y: Tensor = _FORWARD(gate_up, kind, backend)
    return y


def relu2(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Square what is above 0.

    Args:
        x: `[..., F]`, any strides; float16, bfloat16, float32 or float64. It is the only tensor
            saved for the backward.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `[..., F]` in the dtype of `x`; computed in float32 at least.

    Raises:
        ValueError: If there is no dimension, or the dtype is not supported.
        RuntimeError: If `backend` cannot serve this tensor here.
    """
    check("relu2", x, "x")
    y: Tensor = _FORWARD(x, "relu2", backend)
    return y
