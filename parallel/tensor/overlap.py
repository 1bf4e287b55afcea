"""Products that overlap with the collective beside them, under sequence parallelism.

R ranks, T tokens, D input width, F output width, C chunks, t = T / R / C rows of a chunk:

    gather_linear    y [T, F/R] = gather(x [T/R, D]) weight [F/R, D]^T
      backward       dx = reduce-scatter(dy weight), behind it dweight = dy^T gather(x)
    linear_scatter   y [T/R, F] = reduce-scatter(x [T, D/R] weight [F, D/R]^T)
      backward       dx = gather(dy) weight, dweight = gather(dy)^T x

Chunk c of a rank is its rows `c t : (c + 1) t`, so that a chunk over all ranks is R runs of t rows:
run r comes from rank r, or goes to it, and the tokens keep the order that they have without chunks.
Chunk c + 1 travels in while chunk c multiplies; chunk c travels out while chunk c + 1 multiplies.

Without chunks the operands are kept before the product runs, and recomputation that needs no more
than these stops there. In chunks the gathered input is whole only afterwards: the product runs too.

`regather` keeps only this rank's x for the backward and gathers it again there, behind the product
that gives dx. `symmetric` hands both to the fused operators of `torch.ops.symm_mem`, which pipeline
by themselves: it has run on no hardware here and is unproven.

Source: Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2.2 (the rows that are
gathered again); Wang et al. 2022, https://doi.org/10.1145/3567955.3567959 (products in chunks).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from warploom.kernels.invariant import invariant, linear
from warploom.kernels.library import autocast, first_derivative_only

from ..collectives import (
    Pending,
    all_gather_rows,
    all_gather_rows_begin,
    device_of,
    observers,
    reduce_scatter_rows_begin,
    watched,
)
from .product import WeightGradients, current_queue, kept, uncompiled


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product and its collective overlap.

    Attributes:
        group: The tensor-parallel process group.
        chunks: Into how many the rows are cut.
        regather: Whether the gathered input is dropped and gathered again in the backward.
        symmetric: Whether the fused operators over symmetric memory run both.

    Raises:
        ValueError: If the options contradict each other or the group.
    """

    group: dist.ProcessGroup
    chunks: int = 1
    regather: bool = False
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.chunks < 1 or (self.symmetric and self.chunks > 1):
            raise ValueError(
                f"chunks ({self.chunks}) must be at least 1, and 1 with symmetric={self.symmetric}:"
                f" the fused operators choose their own"
            )
        if self.symmetric and device_of(self.group).type != "cuda":
            raise ValueError(
                f"symmetric memory needs a CUDA group, this one is "
                f"{dist.get_backend(self.group)}: use chunks"
            )

    def cut(self, rows: int) -> int:
        """Return the rows t of a chunk of this rank's `rows`.

        Raises:
            ValueError: If the chunks do not divide them.
        """
        if rows % self.chunks:
            raise ValueError(f"chunks ({self.chunks}) must divide a rank's tokens ({rows})")
        return rows // self.chunks


