"""Quantisation to FP8: per tensor, per row, in blocks of 1x128 or in tiles of 128x128.

    a = max |x| of a group, in float32, but at least MAX 2^-126
    scale = a / MAX,    inverse = MAX / a,    both rounded to nearest
    data = round(clamp(x inverse, -MAX, MAX)),    x is about data scale

    dx = the gradient of the value: the rounding is passed straight through

With `power_of_two` the scale is 2^ceil(log2(a / MAX)) and inverse = 1 / scale. MAX is 448 for e4m3
and 57344 for e5m2. A NaN or an inf makes its group NaN when it is multiplied out, and no other.

Shapes: T tokens, D width. Bound by memory. Roof: one read of x and a byte written for each element,
two with the transposed copy, over the bandwidth; a scale that needs the whole tensor (or, with the
transposed copy, whole rows) before the first element is rounded reads x twice.

Source: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433, section 3 (formats); DeepSeek
2024, https://arxiv.org/abs/2412.19437, section 3.3.2 (blocks and tiles).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from ..library import below_autograd, first_derivative_only, need_tensors, register, row_blocks
from .formats import BLOCK as BLOCK
from .formats import MAXIMA as MAXIMA

Scaling = Literal["tensor", "row", "block", "tile"]
Grouping = Literal["row", "block"]  # what an operator that quantises its result knows by itself
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Fp8(NamedTuple):
    """A quantised tensor: data times scale is its value.

    Attributes:
        data: `[..., D]`, float8_e4m3fn or float8_e5m2.
        scale: float32; by scaling: "tensor" `[]`, "row" `[..., 1]`, "block" `[..., ceil(D / 128)]`,
            "tile" `[ceil(T / 128), ceil(D / 128)]`.
        carrier: Shape and dtype of what was quantised, of one element's storage; its gradient is
            the gradient of the value: who consumes data returns its input gradient for this.
        data_t: The transposed matrix `[D, T]`, quantised along T; None unless asked for.
        scale_t: Scale of `data_t`.
        amax: max |x| `[]` float32, for the next step's scale; None unless scaling is "tensor".
    """

    data: Tensor
    scale: Tensor
    carrier: Tensor
    data_t: Tensor | None = None
    scale_t: Tensor | None = None
    amax: Tensor | None = None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Multiply data by scale; differentiable: the gradient goes to what was quantised.

        Args:
            dtype: Of the result; None takes that of what was quantised.

        Returns:
            `[..., D]`.
        """
        return dequantize(self.carrier, self.data, self.scale, BLOCK, dtype)


def dequantize(
    carrier: Tensor, data: Tensor, scale: Tensor, block: int, dtype: torch.dtype | None
) -> Tensor:
    """Multiply data by scale; the gradient goes to the carrier.

    Args:
        carrier: Shape and dtype of the value.
        data: `[..., D]` in an FP8 dtype.
        scale: float32 `[]`, or of rows, of `block` elements of a row, or of tiles of `block`.
        block: Elements that share a scale where it is neither the tensor's nor a row's.
        dtype: Of the result; None takes that of the carrier.

    Returns:
        `[..., D]`.
    """
    codes, to = data.view(torch.uint8), carrier.dtype if dtype is None else dtype
    value: Tensor = _DEQUANTIZE(carrier, codes, scale, block, data.dtype, to)
    return value


def _amax(x: Tensor, dim: int) -> Tensor:
    if not x.shape[dim]:
        return x.new_zeros(()).expand(x.sum(dim, keepdim=True).shape)
    return x.abs().amax(dim, keepdim=True)


