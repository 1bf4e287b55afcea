"""A linear layer whose weight lies in NF4: the frozen half of QLoRA.

    y = x W^T + bias,    W = the values of the codes, in the dtype of x

    dx = dy W,    dbias = sum over the rows of dy,    none for the weight

W is never there as a whole: blocks of its rows go through one buffer, of which a product is made
while it lies in the cache. Shapes: M rows, D input width, F output width. Saved for the backward:
the parts of W in NF4.

Bound by the matrix units: 2 M D F FLOPs. Of W, F D / 2 bytes are read, 2 F D written and read
again: where the buffer stays in the cache (32 MiB, of the 50 of an H200) only the first meet the
memory. At M = 4096 the product of 800 TFLOP/s takes ten times as long as all of these at 4.3 TB/s.
A fused kernel would decode the codes again for each tile of rows of x, with products from
registers, which compilers for Hopper get wrong (kernels/toolchain.py), and stays further below
the units' roof than the tenth that it saves. It would win where M is a few tokens: in decoding.

dx is a sum over the blocks: the products are rounded to the dtype of x, their sum, in float32, once
more.

Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, equations 5 and 6.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import choose
from ..library import (
    autocast,
    below_autograd,
    first_derivative_only,
    need_tensors,
    register,
    row_blocks,
    wide,
)
from ..quant.nf4 import SECOND, Nf4, check, fill, nf4_dequantize

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BUFFER = {"cpu": 1 << 20}  # elements of W at a time: what a core's caches hold
_BUFFER_GPU = 1 << 24  # 32 MiB in 16 bits


def nf4_linear_reference(x: Tensor, weight: Nf4, bias: Tensor | None = None) -> Tensor:
    """Specify `nf4_linear`, differentiably, with the whole weight."""
    return F.linear(x, nf4_dequantize(weight, dtype=torch.float32).to(x.dtype), bias)


def _blocks(q: Nf4, like: Tensor, backend: str) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of W and their values in the dtype of `like`, in a buffer that is used again.

    A block begins where a scale does, and, where scales share one, where that does.
    """
    width, size = q.shape[1], q.shape[0] * q.shape[1]
    unit = q.block if q.code is None else q.block * SECOND
    most = _BUFFER.get(like.device.type, _BUFFER_GPU)
    ranges = [
        (
            rows,
            rows.start * width // unit * unit,
            min(-(-rows.stop * width // q.block) * q.block, size),
        )
        for rows in row_blocks(q.shape[0], width, most)
    ]
    buffer = like.new_empty(max((stop - start for _, start, stop in ranges), default=0))
    packed, absmax = q.packed.reshape(-1), q.absmax.reshape(-1)
    for rows, start, stop in ranges:
        second = None if q.absmax2 is None else q.absmax2[start // (q.block * SECOND) :]
        fill(
            buffer[: stop - start], packed[start // 2 : (stop + 1) // 2],
            absmax[start // q.block : -(-stop // q.block)], *(q.code, second, q.offset),
            *(q.block, backend),
        )  # fmt: skip
        own = buffer[rows.start * width - start :][: (rows.stop - rows.start) * width]
        yield rows, own.view(-1, width)


def _forward(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None, absmax2: Tensor | None,
    offset: Tensor | None, shape: Sequence[int], block: int, bias: Tensor | None,
    backend: str | None,
) -> Tensor:  # fmt: skip
    chosen = choose("nf4_linear", x.device, x.dtype, backend)
    q = Nf4(packed, absmax, tuple(shape), x.dtype, block, code, absmax2, offset)
    y_MF = x.new_empty(x.shape[0], q.shape[0])
    if not y_MF.numel() or not x.shape[1]:
        return y_MF.copy_(bias.expand_as(y_MF)) if bias is not None else y_MF.zero_()
    for rows, weight in _blocks(q, x, chosen):
        if bias is None:
            torch.mm(x, weight.t(), out=y_MF[:, rows])
        else:
            torch.addmm(bias[rows], x, weight.t(), out=y_MF[:, rows])
    return y_MF


def _forward_fake(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None, absmax2: Tensor | None,
    offset: Tensor | None, shape: Sequence[int], *_: Any,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], shape[0])


def _input_gradient(
    dy: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None, absmax2: Tensor | None,
    offset: Tensor | None, shape: Sequence[int], block: int, backend: str | None,
) -> Tensor:  # fmt: skip
    chosen = choose("nf4_linear", dy.device, dy.dtype, backend)
    q = Nf4(packed, absmax, tuple(shape), dy.dtype, block, code, absmax2, offset)
    sum_MD = dy.new_empty(0)
    if not dy.numel() or not q.shape[1]:
        return dy.new_zeros(dy.shape[0], q.shape[1])
    for rows, weight in _blocks(q, dy, chosen):
        part_MD = torch.mm(dy[:, rows], weight)
        if rows.start:
            sum_MD.add_(part_MD)
        else:
            sum_MD = part_MD if rows.stop == q.shape[0] else part_MD.to(wide(dy.dtype))
    return sum_MD.to(dy.dtype)


def _input_gradient_fake(
    dy: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None, absmax2: Tensor | None,
    offset: Tensor | None, shape: Sequence[int], block: int, backend: str | None,
) -> Tensor:  # fmt: skip
    return dy.new_empty(dy.shape[0], shape[1])


class _Nf4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *parts, shape, block, bias, backend = rest
        ctx.save_for_backward(*parts)
        ctx.rest = shape, block, backend
        ctx.bias = None if bias is None else bias.dtype
        y: Tensor = below_autograd(_FORWARD, x, *rest)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("nf4_linear")
        parts = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _INPUT_GRADIENT(dy, *parts, *ctx.rest)
        if ctx.bias is not None and ctx.needs_input_grad[8]:
            dbias = dy.sum(0, dtype=wide(dy.dtype)).to(ctx.bias)
        return dx, *(None,) * 7, dbias, None


_PARTS = "Tensor packed, Tensor absmax, Tensor? code, Tensor? absmax2, Tensor? offset"
_FORWARD = register(
    f"nf4_linear_forward(Tensor x, {_PARTS}, SymInt[] shape, int block, Tensor? bias,"
    " str? backend) -> Tensor",
    _forward, _forward_fake, _Nf4Linear,
)  # fmt: skip
_INPUT_GRADIENT = register(
    f"nf4_linear_input_gradient(Tensor dy, {_PARTS}, SymInt[] shape, int block, str? backend)"
    " -> Tensor",
    _input_gradient, _input_gradient_fake,
)  # fmt: skip


def nf4_linear(
    x: Tensor, weight: Nf4, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Multiply by a frozen weight in NF4, which is never there as a whole.

    Args:
        x: `[..., D]`, any strides; float16, bfloat16, float32 or float64. Under autocast it is
            cast, as in `linear`.
        weight: `[F, D]`, as `nf4_quantize` gives it; it gets no gradient.
        bias: `[F]` in the dtype of `x`, or None.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        `[..., F]` in the dtype of `x`, to which W is rounded before it is multiplied.

    Raises:
        TypeError: If `x` or `bias` is no tensor, or `weight` no `Nf4`.
        ValueError: If the shapes or dtypes do not fit.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    need_tensors("nf4_linear", x=x, **({} if bias is None else {"bias": bias}))
    if not isinstance(weight, Nf4):
        raise TypeError(
            f"nf4_linear: weight must be an Nf4, got {type(weight).__name__}: make one by "
            f"nf4_quantize"
        )
    if len(weight.shape) != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"nf4_linear: x must be [..., D] and weight [F, D], got {[*x.shape]} and "
            f"{[*weight.shape]}"
        )
    check("nf4_linear", weight)
    x, bias = autocast(x)[0], None if bias is None else autocast(bias)[0]
    if x.dtype not in _DTYPES or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(
            "nf4_linear: x and bias must have one dtype of float16, bfloat16, float32 and float64, "
            f"got {x.dtype} and {None if bias is None else bias.dtype}"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"nf4_linear: bias must be [{weight.shape[0]}], got {[*bias.shape]}")
    parts = weight.packed, weight.absmax, weight.code, weight.absmax2, weight.offset
    flat = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    y: Tensor = _FORWARD(flat, *parts, weight.shape, weight.block, bias, backend)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
