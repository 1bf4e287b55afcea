"""The batch-invariant mode: a token's results depend on nothing but the tokens before it.

    with batch_invariant():
        ...                 the same bits alone or in a batch, in chunks or at once, paged or not

What depends on company on a CPU, and what the mode does about it:

- Products. MKL sums along the width in another order with another number of rows. oneDNN's inner
  product takes one order for any number of rows, from two on; a single row is doubled.
- Attention. It is computed in tiles of keys at fixed places (`attention/invariant.py`).
- Sigmoid, SiLU and GELU. PyTorch's last elements, which do not fill a vector, are rounded in
  another way than the rest; exp, tanh and erf have no such end, and the mode takes these alone.
- Sums over more than two ranks, whose order moves with the place: in rank order
  (`parallel/collectives`).

That oneDNN and these functions are so was measured (x86-64 with AVX-512 and AVX2, 1 to 16 threads)
and is written nowhere: `tests/kernels/test_invariant.py` is the proof on a machine. The bits are
those of a machine and its number of threads. Gradients are computed as always.

The mode serves float32, bfloat16 and float16 on the CPU; what it has no invariant form for is an
error. What is compiled runs as it is written, uncompiled.

Source: He et al. 2025, https://thinkingmachines.ai/blog/defeating-nondeterminism-in-llm-inference
(one order of sums, whatever the size of the batch).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .library import autocast, first_derivative_only, wide

_ON: ContextVar[bool] = ContextVar("warploom_batch_invariant", default=False)


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Have what runs in this context, in this thread, be invariant of the batch, or refuse."""
    token = _ON.set(True)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _ON.reset(token)


def invariant() -> bool:
    """Tell whether the mode is on here; the compiler, which cannot ask, is off where it is."""
    return not torch.compiler.is_compiling() and _ON.get()


def plain(*tensors: Tensor) -> bool:
    """Tell whether the operators of `cpu` serve: no gradient can come, float32 in memory."""
    if not torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
        return False
    for x in tensors:
        if type(x) not in (Tensor, torch.nn.Parameter) or x.dtype != torch.float32 or not x.is_cpu:
            return False
    return cpu.lanes() > 0 and not (_ON.get() or torch.is_autocast_enabled("cpu"))


def need_invariant(op: str, served: bool, found: object) -> None:
    """Refuse in the mode what has no invariant form.

    Args:
        op: Operator, for the message.
        served: Whether it has one.
        found: What has none: a device, a dtype, a backend.

    Raises:
        RuntimeError: If the mode is on and it is not served.
    """
    if invariant() and not served:
        raise RuntimeError(
            f"{op}: batch_invariant() serves float32, bfloat16 and float16 on the CPU, without "
            f"quantised products, rings or Triton, got {found}: leave the mode for this"
        )


def need_tensor(op: str, x: Tensor) -> None:
    """Refuse in the mode a tensor of another device or dtype, as `need_invariant`."""
    served = x.device.type == "cpu" and x.dtype != torch.float64
    need_invariant(op, served, f"{x.dtype} on {x.device}")


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x weight^T` on the CPU, each row by itself; x is `[..., D]`, weight `[F, D]`."""
    rows = x.reshape(-1, x.shape[-1])
    native = x.dtype == torch.float32 or (
        x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    a, b = (rows, weight) if native else (rows.float(), weight.float())
    if not (a.numel() and b.numel()):
        return F.linear(x, weight)
    a = a.expand(2, -1) if len(a) == 1 else a
    product: Any = torch.ops.mkldnn._linear_pointwise.default
    y: Tensor = product(a.contiguous(), b.contiguous(), None, "none", [], "")
    return y[: len(rows)].to(x.dtype).view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("linear")
        (dy,), (x, weight), needs = dys, ctx.saved_tensors, ctx.needs_input_grad
        dx = dy @ weight if needs[0] else None
        return dx, dy.flatten(0, -2).t() @ x.flatten(0, -2) if needs[1] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply `F.linear`, in the mode an invariant one.

    Args:
        x: `[..., D]`.
        weight: `[F, D]`, in the dtype of `x`.
        bias: `[F]`, or None.

    Returns:
        `[..., F]`.

    Raises:
        RuntimeError: In the mode, if it does not serve the tensors.
    """
    if torch.compiler.is_compiling() or not (_ON.get() or torch.is_inference_mode_enabled()):
        return F.linear(x, weight, bias)
    if not _ON.get():
        few = plain(x, weight, x if bias is None else bias) and cpu.serves_linear(x, weight, bias)
        y: Tensor = (cpu.linear if few else F.linear)(x, weight, bias)
        return y
    x, weight = autocast(x, weight)
    need_tensor("linear", x)
    y = _Linear.apply(x, weight)
    return y if bias is None else y + bias.to(y.dtype)


def sigmoid(x: Tensor) -> Tensor:
    """Apply the sigmoid, in the mode an invariant one."""
    return ((-x).exp() + 1).reciprocal() if invariant() else torch.sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    """Apply the GELU in its tanh form, in the mode an invariant one."""
    if not invariant():
        return F.gelu(x, approximate="tanh")
    h = x.to(wide(x.dtype))
    return (h * sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))).to(x.dtype)