@uncompiled
def gather_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Gather `x` `[T/R, ..., D]` over the group and multiply: `[T, ..., F/R]`.

    Args:
        x: This rank's tokens.
        weight: Own rows `[F/R, D]`; their gradient waits if a queue is open.
        bias: Own `[F/R]`, or None.
        plan: How the two overlap.

    Raises:
        ValueError: If the chunks do not divide the rows.
    """
    x, weight = autocast(x, weight)
    queue = current_queue() if weight.requires_grad and torch.is_grad_enabled() else None
    seen = (weight, bias) if queue is None else (None, None)
    own, full, token = x.flatten(0, -2), None, None
    if _trains(x, weight, bias) and plan.chunks == 1 and not plan.symmetric:
        if plan.regather:
            token = kept(own, weight)
        with torch.no_grad():
            full = all_gather_rows(own, plan.group)
        if not plan.regather:
            token = kept(full if weight.requires_grad else None, weight)
    elif queue is not None:
        token = kept()
    y: Tensor = _Gather.apply(own, *seen, token, full, (weight, bias), plan, queue)
    whole: Tensor = y.unflatten(0, (x.shape[0] * plan.group.size(), *x.shape[1:-1]))
    return whole


@uncompiled
def linear_scatter(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """Multiply `x` `[T, ..., D/R]`, sum over the group and keep own tokens: `[T/R, ..., F]`.

    Args:
        x: This rank's features.
        weight: Own columns `[F, D/R]`; their gradient waits if a queue is open.
        plan: How the two overlap.

    Raises:
        ValueError: If the rows do not divide over the ranks and the chunks.
    """
    if x.shape[0] % plan.group.size():
        raise ValueError(
            f"rows to scatter ({x.shape[0]}) must be divisible by the group ({plan.group.size()})"
        )
    x, weight = autocast(x, weight)
    queue = current_queue() if weight.requires_grad and torch.is_grad_enabled() else None
    rows, seen = x.flatten(0, -2).contiguous(), weight if queue is None else None
    token = kept(rows, weight) if _trains(x, weight) else None
    y: Tensor = _Scatter.apply(rows, seen, token, weight, plan, queue)
    whole: Tensor = y.unflatten(0, (x.shape[0] // plan.group.size(), *x.shape[1:-1]))
    return whole


def _trains(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _gathered_product(x: Tensor, matrix: Tensor, plan: Plan, keep: bool) -> tuple[Tensor, Any]:
    """Return `gather(x) matrix`, and where `keep` is set gather(x); `x` is `[T/R, M]`."""
    group, ranks = plan.group, plan.group.size()
    if plan.symmetric:
        return _fused_gather(x, matrix, group, keep)
    if plan.chunks == 1 or invariant():
        full: Any = all_gather_rows_begin(x, group).wait()
        return linear(full, matrix.t()), full if keep else None
    rows, width = plan.cut(x.shape[0]), x.shape[1]
    y = x.new_empty(ranks, plan.chunks, rows, matrix.shape[1])
    full = x.new_empty(y.shape[:3] + (width,)) if keep else None
    each = matrix.expand(ranks, *matrix.shape)
    coming = all_gather_rows_begin(x[:rows], group)
    for c in range(plan.chunks):
        part = coming.wait().view(ranks, rows, width)
        if c + 1 < plan.chunks:
            coming = all_gather_rows_begin(x[(c + 1) * rows : (c + 2) * rows], group)
        torch.bmm(part, each, out=y[:, c])
        if full is not None:
            full[:, c] = part
    return y.view(-1, y.shape[-1]), None if full is None else full.view(-1, width)


def _product_scattered_begin(x: Tensor, matrix: Tensor, plan: Plan) -> Pending:
    """Begin `reduce-scatter(x matrix)`; `x` is `[T, M]`. The last transfer is under way."""
    group, ranks = plan.group, plan.group.size()
    if plan.symmetric:
        return Pending(_fused_scatter(x, matrix, group))
    if plan.chunks == 1 or invariant():
        return reduce_scatter_rows_begin(linear(x, matrix.t()), group)
    rows = plan.cut(x.shape[0] // ranks)
    y = x.new_empty(plan.chunks, rows, matrix.shape[1])
    each = matrix.expand(ranks, *matrix.shape)
    runs = x.view(ranks, plan.chunks, rows, x.shape[1])
    leaving = []
    for c in range(plan.chunks):
        part = torch.bmm(runs[:, c], each).flatten(0, 1)
        leaving.append(reduce_scatter_rows_begin(part, group, out=y[c]))
    return Pending(y.view(-1, y.shape[-1]), leaving)


def _fused_gather(
    x: Tensor, matrix: Tensor, group: dist.ProcessGroup, keep: bool
) -> tuple[Tensor, Any]:
    import torch.distributed._symmetric_memory  # registers the operators

    fused: Any = torch.ops.symm_mem.fused_all_gather_matmul
    full, (product,) = fused(x, [matrix], 0, group.group_name, return_A=keep)
    return product, full


def _fused_scatter(x: Tensor, matrix: Tensor, group: dist.ProcessGroup) -> Tensor:
    import torch.distributed._symmetric_memory  # registers the operators

    y: Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(
        x, matrix, "sum", 0, group.group_name
    )
    return y


class _Gather(torch.autograd.Function):
    """The column-parallel product; `held` are weight and bias, seen by autograd or not."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, token: Tensor | None,
        full: Tensor | None, held: tuple[Tensor, Tensor | None], plan: Plan,
        queue: WeightGradients | None,
    ) -> Tensor:  # fmt: skip
        wanted = ctx.needs_input_grad[1] or queue is not None
        if full is not None:
            y = linear(full, held[0])
        else:
            y, full = _gathered_product(x, held[0].t(), plan, wanted and not plan.regather)
            ctx.save_for_backward(x if plan.regather else full, held[0])
        ctx.saved = None if token is None else token.grad_fn
        ctx.held, ctx.plan, ctx.queue, ctx.observers = held, plan, queue, observers()
        return y if held[1] is None else y.add_(held[1])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("a column-parallel product")
        (dy,), plan, (weight, bias), queue = dys, ctx.plan, ctx.held, ctx.queue
        own, value = ctx.saved_tensors or ctx.saved.saved_tensors
        wanted = ctx.needs_input_grad[1] or queue is not None
        dx = dweight = dbias = None
        with watched(ctx.observers or observers()):
            again = wanted and plan.regather
            full = all_gather_rows_begin(own, plan.group) if again else Pending(own)
            if ctx.needs_input_grad[0]:
                dx = _product_scattered_begin(dy.contiguous(), value, plan)
            x = full.wait()
            if queue is not None:
                queue.put(weight, lambda: dy.t() @ x)
                if bias is not None and bias.requires_grad:
                    queue.put(bias, lambda: dy.sum(0))
            if ctx.needs_input_grad[1]:
                dweight = dy.t() @ x
            if ctx.needs_input_grad[2]:
                dbias = dy.sum(0)
            return None if dx is None else dx.wait(), dweight, dbias, *(None,) * 5


class _Scatter(torch.autograd.Function):
    """The row-parallel product; `held` is the weight, seen by autograd or not."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, token: Tensor | None, held: Tensor, plan: Plan,
        queue: WeightGradients | None,
    ) -> Tensor:  # fmt: skip
        ctx.saved = None if token is None else token.grad_fn
        ctx.held, ctx.plan, ctx.queue, ctx.observers = held, plan, queue, observers()
        y: Tensor = _product_scattered_begin(x, held.t(), plan).wait()
        return y

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("a row-parallel product")
        (dy,), queue = dys, ctx.queue
        x, value = ctx.saved.saved_tensors
        wanted = ctx.needs_input_grad[1] or queue is not None
        with watched(ctx.observers or observers()):
            dx, full = _gathered_product(dy.contiguous(), value, ctx.plan, wanted)
        if queue is not None:
            queue.put(ctx.held, lambda: full.t() @ x)
        dweight = full.t() @ x if ctx.needs_input_grad[1] else None
        return dx, dweight, None, None, None, None
