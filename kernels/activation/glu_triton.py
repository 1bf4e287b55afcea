"""Triton code of `swiglu`, `geglu`, `relu2` and their FP8 forms.

A program works on a piece of one row, which divides into the blocks that share a scale; with one
scale a row it walks over the row twice, and finds it in the cache the second time. The backward
computes the activation again. Row offsets are 64-bit.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launch import next_power_of_two, on_device
from ..quant.formats import BLOCK as GROUP
from ..quant.formats import MAXIMA
from ..quant.fp8_triton import fp8_amax, fp8_bits, fp8_cast, fp8_scale

_MAX_BLOCK = 2048
_OTHERS = ((1024, 4), (2048, 4), (4096, 8), (4096, 16), (8192, 16))  # to be searched
_E4M3 = torch.float8_e4m3fn


def configurations(width: int) -> list[dict[str, int]]:
    """List blocks and warps that may serve a width, the default first.

    Args:
        width: F.

    Returns:
        For each BLOCK, elements a program, and num_warps.
    """
    whole = next_power_of_two(width)
    block = min(whole, _MAX_BLOCK)
    found = [{"BLOCK": block, "num_warps": 8 if block > 1024 else 4}]
    others = [{"BLOCK": b, "num_warps": w} for b, w in _OTHERS if b <= whole]
    return found + [other for other in others if other not in found]


@triton.jit
def activate(z, KIND: tl.constexpr):
    """Return f(z) and f'(z)."""
    if KIND == "relu2":
        positive = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive * positive, 2.0 * positive
    if KIND == "geglu":
        below = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        return z * below, below + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    if KIND == "geglu_tanh":
        square = z * z
        s = tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * square))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * square)
        return z * s, s + z * s * (1.0 - s) * inner
    s = tl.sigmoid(z)
    return z * s, s * (1.0 + z * (1.0 - s))


