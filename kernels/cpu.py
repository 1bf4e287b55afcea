"""The operators of a step of generation on a CPU, in C++: `warploom._cpu`, from csrc/cpu.

They serve tensors that are `plain` (see `invariant.py`): float32, of which no gradient is asked.
PyTorch's own operators cost a call of 5 to 200 microseconds each for the few rows of a step, and
its products read the weights at half the memory's speed; these are bound by the memory up to eight
rows. `setup.py` builds the module where a C++ compiler is; where it is not, generation takes the
operators that train. The caller checks shapes.
"""

import functools
import importlib
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

MOST_ROWS = 24  # of a product: beyond, PyTorch's is as fast


@functools.cache
def _module() -> ModuleType | str:
    """Return the module, or what it lacks; an import that failed once is not tried again."""
    try:
        return importlib.import_module("warploom._cpu")
    except ImportError as error:
        return f"{error}: install a C++ compiler with OpenMP, then `pip install -e .`"


def missing() -> str | None:
    """Say why the module does not serve; None when it does."""
    return found if isinstance(found := _module(), str) else None


@functools.cache
def lanes() -> int:
    """Return how many floats a vector of this machine has: 4, 8 or 16; 0 without the module."""
    found = _module()
    return 0 if isinstance(found, str) else max(found.lanes())


def call(name: str, tensors: Iterable[Tensor | None], *sizes: float) -> None:
    """Call an operator of csrc/cpu/operators.h with the addresses of tensors, and with sizes."""
    pointers = (0 if x is None else x.data_ptr() for x in tensors)
    getattr(_module(), name)(lanes(), *pointers, *sizes)


def serves_linear(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `linear` serves these: 3 to `MOST_ROWS` rows, of whole vectors."""
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    return 2 < rows <= MOST_ROWS and not width % lanes() and weight.is_contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x weight^T + bias`: x `[..., D]`, weight `[F, D]` without gaps, bias `[F]`."""
    x, columns, bias = x.contiguous(), len(weight), bias if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], columns)
    call("linear", (x, weight, bias, y), x.shape[:-1].numel(), columns, x.shape[-1])
    return y


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `x + residual` normalised, and the sum (x without a residual): `[..., D]`."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    width = x.shape[-1]
    call("rms_norm", (x, residual, weight.contiguous(), y, total), x.numel() // width, width, eps)
    return y, total


def swiglu(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up` `[..., F]` of `[..., 2 F]`."""
    gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    call("swiglu", (gate_up, y), y.numel() // width, width)
    return y


def rotate(x_THK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
    """Rotate heads in halves, K = 2 J; the heads of a token lie side by side."""
    tokens, heads, width = x_THK.shape
    y = x_THK.new_empty(x_THK.shape)
    call("rotate", (x_THK, cos_TJ, sin_TJ, y), tokens, heads, width // 2, x_THK.stride(0))
    return y
