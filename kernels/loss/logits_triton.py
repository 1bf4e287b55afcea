# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202
"""Device code of `logits.py`: one program a row of logits, all sums in float32.

`nll_and_gradient_` overwrites logits by their gradient. A row of up to 64 KB stays in registers:
one read, one write. A longer one (128k bfloat16 are 256 KB, all registers of a multiprocessor) is
walked over twice, and the second walk must hit the L2 cache. Three things see to that. 32 warps
leave room for one program a multiprocessor, so that 132 rows are in flight, 34 MB of the 50 MB.
What the second walk writes lies where it was read, and is marked to leave the cache first. And the
second walk goes backwards, so that what was read last is met first: were only half of a row still
there, the hits are that half, where a walk forwards would find nothing. Loads run two tiles ahead
in shared memory (asynchronous copies, which take no mark of their own).

Roof: one read and one write of C V elements: 2.1 GB for 4096 x 128,256 in bfloat16, 0.44 ms at
4.8 TB/s. Not run on a GPU yet. Row offsets are 64 bits wide.

Source: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867, algorithm 3.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from .. import tuning
from ..launch import next_power_of_two, on_device

_KEEP = 1 << 16  # bytes of a row that a program's registers can hold
_BLOCK = 16384  # columns at a time of a longer row


@triton.jit
def _capped(x, cap, CAPPED: tl.constexpr):
    """Apply the soft-cap: tanh(y) = 2 sigmoid(2 y) - 1, and by its series where that cancels."""
    if CAPPED:
        y = x / cap
        square = y * y
        near = y * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
        z = cap * tl.where(square < 0.04, near, 2.0 / (1.0 + tl.exp(-2.0 * y)) - 1.0)
        x = tl.where(x == -float("inf"), x, z)
    return x


@triton.jit
def _through_cap(dz, z, cap, CAPPED: tl.constexpr):
    """Multiply a gradient by the slope of the soft-cap, which is 0 at -inf."""
    if CAPPED:
        share = z / cap
        dz = dz * (1.0 - tl.minimum(share * share, 1.0))
    return dz


@triton.jit
def _reduce_row(
    row_ptr, V, cap, CAPPED: tl.constexpr, MOMENTS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Find maximum, sum of exp(z - maximum), sum of z, and sum of exp(z - m) (z - m) of a row."""
    high = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    plain = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    for first in tl.range(0, V, BLOCK, num_stages=STAGES):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < V
        x = tl.load(row_ptr + columns, mask=inside, other=-float("inf"))
        z = _capped(x.to(tl.float32), cap, CAPPED)
        higher = tl.maximum(high, tl.max(z, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # else exp(-inf + inf) is NaN
        exp = tl.exp(z - shift)
        fall = tl.where(high == -float("inf"), 0.0, high - shift)
        scale = tl.exp(fall)
        if MOMENTS:
            plain += tl.sum(tl.where(inside, z, 0.0), 0)
            weighted = scale * (weighted + fall * total)
            weighted += tl.sum(tl.where(exp > 0, exp * (z - shift), 0.0), 0)
        total = scale * total + tl.sum(exp, 0)
        high = higher
    return high, total, plain, weighted


@triton.jit
def partials_kernel(
    logits_ptr, targets_ptr, out_ptr, row_stride, start, C, V, cap,
    CAPPED: tl.constexpr, MOMENTS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Reduce a row to 3 or 5 numbers, each in its own row of C numbers."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    high, total, plain, weighted = _reduce_row(row_ptr, V, cap, CAPPED, MOMENTS, BLOCK, STAGES)
    column = tl.load(targets_ptr + row).to(tl.int64) - start
    inside = (column >= 0) & (column < V)
    true = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32)
    out_ptr += row
    tl.store(out_ptr, high)
    tl.store(out_ptr + C, total)
    tl.store(out_ptr + 2 * C, _capped(true, cap, CAPPED))
    if MOMENTS:
        tl.store(out_ptr + 3 * C, plain)
        tl.store(out_ptr + 4 * C, weighted)


@triton.jit
def gradient_kernel(
    logits_ptr, out_ptr, targets_ptr, lse_ptr, g_ptr, row_stride, out_stride, start, C, V, cap,
    CAPPED: tl.constexpr, MOMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a block of a row of the gradient: see the formula in `logits.py`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    x = tl.load(logits_ptr + row * row_stride + columns, mask=inside, other=-float("inf"))
    z = _capped(x.to(tl.float32), cap, CAPPED)
    g_ptr += row
    slope = tl.load(g_ptr)
    hit = tl.load(g_ptr + C)
    used = (slope != 0) | (hit != 0)
    below = z - tl.load(lse_ptr + row)
    dz = slope * tl.exp(below)
    if MOMENTS:
        flat = tl.load(g_ptr + 2 * C)
        tilt = tl.load(g_ptr + 3 * C)
        used = used | (flat != 0) | (tilt != 0)
        finite = tl.where(z == -float("inf"), 0.0, below)
        dz = (slope + tilt * finite) * tl.exp(below) + flat
    target = tl.load(targets_ptr + row).to(tl.int64) - start
    dz -= tl.where(columns == target, hit, 0.0)
    dx = tl.where(used, _through_cap(dz, z, cap, CAPPED), 0.0)
    out_ptr += row * out_stride
    tl.store(out_ptr + columns, dx.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_gradient(
    row_ptr, columns, z, V, lse, target, trained, cap, smoothing, CAPPED: tl.constexpr
):
    dz = tl.exp(z - lse) - smoothing / V - tl.where(columns == target, 1.0 - smoothing, 0.0)
    dx = tl.where(trained, _through_cap(dz, z, cap, CAPPED), 0.0)
    tl.store(
        row_ptr + columns, dx.to(row_ptr.dtype.element_ty), mask=columns < V,
        eviction_policy="evict_first",
    )  # fmt: skip


@triton.jit
def nll_and_gradient_kernel(
    logits_ptr, targets_ptr, nll_ptr, row_stride, ignore_index, V, cap, smoothing,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, GRADIENT: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store the loss of a row, and overwrite it by the gradient; both 0 where ignored."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    target = tl.load(targets_ptr + row).to(tl.int64)
    trained = target != ignore_index
    inside = (target >= 0) & (target < V)
    true = tl.load(row_ptr + target, mask=inside & trained, other=0.0).to(tl.float32)
    true = _capped(true, cap, CAPPED)
    tl.debug_barrier()  # the target's logit has been read before any thread overwrites it
    if KEPT:
        columns = tl.arange(0, BLOCK)
        x = tl.load(row_ptr + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
        z = _capped(x, cap, CAPPED)
        high = tl.max(z, 0)
        lse = high + tl.log(tl.sum(tl.exp(z - high), 0))
        nll = lse - true
        if SMOOTHED:
            even = lse - tl.sum(tl.where(columns < V, z, 0.0), 0) / V
            nll = (1.0 - smoothing) * nll + smoothing * even
        tl.store(nll_ptr + row, tl.where(trained, nll, 0.0))
        if GRADIENT:
            _store_gradient(row_ptr, columns, z, V, lse, target, trained, cap, smoothing, CAPPED)
    else:
        lse = tl.zeros((), tl.float32)
        nll = tl.zeros((), tl.float32)
        if trained:
            high, total, plain, _ = _reduce_row(row_ptr, V, cap, CAPPED, SMOOTHED, BLOCK, STAGES)
            lse = high + tl.log(total)
            nll = lse - true
            if SMOOTHED:
                nll = (1.0 - smoothing) * nll + smoothing * (lse - plain / V)
        tl.store(nll_ptr + row, nll)
        if GRADIENT:
            tl.debug_barrier()  # the whole row has been read
            last = (V - 1) // BLOCK * BLOCK
            for first in tl.range(0, V, BLOCK, num_stages=STAGES):
                columns = last - first + tl.arange(0, BLOCK)
                x = tl.load(row_ptr + columns, mask=columns < V, other=-float("inf"))
                z = _capped(x.to(tl.float32), cap, CAPPED)
                _store_gradient(
                    row_ptr, columns, z, V, lse, target, trained, cap, smoothing, CAPPED
                )


def configuration(vocabulary: int, *, keep: int | None = None) -> dict[str, Any]:
    """Choose the tile of a kernel.

    Args:
        vocabulary: Columns of the logits.
        keep: For `nll_and_gradient_kernel`, how many columns stay in registers.

    Returns:
        Compile-time arguments of the launch: `BLOCK` and `num_warps`, with `keep` also `KEPT`.
    """
    if keep is None:
        block = min(4096, next_power_of_two(vocabulary))
        return {"BLOCK": block, "num_warps": max(1, block // 512)}
    kept = vocabulary <= keep
    block = next_power_of_two(vocabulary) if kept else _BLOCK
    return {"BLOCK": block, "KEPT": kept, "num_warps": min(32, max(1, block // 512))}


_STAGES = 3  # tiles of a long row whose loads are under way


def partials(
    logits_CV: Tensor, targets_C: Tensor, start: int, softcap: float | None, moments: bool
) -> Tensor:
    """Launch `partials_kernel`; as `cross_entropy_partials_reference`.

    Args:
        logits_CV: `[C, V]`; float16, bfloat16 or float32.
        targets_C: `[C]`, int32 or int64.
        start: Column of the whole vocabulary that is column 0 here.
        softcap: Soft-cap of the logits, or None.
        moments: Whether the last two are wanted.

    Returns:
        `[3, C]`, with `moments` `[5, C]`, float32.
    """
    tokens, vocabulary = logits_CV.shape
    logits_CV = logits_CV if logits_CV.stride(1) == 1 else logits_CV.contiguous()
    shape = (5 if moments else 3, tokens)
    parts = torch.empty(shape, dtype=torch.float32, device=logits_CV.device)
    targets_C = targets_C.contiguous()

    def begin(chosen: dict[str, int]) -> None:
        partials_kernel[(tokens,)](
            logits_CV, targets_C, parts, logits_CV.stride(0), start, tokens, vocabulary,
            softcap or 1.0, CAPPED=softcap is not None, MOMENTS=moments, STAGES=_STAGES, **chosen,
        )  # fmt: skip

    if tokens:
        candidates = tuning.by_warps(configuration(vocabulary))
        key = "partials", vocabulary, int(moments)
        tuning.launch("cross_entropy", key, candidates, begin, logits_CV)
    return parts


def write_gradient(
    logits_CV: Tensor, targets_C: Tensor, start: int, lse_C: Tensor, g: Tensor,
    softcap: float | None, out_CV: Tensor,
) -> None:  # fmt: skip
    """Launch `gradient_kernel`; as `cross_entropy_gradient_reference`.

    Args:
        logits_CV: `[C, V]`.
        targets_C: `[C]`, int32 or int64.
        start: Column of the whole vocabulary that is column 0 here.
        lse_C: `[C]`, float32.
        g: `[2, C]` or `[4, C]`, float32.
        softcap: Soft-cap of the logits, or None.
        out_CV: `[C, V]`, contiguous; may be `logits_CV`.
    """
    tokens, vocabulary = logits_CV.shape
    if not logits_CV.numel():
        return
    logits_CV = logits_CV if logits_CV.stride(1) == 1 else logits_CV.contiguous()
    tile = configuration(vocabulary)
    with on_device(logits_CV):
        gradient_kernel[(tokens, triton.cdiv(vocabulary, tile["BLOCK"]))](
            logits_CV, out_CV, targets_C.contiguous(), lse_C.contiguous(), g.contiguous(),
            logits_CV.stride(0), out_CV.stride(0), start, tokens, vocabulary, softcap or 1.0,
            CAPPED=softcap is not None, MOMENTS=len(g) == 4, **tile,
        )  # fmt: skip


def nll_and_gradient_(
    logits_CV: Tensor, targets_C: Tensor, ignore_index: int, softcap: float | None,
    label_smoothing: float, gradient: bool,
) -> Tensor:  # fmt: skip
    """Launch `nll_and_gradient_kernel`.

    Args:
        logits_CV: `[C, V]`, contiguous, V at least 1; overwritten by the gradient.
        targets_C: `[C]`, int32 or int64.
        ignore_index: The target of rows whose loss and gradient are 0.
        softcap: Soft-cap of the logits, or None.
        label_smoothing: Share of the target's weight that all columns divide.
        gradient: Whether the logits are overwritten.

    Returns:
        Losses `[C]`, float32.
    """
    tokens, vocabulary = logits_CV.shape
    nll_C = torch.empty(tokens, dtype=torch.float32, device=logits_CV.device)
    if tokens:
        with on_device(logits_CV):
            nll_and_gradient_kernel[(tokens,)](
                logits_CV, targets_C.contiguous(), nll_C, logits_CV.stride(0), ignore_index,
                vocabulary, softcap or 1.0, label_smoothing, CAPPED=softcap is not None,
                SMOOTHED=label_smoothing > 0, GRADIENT=gradient, STAGES=_STAGES,
                **configuration(vocabulary, keep=_KEEP // logits_CV.element_size()),
            )  # fmt: skip
    return nll_C


@triton.jit
def scale_kernel(x_ptr, g_ptr, N, BLOCK: tl.constexpr):
    """Multiply N numbers in place; where the factor is 1 nothing moves."""
    g = tl.load(g_ptr)
    if g != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < N).to(tl.float32)
        tl.store(x_ptr + at, (x * g).to(x_ptr.dtype.element_ty), mask=at < N)


def scale_(x: Tensor, g: Tensor) -> None:
    """Launch `scale_kernel`.

    Args:
        x: Any shape, contiguous; overwritten by the product.
        g: `[]`, float32.
    """
    if x.numel():
        with on_device(x):
            scale_kernel[(triton.cdiv(x.numel(), 8192),)](x, g, x.numel(), BLOCK=8192, num_warps=8)
