"""SwiGLU on packed halves: the gate and the linear part come from one matrix product.

    y = silu(gate) * up,    silu(z) = z * sigmoid(z),    gate_up = [gate, up]

    dup = dy * silu(gate)
    dgate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

Shapes: T tokens, F feed-forward width. Bound by memory. Roof of the forward: 3 T F elements /
bandwidth; of the backward, which recomputes silu from the input, the one tensor saved: 5 T F.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 6 (without biases).
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..library import below_autograd, first_derivative_only, register, row_blocks, wide

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Specify `swiglu`, differentiably; the tests hold every backend to this.

    Args:
        gate_up: `[..., 2F]`, the gate first.

    Returns:
        `[..., F]` in the dtype of `gate_up`.
    """
    gate, up = gate_up.to(wide(gate_up.dtype)).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def _forward_cpu(gate_up_TF: Tensor) -> Tensor:
    width = gate_up_TF.shape[1] // 2
    y_TF = gate_up_TF.new_empty(gate_up_TF.shape[0], width)
    accumulate = wide(y_TF.dtype)
    for rows in row_blocks(gate_up_TF.shape[0], width):
        gate, up = gate_up_TF[rows].split(width, 1)
        if accumulate == y_TF.dtype:
            torch.ops.aten.silu.out(gate, out=y_TF[rows]).mul_(up)
        else:
            y_TF[rows].copy_(torch.ops.aten.silu_(gate.to(accumulate)).mul_(up))
    return y_TF


def backward_cpu(dy_TF: Tensor, gate_up_TF: Tensor, y_TF: Tensor | None = None) -> Tensor:
    """Take one sigmoid a gate; the rest are products within a block that stays in cache.

    Args:
        dy_TF: Upstream gradient `[T, F]`.
        gate_up_TF: `[T, 2F]`.
        y_TF: If given, `[T, F]` that receives SwiGLU's value, which is a by-product.

    Returns:
        `[T, 2F]`.
    """
    dx_TF = torch.empty_like(gate_up_TF, memory_format=torch.contiguous_format)
    width = dy_TF.shape[1]
    accumulate = wide(dx_TF.dtype)
    for rows in row_blocks(gate_up_TF.shape[0], width):
        dgate, dup = dx_TF[rows].split(width, 1)
        gate, up = gate_up_TF[rows].to(accumulate).split(width, 1)
        dy = dy_TF[rows].to(accumulate)
        sigmoid = torch.sigmoid(gate)
        value = gate * sigmoid
        if y_TF is not None:
            y_TF[rows].copy_(value * up)
        if accumulate == dx_TF.dtype:
            torch.mul(dy, value, out=dup)
        else:
            dup.copy_(value * dy)
        slope = value.addcmul_(value, sigmoid, value=-1).add_(sigmoid).mul_(up)
        if accumulate == dx_TF.dtype:
            torch.mul(slope, dy, out=dgate)
        else:
            dgate.copy_(slope.mul_(dy))
    return dx_TF


def _forward(gate_up: Tensor, backend: str | None) -> Tensor:
    gate_up_TF = gate_up.reshape(-1, gate_up.shape[-1])
    if choose("swiglu", gate_up.device, gate_up.dtype, backend) == "triton":
        from .glu_triton import forward

        y_TF = forward(gate_up_TF)
    else:
        y_TF = _forward_cpu(gate_up_TF)
    return y_TF.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _forward_fake(gate_up: Tensor, backend: str | None) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _backward(dy: Tensor, gate_up: Tensor, backend: str | None) -> Tensor:
    args = dy.reshape(-1, dy.shape[-1]), gate_up.reshape(-1, gate_up.shape[-1])
    if choose("swiglu", gate_up.device, gate_up.dtype, backend) == "triton":
        from .glu_triton import backward

        return backward(*args).view(gate_up.shape)
    return backward_cpu(*args).view(gate_up.shape)


def _backward_fake(dy: Tensor, gate_up: Tensor, backend: str | None) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, backend: str | None) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.backend = backend
        y: Tensor = below_autograd(_FORWARD, gate_up, backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        first_derivative_only("swiglu")
        return _BACKWARD(dy, *ctx.saved_tensors, ctx.backend), None


_FORWARD = register(
    "swiglu_forward(Tensor gate_up, str? backend) -> Tensor", _forward, _forward_fake, _Swiglu
)
_BACKWARD = register(
    "swiglu_backward(Tensor dy, Tensor gate_up, str? backend) -> Tensor", _backward, _backward_fake
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
    if not gate_up.dim() or gate_up.shape[-1] % 2:
        raise ValueError(
            f"swiglu: the last dimension must be even (gate, up), got {[*gate_up.shape]}"
        )
    if gate_up.dtype not in _DTYPES:
        raise ValueError(
            f"swiglu: gate_up must be float16, bfloat16, float32 or float64, got {gate_up.dtype}"
        )
    y: Tensor = _FORWARD(gate_up, backend)
    return y
