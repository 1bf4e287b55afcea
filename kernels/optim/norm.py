"""The norm of many tensors together, the clip by it, and their scaling.

    n = sqrt(sum over tensors and elements of g^2)
    c = min(1, max_norm / (n + 1e-6)),    found_inf = n is not finite

Nothing leaves the device: c goes to `adamw_` as `scale` and found_inf as its flag, so that the clip
costs one read of the gradients and no write; `clip_by_global_norm_` scales in place for others.
Sharded gradients: add up the ranks' `squared_norm`, take the root, then `clip_coefficient`.

Sums are float32 within a chunk (float64 for float64) and float64 over chunks, in a fixed order.
Bound by memory. Roof of the norm: N elements read / bandwidth; of the scaling 2 N.

Source: Pascanu et al. 2013, https://arxiv.org/abs/1211.5063, algorithm 1.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..backends import choose
from ..library import need_tensor_list, need_tensors, register, wide
from .table import Plan, refuse_shared_memory

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BLOCK = 1 << 16  # elements torch's CPU norm may add up in float32: of 2^26 it loses half a percent
_TINY = 1e-6  # added to the norm, as torch.nn.utils.clip_grad_norm_ does


def squared_norm_reference(tensors: Sequence[Tensor]) -> Tensor:
    """Specify `squared_norm`; tests hold every backend to it.

    Args:
        tensors: Any shapes, one device.

    Returns:
        0-dim float64.
    """
    return torch.stack([t.double().square().sum() for t in tensors]).sum()


def _squared_norm(tensors: list[Tensor], plan: list[Tensor] | None, backend: str | None) -> Tensor:
    dtype = tensors[0].dtype
    if choose("global_norm", tensors[0].device, dtype, backend) == "triton":
        from .norm_triton import squared_norm

        return squared_norm([t.contiguous() for t in tensors], plan)
    filled = [t for t in tensors if t.numel()]
    if not filled:
        return tensors[0].new_zeros((), dtype=torch.float64)
    if tensors[0].is_cpu:
        norms = [norm for t in filled for norm in _block_norms(t.reshape(-1))]
    else:
        norms = [norm.view(1) for norm in torch._foreach_norm(filled, 2, dtype=wide(dtype))]
    return torch.cat(norms).double().square().sum()


def _block_norms(x_N: Tensor) -> Iterator[Tensor]:
    """Yield the norms of blocks, of all that are whole in one call."""
    whole, dtype = len(x_N) // _BLOCK * _BLOCK, wide(x_N.dtype)
    if whole:
        yield torch.linalg.vector_norm(x_N[:whole].view(-1, _BLOCK), dim=1, dtype=dtype)
    if whole < len(x_N):
        yield torch.linalg.vector_norm(x_N[whole:], dtype=dtype).view(1)


def _scale(
    tensors: list[Tensor], factor: Tensor, plan: list[Tensor] | None, backend: str | None
) -> None:
    if plan is None:
        refuse_shared_memory("scale_", {"tensors": tensors})
    if choose("global_norm", factor.device, tensors[0].dtype, backend) != "triton":
        torch._foreach_mul_(tensors, factor)
        return
    from .norm_triton import scale

    scale(tensors, factor, plan)
    torch.autograd.graph.increment_version(tensors)


_SQUARED_NORM = register(
    "squared_norm(Tensor[] tensors, Tensor[]? plan, str? backend) -> Tensor",
    _squared_norm, lambda tensors, plan, backend: tensors[0].new_empty((), dtype=torch.float64),
)  # fmt: skip
_SCALE = register(
    "scale_(Tensor(a!)[] tensors, Tensor factor, Tensor[]? plan, str? backend) -> ()",
    _scale, lambda *_: None,
)  # fmt: skip


def _by_dtype(op: str, tensors: Sequence[Tensor], plan: Plan | None) -> list[list[Tensor]]:
    """Check the tensors and return them by dtype: a launch serves one."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    tensors = list(tensors)
    need_tensor_list(op, "tensors", tensors)
    for n, t in enumerate(tensors):
        if t.device != tensors[0].device:
            raise ValueError(
                f"{op}: all tensors must be on one device, got {tensors[0].device} and {t.device}"
            )
        if t.dtype not in _DTYPES:
            raise ValueError(
                f"{op}: the tensors must be float16, bfloat16, float32 or float64; tensors[{n}] is "
                f"{t.dtype}"
            )
        if t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{op}: has no gradient, and tensors[{n}] requires one: detach it, or call under "
                f"torch.no_grad()"
            )
        groups.setdefault(t.dtype, []).append(t)
    if plan is not None and len(groups) > 1:
        raise ValueError(f"{op}: a plan serves one dtype, the tensors are {[*groups]}")
    return [*groups.values()]


