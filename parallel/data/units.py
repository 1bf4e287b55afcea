"""ZeRO-3: between uses a rank holds only its own rows of each parameter.

A *unit* is an entry of a `ModuleList` or `ModuleDict` of the model (a block), the outermost one;
what is in none is the *root* unit (embedding, final norm, head), gathered for a whole step.

    forward of unit i     gather i (mostly there already), begin i + 1;  free i at the end
    backward of unit i    gather i when the gradient of its output is there, begin i - 1;
                          free i when the gradients of its inputs are there

Bytes over R ranks, P a parameter's size: own rows P / R always, and P for the root and at most two
units. Each unit is gathered twice a micro-batch. A parameter that is away has its shape and NaN for
values, at the cost of one element. What autograd has saved stays valid: it refers to the parameter,
or to storage that is emptied and filled again. A module that keeps something made of its parameters
(codes in FP8) has `forget()`, which is called when they go.

Units must be entered through `__call__`. Under recomputation a unit that runs again in its backward
stays until that ends.

Source: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5.3; Zhao et al. 2023,
https://arxiv.org/abs/2304.11277, section 3.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..collectives import Group, Pending, all_gather_rows_begin, observers, watched
from .buckets import Bucket, make_buckets


def unit_modules(model: nn.Module) -> list[nn.Module]:
    """List the entries of the outermost module lists and dicts of `model`, in order."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            found += child
        elif isinstance(child, nn.ModuleDict):
            found += child.values()
        else:
            found += unit_modules(child)
    return found


def unit_of(model: nn.Module) -> dict[str, int]:
    """Return the unit of each parameter by path, counted from 0; the root unit is -1.

    A parameter that is in two units belongs to the root.
    """
    holders: dict[int, set[int]] = {}
    for number, module in enumerate(unit_modules(model)):
        for parameter in module.parameters():
            holders.setdefault(id(parameter), set()).add(number)
    outside = {id(p) for p in _outside(model)}
    return {
        path: next(iter(held))
        if len(held := holders.get(id(p), set())) == 1 and id(p) not in outside
        else -1
        for path, p in model.named_parameters()
    }


