"""Collectives that are differentiable, each a forward paired with its adjoint.

    forward                                 backward
    gather    all-gather along dim 0        reduce-scatter along dim 0
    scatter   reduce-scatter along dim 0    all-gather along dim 0
    copy      nothing                       all-reduce (each rank's gradient is a part of the whole)
    reduce    all-reduce                    nothing
    join      all-gather along dim 0        own rows
    split     own rows                      all-gather along dim 0
    swap      all-to-all along dim 0        all-to-all back

What the tensor is on the group, before and after (replicated R: equal on all ranks; sharded S:
each rank has its rows; partial P: the ranks' values must be summed), and its gradient:

              forward     gradient
    gather    S -> R      P -> S
    scatter   P -> S      S -> R
    copy      R -> R      P -> R
    reduce    P -> R      R -> R
    join      S -> R      R -> S
    split     R -> S      S -> R
    swap      S -> S      S -> S

`gather` and `join` differ in what follows: after `gather` each rank goes on with a part of the work
(its features), after `join` all do the same work (a loss over gathered logits).

Inside `debug.checked()` every R that a rank brings is compared over the group, so that a missing
reduction is an error where it happens.

Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3 (f = copy, g = reduce);
Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2.2 (g = gather, g-bar =
scatter).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .debug import check_replicated
from .door import observers, watched
from .plain import Group, all_gather_rows, all_reduce_, all_to_all_rows, reduce_scatter_rows

_Function = Callable[[Tensor, dist.ProcessGroup], Tensor]


def _same(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    check_replicated(x, group)
    return x


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return all_reduce_(x.clone(memory_format=torch.contiguous_format), group)


def _own_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    check_replicated(x, group)
    return x.chunk(group.size())[group.rank()].clone()


class _Pair(torch.autograd.Function):
    """Runs one function forward and its adjoint backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, forth: _Function, back: _Function
    ) -> Tensor:
        ctx.group, ctx.back, ctx.observers = group, back, observers()
        y = forth(x, group)
        return y.view_as(y) if y is x else y

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor, None, None, None]:
        with watched(ctx.observers or observers()):
            return ctx.back(dys[0], ctx.group), None, None, None


def gather(x: Tensor, group: Group) -> Tensor:
    """All-gather `x` `[n, ...]` along dim 0 into `[n * R, ...]`; backward reduce-scatters."""
    if group is None:
        return x
    y: Tensor = _Pair.apply(x, group, all_gather_rows, reduce_scatter_rows)
    return y


def scatter(x: Tensor, group: Group) -> Tensor:
    """Sum `x` `[n * R, ...]` over the group and keep `[n, ...]`; backward all-gathers.

    Raises:
        ValueError: If the group's size does not divide the rows.
    """
    if group is None:
        return x
    if x.shape[0] % group.size():
        raise ValueError(
            f"rows to scatter ({x.shape[0]}) must be divisible by the group ({group.size()})"
        )
    y: Tensor = _Pair.apply(x, group, reduce_scatter_rows, all_gather_rows)
    return y


def copy(x: Tensor, group: Group) -> Tensor:
    """Use the same `x` on every rank; backward sums the ranks' partial gradients."""
    if group is None:
        return x
    y: Tensor = _Pair.apply(x, group, _same, _all_reduce)
    return y


def reduce(x: Tensor, group: Group) -> Tensor:
    """Sum `x` over the group; backward passes the gradient, equal on all ranks, on to each."""
    if group is None:
        return x
    y: Tensor = _Pair.apply(x, group, _all_reduce, _same)
    return y


def join(x: Tensor, group: Group) -> Tensor:
    """All-gather `x` `[n, ...]` into `[n * R, ...]` for all ranks; backward keeps own rows."""
    if group is None:
        return x
    y: Tensor = _Pair.apply(x, group, all_gather_rows, _own_rows)
    return y


def split(x: Tensor, group: Group) -> Tensor:
    """Keep own rows of `x` `[n * R, ...]`, equal on all ranks; backward all-gathers.

    Raises:
        ValueError: If the group's size does not divide the rows.
    """
    if group is None:
        return x
    if x.shape[0] % group.size():
        raise ValueError(
            f"rows to split ({x.shape[0]}) must be divisible by the group ({group.size()})"
        )
    y: Tensor = _Pair.apply(x, group, _own_rows, all_gather_rows)
    return y


def swap(
    x: Tensor, group: Group, sent: Sequence[int] | None = None, got: Sequence[int] | None = None
) -> Tensor:
    """Send rows of `x` `[n, ...]` to each rank and return those that came; backward sends back.

    Args:
        x: First the rows for rank 0 of the group, then those for rank 1, and so on.
        group: The ranks.
        sent: Rows for each rank; `None` for equal parts.
        got: Rows from each rank; `None` for equal parts.

    Raises:
        ValueError: If the rows are not those of `sent`, or equal parts do not divide.
    """
    if group is None:
        return x
    if sent is not None and sum(sent) != x.shape[0]:
        raise ValueError(f"rows to swap ({x.shape[0]}) must be the sum of those sent ({sent})")
    if sent is None and x.shape[0] % group.size():
        raise ValueError(
            f"rows to swap ({x.shape[0]}) must be divisible by the group ({group.size()})"
        )
    y: Tensor = _Pair.apply(
        x, group, lambda t, g: all_to_all_rows(t, g, sent, got),
        lambda t, g: all_to_all_rows(t, g, got, sent),
    )  # fmt: skip
    return y
