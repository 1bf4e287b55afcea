"""Host of the CUDA C++ code of `rms_norm`; csrc/rms_norm.cu says how it works."""

import torch
from torch import Tensor

from ..launch import near, on_device, processors
from ..native import call, code, library, pointer


def _weight(weight_D: Tensor, dtype: torch.dtype) -> Tensor:
    """Make another 16-bit dtype than that of the rows float32, which is exact."""
    return (weight_D if weight_D.dtype == dtype else weight_D.float()).contiguous()


def forward(
    x_TD: Tensor, weight_D: Tensor, residual_TD: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward.

    Args:
        x_TD: `[T, D]`, float16, bfloat16 or float32.
        weight_D: `[D]`, any of these dtypes.
        residual_TD: `[T, D]` in the dtype of x, or None.
        eps: Added to the mean square.

    Returns:
        y and h `[T, D]` (h is x without a residual), rstd `[T]` float32.

    Raises:
        RuntimeError: If the library is missing, serves no such dtype, or the launch fails.
    """
    tokens, width = x_TD.shape
    x_TD, weight_D = near(x_TD), _weight(weight_D, x_TD.dtype)
    residual = None if residual_TD is None else near(residual_TD)
    y_TD = x_TD.new_empty(tokens, width)
    h_TD = x_TD if residual is None else x_TD.new_empty(tokens, width)
    rstd_T = x_TD.new_empty(tokens, dtype=torch.float32)
    with on_device(x_TD):
        call(
            "rms_norm_forward", x_TD, pointer(x_TD), pointer(residual), pointer(weight_D),
            pointer(y_TD), 0 if residual is None else pointer(h_TD), pointer(rstd_T), tokens, width,
            x_TD.stride(0), 0 if residual is None else residual.stride(0), eps, code(x_TD.dtype),
            code(weight_D.dtype),
        )  # fmt: skip
    return y_TD, h_TD, rstd_T


def backward(
    dy_TD: Tensor, dh_TD: Tensor | None, h_TD: Tensor, weight_D: Tensor, rstd_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the backward and the addition of the shares of dweight.

    Args:
        dy_TD: Gradient of y, `[T, D]` in the dtype of h.
        dh_TD: Gradient of h, `[T, D]` in the dtype of h, or None.
        h_TD: What was normalised, `[T, D]`.
        weight_D: `[D]`.
        rstd_T: `[T]` float32.

    Returns:
        dx `[T, D]` and dweight `[D]`.

    Raises:
        RuntimeError: If the library is missing, serves no such dtype, or the launch fails.
    """
    tokens, width = h_TD.shape
    dy_TD, h_TD, rstd_T = near(dy_TD), near(h_TD), rstd_T.contiguous()
    dh = None if dh_TD is None else near(dh_TD)
    parts = library().rms_norm_parts(tokens, width, code(h_TD.dtype), processors(h_TD.device))
    dx_TD = h_TD.new_empty(tokens, width)
    given = weight_D.dtype
    dweight_D = weight_D.new_empty(width, dtype=torch.float32 if given == torch.float64 else given)
    weight_D = _weight(weight_D, h_TD.dtype)
    shares = h_TD.new_empty(parts, width, dtype=torch.float32)
    with on_device(h_TD):
        call(
            "rms_norm_backward", h_TD, pointer(dy_TD), pointer(dh), pointer(h_TD),
            pointer(weight_D), pointer(rstd_T), pointer(dx_TD), pointer(dweight_D), pointer(shares),
            tokens, width, dy_TD.stride(0), 0 if dh is None else dh.stride(0), h_TD.stride(0),
            parts, code(h_TD.dtype), code(weight_D.dtype), code(dweight_D.dtype),
        )  # fmt: skip
    return dx_TD, dweight_D.to(given)