def squared_norm(
    tensors: Sequence[Tensor], *, plan: Plan | None = None, backend: str | None = None
) -> Tensor:
    """Sum the squares of all elements: what ranks that share out the tensors add up.

    Args:
        tensors: Any shapes, strides and floating dtypes, on one device. Elements above 1e19 in
            float32 and bfloat16 give inf: squares are summed in float32 first.
        plan: `plan(tensors)` for the Triton backend, which needs one inside a CUDA graph.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        0-dim float64 on the tensors' device (the CPU for none): the same bits for the same tensors.

    Raises:
        ValueError: If dtypes or devices are not as above, or the plan is of other tensors.
        RuntimeError: If a tensor requires a gradient, `backend` cannot serve these tensors here, or
            a CUDA graph lacks a plan.
    """
    return _sum_squares("squared_norm", tensors, plan, backend)


def _sum_squares(
    op: str, tensors: Sequence[Tensor], plan: Plan | None, backend: str | None
) -> Tensor:
    total: Tensor | None = None
    for group in _by_dtype(op, tensors, plan):
        part: Tensor = _SQUARED_NORM(group, plan, backend)
        total = part if total is None else total + part
    return torch.zeros((), dtype=torch.float64) if total is None else total


def global_norm(
    tensors: Sequence[Tensor], *, plan: Plan | None = None, backend: str | None = None
) -> Tensor:
    """Take the norm of many tensors together.

    Args:
        tensors: As `squared_norm`.
        plan: As `squared_norm`.
        backend: As `squared_norm`.

    Returns:
        0-dim float64 on the tensors' device; 0 for no tensors.

    Raises:
        ValueError: As `squared_norm`.
        RuntimeError: As `squared_norm`.
    """
    return _sum_squares("global_norm", tensors, plan, backend).sqrt()


def clip_coefficient(norm: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Compute what a gradient of `norm` is multiplied with, without waiting for the device.

    Args:
        norm: 0-dim, of the whole gradient.
        max_norm: Largest norm afterwards, above 0; inf for no clip.

    Returns:
        The coefficient, in the dtype of `norm`, and a float32 flag: 1 where `norm` is inf or NaN.

    Raises:
        ValueError: If `max_norm` is not above 0.
    """
    need_tensors("clip_coefficient", norm=norm)
    if not max_norm > 0:
        raise ValueError(f"clip_coefficient: max_norm must be above 0, got {max_norm}")
    coefficient = torch.clamp(max_norm / (norm + _TINY), max=1.0)
    return coefficient, (~norm.isfinite()).float()


def scale_(
    tensors: Sequence[Tensor],
    factor: Tensor,
    *,
    plan: Plan | None = None,
    backend: str | None = None,
) -> None:
    """Multiply many tensors in place with one number that is on the device.

    Args:
        tensors: As `squared_norm`, but contiguous for `triton`, and none shares another's memory.
        factor: 0-dim, on the tensors' device.
        plan: As `squared_norm`.
        backend: As `squared_norm`.

    Raises:
        ValueError: If tensors, factor or plan are not as above.
        RuntimeError: As `squared_norm`.
    """
    for group in _by_dtype("scale_", tensors, plan):
        if factor.dim() or factor.device != group[0].device:
            raise ValueError(
                f"scale_: factor must be 0-dim and on {group[0].device}, got {[*factor.shape]} on "
                f"{factor.device}"
            )
        _SCALE(group, factor, plan, backend)


def clip_by_global_norm_(
    tensors: Sequence[Tensor],
    max_norm: float,
    *,
    plan: Plan | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale many tensors in place so that their common norm is at most `max_norm`.

    Args:
        tensors: As `scale_`.
        max_norm: Above 0, and finite.
        plan: As `squared_norm`.
        backend: As `squared_norm`.

    Returns:
        The norm before, and a float32 flag: 1 where it is inf or NaN (what the tensors then hold is
        of no use). Both 0-dim, on the device.

    Raises:
        ValueError: If tensors, number or plan are not as above.
        RuntimeError: As `squared_norm`.
    """
    if not 0 < max_norm < math.inf:
        raise ValueError(
            f"clip_by_global_norm_: max_norm must be above 0 and finite, got {max_norm}"
        )
    norm = _sum_squares("clip_by_global_norm_", tensors, plan, backend).sqrt()
    coefficient, found = clip_coefficient(norm, max_norm)
    scale_(tensors, coefficient, plan=plan, backend=backend)
    return norm, found
