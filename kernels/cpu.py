"""The operators of a step of generation on a CPU, in C++: `warploom._cpu`, from csrc/cpu.

They serve tensors that are `plain` (see `invariant.py`): float32, of which no gradient is asked.
PyTorch's own operators cost a call of 5 to 200 microseconds each for the few rows of a step, and
its products read the weights at half the memory's speed; these are bound by the memory up to eight
rows. `setup.py` builds the module where a C++ compiler is; where it is not, generation takes the
operators that train. The caller checks shapes.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 24  # of a product: beyond, PyTorch's is as fast


@functools.cache
def operators() -> Any:
    """Return the module, or in words what it lacks; an import that failed is not tried again.

    Its operators take how many floats a vector has, addresses and sizes.
    """
    try:
        return importlib.import_module("warploom._cpu")
    except ImportError as error:
        return f"{error}: install a C++ compiler with OpenMP, then `pip install -e .`"


def missing() -> str | None:
    """Say why the module does not serve; None when it does."""
    return found if isinstance(found := operators(), str) else None


@functools.cache
def lanes() -> int:
    """Return how many floats a vector of this machine has: 4, 8 or 16; 0 without the module."""
    return 0 if missing() else max(operators().lanes())


def serves_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether `linear` serves these: they fit, 3 to `MOST_ROWS` rows of whole vectors."""
    added = bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())
    whole = weight.shape[1:] == x.shape[-1:] and weight.numel() > 0 and not x.shape[-1] % lanes()
    return added and whole and weight.is_contiguous() and 2 < x.shape[:-1].numel() <= MOST_ROWS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x weight^T + bias`: x `[..., D]`, weight `[F, D]` without gaps, bias `[F]`."""
    x, columns, width = x.contiguous(), weight.shape[0], x.shape[-1]
    y, added = x.new_empty(*x.shape[:-1], columns), 0 if bias is None else bias.data_ptr()
    where = x.data_ptr(), weight.data_ptr(), added, y.data_ptr()
    operators().linear(lanes(), *where, x.numel() // width, columns, width)
    return y


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `x + residual` normalised, and the sum (x without a residual): `[..., D]`."""
    x, weight, width = x.contiguous(), weight.contiguous(), x.shape[-1]
    y, total, more = torch.empty_like(x), x, 0
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty_like(x)
        more = residual.data_ptr()
    where = x.data_ptr(), more, weight.data_ptr(), y.data_ptr(), total.data_ptr()
    operators().rms_norm(lanes(), *where, x.numel() // width, width, eps)
    return y, total


def swiglu(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up` `[..., F]` of `[..., 2 F]`."""
    gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    operators().swiglu(lanes(), gate_up.data_ptr(), y.data_ptr(), y.shape[:-1].numel(), width)
    return y


def rotate(x_THK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
    """Rotate heads in halves, K = 2 J; the heads of a token lie side by side."""
    tokens, heads, width = x_THK.shape
    y = x_THK.new_empty(x_THK.shape)
    where = x_THK.data_ptr(), cos_TJ.data_ptr(), sin_TJ.data_ptr(), y.data_ptr()
    operators().rotate(lanes(), *where, tokens, heads, width // 2, x_THK.stride(0))
    return y
