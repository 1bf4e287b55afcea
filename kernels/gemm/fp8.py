"""Matrix products of FP8 operands, each with its scales: one operator for every grouping.

    y[m, n] = sum over k of (a[m, k] sa[m, k]) (b[n, k] sb[n, k])

    scaling    a shares a scale in      b shares a scale in      serves
    tensor     the matrix               the matrix               all three products of a layer
    row        a row                    a row                    all three
    tile       1 x 128 along K          128 x 128                forward and input gradient
    block      1 x 128 along K          1 x 128 along K          weight gradient
    mx         1 x 32 along K, E8M0     1 x 32 along K, E8M0     all three

The scaling is read off the shapes of the scales. A product of two FP8 numbers is exact in float32,
sums are float32, the result is rounded once, to its dtype. Backends differ in the order of the sums
and in where a scale that is no power of two is rounded: `reference` multiplies each operand by its
scale, the others a sum over K (tensor, row) or over a group of it. With integers whose sums stay
below 2^24, and scales that are powers of two, all give the same bits. Hopper's matrix units keep
some 14 bits of a sum: a sum is closed every 128 elements of K, and goes on in float32.

Shapes: M rows of a, N rows of b, K what they share. Bound by the matrix units, 2 M N K FLOPs.

Source: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433, section 3; DeepSeek 2024,
https://arxiv.org/abs/2412.19437, sections 3.3.2 and 3.3.3 (groups, sums of 128); Open Compute
Project 2023, Microscaling Formats (MX) Specification v1.0, section 6.2.
"""

from typing import Literal

import torch
from torch import Tensor

from ..backends import case_key, choose
from ..library import need_tensors, register, row_blocks, wide
from ..quant.formats import BLOCK, MAXIMA, MX_BLOCK
from ..quant.fp8 import Fp8
from ..quant.mx import Mx
from . import fp8_torch

Product = Literal["tensor", "row", "tile", "block", "mx"]
Operand = Fp8 | Mx
_MEMORY = 1 << 24  # elements of an operand that are numbers at a time: 64 MiB in float32
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SCALED: tuple[Product, ...] = ("tensor", "row", "tile", "block")