def _outside(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that are reached without entering a unit."""
    yield from model.parameters(recurse=False)
    for child in model.children():
        if not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _outside(child)


class _Unit:
    """The sharded parameters of a unit, there or away."""

    def __init__(
        self, buckets: list[Bucket], parameters: Mapping[str, nn.Parameter],
        forget: list[Callable[[], None]],
    ) -> None:  # fmt: skip
        self.buckets, self.forget = buckets, forget
        self.parameters = {p: parameters[p] for bucket in buckets for p in bucket.paths}
        self.full = {path: p.data for path, p in self.parameters.items()}
        self.away = {p: x.new_full((), nan).expand(x.shape) for p, x in self.full.items()}
        self.pending: list[Pending] | None = None
        self.there = True
        self.in_backward = False

    def begin(self, rows: Mapping[str, Tensor]) -> None:
        """Begin to gather, unless it is there or under way."""
        if not self.there and self.pending is None:
            self.pending = [
                all_gather_rows_begin(bucket.own([rows[p] for p in bucket.paths]), bucket.group)
                for bucket in self.buckets
            ]

    @torch.no_grad()
    def gather(self, rows: Mapping[str, Tensor]) -> None:
        self.begin(rows)
        if self.pending is None:
            return
        for bucket, pending in zip(self.buckets, self.pending, strict=True):
            full = [self.full[path] for path in bucket.paths]
            for tensor in full:
                tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
            bucket.spill(pending.wait(), full)
        for path, parameter in self.parameters.items():
            parameter.data = self.full[path]
        self.pending, self.there = None, True

    def free(self) -> None:
        """Let go of all but the own rows, and of what was gathered ahead."""
        for pending in self.pending or ():
            pending.wait()
        self.pending, self.in_backward = None, False
        if self.there:
            for path, parameter in self.parameters.items():
                parameter.data = self.away[path]
                self.full[path].untyped_storage().resize_(0)
            for forget in self.forget:
                forget()
        self.there = False


class Units:
    """Gathers the units of `model` around their use and frees them after; it begins by freeing.

    Args:
        model: The model.
        rows: This rank's own rows of each parameter by path, in the parameter's dtype.
        group: The ranks that share out the rows of each, by path.

    Raises:
        ValueError: If a parameter is a view of memory that others use too.
    """

    def __init__(
        self, model: nn.Module, rows: Mapping[str, Tensor], group: Callable[[str], Group]
    ) -> None:
        self.rows = rows
        unit = unit_of(model)
        parameters = {path: p for path, p in model.named_parameters() if group(path) is not None}
        for path, p in parameters.items():
            if p.untyped_storage().nbytes() != p.numel() * p.element_size():
                raise ValueError(
                    f"zero=3 needs parameters that have their memory to themselves, but {path} "
                    f"{tuple(p.shape)} is in memory of {p.untyped_storage().nbytes()} bytes: "
                    f"clone it, or use zero=2"
                )
        buckets = make_buckets(parameters, group, unit.__getitem__)
        modules = unit_modules(model)
        inner = {id(part): n for n, module in enumerate(modules) for part in module.modules()}
        forget: dict[int, list[Callable[[], None]]] = {}
        for part in model.modules():
            if (drop := getattr(part, "forget", None)) is not None:
                forget.setdefault(inner.get(id(part), -1), []).append(drop)
        made = [
            _Unit(
                [b for b in buckets if unit[b.paths[0]] == number],
                parameters,
                forget.get(number, []),
            )
            for number in range(-1, len(modules))
        ]
        self.root, self.units = made[0], made[1:]
        self.watching = observers()
        self.handles: list[RemovableHandle] = []
        for number, module in enumerate(modules):
            self._watch(number, module)
        self.free()

    def free(self) -> None:
        """Free every unit."""
        for unit in (self.root, *self.units):
            unit.free()

    def close(self) -> None:
        """Gather every parameter for good and take the hooks off the modules."""
        for unit in (self.root, *self.units):
            unit.free()
            unit.gather(self.rows)
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def open(self, *, whole: bool = False) -> Iterator[None]:
        """Hold the root unit while the context is open: the model can run inside.

        Args:
            whole: Whether every unit is held.
        """
        self.watching = observers()
        held = self.root.there
        for unit in (self.root, *(self.units if whole else ())):
            unit.gather(self.rows)
        try:
            yield
        finally:
            for unit in self.units if held else (self.root, *self.units):
                unit.free()

    def settle(self) -> None:
        """Free the units whose backward is over but whose inputs asked for no gradient."""
        for unit in self.units:
            if unit.in_backward:
                unit.free()

    def _watch(self, number: int, module: nn.Module) -> None:
        unit = self.units[number]

        def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            unit.gather(self.rows)
            if not unit.in_backward and number + 1 < len(self.units):
                self.units[number + 1].begin(self.rows)
            return self._mark(unit, args, kwargs)

        def backward(_: Tensor) -> None:
            unit.in_backward = True
            with watched(self.watching):
                unit.gather(self.rows)
                if number:
                    self.units[number - 1].begin(self.rows)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            if unit.in_backward:
                return
            for tensor in _tensors(output):
                tensor.register_hook(backward)
            unit.free()

        self.handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    def _mark(
        self, unit: _Unit, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pass the inputs through a node whose backward is the last of the unit's."""
        inputs = (*args, *kwargs.values())
        marked = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        if not marked or unit.in_backward:
            return args, kwargs
        found = {id(x): y for x, y in zip(marked, _Last.apply(unit.free, *marked), strict=True)}
        return (
            tuple(found.get(id(x), x) for x in args),
            {name: found.get(id(x), x) for name, x in kwargs.items()},
        )


def _tensors(value: Any) -> list[Tensor]:
    """List the tensors in tuples, lists and dicts that have a gradient."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


class _Last(torch.autograd.Function):
    """Passes tensors on; its backward, the last of those that were begun later, calls `done`."""

    @staticmethod
    def forward(ctx: Any, done: Callable[[], None], *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.done = done
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.done()
        return None, *dys
