"""Gradients of a step: accumulated over micro-batches, then summed over ranks into shards.

The replicas of a parameter are `mesh.shard`, or `mesh.edp` for those of experts, times `mesh.rep`.

    stage   over the replicas              when                            gradients held
    0       all-reduce                     backward of the last micro-batch   whole
    1       reduce-scatter                 backward of the last micro-batch   whole, then own rows
    2, 3    reduce-scatter                 backward of every micro-batch      own rows

    once a step, on the own rows           over
    all-reduce, in buckets                 mesh.rep
    all-reduce, coalesced                  layout.partial   those that see a part of the tokens
    all-reduce, coalesced                  layout.spread    slices that some ranks hold alike

A bucket leaves as soon as all its gradients are there, while the backward goes on. Buckets leave in
one order on all ranks, whichever parameters a rank's tokens reach: the reverse of that in which the
model registers its parameters, which should be the order of its forward. Ranks of a partial or a
spread group must hold the parameter in the same local shape: then they own the same rows of it.
Sums are in float32 at least. Sums only: what a sum is divided by belongs to `step.py`.

Source: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5 (the stages); Li et al.
2020, https://arxiv.org/abs/2006.15704, section 3.2 (buckets that overlap with the backward).
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..collectives import (
    Group,
    Pending,
    all_reduce_,
    all_reduce_begin,
    observers,
    reduce_scatter_rows_begin,
    watched,
)
from ..mesh import Mesh
from ..sharding import Layout, narrow
from .buckets import BUCKET_ELEMENTS, Bucket, make_buckets, shard_rows

_FLYING = 2  # buckets under way at a time: bounds the memory of their copies


@dataclass(eq=False)
class _Sum:
    """A bucket on its way: which gradients it waits for, and what has come back."""

    bucket: Bucket
    dtype: torch.dtype
    leaves: bool = False
    missing: set[str] = field(default_factory=set)
    total: Tensor | None = None

    def add(self, part: Tensor) -> None:
        self.total = part if self.total is None else self.total.add_(part)


class Gradients:
    """Accumulates the gradients of `parameters` and sums them into this rank's shards.

    Args:
        parameters: Parameters by path.
        layouts: Their layouts, by the same paths.
        mesh: Its groups are reduced over.
        zero: The ZeRO stage, from 0 to 3.
        kind: What must be equal within a bucket, such as the unit a parameter is in.
        elements: Most elements of a bucket.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout], mesh: Mesh, *,
        zero: int = 1, kind: Callable[[str], Hashable] = lambda path: None,
        elements: int = BUCKET_ELEMENTS,
    ) -> None:  # fmt: skip
        self.parameters = dict(parameters)
        self.layouts = dict(layouts)
        self.mesh = mesh
        self.stage = zero
        backward = dict(reversed(self.parameters.items()))
        made = make_buckets(backward, self._replicas, kind, elements=elements)
        if zero == 0:
            made = [Bucket(bucket.paths, bucket.shapes, None) for bucket in made]
        self.sums = [_Sum(bucket, self._wide(bucket.paths[0])) for bucket in made]
        self.of = {path: one for one in self.sums for path in one.bucket.paths}
        self.flying: deque[tuple[_Sum, Pending]] = deque()
        self.next: int | None = None  # the bucket whose turn it is; None where any may leave
        self.turn: list[_Sum] = []
        self.leaving = False
        self.watching = observers()
        self.wide: dict[str, Tensor] = {}
        self.hooks: dict[str, RemovableHandle] = {}
        for path, parameter in self.parameters.items():
            if parameter.dtype.itemsize < 4 and not self._often(self.of[path]):
                self.wide[path] = torch.zeros_like(parameter, dtype=torch.float32)
        self._watch()

    def _watch(self) -> None:
        """Be told of the gradients of all that trains; a parameter may be unfrozen later."""
        for path, parameter in self.parameters.items():
            if parameter.requires_grad and path not in self.hooks:
                hook = _weakly(self._arrived, path)
                self.hooks[path] = parameter.register_post_accumulate_grad_hook(hook)

    def _replicas(self, path: str) -> Group:
        return self.layouts[path].replicas(self.mesh)

    def _wide(self, path: str) -> torch.dtype:
        return torch.promote_types(self.parameters[path].dtype, torch.float32)

    def _often(self, one: _Sum) -> bool:
        """Whether a bucket leaves in every micro-batch, not only in the last."""
        return self.stage >= 2 and one.bucket.group is not None

    def _alone(self, one: _Sum) -> bool:
        """Whether no other rank holds the same parameters, so that nothing leaves."""
        return self.mesh.rep is None and self._replicas(one.bucket.paths[0]) is None

    def zero(self) -> None:
        """Forget the gradients of the last step."""
        self._watch()
        while self.flying:
            self._land()
        for parameter in self.parameters.values():
            parameter.grad = None
        for wide in self.wide.values():
            wide.zero_()
        for one in self.sums:
            one.total = None

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self.hooks.values():
            hook.remove()

    def local(self, path: str) -> Tensor:
        """Return the gradient accumulated on this rank; zeros where no token reached it."""
        if path in self.wide:
            return self.wide[path]
        parameter = self.parameters[path]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return parameter.grad

    @contextmanager
    def backward(self, *, last: bool, ordered: bool = True) -> Iterator[None]:
        """Collect what the backward passes in this context give.

        Args:
            last: Whether the gradients of the step are complete at the end of the context.
            ordered: Whether the context holds one pass. Of several (a pipeline's), only stages 2
                and 3 let buckets leave meanwhile, in the order in which they fill: every rank of
                a group must then give gradients to the same parameters in each pass.
        """
        self.leaving = self.stage >= 2 or (last and ordered)
        self.next = 0 if ordered else None
        self.watching = observers()
        for one in self.sums:
            one.leaves = not self._alone(one) and (last or self._often(one))
            one.missing = self._expected(one)
        self.turn = [one for one in self.sums if one.leaves]
        try:
            yield
        finally:
            leaving, self.leaving = self.leaving, False
        if leaving and ordered:
            for one in self.turn[self.next :]:
                self._leave(one)

    def _expected(self, one: _Sum) -> set[str]:
        return {path for path in one.bucket.paths if self.parameters[path].requires_grad}

    def _arrived(self, path: str, parameter: Tensor) -> None:
        """Take in a gradient that autograd has accumulated, and let go what is complete."""
        if (wide := self.wide.get(path)) is not None and parameter.grad is not None:
            wide.add_(parameter.grad)
            parameter.grad = None
        one = self.of[path]
        if not (self.leaving and one.leaves):
            return
        one.missing.discard(path)
        with watched(self.watching):
            if self.next is None:
                if not one.missing and self._often(one):
                    self._leave(one)
                return
            while self.next < len(self.turn) and not self.turn[self.next].missing:
                self._leave(self.turn[self.next])
                self.next += 1

    def _leave(self, one: _Sum) -> None:
        """Begin to sum a bucket over its replicas; its gradients are freed."""
        paths = one.bucket.paths
        with torch.no_grad():
            flat = one.bucket.pack([self.local(path) for path in paths], one.dtype)
        for path in paths:
            self.parameters[path].grad = None
        one.missing = self._expected(one)
        while len(self.flying) >= _FLYING:
            self._land()
        if self.stage == 0:
            pending = all_reduce_begin(flat, self._replicas(paths[0]))
        else:
            pending = reduce_scatter_rows_begin(flat, one.bucket.group)
        self.flying.append((one, pending))

    def _land(self) -> None:
        one, pending = self.flying.popleft()
        one.add(pending.wait())

    @torch.no_grad()
    def reduce(self) -> dict[str, Tensor]:
        """Sum over all ranks and return this rank's shards by path: rows of dim 0.

        Where no other rank holds a parameter, its shard is its gradient itself, not a copy.
        """
        shards: dict[str, Tensor] = {}
        for one in self.sums:
            left = any(self.parameters[p].grad is not None for p in one.bucket.paths)
            if not self._alone(one) and (left or not self._gone(one)):
                self._leave(one)
        while self.flying:
            self._land()
        totals = [one.total for one in self.sums if one.total is not None]
        for pending in [all_reduce_begin(total, self.mesh.rep) for total in totals]:
            pending.wait()
        for one in self.sums:
            if one.total is None:
                shards |= {path: self.local(path) for path in one.bucket.paths}
            else:
                shards |= one.bucket.views(one.total)
        shards = {path: shards[path] for path in self.parameters}
        self._sum_partial(shards)
        self._sum_spread(shards)
        return shards

    def _gone(self, one: _Sum) -> bool:
        return one.total is not None or any(other is one for other, _ in self.flying)

    def _sum_partial(self, shards: Mapping[str, Tensor]) -> None:
        """Sum shards over the groups on which they are partial."""
        for group in self._ordered(g for made in self.layouts.values() for g in made.partial):
            _sum_together(
                [shard for path, shard in shards.items() if group in self.layouts[path].partial],
                group,
            )

    def _sum_spread(self, shards: Mapping[str, Tensor]) -> None:
        """Sum slices that some ranks hold alike, each through a buffer of the logical shape."""
        spread = {p: made.spread for p, made in self.layouts.items() if p in shards and made.spread}
        for group in self._ordered(group for each in spread.values() for group, _ in each):
            buffers: list[Tensor] = []
            views: list[tuple[Tensor, Tensor]] = []
            for path, each in spread.items():
                names = dict.fromkeys(n for g, names in each if g is group for n in names)
                shapes = {p.name: p.shape for p in self.layouts[path].pieces}
                made = {name: shards[path].new_zeros(shapes[name]) for name in names}
                buffers += made.values()
                views += [
                    (piece.of_local(shards[path]), piece.of_logical(made[piece.name]))
                    for piece in self._own(path).pieces
                    if piece.name in made
                ]
            for own, place in views:
                place.copy_(own)
            _sum_together(buffers, group)
            for own, place in views:
                own.copy_(place)

    def _own(self, path: str) -> Layout:
        """Return the layout of this rank's shard."""
        rows = self.parameters[path].shape[0]
        return narrow(self.layouts[path], *shard_rows(rows, self.of[path].bucket.group))

    def _ordered(self, groups: Iterable[Group]) -> list[Group]:
        """List each group once, in the order of the mesh's axes: the same on all ranks."""
        found = [group for group in dict.fromkeys(groups) if group is not None]
        known = [getattr(self.mesh, f.name) for f in fields(self.mesh)]
        return sorted(found, key=lambda g: known.index(g) if g in known else len(known))


def _weakly(arrived: Callable[[str, Tensor], None], path: str) -> Callable[[Tensor], None]:
    """Return a hook that does not hold its object: no collector sees a cycle through a hook."""
    known = WeakMethod(arrived)

    def hook(parameter: Tensor) -> None:
        if (told := known()) is not None:
            told(path, parameter)

    return hook


def _sum_together(tensors: list[Tensor], group: Group) -> None:
    """Sum tensors over a group in place, by one all-reduce for each dtype."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype and tensor.numel()]
        if not alike:
            continue
        flat = all_reduce_(torch.cat([tensor.reshape(-1) for tensor in alike]), group)
        for tensor, part in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))
