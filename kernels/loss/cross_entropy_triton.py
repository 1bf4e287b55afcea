# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202
"""Device code of `cross_entropy.py`: one program a row of logits, all sums in float32.

The partials read the logits once: the running sum is rescaled when the running maximum grows. The
gradient is elementwise, and spreads a row over programs. `nll_and_gradient_` walks over a row
twice, and the second walk finds it in the L2 cache: the rows of all running programs fit there
(132 rows of 128k bfloat16 are 34 MB). Row offsets are 64 bits wide.

Source: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867, algorithm 3.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..launch import next_power_of_two, on_device

_BLOCK = 4096  # columns at a time: 16 elements a thread
_WARPS = 8


@triton.jit
def _reduce_row(row_ptr, V, BLOCK: tl.constexpr):
    """Find the maximum of a row and the sum of exp(x - maximum)."""
    high = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(high, tl.max(x, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # else exp(-inf + inf) is NaN
        total = total * tl.exp(high - shift) + tl.sum(tl.exp(x - shift), 0)
        high = higher
    return high, total


@triton.jit
def partials_kernel(
    logits_ptr,
    targets_ptr,
    max_ptr,
    sum_ptr,
    true_ptr,
    row_stride,
    start,
    V,
    BLOCK: tl.constexpr,
):
    """Reduce a row to its maximum, its sum of exponentials and the logit of its target."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    high, total = _reduce_row(row_ptr, V, BLOCK)
    column = tl.load(targets_ptr + row).to(tl.int64) - start
    inside = (column >= 0) & (column < V)
    true = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(max_ptr + row, high)
    tl.store(sum_ptr + row, total)
    tl.store(true_ptr + row, true)


@triton.jit
def gradient_kernel(
    logits_ptr,
    targets_ptr,
    lse_ptr,
    g_nll_ptr,
    g_lse_ptr,
    row_stride,
    start,
    V,
    BLOCK: tl.constexpr,
):
    """Overwrite a block of a row by (g_nll + g_lse) * softmax - g_nll * onehot."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_ptrs = logits_ptr + row * row_stride + columns
    x = tl.load(x_ptrs, mask=columns < V, other=-float("inf")).to(tl.float32)
    g_nll = tl.load(g_nll_ptr + row)
    both = g_nll + tl.load(g_lse_ptr + row)
    target = tl.load(targets_ptr + row).to(tl.int64) - start
    dx = both * tl.exp(x - tl.load(lse_ptr + row)) - tl.where(columns == target, g_nll, 0.0)
    tl.store(x_ptrs, dx.to(logits_ptr.dtype.element_ty), mask=columns < V)


@triton.jit
def nll_and_gradient_kernel(
    logits_ptr,
    targets_ptr,
    nll_ptr,
    row_stride,
    ignore_index,
    V,
    BLOCK: tl.constexpr,
):
    """Overwrite a row by softmax - onehot, or 0 where ignored, and give its loss."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    target = tl.load(targets_ptr + row).to(tl.int64)
    trained = target != ignore_index
    nll = tl.zeros((), tl.float32)
    lse = tl.zeros((), tl.float32)
    if trained:
        high, total = _reduce_row(row_ptr, V, BLOCK)
        lse = high + tl.log(total)
        inside = (target >= 0) & (target < V)
        nll = lse - tl.load(row_ptr + target, mask=inside, other=0.0).to(tl.float32)
    tl.store(nll_ptr + row, nll)
    tl.debug_barrier()  # the target's logit has been read before any thread overwrites it
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
        dx = tl.exp(x - lse) - tl.where(columns == target, 1.0, 0.0)
        dx = tl.where(trained, dx, 0.0)
        tl.store(row_ptr + columns, dx.to(logits_ptr.dtype.element_ty), mask=columns < V)


def _tile(vocabulary: int) -> dict[str, Any]:
    return {"BLOCK": min(_BLOCK, next_power_of_two(vocabulary)), "num_warps": _WARPS}


def partials(logits_CV: Tensor, targets_C: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `partials_kernel`; as `cross_entropy_partials_reference`.

    Args:
        logits_CV: `[C, V]`; float16, bfloat16 or float32.
        targets_C: `[C]`, int32 or int64.
        start: Column of the whole vocabulary that is column 0 here.

    Returns:
        Maximum, sum of exponentials and target logit, each `[C]`, float32.
    """
    tokens, vocabulary = logits_CV.shape
    logits_CV = logits_CV if logits_CV.stride(1) == 1 else logits_CV.contiguous()
    new = torch.empty(3, tokens, dtype=torch.float32, device=logits_CV.device)
    if tokens:
        with on_device(logits_CV):
            partials_kernel[(tokens,)](
                logits_CV, targets_C.contiguous(), *new, logits_CV.stride(0), start, vocabulary,
                **_tile(vocabulary),
            )  # fmt: skip
    high, total, true = (part.clone() for part in new)
    return high, total, true


def gradient_(
    logits_CV: Tensor,
    targets_C: Tensor,
    start: int,
    lse_C: Tensor,
    g_nll_C: Tensor,
    g_lse_C: Tensor,
) -> None:
    """Launch `gradient_kernel`; as `cross_entropy_gradient_reference_`.

    Args:
        logits_CV: `[C, V]`, contiguous; overwritten.
        targets_C: `[C]`, int32 or int64.
        start: Column of the whole vocabulary that is column 0 here.
        lse_C: `[C]`, float32.
        g_nll_C: `[C]`, float32.
        g_lse_C: `[C]`, float32.
    """
    tokens, vocabulary = logits_CV.shape
    if not logits_CV.numel():
        return
    tile = _tile(vocabulary)
    vectors = (x.contiguous() for x in (targets_C, lse_C, g_nll_C, g_lse_C))
    with on_device(logits_CV):
        gradient_kernel[(tokens, triton.cdiv(vocabulary, tile["BLOCK"]))](
            logits_CV, *vectors, logits_CV.stride(0), start, vocabulary, **tile
        )


def nll_and_gradient_(logits_CV: Tensor, targets_C: Tensor, ignore_index: int) -> Tensor:
    """Launch `nll_and_gradient_kernel`.

    Args:
        logits_CV: `[C, V]`, contiguous, V at least 1; overwritten by softmax - onehot.
        targets_C: `[C]`, int32 or int64.
        ignore_index: The target of rows whose loss and gradient are 0.

    Returns:
        Negative log-likelihoods `[C]`, float32.
    """
    tokens, vocabulary = logits_CV.shape
    nll_C = torch.empty(tokens, dtype=torch.float32, device=logits_CV.device)
    if tokens:
        with on_device(logits_CV):
            nll_and_gradient_kernel[(tokens,)](
                logits_CV, targets_C.contiguous(), nll_C, logits_CV.stride(0), ignore_index,
                vocabulary, **_tile(vocabulary),
            )  # fmt: skip
    return nll_C