def fp8_scales(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Turn the largest absolute value of each group into its scale.

    Args:
        amax: float32, any shape.
        dtype: float8_e4m3fn or float8_e5m2.
        power_of_two: Whether to round the scale up to a power of two.

    Returns:
        scale and its inverse, float32 in the shape of `amax`.
    """
    limit = amax.new_full((), MAXIMA[dtype])  # a tensor: division by a number is not exact on CUDA
    amax = torch.maximum(amax, limit * 2.0**-126)
    scale = torch.div(amax, limit)
    if not power_of_two:
        return scale, torch.div(limit, amax)
    bits = (scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000  # a mantissa raises the exponent
    scale = torch.where(scale.isnan(), scale, bits.view(torch.float32))
    return scale, torch.div(torch.ones_like(limit), scale)


def fp8_rows(
    x_TD: Tensor, scaling: str, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Quantise each row, or each 128 elements of it: what the fused operators do on the CPU.

    Args:
        x_TD: `[T, D]` float32, not yet rounded to a narrower dtype.
        scaling: "row" or "block".
        dtype: float8_e4m3fn or float8_e5m2.
        power_of_two: Whether scales are powers of two.

    Returns:
        data `[T, D]` and scale `[T, 1]` or `[T, ceil(D / 128)]`.
    """
    if scaling == "row":
        scale, inverse = fp8_scales(_amax(x_TD, 1), dtype, power_of_two)
        return torch.mul(x_TD, inverse).to(dtype), scale  # within MAX, as every scale made here
    tokens, width = x_TD.shape
    whole = width // BLOCK * BLOCK
    data = x_TD.new_empty(tokens, width, dtype=dtype)
    scale = x_TD.new_empty(tokens, -(-width // BLOCK), dtype=torch.float32)
    for rows in row_blocks(tokens, width):
        for part in (slice(0, whole), slice(whole, width)):  # the last block may be narrow
            if part.start == part.stop:
                continue
            groups = x_TD[rows, part].unflatten(1, (-1, min(BLOCK, part.stop - part.start)))
            factor, inverse = fp8_scales(_amax(groups, 2), dtype, power_of_two)
            scale[rows, part.start // BLOCK : -(-part.stop // BLOCK)] = factor.squeeze(2)
            data[rows, part] = torch.mul(groups, inverse).flatten(1).to(dtype)
    return data, scale


def _tiles(x_TD: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    tokens, width = x_TD.shape
    x_TD = torch.nn.functional.pad(x_TD, (0, -width % BLOCK, 0, -tokens % BLOCK))
    tiles = x_TD.unflatten(0, (x_TD.shape[0] // BLOCK, BLOCK))
    tiles = tiles.unflatten(2, (x_TD.shape[1] // BLOCK, BLOCK))  # [T/128, 128, D/128, 128]
    scale, inverse = fp8_scales(_amax(_amax(tiles, 3), 1), dtype, power_of_two)
    data = torch.mul(tiles, inverse).to(dtype).view(x_TD.shape)[:tokens, :width]
    return data.contiguous(), scale[:, 0, :, 0]


def fp8_quantize_reference(
    x_TD: Tensor,
    scaling: Scaling,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Specify `fp8_quantize` without the transposed copy; every backend gives these bits.

    Args:
        x_TD: `[T, D]`.
        scaling: "tensor", "row", "block" or "tile".
        dtype: float8_e4m3fn or float8_e5m2.
        scale: float32 `[]`, for "tensor"; None computes it.
        power_of_two: Whether scales are powers of two.

    Returns:
        data `[T, D]`, scale, and max |x| `[]` (empty unless scaling is "tensor").
    """
    x = x_TD.to(torch.float32)
    amax = x.new_empty(0)
    if scaling == "tensor":
        amax = _amax(x.flatten(), 0).view(())
        if scale is None:
            scale, inverse = fp8_scales(amax, dtype, power_of_two)
            return torch.mul(x, inverse).to(dtype), scale, amax
        scaled = torch.mul(x, torch.div(torch.ones_like(scale), scale))
        return scaled.clamp_(-MAXIMA[dtype], MAXIMA[dtype]).to(dtype), scale, amax
    if scaling == "tile":
        return *_tiles(x, dtype, power_of_two), amax
    return *fp8_rows(x, scaling, dtype, power_of_two), amax


_Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _quantize_cpu(
    x_TD: Tensor, scaling: Scaling, dtype: torch.dtype, scale: Tensor | None, power_of_two: bool,
    transpose: bool,
) -> _Parts:  # fmt: skip
    """Quantise, and for the copy the transposed matrix unless it has the same codes."""
    if scale is not None and scale.device.type == "cpu" and scale <= 0:
        raise ValueError(f"fp8_quantize: scale must be above 0, got {float(scale)}")
    args = dtype, scale, power_of_two
    none, x_TD = x_TD.new_empty(0, dtype=torch.float32), x_TD.contiguous()
    data, scales, amax = fp8_quantize_reference(x_TD, scaling, *args)
    data_t, scale_t = none.to(dtype), none
    if transpose and scaling in ("tensor", "tile"):
        data_t = data.view(torch.uint8).t().contiguous().view(dtype)
    elif transpose:
        data_t, scale_t, _ = fp8_quantize_reference(x_TD.t().contiguous(), scaling, *args)
    return data, none if scales is scale else scales, data_t, scale_t, amax


def carrier_of(x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Make the carrier of a quantised tensor: its shape and dtype, one element of storage.

    Args:
        x: What was quantised, or one of its dtype.
        shape: That of what was quantised; None takes that of `x`.

    Returns:
        Zeros, expanded.
    """
    return x.new_zeros(()).expand(x.shape if shape is None else shape)


def check_grouping(op: str, scaling: str) -> None:
    """Refuse a scaling that an operator which quantises its result does not know.

    Args:
        op: Operator, for the message.
        scaling: As the caller gave it.

    Raises:
        ValueError: If it is neither "row" nor "block".
    """
    if scaling not in ("row", "block"):
        raise ValueError(f"{op}: scaling must be row or block, got {scaling!r}")


def fp8_rows_fake(x: Tensor, shape: Sequence[int], scaling: str) -> tuple[Tensor, Tensor]:
    """Make what `fp8_rows` returns, without storage; the codes as bytes.

    Args:
        x: Gives the device.
        shape: Of the result, `[..., D]`.
        scaling: "row" or "block".

    Returns:
        Codes uint8 `[..., D]` and scale float32 `[..., groups]`.
    """
    groups = 1 if scaling == "row" else (shape[-1] + BLOCK - 1) // BLOCK
    codes = x.new_empty(shape, dtype=torch.uint8)
    return codes, x.new_empty((*shape[:-1], groups), dtype=torch.float32)


def _forward(
    x: Tensor, scaling: Scaling, dtype: torch.dtype, scale: Tensor | None, power_of_two: bool,
    transpose: bool, backend: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return codes as bytes: opcheck adds outputs up, which PyTorch cannot do in FP8.

    The carrier is the first for the same reason: the sum must begin with a float.
    """
    x_TD = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    args = x_TD, scaling, dtype, scale, power_of_two, transpose
    if choose("fp8_quantize", x.device, x.dtype, backend) == "triton":
        from .fp8_triton import quantize

        data, scales, data_t, scale_t, amax = quantize(*args)
    else:
        data, scales, data_t, scale_t, amax = _quantize_cpu(*args)
    if scaling in ("row", "block"):
        scales = scales.view(*x.shape[:-1], scales.shape[1])
    codes, codes_t = data.view(x.shape).view(torch.uint8), data_t.view(torch.uint8)
    return carrier_of(x), codes, scales, codes_t, scale_t, amax


def _forward_fake(
    x: Tensor, scaling: Scaling, dtype: torch.dtype, scale: Tensor | None, power_of_two: bool,
    transpose: bool, backend: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    none, width = x.new_empty(0, dtype=torch.float32), x.shape[-1]
    shapes: dict[str, tuple[Any, ...]] = {
        "tensor": () if scale is None else (0,),
        "row": (*x.shape[:-1], 1),
        "block": (*x.shape[:-1], (width + BLOCK - 1) // BLOCK),
        "tile": ((x.shape[0] + BLOCK - 1) // BLOCK, (width + BLOCK - 1) // BLOCK),
    }
    scale_t = none
    if transpose and scaling in ("row", "block"):
        groups = 1 if scaling == "row" else (x.shape[0] + BLOCK - 1) // BLOCK
        scale_t = none.new_empty(width, groups)
    return (
        carrier_of(x),
        x.new_empty(x.shape, dtype=torch.uint8),
        none.new_empty(shapes[scaling]),
        x.new_empty((width, x.shape[0]) if transpose else (0,), dtype=torch.uint8),
        scale_t,
        none.new_empty(() if scaling == "tensor" else (0,)),
    )


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = below_autograd(_FORWARD, x, *rest)
        ctx.mark_non_differentiable(*parts[1:])
        ctx.set_materialize_grads(False)
        return parts

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        first_derivative_only("fp8_quantize")
        return dy, None, None, None, None, None, None


def _dequantize(
    carrier: Tensor, codes: Tensor, scale: Tensor, block: int, source: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    tokens, width = codes.shape[:-1].numel(), codes.shape[-1]
    y = codes.new_empty(codes.shape, dtype=dtype)
    if not y.numel():
        return y
    y_TD, data_TD = y.view(tokens, width), codes.view(source).reshape(tokens, width)
    scale = scale.reshape(-1, scale.shape[-1]) if scale.dim() else scale.view(1, 1)
    for rows in row_blocks(tokens, width):
        index = torch.arange(rows.start, rows.stop, device=codes.device)
        part = scale[index if len(scale) == tokens else index // block] if len(scale) > 1 else scale
        if part.shape[1] > 1:
            part = part.repeat_interleave(block, 1)[:, :width]
        y_TD[rows].copy_(data_TD[rows].to(torch.float32).mul_(part))
    return y


def _dequantize_fake(
    carrier: Tensor, codes: Tensor, scale: Tensor, block: int, source: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return codes.new_empty(codes.shape, dtype=dtype)


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, *rest: Any) -> Tensor:
        ctx.dtype = carrier.dtype
        y: Tensor = below_autograd(_DEQUANTIZE, carrier, *rest)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy.to(ctx.dtype), None, None, None, None, None


_FORWARD = register(
    "fp8_quantize_forward(Tensor x, str scaling, ScalarType dtype, Tensor? scale,"
    " bool power_of_two, bool transpose, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _Quantize,
)  # fmt: skip
_DEQUANTIZE = register(
    "fp8_dequantize(Tensor carrier, Tensor codes, Tensor scale, int block, ScalarType source,"
    " ScalarType dtype) -> Tensor",
    _dequantize, _dequantize_fake, _Dequantize,
)  # fmt: skip


def _check(
    x: Tensor, scaling: str, dtype: torch.dtype, scale: Tensor | None, transpose: bool
) -> None:
    need_tensors("fp8_quantize", x=x)
    if scaling not in ("tensor", "row", "block", "tile"):
        raise ValueError(
            f"fp8_quantize: scaling must be tensor, row, block or tile, got {scaling!r}"
        )
    if x.dtype not in _DTYPES or dtype not in MAXIMA:
        raise ValueError(
            "fp8_quantize: x must be float16, bfloat16, float32 or float64 and dtype float8_e4m3fn "
            f"or float8_e5m2, got {x.dtype} and {dtype}"
        )
    if not x.dim() or (x.dim() != 2 and (transpose or scaling == "tile")):
        raise ValueError(
            f"fp8_quantize: x must have a dimension, and two for tiles or a transposed copy, "
            f"got {[*x.shape]}"
        )
    if scale is not None and (scaling != "tensor" or scale.dim() or scale.dtype != torch.float32):
        raise ValueError(
            f"fp8_quantize: scale must be float32 [] and goes with scaling 'tensor', got "
            f"{scale.dtype} {[*scale.shape]} with {scaling!r}"
        )


def fp8_quantize(
    x: Tensor, *, scaling: Scaling = "tensor", dtype: torch.dtype = torch.float8_e4m3fn,
    scale: Tensor | None = None, power_of_two: bool = False, transpose: bool = False,
    backend: str | None = None,
) -> Fp8:  # fmt: skip
    """Quantise to FP8.

    Args:
        x: `[..., D]`, any strides; float16, bfloat16, float32 or float64, taken as float32.
        scaling: What shares a scale: the "tensor", a "row", a "block" of 128 elements of a row, or
            a "tile" of 128 by 128 (two dimensions, for weights).
        dtype: float8_e4m3fn or float8_e5m2.
        scale: Of an earlier step, float32 `[]`, greater than 0 (which only the CPU checks: a
            device would have to wait); for "tensor" alone. None computes it, which reads `x` twice.
        power_of_two: Whether scales are rounded up to powers of two; not with `scale`.
        transpose: Whether to add the transposed copy `[D, T]`, quantised along T (two dimensions).
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        The quantised tensor; the same bits from every backend.

    Raises:
        ValueError: If scaling, a dtype or a shape is not one of these.
        RuntimeError: If `backend` cannot serve this tensor here.
    """
    _check(x, scaling, dtype, scale, transpose)
    if scale is not None and power_of_two:
        raise ValueError(
            f"fp8_quantize: a given scale is used as it is, got power_of_two={power_of_two} beside "
            f"it: round it before"
        )
    args = scaling, dtype, scale, power_of_two, transpose, backend
    carrier, codes, scales, codes_t, scale_t, amax = _FORWARD(x, *args)
    if scale is not None:
        scales = scale.detach()
    if scaling in ("tensor", "tile"):
        scale_t = scales.t() if scaling == "tile" else scales
    return Fp8(
        data=codes.view(dtype), scale=scales, carrier=carrier,
        data_t=codes_t.view(dtype) if transpose else None, scale_t=scale_t if transpose else None,
        amax=amax if scaling == "tensor" else None,
    )  # fmt: skip
