"""Triton code of the norm and the scaling of many tensors: a launch each over a table of addresses.

A program sums the squares of one chunk in float32; one program then adds up the chunks' sums in
float64 in a fixed order, so that the same tensors give the same bits.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device
from .table import CHUNK, device_table

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
SUM = {"BLOCK": 4096, "num_warps": 8}  # of the one program that adds up the chunks


def configuration(dtype: torch.dtype) -> dict[str, int]:
    """Choose the tile: 32 bytes a thread in flight.

    Args:
        dtype: Of the tensors.

    Returns:
        CHUNK, BLOCK and num_warps.
    """
    return {"CHUNK": CHUNK, "BLOCK": 4096 // dtype.itemsize, "num_warps": 4}


@triton.jit
def _part(table, owners, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Return a tensor's address and size, the first element, the end of whole blocks, the end."""
    chunk = tl.program_id(0).to(tl.int64)
    row = table + tl.load(table + owners + chunk) * 4
    size = tl.load(row + 1)
    start = (chunk - tl.load(row + 2)) * CHUNK
    stop = tl.minimum(start + CHUNK, size)
    middle = start
    if tl.load(row + 3) != 0:
        middle = start + (stop - start) // BLOCK * BLOCK
    return tl.load(row), size, start, middle, stop


@triton.jit
def norm_kernel(table, owners, sums, TYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the squares of one chunk."""
    address, size, start, middle, stop = _part(table, owners, CHUNK, BLOCK)
    x = address.to(tl.pointer_type(TYPE))
    aligned = tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(start, middle, BLOCK):
        value = tl.load(aligned + (at + tl.arange(0, BLOCK))).to(tl.float32)
        total += value * value
    for at in range(middle, stop, BLOCK):
        lane = at + tl.arange(0, BLOCK)
        value = tl.load(x + lane, lane < size, other=0.0).to(tl.float32)
        total += value * value
    tl.store(sums + tl.program_id(0).to(tl.int64), tl.sum(total, 0))


@triton.jit
def sum_kernel(sums, total, count, BLOCK: tl.constexpr):
    """Add up the sums of all chunks, in float64."""
    lane = tl.arange(0, BLOCK)
    held = tl.zeros([BLOCK], tl.float64)
    for at in range(0, count, BLOCK):
        held += tl.load(sums + at + lane, at + lane < count, other=0.0).to(tl.float64)
    tl.store(total, tl.sum(held, 0))


@triton.jit
def scale_kernel(
    table, owners, factor, TYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Multiply one chunk in place."""
    address, size, start, middle, stop = _part(table, owners, CHUNK, BLOCK)
    x = address.to(tl.pointer_type(TYPE))
    aligned = tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)
    by = tl.load(factor).to(tl.float32)
    for at in range(start, middle, BLOCK):
        lane = at + tl.arange(0, BLOCK)
        tl.store(aligned + lane, (tl.load(aligned + lane).to(tl.float32) * by).to(TYPE))
    for at in range(middle, stop, BLOCK):
        lane = at + tl.arange(0, BLOCK)
        value = tl.load(x + lane, lane < size).to(tl.float32)
        tl.store(x + lane, (value * by).to(TYPE), lane < size)


def squared_norm(tensors: list[Tensor], plan: list[Tensor] | None) -> Tensor:
    """Launch the two sums.

    Args:
        tensors: Contiguous, of one dtype and device, at least one.
        plan: A plan of them, or None.

    Returns:
        0-dim float64.
    """
    first = tensors[0]
    table, chunks = device_table("squared_norm", [tensors], plan)
    sums = first.new_empty(chunks, dtype=torch.float32)
    total = first.new_empty((), dtype=torch.float64)
    if not chunks:
        return total.zero_()
    chosen = configuration(first.dtype)
    with on_device(first):
        norm_kernel[(chunks,)](
            table, table.numel() - chunks, sums, TYPE=TYPES[first.dtype], **chosen
        )
        sum_kernel[(1,)](sums, total, chunks, **SUM)
    return total


def scale(tensors: list[Tensor], factor: Tensor, plan: list[Tensor] | None) -> None:
    """Launch the scaling.

    Args:
        tensors: Contiguous, of one dtype and device, at least one.
        factor: 0-dim, on that device.
        plan: A plan of them, or None.
    """
    for n, t in enumerate(tensors):
        if not t.is_contiguous():
            raise ValueError(
                f"scale_: triton takes contiguous tensors, tensors[{n}] has shape {[*t.shape]} and "
                f"strides {[*t.stride()]}"
            )
    first = tensors[0]
    table, chunks = device_table("scale_", [tensors], plan)
    if not chunks:
        return
    chosen = configuration(first.dtype)
    with on_device(first):
        scale_kernel[(chunks,)](
            table, table.numel() - chunks, factor, TYPE=TYPES[first.dtype], **chosen
        )
