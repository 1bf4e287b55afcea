"""Triton code of `adamw_`: one launch over a table of addresses.

A program works on one chunk of one tensor. Where all of the tensor's addresses are multiples of 16
bytes it walks over whole blocks with 16-byte accesses; what is left, and tensors that are not
aligned, go element by element. The bias corrections are computed in float64, once a program: in
float32 1 - 0.999^1 has five digits.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device
from .table import CHUNK, device_table

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.int16: tl.int16,
}


def configuration(tensors: int) -> dict[str, int]:
    """Choose the tile: 8 elements a thread of each of five tensors, in flight at once.

    Args:
        tensors: How many a call has; one configuration serves every number.

    Returns:
        CHUNK, BLOCK and num_warps.
    """
    return {"CHUNK": CHUNK, "BLOCK": 1024, "num_warps": 4}


@triton.jit
def _step(
    parameter, gradient, mean, square, extra, at, size, scale, decay, rate, root, rest1, beta2,
    rest2, eps, KIND: tl.constexpr, PARAMETER: tl.constexpr, GRADIENT: tl.constexpr,
    EXTRA: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update BLOCK elements from `at`; all of them are there when ALIGNED."""
    parameter = parameter.to(tl.pointer_type(PARAMETER))
    gradient = gradient.to(tl.pointer_type(GRADIENT))
    mean = mean.to(tl.pointer_type(tl.float32))
    square = square.to(tl.pointer_type(tl.float32))
    extra = extra.to(tl.pointer_type(EXTRA))
    lane = at + tl.arange(0, BLOCK)
    if ALIGNED:  # said of the results of casts here: it is lost on what a call passes
        inside = None
        parameter = tl.multiple_of(parameter, 16)
        gradient = tl.multiple_of(gradient, 16)
        mean = tl.multiple_of(mean, 16)
        square = tl.multiple_of(square, 16)
        extra = tl.multiple_of(extra, 16)
    else:
        inside = lane < size
    g = tl.load(gradient + lane, inside).to(tl.float32) * scale
    m = tl.load(mean + lane, inside)
    v = tl.load(square + lane, inside)
    if KIND == "remainders":
        high = tl.load(parameter + lane, inside).to(tl.int32) << 16
        w = (high + tl.load(extra + lane, inside).to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        w = tl.load(extra + lane, inside)
    m += (g - m) * rest1
    v = v * beta2 + g * rest2 * g
    w -= w * decay
    w -= rate * tl.div_rn(m, tl.sqrt_rn(v) * root + eps)
    tl.store(mean + lane, m, inside)
    tl.store(square + lane, v, inside)
    if KIND == "remainders":
        bits = tl.where(w == w, w.to(tl.int32, bitcast=True), 0x7FC00000)
        low = bits.to(tl.int16)
        tl.store(extra + lane, low, inside)
        high = (bits - low.to(tl.int32)) >> 16
        tl.store(parameter + lane, high.to(tl.int16), inside)
    else:
        tl.store(extra + lane, w, inside)
        if KIND == "masters":
            tl.store(parameter + lane, w.to(parameter.dtype.element_ty), inside)


@triton.jit
def update_kernel(
    table, owners, step, rate_at, scale_at, found_at, rate, log_beta1, log_beta2, rest1, beta2,
    rest2, eps, decay, KIND: tl.constexpr, PARAMETER: tl.constexpr, GRADIENT: tl.constexpr,
    EXTRA: tl.constexpr, RATE: tl.constexpr, SCALE: tl.constexpr, FOUND: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one chunk of one tensor; nothing where the flag is up."""
    COLUMNS: tl.constexpr = 4 if KIND == "in place" else 5
    chunk = tl.program_id(0).to(tl.int64)
    row = table + tl.load(table + owners + chunk) * (COLUMNS + 3)
    parameter = tl.load(row)
    gradient = tl.load(row + 1)
    mean = tl.load(row + 2)
    square = tl.load(row + 3)
    extra = tl.load(row + (0 if KIND == "in place" else 4))
    size = tl.load(row + COLUMNS)
    start = (chunk - tl.load(row + COLUMNS + 1)) * CHUNK
    stop = tl.minimum(start + CHUNK, size)
    if FOUND:
        stop = tl.where(tl.load(found_at) == 0, stop, start)
    scale = 1.0
    if SCALE:
        scale = tl.load(scale_at).to(tl.float32)
    if RATE:
        rate = tl.load(rate_at)
    t = tl.load(step).to(tl.float64)
    root = tl.div_rn(1.0, tl.sqrt_rn((1 - tl.exp(t * log_beta2)).to(tl.float32)))
    decay = rate * decay
    rate = tl.div_rn(rate, (1 - tl.exp(t * log_beta1)).to(tl.float32))
    middle = start
    if tl.load(row + COLUMNS + 2) != 0:
        middle = start + (stop - start) // BLOCK * BLOCK
    for TAIL in tl.static_range(2):  # first the blocks that are whole and aligned
        for at in range(middle if TAIL else start, stop if TAIL else middle, BLOCK):
            _step(
                *(parameter, gradient, mean, square, extra, at, size, scale, decay, rate, root),
                *(rest1, beta2, rest2, eps, KIND, PARAMETER, GRADIENT, EXTRA, not TAIL, BLOCK),
            )


def update(
    parameters: list[Tensor], gradients: list[Tensor], means: list[Tensor], squares: list[Tensor],
    extra: list[Tensor], step: Tensor, rate: Tensor | None, scale: Tensor | None,
    found: Tensor | None, rates: tuple[float, ...], plan: list[Tensor] | None,
) -> None:  # fmt: skip
    """Launch the update.

    Args:
        parameters: What the model computes with, contiguous, as `gradients`.
        gradients: One for each.
        means: First moments, float32.
        squares: Second moments, float32.
        extra: float32 masters, int16 remainders, or nothing.
        step: 0-dim float32, steps before; the call adds one.
        rate: 0-dim float32 learning rate, or None for that of `rates`.
        scale: 0-dim factor of the gradients, or None, as `found`, the flag.
        found: 0-dim.
        rates: Learning rate, beta1, beta2, eps, weight decay.
        plan: A plan of the lists, or None.
    """
    columns = [parameters, gradients, means, squares, *([extra] if extra else [])]
    table, chunks = device_table("adamw_", columns, plan)
    step.add_(1 if found is None else found == 0)
    if not chunks:
        return
    kept = (extra or parameters)[0].dtype
    remainders = kept == torch.int16
    number, beta1, beta2, eps, decay = rates
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    with on_device(step):
        update_kernel[(chunks,)](
            table, table.numel() - chunks, step, step if rate is None else rate,
            step if scale is None else scale, step if found is None else found, number, *logs,
            *(1 - beta1, beta2, 1 - beta2, eps, decay),
            KIND="remainders" if remainders else "masters" if extra else "in place",
            PARAMETER=TYPES[kept if remainders else parameters[0].dtype],
            GRADIENT=TYPES[gradients[0].dtype], EXTRA=TYPES[kept], RATE=rate is not None,
            SCALE=scale is not None, FOUND=found is not None, **configuration(len(parameters)),
        )  # fmt: skip