@triton.jit
def value_at(at, width, inside, KIND: tl.constexpr):
    """Load the gate and what it multiplies, and return their product in float32."""
    value, _ = activate(tl.load(at, inside, other=0.0).to(tl.float32), KIND)
    if KIND != "relu2":
        value *= tl.load(at + width, inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def forward_kernel(x, y, width, pieces, stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Write BLOCK elements of the value."""
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64)
    column = (program % pieces) * BLOCK + tl.arange(0, BLOCK)
    value = value_at(x + row * stride + column, width, column < width, KIND)
    tl.store(y + row * width + column, value.to(y.dtype.element_ty), column < width)


@triton.jit
def block_kernel(
    x, data, scale, width, pieces, groups, stride, KIND: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    MAX: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the codes of BLOCK elements and a scale for each GROUP of them."""
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64)
    group = (program % pieces) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = value_at(x + row * stride + column, width, column < width, KIND)
    factor, inverse = fp8_scale(fp8_amax(value, 1), MAX, POWER_OF_TWO)
    tl.store(scale + row * groups + group, factor, group < groups)
    codes = fp8_cast(value, inverse[:, None], MAX, data.dtype.element_ty)
    tl.store(data + row * width + column, codes, column < width)


@triton.jit
def row_kernel(
    x, data, scale, width, stride, KIND: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    MAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the codes of a row and its scale."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        column = start + columns
        value = value_at(x + row * stride + column, width, column < width, KIND)
        largest = tl.maximum(largest, fp8_bits(value))
    a = tl.max(largest, 0).to(tl.float32, bitcast=True)
    factor, inverse = fp8_scale(a, MAX, POWER_OF_TWO)
    tl.store(scale + row, factor)
    for start in range(0, width, BLOCK):
        column = start + columns
        value = value_at(x + row * stride + column, width, column < width, KIND)
        codes = fp8_cast(value, inverse, MAX, data.dtype.element_ty)
        tl.store(data + row * width + column, codes, column < width)


@triton.jit
def backward_kernel(
    dy, x, dx, width, pieces, dy_stride, stride, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """Write BLOCK elements of dgate, and the same of dup where there is one."""
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64)
    column = (program % pieces) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = x + row * stride + column
    value, slope = activate(tl.load(at, inside, other=0.0).to(tl.float32), KIND)
    above = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(tl.float32)
    if KIND == "relu2":
        tl.store(dx + row * width + column, (above * slope).to(dx.dtype.element_ty), inside)
    else:
        up = tl.load(at + width, inside, other=0.0).to(tl.float32)
        to = dx + row * (2 * width) + column
        tl.store(to, (above * up * slope).to(dx.dtype.element_ty), inside)
        tl.store(to + width, (above * value).to(dx.dtype.element_ty), inside)


def _rows(x_TD: Tensor) -> Tensor:
    """Leave strided rows as they are; copy only when the elements of a row are apart."""
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


def forward(x_TF: Tensor, kind: str) -> Tensor:
    """Launch the forward.

    Args:
        x_TF: `[T, 2F]`, for relu2 `[T, F]`.
        kind: "swiglu", "geglu", "geglu_tanh" or "relu2".

    Returns:
        `[T, F]`.
    """
    tokens, width = x_TF.shape[0], x_TF.shape[1] // (1 if kind == "relu2" else 2)
    y_TF = x_TF.new_empty(tokens, width)
    if y_TF.numel():
        x_TF = _rows(x_TF)

        def start(chosen: dict[str, int]) -> None:
            pieces = triton.cdiv(width, chosen["BLOCK"])
            forward_kernel[(tokens * pieces,)](
                x_TF, y_TF, width, pieces, x_TF.stride(0), KIND=kind, **chosen
            )

        key, op = ("forward", kind, width), kind.removesuffix("_tanh")
        tuning.launch(op, key, configurations(width), start, x_TF)
    return y_TF


def forward_fp8(x_TF: Tensor, kind: str, scaling: str, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Launch the forward that quantises.

    Args:
        x_TF: `[T, 2F]`, for relu2 `[T, F]`.
        kind: "swiglu", "geglu", "geglu_tanh" or "relu2".
        scaling: "row" or "block".
        power_of_two: Whether scales are powers of two.

    Returns:
        data `[T, F]` float8_e4m3fn, scale `[T, 1]` or `[T, ceil(F / 128)]` float32.
    """
    tokens, width = x_TF.shape[0], x_TF.shape[1] // (1 if kind == "relu2" else 2)
    groups = 1 if scaling == "row" else triton.cdiv(width, GROUP)
    data = x_TF.new_empty(tokens, width, dtype=_E4M3)
    scale = x_TF.new_empty(tokens, groups, dtype=torch.float32)
    if not data.numel():
        return data, scale.fill_(2.0**-126)
    chosen, x_TF = configurations(max(width, GROUP))[0], _rows(x_TF)
    options = {"KIND": kind, "POWER_OF_TWO": power_of_two, "MAX": MAXIMA[_E4M3], **chosen}
    with on_device(x_TF):
        if scaling == "row":
            row_kernel[(tokens,)](x_TF, data, scale, width, x_TF.stride(0), **options)
        else:
            pieces = triton.cdiv(width, chosen["BLOCK"])
            block_kernel[(tokens * pieces,)](
                x_TF, data, scale, width, pieces, groups, x_TF.stride(0), GROUP=GROUP, **options
            )
    return data, scale


def backward(dy_TF: Tensor, x_TF: Tensor, kind: str) -> Tensor:
    """Launch the backward.

    Args:
        dy_TF: `[T, F]`.
        x_TF: `[T, 2F]`, for relu2 `[T, F]`.
        kind: "swiglu", "geglu", "geglu_tanh" or "relu2".

    Returns:
        In the shape of `x_TF`.
    """
    tokens, width = dy_TF.shape
    dx_TF = x_TF.new_empty(x_TF.shape)
    if dx_TF.numel():
        x_TF, dy_TF = _rows(x_TF), _rows(dy_TF)

        def start(chosen: dict[str, int]) -> None:
            pieces = triton.cdiv(width, chosen["BLOCK"])
            strides = dy_TF.stride(0), x_TF.stride(0)
            backward_kernel[(tokens * pieces,)](
                dy_TF, x_TF, dx_TF, width, pieces, *strides, KIND=kind, **chosen
            )

        key, op = ("backward", kind, width), kind.removesuffix("_tanh")
        tuning.launch(op, key, configurations(width), start, x_TF)
    return dx_TF
