"""Triton code of NF4: whole blocks a program, their codes in pairs.

The dequantisation undoes both levels in one kernel: the scale of a block is looked up by its code,
the 16 values lie in a table of the program, two values a byte are joined before they are stored.
Products and sums stay apart (no fused multiply-add), so that the bits are those of the
specification. Offsets are 64-bit.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device
from .formats import NF4_VALUES as VALUES
from .formats import middles
from .fp8_triton import fp8_amax, fp8_bits

_TILE = 4096  # elements a program
_BOUNDS = tl.constexpr(tuple(middles(torch.tensor(VALUES)).tolist()))
_VALUES = tl.constexpr(VALUES)


def configuration(block: int) -> dict[str, int]:
    """Choose the tile.

    Args:
        block: Elements that share a scale.

    Returns:
        BLOCKS a program, BLOCK and num_warps.
    """
    return {"BLOCKS": max(1, _TILE // block), "BLOCK": block, "num_warps": 4}


@triton.jit
def quantize_kernel(x, packed, absmax, blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the codes and scales of BLOCKS whole blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (block < blocks)[:, None]
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + at, inside, other=0.0).to(tl.float32)
    a = fp8_amax(value, 1)
    tl.store(absmax + block, a, block < blocks)
    least = tl.maximum(fp8_bits(a), 0x6CE3EE)  # 1e-38, which is subnormal
    inverse = tl.div_rn(1.0, least.to(tl.float32, bitcast=True))
    value = value * inverse[:, None]
    code = tl.zeros([BLOCKS, BLOCK], tl.int32)
    for i in tl.static_range(15):
        code = tl.where(value <= _BOUNDS[i], code, i + 1)  # NaN is above all
    high, low = tl.split(tl.reshape(code, [BLOCKS, BLOCK // 2, 2]))
    at = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed + at, (high * 16 + low).to(tl.uint8), inside)


@triton.jit
def dequantize_kernel(
    packed, absmax, code, absmax2, offset, y, size, pairs, blocks, DOUBLE: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the values of BLOCKS blocks."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    if DOUBLE:
        level = tl.load(absmax + block, block < blocks, other=0).to(tl.int32)
        scale = tl.load(code + level) * tl.load(absmax2 + block // 256, block < blocks, other=0.0)
        scale += tl.load(offset)
    else:
        scale = tl.load(absmax + block, block < blocks, other=0.0)
    entry = tl.arange(0, 16)
    table = tl.zeros([16], tl.float32)
    for i in tl.static_range(16):
        table = tl.where(entry == i, _VALUES[i], table)
    at = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    byte = tl.load(packed + at, at < pairs, other=0).to(tl.int32)
    pair = tl.reshape(tl.join(byte >> 4, byte & 15), [BLOCKS * BLOCK])
    value = tl.reshape(tl.gather(table, pair, 0), [BLOCKS, BLOCK]) * scale[:, None]
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), at < size)


def quantize(x_N: Tensor, block: int, packed: Tensor, absmax: Tensor) -> None:
    """Launch the quantisation of the whole blocks; a rest is left to the caller.

    Args:
        x_N: `[N]`.
        block: Elements that share a scale.
        packed: `[ceil(N / 2)]` uint8, to fill.
        absmax: `[ceil(N / block)]` float32, to fill.
    """
    blocks = x_N.numel() // block
    if blocks:
        chosen = configuration(block)
        with on_device(x_N):
            quantize_kernel[(triton.cdiv(blocks, chosen["BLOCKS"]),)](
                x_N, packed, absmax, blocks, **chosen
            )


def dequantize(
    packed: Tensor, absmax: Tensor, code: Tensor | None, absmax2: Tensor | None,
    offset: Tensor | None, block: int, y_N: Tensor,
) -> None:  # fmt: skip
    """Launch the dequantisation.

    Args:
        packed: `[ceil(N / 2)]` uint8.
        absmax: `[ceil(N / block)]`, float32 or uint8.
        code: `[256]` float32 or None.
        absmax2: float32 or None.
        offset: `[]` float32 or None.
        block: Elements that share a scale.
        y_N: `[N]`, to fill.
    """
    if not y_N.numel():
        return
    chosen, blocks = configuration(block), absmax.numel()
    double = code is not None and absmax2 is not None and offset is not None
    second = [absmax if part is None else part for part in (code, absmax2, offset)]
    with on_device(y_N):
        dequantize_kernel[(triton.cdiv(blocks, chosen["BLOCKS"]),)](
            packed, absmax.contiguous(), *(part.contiguous() for part in second), y_N, y_N.numel(),
            packed.numel(), blocks, DOUBLE=double, enable_fp_fusion=False, **chosen,
        )  # fmt: skip