def fp8_gemm_reference(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """Specify `fp8_gemm`: multiply the operands out, then each other; every backend is near this.

    Args:
        a: `[M, K]`.
        b: `[N, K]`.
        dtype: Of the result; float64 sums in float64.

    Returns:
        `[M, N]`.
    """
    values = (q.dequantize(torch.float32).to(wide(dtype)) for q in (a, b))
    return torch.mm(next(values), next(values).t()).to(dtype)


def _value(
    codes: Tensor, scale: Tensor, source: torch.dtype, group: int, to: torch.dtype
) -> Tensor:
    """Multiply rows out in float32; `scale` is `[]`, of the rows, or of groups of each row."""
    table = torch.arange(256, dtype=torch.uint8, device=codes.device).view(source).to(torch.float32)
    rows, width = codes.shape
    value = table.index_select(0, codes.reshape(-1).int()).view(rows, width)  # the cast takes 7x
    if not scale.dim() or scale.shape[1] == 1:
        return value.mul_(scale).to(to)
    whole = width // group * group
    if whole:
        value[:, :whole].unflatten(1, (-1, group)).mul_(scale[:, : whole // group, None])
    if whole < width:
        value[:, whole:].mul_(scale[:, whole // group :])
    return value.to(to)


def _gemm_cpu(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, types: tuple[torch.dtype, torch.dtype],
    scaling: Product, y: Tensor,
) -> None:  # fmt: skip
    """Multiply block by block of rows of both, so that few of them are numbers at a time."""
    group, to = MX_BLOCK if scaling == "mx" else BLOCK, wide(y.dtype)

    def blocks(codes: Tensor) -> list[slice]:
        rows, width = codes.shape
        cuts = row_blocks(-(-rows // BLOCK), BLOCK * width, _MEMORY)  # whole tiles
        return [slice(cut.start * BLOCK, min(cut.stop * BLOCK, rows)) for cut in cuts]

    def part(codes: Tensor, scale: Tensor, rows: slice, n: int) -> Tensor:
        if scaling == "tile" and n == 1:
            scale = scale[rows.start // BLOCK : -(-rows.stop // BLOCK)]
            scale = scale.repeat_interleave(BLOCK, 0)[: rows.stop - rows.start]
        elif scaling == "mx":
            scale = scale[rows].view(torch.float8_e8m0fnu).to(torch.float32)
        elif scale.dim():
            scale = scale[rows]
        return _value(codes[rows], scale, types[n], group, to)

    for columns in blocks(b):
        second = part(b, b_scale, columns, 1).t()
        for rows in blocks(a):
            y[rows, columns] = torch.mm(part(a, a_scale, rows, 0), second)


def _choose(
    a: Tensor, b: Tensor, types: tuple[torch.dtype, torch.dtype], scaling: Product,
    dtype: torch.dtype, backend: str | None,
) -> str:  # fmt: skip
    """Choose a backend; on CUDA by default PyTorch's, and on a device without FP8 none."""
    device = a.device
    case = None
    if a.is_cuda:
        case = case_key(scaling=scaling, rows=a.shape[0], n=b.shape[0], k=a.shape[1])
    chosen = choose("fp8_gemm", device, dtype, backend, case)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if lack := fp8_torch.device_lack(capability, scaling, backend):
        raise RuntimeError(f"fp8_gemm: {lack}")
    if chosen == "torch" or (chosen == "reference" and backend is None and capability is not None):
        sizes = a.shape[0], b.shape[0], a.shape[1]
        lack = fp8_torch.missing(sizes, types, scaling, dtype, device, capability)
        if lack and backend:
            raise RuntimeError(f"fp8_gemm: backend 'torch' {lack}")
        chosen = "reference" if lack else "torch"
    return chosen


def _gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, a_type: torch.dtype,
    b_type: torch.dtype, scaling: Product, dtype: torch.dtype, backend: str | None,
) -> Tensor:  # fmt: skip
    types = a_type, b_type
    chosen = _choose(a, b, types, scaling, dtype, backend)
    y = a_scale.new_empty(a.shape[0], b.shape[0], dtype=dtype)
    if not y.numel() or not a.shape[1]:
        return y.zero_()
    if chosen == "reference":
        _gemm_cpu(a, a_scale, b, b_scale, types, scaling, y)
        return y
    operands = a.view(a_type), a_scale, b.view(b_type), b_scale, scaling
    if chosen == "torch":
        return fp8_torch.gemm(*operands, dtype)
    from .fp8_triton import gemm

    gemm(*operands, y)
    return y


def _gemm_fake(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, a_type: torch.dtype,
    b_type: torch.dtype, scaling: Product, dtype: torch.dtype, backend: str | None,
) -> Tensor:  # fmt: skip
    return a_scale.new_empty(a.shape[0], b.shape[0], dtype=dtype)


_GEMM = register(
    "fp8_gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, ScalarType a_type,"
    " ScalarType b_type, str scaling, ScalarType dtype, str? backend) -> Tensor",
    _gemm, _gemm_fake,
)  # fmt: skip


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *rest: object) -> Tensor:
    """Multiply operands whose scaling is known, without checks.

    Args:
        a: Codes `[M, K]`, in an FP8 dtype.
        a_scale: Of `a`, float32 or float8_e8m0fnu.
        b: Codes `[N, K]`, in an FP8 dtype.
        b_scale: Of `b`.
        rest: The scaling by the name of the table, dtype of the result, backend or None.

    Returns:
        `[M, N]`.
    """
    bytes_ = (x.view(torch.uint8) if x.dtype.itemsize == 1 else x for x in (a, a_scale, b, b_scale))
    y: Tensor = _GEMM(*bytes_, a.dtype, b.dtype, *rest)
    return y


def scale_shape(grouping: Product, rows: int, width: int) -> tuple[int, ...]:
    """Return the shape of the scales of an operand.

    Args:
        grouping: What shares a scale.
        rows: Of the operand.
        width: Its K.

    Returns:
        `[]`, `[rows, 1]`, or a scale for each group of a row, or of 128 rows with "tile".
    """
    if grouping == "tensor":
        return ()
    group = MX_BLOCK if grouping == "mx" else BLOCK
    groups = 1 if grouping == "row" else (width + group - 1) // group
    return (rows + BLOCK - 1) // BLOCK if grouping == "tile" else rows, groups


def _groupings(q: Operand) -> list[Product]:
    """Name the groupings that the scales of an operand can mean; one row is a tile and a block."""
    names: tuple[Product, ...] = ("mx",) if isinstance(q, Mx) else _SCALED
    return [name for name in names if q.scale.shape == scale_shape(name, *q.data.shape)]


def _check(a: Operand, b: Operand) -> Product:
    """Refuse what cannot be multiplied; return the scaling."""
    for name, q in (("a", a), ("b", b)):
        if not isinstance(q, Fp8 | Mx):
            raise TypeError(
                f"fp8_gemm: {name} must be an Fp8 or an Mx, got {type(q).__name__}: quantise it "
                f"with fp8_quantize or mx_quantize"
            )
        need_tensors("fp8_gemm", **{f"{name}.data": q.data, f"{name}.scale": q.scale})
        scale = torch.float8_e8m0fnu if isinstance(q, Mx) else torch.float32
        if q.data.dtype not in MAXIMA or q.scale.dtype != scale:
            raise ValueError(
                f"fp8_gemm: {name} must be float8_e4m3fn or float8_e5m2 with scales in {scale}, "
                f"got {q.data.dtype} and {q.scale.dtype}"
            )
        if q.carrier.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"fp8_gemm: it has no gradient, but {name} was quantised from a tensor that "
                f"requires one: take fp8_linear, or quantise the detached tensor"
            )
    if a.data.dim() != 2 or b.data.dim() != 2 or a.data.shape[1] != b.data.shape[1]:
        raise ValueError(
            f"fp8_gemm: a must be [M, K] and b [N, K], got {[*a.data.shape]} and {[*b.data.shape]}"
        )
    first = _groupings(a)
    for grouping in _groupings(b):
        if ("block" if grouping == "tile" else grouping) in first:
            return grouping
    raise ValueError(
        f"fp8_gemm: scales must be of the tensors, of the rows, of 1x128 and 128x128, of 1x128 "
        f"twice, or MX twice, got {[*a.scale.shape]} for a {[*a.data.shape]} and "
        f"{[*b.scale.shape]} for b {[*b.data.shape]}"
    )


def fp8_gemm(
    a: Operand, b: Operand, *, dtype: torch.dtype | None = None, backend: str | None = None
) -> Tensor:
    """Multiply a by b transposed.

    Args:
        a: `[M, K]`, from `fp8_quantize` or `mx_quantize`; e4m3 or e5m2.
        b: `[N, K]`, quantised along K as well: for what is contracted along the other dimension
            take the transposed copy, `Fp8(q.data_t, q.scale_t, ...)`.
        dtype: Of the result: float16, bfloat16, float32, or float64, which sums in float64; None
            takes what `a` was quantised from.
        backend: `reference`, `torch` or `triton`; None takes the fastest that is proven here.

    Returns:
        `[M, N]`; it has no gradient.

    Raises:
        TypeError: If an operand is not quantised.
        ValueError: If shapes, dtypes or scales do not fit.
        RuntimeError: If an operand wants a gradient, or `backend` cannot serve these here.
    """
    scaling, dtype = _check(a, b), a.carrier.dtype if dtype is None else dtype
    if dtype not in _DTYPES:
        raise ValueError(
            f"fp8_gemm: dtype must be float16, bfloat16, float32 or float64, got {dtype}"
        )
    return product(a.data, a.scale, b.data, b.scale, scaling, dtype, backend)
