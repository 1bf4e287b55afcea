"""A matrix product for each group of rows: the linear layers of experts.

    y[m] = x[m] weight[e]^T                 for the rows m of expert e: those of expert 0 first

    dx[m] = dy[m] weight[e],    dweight[e] = sum over the rows m of e of dy[m]^T x[m]

Rows beyond the sum of the counts are not read; in y they are not written, in dx they are zero.

Shapes: M rows, D input width, F output width, E experts. Bound by the matrix units where an expert
has many rows (2 M D F FLOPs), by the memory of the weights (E F D elements) where it has few.
Saved for the backward: x, weight, counts.

Backend `torch` is PyTorch's own grouped product, in bfloat16. What it is known for, and what is
done: an expert without rows hangs in the weight gradient (pytorch #152668), so the factors go in
the one layout that its kernel takes empty groups in; on Blackwell it gets garbage there (#172439),
which zeros overwrite; rows beyond the counts are left as the memory was (#154557, #193633), so
zeros overwrite them where that is asked for; rows, and where they begin, must be multiples of 16
bytes, so others are copied; what it would serve by a loop that waits for the device (another dtype
or device) is refused.

Source: Gale et al. 2022, https://arxiv.org/abs/2211.15841, section 3 (experts of unequal load).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import case_key, choose
from ..invariant import invariant, linear
from ..library import autocast, below_autograd, first_derivative_only, need_tensors, register, wide

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_UNIT = 8  # bfloat16 elements in the 16 bytes of which PyTorch's kernel wants multiples
_MOST = 1023  # its experts


def _check_counts(counts_E: Tensor, rows: int) -> list[int]:
    """Return the counts; waits for the device that they are on."""
    counts: list[int] = counts_E.tolist()
    if min(counts, default=0) < 0 or sum(counts) > rows:
        raise ValueError(
            f"grouped_gemm: counts must be at least 0 and sum to at most the rows ({rows}), got "
            f"{counts}"
        )
    return counts


def _groups(counts_E: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Yield each expert with its rows, which may be none."""
    start = 0
    for expert, count in enumerate(_check_counts(counts_E, rows)):
        yield expert, slice(start, start + count)
        start += count


