"""SwiGLU and the linear layer behind it, without keeping their product.

    y = h weight^T,    h = silu(gate) * up,    gate_up = [gate, up]

    dh = dy weight,    dweight = dy^T h,    dgate_up = the gradient of SwiGLU at dh

Shapes: T tokens, F feed-forward width, D width. The linear layer alone would save h `[T, F]`, a
third of what a feed-forward block saves; here the backward makes it again from gate_up, of whose
gradient it is a by-product. The roofs are the two operators'.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 6; what is saved follows Hsu et al.
2024, https://arxiv.org/abs/2410.10989, section 3.2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cpu
from ..backends import choose
from ..invariant import linear, plain
from ..library import autocast, below_autograd, first_derivative_only, register
from .glu import backward_cpu, swiglu, swiglu_reference


def swiglu_linear_reference(gate_up: Tensor, weight_DF: Tensor) -> Tensor:
    """Specify `swiglu_linear`, differentiably; the tests hold every backend to this.

    Args:
        gate_up: `[..., 2F]`, the gate first.
        weight_DF: `[D, F]`.

    Returns:
        `[..., D]` in the dtype of `gate_up`.
    """
    return F.linear(swiglu_reference(gate_up), weight_DF)


def _forward(gate_up: Tensor, weight: Tensor, backend: str | None) -> Tensor:
    choose("swiglu", gate_up.device, gate_up.dtype, backend)
    return linear(swiglu(gate_up, backend=backend), weight)


def _forward_fake(gate_up: Tensor, weight: Tensor, backend: str | None) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], weight.shape[0])


def _backward(
    dy: Tensor, gate_up: Tensor, weight: Tensor, weight_grad: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    dy_TD, gate_up_TF = dy.reshape(-1, dy.shape[-1]), gate_up.reshape(-1, gate_up.shape[-1])
    dh_TF = dy_TD @ weight
    h_TF = dh_TF.new_empty(dh_TF.shape if weight_grad else (0, 0))
    if choose("swiglu", gate_up.device, gate_up.dtype, backend) == "triton":
        from .glu_triton import backward, forward

        dgate_up = backward(dh_TF, gate_up_TF, "swiglu")
        h_TF = forward(gate_up_TF, "swiglu") if weight_grad else h_TF
    else:
        dgate_up = backward_cpu(dh_TF, gate_up_TF, h_TF if weight_grad else None)
    dweight = dy_TD.t() @ h_TF if weight_grad else weight.new_empty(0)
    return dgate_up.view(gate_up.shape), dweight


def _backward_fake(
    dy: Tensor, gate_up: Tensor, weight: Tensor, weight_grad: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), weight.new_empty(weight.shape if weight_grad else 0)


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, backend: str | None) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        ctx.backend = backend
        y: Tensor = below_autograd(_FORWARD, gate_up, weight, backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        first_derivative_only("swiglu_linear")
        wanted, weight_grad, _ = ctx.needs_input_grad
        dgate_up, dweight = _BACKWARD(dy, *ctx.saved_tensors, weight_grad, ctx.backend)
        return dgate_up if wanted else None, dweight if weight_grad else None, None


_FORWARD = register(
    "swiglu_linear_forward(Tensor gate_up, Tensor weight, str? backend) -> Tensor",
    _forward, _forward_fake, _SwigluLinear,
)  # fmt: skip
_BACKWARD = register(
    "swiglu_linear_backward(Tensor dy, Tensor gate_up, Tensor weight, bool weight_grad,"
    " str? backend) -> (Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip


def swiglu_linear(gate_up: Tensor, weight_DF: Tensor, *, backend: str | None = None) -> Tensor:
    """Apply SwiGLU, then a linear layer without a bias.

    Args:
        gate_up: `[..., 2F]`, the gate first; float16, bfloat16, float32 or float64. It and the
            weight are all that is saved.
        weight_DF: `[D, F]`, in the dtype of `gate_up`; under autocast both are cast first.
        backend: Of the activation: `reference` or `triton`; None takes the fastest proven here.

    Returns:
        `[..., D]` in the dtype of `gate_up`, or in autocast's.

    Raises:
        ValueError: If the widths do not fit, or the dtypes differ or are not supported.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    if not gate_up.dim() or weight_DF.dim() != 2 or gate_up.shape[-1] != 2 * weight_DF.shape[1]:
        raise ValueError(
            f"swiglu_linear: gate_up must be twice as wide as the weight's input, got "
            f"{[*gate_up.shape]} and weight {[*weight_DF.shape]}"
        )
    if backend is None and plain(gate_up, weight_DF):
        return linear(cpu.swiglu(gate_up), weight_DF)
    gate_up, weight_DF = autocast(gate_up, weight_DF)
    if gate_up.dtype != weight_DF.dtype:
        raise ValueError(
            f"swiglu_linear: gate_up and weight must have one dtype, got {gate_up.dtype} and "
            f"{weight_DF.dtype}"
        )
    y: Tensor = _FORWARD(gate_up, weight_DF, backend)
    return y
