"""What rms_norm and layer_norm share: their checks, and who quantises their result."""

import torch
from torch import Tensor

from ..backends import choose, proof
from ..library import need_tensors
from ..quant.fp8 import check_grouping

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float
) -> None:
    """Refuse what does not fit together.

    Args:
        op: Operator, for the message.
        x: `[..., D]`.
        weight: `[D]`.
        bias: `[D]` or None.
        residual: `[..., D]` or None.
        eps: Added to the mean square.

    Raises:
        TypeError: If x or weight is not a tensor.
        ValueError: If the shapes do not match, the width is 0, a dtype is not supported, or `eps`
            is negative or not finite.
    """
    need_tensors(op, x=x, weight=weight)
    if weight.shape != x.shape[-1:] or not weight.numel():
        raise ValueError(f"{op}: weight has shape {[*weight.shape]}, x has {[*x.shape]}")
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"{op}: bias has shape {[*bias.shape]}, weight has {[*weight.shape]}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must have the shape of x {[*x.shape]}, got {[*residual.shape]}"
        )
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps must be at least 0 and finite, got {eps}")


def alike(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Convert both to the wider of their dtypes.

    Args:
        x: `[..., D]`.
        residual: `[..., D]`.

    Returns:
        Both, in the dtype of their sum.
    """
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def quantiser(op: str, x: Tensor, scaling: str, backend: str | None) -> str:
    """Choose who computes a norm of which the result is quantised.

    Args:
        op: `rms_norm` or `layer_norm`.
        x: Its input.
        scaling: "row" or "block".
        backend: An explicit choice, or None.

    Returns:
        `reference` or `triton`.

    Raises:
        ValueError: If `scaling` is neither.
        RuntimeError: If `backend` cannot serve this here.
    """
    check_grouping(f"{op}_fp8", scaling)
    served = choose(op, x.device, x.dtype, backend)
    if served in ("reference", "triton"):
        return served
    if backend is not None:
        raise RuntimeError(
            f"{op}_fp8: backend {backend!r} does not quantise: use 'triton' or 'reference'"
        )
    major, minor = torch.cuda.get_device_capability(x.device)
    return "triton" if proof(op, f"{major}.{minor}") else "reference"