def grouped_gemm_reference(x_MD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Specify `grouped_gemm`, differentiably; rows beyond the counts are zero."""
    groups = _groups(counts_E, x_MD.shape[0])
    parts = [x_MD[rows] @ weight_EFD[expert].t() for expert, rows in groups]
    rest = x_MD.shape[0] - int(counts_E.sum())
    return torch.cat([*parts, x_MD.new_zeros(rest, weight_EFD.shape[1])])


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Multiply into `out`; on the CPU in float32, as its products of 16 bits take ten times."""
    if a.device.type == "cpu" and a.dtype != wide(a.dtype):
        out.copy_(torch.mm(a.float(), b.float()))
    else:
        torch.mm(a, b, out=out)


def _major(device: torch.device) -> int:
    """Return the first number of a device's compute capability; 0 for the CPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _torch_lacks(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]) -> str:
    """Say what keeps PyTorch's kernel from E products of widths F and D; empty if nothing."""
    experts, *widths = sizes
    if dtype != torch.bfloat16:
        return f"needs bfloat16, the tensors are {dtype}"
    if any(width % _UNIT for width in widths):
        return f"needs widths divisible by {_UNIT}, got {widths[1]} to {widths[0]}"
    if experts > _MOST:
        return f"takes at most {_MOST} experts, got {experts}"
    if _major(device) not in (0, 9, 10):
        return f"needs compute capability 9 or 10, the device has {_major(device)}"
    return ""


def _serve(x: Tensor, counts_E: Tensor, sizes: tuple[int, int, int], backend: str | None) -> str:
    """Choose the backend, and check by value what can be had without waiting."""
    experts, *widths = sizes
    narrow, broad = sorted(widths)
    case = case_key(experts=experts, narrow=narrow, broad=broad, rows=len(x)) if x.is_cuda else None
    chosen = choose("grouped_gemm", x.device, x.dtype, backend, case)
    lack = _torch_lacks(x.device, x.dtype, sizes)
    if chosen == "torch" and lack:
        raise RuntimeError(f"grouped_gemm: backend 'torch' {lack}: take 'triton' or 'reference'")
    if backend is None and chosen == "reference" and x.is_cuda and not lack:
        chosen = "torch"
    if chosen != "reference" and counts_E.device.type == "cpu":
        _check_counts(counts_E, len(x))
    return chosen


def _aligned(x: Tensor) -> Tensor:
    """Copy unless rows are as PyTorch's kernel takes them."""
    *outer, inner = x.stride()
    whole = all(stride % _UNIT == 0 for stride in outer) and not x.data_ptr() % 16
    if inner == 1 and outer[-1] >= x.shape[-1] and whole:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _torch_forward(x: Tensor, weight_EFD: Tensor, counts_E: Tensor, zero_rest: bool) -> Tensor:
    right = weight_EFD.transpose(1, 2)
    right = _aligned(right) if right.stride(2) == 1 else _aligned(weight_EFD).transpose(1, 2)
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    y_MF: Tensor = F.grouped_mm(_aligned(x), right, offs=ends_E)
    if zero_rest:
        beyond = torch.arange(len(y_MF), device=y_MF.device) >= ends_E[-1]
        y_MF.masked_fill_(beyond.unsqueeze(1), 0.0)
    return y_MF


def _torch_weight_gradient(dy: Tensor, x: Tensor, counts_E: Tensor) -> Tensor:
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    dweight_EFD: Tensor = F.grouped_mm(_aligned(dy).t(), _aligned(x), offs=ends_E)
    if _major(x.device) != 9:  # on Hopper they are zero, and this is a pass over all weights
        dweight_EFD.masked_fill_((counts_E == 0).view(-1, 1, 1), 0.0)
    return dweight_EFD


def _forward(
    x: Tensor, weight: Tensor, counts: Tensor, zero_rest: bool, backend: str | None
) -> Tensor:
    chosen = _serve(x, counts, (*weight.shape,), backend)
    if chosen == "triton":
        from .grouped_triton import Rows, forward

        return forward(Rows(x), weight, counts, zero_rest)
    if chosen == "torch" and x.numel() and weight.numel():
        return _torch_forward(x, weight, counts, zero_rest)
    y_MF = x.new_empty(x.shape[0], weight.shape[1])
    end = 0
    for expert, rows in _groups(counts, x.shape[0]):
        if rows.start < rows.stop:
            if invariant():
                y_MF[rows] = linear(x[rows], weight[expert])
            else:
                _multiply(x[rows], weight[expert].t(), y_MF[rows])
        end = rows.stop
    if zero_rest:
        y_MF[end:].zero_()
    return y_MF


def _forward_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _weight_gradient(dy: Tensor, x: Tensor, counts: Tensor, backend: str | None) -> Tensor:
    chosen = _serve(x, counts, (len(counts), dy.shape[1], x.shape[1]), backend)
    if chosen == "triton":
        from .grouped_triton import Rows, weight_gradient

        return weight_gradient(Rows(dy), Rows(x), counts)
    if chosen == "torch" and x.numel() and dy.numel() and counts.numel():
        return _torch_weight_gradient(dy, x, counts)
    dweight_EFD = x.new_empty(counts.shape[0], dy.shape[1], x.shape[1])
    for expert, rows in _groups(counts, x.shape[0]):
        if rows.start < rows.stop:
            _multiply(dy[rows].t(), x[rows], dweight_EFD[expert])
        else:
            dweight_EFD[expert].zero_()
    return dweight_EFD


def _weight_gradient_fake(dy: Tensor, x: Tensor, counts: Tensor, backend: str | None) -> Tensor:
    return x.new_empty(counts.shape[0], dy.shape[1], x.shape[1])


def _accumulate(into: Tensor, dy: Tensor, x: Tensor, counts: Tensor, backend: str | None) -> None:
    chosen = _serve(x, counts, (len(counts), dy.shape[1], x.shape[1]), backend)
    if chosen == "triton":
        from .grouped_triton import Rows, weight_gradient

        weight_gradient(Rows(dy), Rows(x), counts, into)
    elif chosen == "torch" and x.numel() and dy.numel() and counts.numel():
        into.add_(_torch_weight_gradient(dy, x, counts))
    else:
        for expert, rows in _groups(counts, x.shape[0]):
            if rows.start < rows.stop:
                into[expert].addmm_(dy[rows].t().to(into.dtype), x[rows].to(into.dtype))


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, zero_rest: bool, backend: str | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        ctx.backend = backend
        y: Tensor = below_autograd(_FORWARD, x, weight, counts, zero_rest, backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("grouped_gemm")
        x, weight, counts = ctx.saved_tensors
        x_wanted, weight_wanted, *_ = ctx.needs_input_grad
        dx = dweight = None
        if x_wanted:
            dx = _FORWARD(dy, weight.transpose(1, 2), counts, True, ctx.backend)
        if weight_wanted:
            dweight = _WEIGHT_GRADIENT(dy, x, counts, ctx.backend)
        return dx, dweight, None, None, None


_FORWARD = register(
    "grouped_gemm_forward(Tensor x, Tensor weight, Tensor counts, bool zero_rest, str? backend)"
    " -> Tensor",
    _forward, _forward_fake, _GroupedGemm,
)  # fmt: skip
_WEIGHT_GRADIENT = register(
    "grouped_gemm_weight_gradient(Tensor dy, Tensor x, Tensor counts, str? backend) -> Tensor",
    _weight_gradient, _weight_gradient_fake,
)  # fmt: skip
_ACCUMULATE = register(
    "grouped_gemm_accumulate(Tensor(a!) into, Tensor dy, Tensor x, Tensor counts, str? backend)"
    " -> ()",
    _accumulate, lambda *_: None,
)  # fmt: skip


def _check(counts: Tensor, experts: int, left: str, right: str, **tensors: Tensor) -> None:
    """Refuse dtypes that are not served, or that differ, and counts of something else."""
    a, b = tensors[left], tensors[right]
    if a.dtype not in _DTYPES or a.dtype != b.dtype:
        raise ValueError(
            f"grouped_gemm: {left} and {right} must have one dtype of float16, bfloat16, float32 "
            f"and float64, got {a.dtype} and {b.dtype}"
        )
    if counts.dim() != 1 or len(counts) != experts or counts.dtype != torch.int64:
        raise ValueError(
            f"grouped_gemm: counts must be [{experts}] int64, got {[*counts.shape]} {counts.dtype}"
        )


def grouped_gemm(
    x: Tensor, weight: Tensor, counts: Tensor, *, zero_rest: bool = False,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Multiply each expert's rows by its weight.

    Args:
        x: Rows `[M, D]`, sorted by expert; float16, bfloat16, float32 or float64.
        weight: `[E, F, D]` in the dtype of `x`, any strides; under autocast both are cast first.
        counts: Rows of each expert `[E]` int64; any may be 0; they sum to at most M.
        zero_rest: Whether rows of the result beyond the counts are zero; else they are not written.
        backend: `reference`, which waits for the counts, `torch` (bfloat16, D and F divisible by
            8, on CUDA compute capability 9 or 10) or `triton`; None takes the fastest that is
            proven here, on CUDA `torch` where it can serve.

    Returns:
        `[M, F]` in the dtype of `x`, or in autocast's, summed in float32 at least.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If the shapes or dtypes do not fit, or, on the CPU, a count is negative or they
            sum to more than M (elsewhere rows end where x ends: to know would be to wait).
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    need_tensors("grouped_gemm", x=x, weight=weight, counts=counts)
    x, weight = autocast(x, weight)
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"grouped_gemm: x must be [M, D] and weight [E, F, D], got {[*x.shape]} and "
            f"{[*weight.shape]}"
        )
    _check(counts, weight.shape[0], "x", "weight", x=x, weight=weight)
    y: Tensor = _FORWARD(x, weight, counts, zero_rest, backend)
    return y


def grouped_gemm_weight_gradient(
    dy: Tensor, x: Tensor, counts: Tensor, *, into: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Return the weight gradient of `grouped_gemm` alone, for schedules that defer it.

    Args:
        dy: Upstream gradient `[M, F]`.
        x: Rows `[M, D]` of the forward, in the dtype of `dy`.
        counts: Rows of each expert `[E]` int64.
        into: If given, `[E, F, D]` float32 (float64 for float64), contiguous, to which the
            gradient is added; with `torch` it is rounded to the dtype of `x` first.
        backend: As of `grouped_gemm`.

    Returns:
        `[E, F, D]` in the dtype of `x`, zero for an expert without rows; `into` if that is given.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If the rows, the shapes or the dtypes do not fit, or the counts, as of
            `grouped_gemm`.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    need_tensors("grouped_gemm", dy=dy, x=x, counts=counts)
    if dy.dim() != 2 or x.dim() != 2 or dy.shape[0] != x.shape[0]:
        raise ValueError(
            f"grouped_gemm: dy must be [M, F] and x [M, D], got {[*dy.shape]} and {[*x.shape]}"
        )
    _check(counts, counts.numel(), "dy", "x", dy=dy, x=x)
    if into is None:
        dweight: Tensor = _WEIGHT_GRADIENT(dy, x, counts, backend)
        return dweight
    shape = counts.shape[0], dy.shape[1], x.shape[1]
    if into.shape != shape or into.dtype != wide(x.dtype) or not into.is_contiguous():
        raise ValueError(
            f"grouped_gemm: into must be contiguous, {[*shape]} {wide(x.dtype)}, got "
            f"{[*into.shape]} {into.dtype} with strides {[*into.stride()]}"
        )
    _ACCUMULATE(into, dy, x, counts, backend)
    return into
