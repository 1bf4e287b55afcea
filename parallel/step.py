"""One optimizer step, and the one place that divides.

A loss returns named terms, each a sum over what this rank saw and the count it is over. The step
sums the counts over micro-batches and over all ranks that see different tokens *before* the first
forward, and differentiates

    sum over terms of  weight * sum / global count

for each micro-batch. Gradients are then only ever summed: over micro-batches, over the replicas of
a parameter, over groups on which it is partial (`data/gradients.py`). So the gradient of a global
batch does not depend on how it is split, and no rank, schedule or reduction holds a divisor of its
own.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from warploom.kernels.optim import squared_norm

from .collectives import all_reduce_, device_of, place
from .data import BUCKET_ELEMENTS, Gradients, Units, unit_of
from .mesh import Mesh
from .optimizer import ShardedOptimizer
from .pipeline import Schedule, execute
from .sharding import Layout, Piece, owned


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a loss.

    Attributes:
        name: What it measures, such as `language_model`.
        sum: 0-dim tensor with a gradient: the sum over this rank's micro-batch.
        count: What the sum is over (trained tokens, sequences, pairs), 0-dim or a number.
        weight: Its weight in the objective.
    """

    name: str
    sum: Tensor
    count: Tensor | int | float
    weight: float = 1.0


class Trainable(Protocol):
    """What a step needs of a model.

    With a pipeline schedule, instead of `loss`: `stage(s, x, batch) -> (y | None, terms)` for each
    stage s of this rank, and `boundary(s, batch) -> (shape, dtype)` of the output of a stage, if it
    is known before. A model that has `after_step(mesh)` is called after each optimizer step.
    """

    def loss(self, batch: Any) -> Sequence[Term]:
        """Run the forward and return the terms."""
        ...

    def counts(self, batch: Any) -> Mapping[str, Tensor | int | float]:
        """Return the counts that `loss` will report for `batch`, without a forward.

        A term that several layers give is summed over them; its count is promised once.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured.

    Attributes:
        losses: Mean of each term over the global batch.
        counts: Global count of each term.
        grad_norm: Norm of the global gradient, before clipping.
        clip_coefficient: What the gradient was multiplied with; 1 where it was short enough.
    """

    losses: dict[str, float]
    counts: dict[str, float]
    grad_norm: float
    clip_coefficient: float = 1.0


class NonFiniteError(RuntimeError):
    """A loss or the gradient is not finite; no parameter was changed."""


Counts = Mapping[str, Tensor | int | float]


def divisors(model: Trainable, batches: Sequence[Any], mesh: Mesh) -> dict[str, float]:
    """Sum each term's count over micro-batches and over all ranks that see different tokens.

    Raises:
        ValueError: If a term counts nothing in the whole global batch.
    """
    return _divisors([model.counts(batch) for batch in batches], mesh)


def _divisors(promised: Sequence[Counts], mesh: Mesh) -> dict[str, float]:
    totals: dict[str, float] = {}
    for counts in promised:
        for name, count in counts.items():
            totals[name] = totals.get(name, 0.0) + float(count)
    own = len(promised)
    values = torch.tensor(
        [*totals.values(), own, own**2], dtype=torch.float64, device=device_of(mesh.tokens)
    )
    *sums, all_, squares = all_reduce_(values, mesh.tokens).tolist()
    if not all_ or all_**2 != squares * place(mesh.tokens)[1]:
        raise ValueError(
            f"every rank must bring as many micro-batches as the others, at least one; this one "
            f"brings {own}, all of them {all_:.0f}"
        )
    result = dict(zip(totals, sums, strict=True))
    empty = [name for name, total in result.items() if total == 0]
    if empty:
        raise ValueError(
            f"a global batch must hold at least one position that trains; {', '.join(empty)} "
            f"counted 0 over {len(promised)} micro-batches on every rank"
        )
    return result


@dataclass(frozen=True)
class _Tally:
    """What the terms of a step add up to on this rank.

    Attributes:
        by: The divisor of each term.
        promised: What `counts` gave for each micro-batch.
        sums: Sum of each term so far.
        found: Name, micro-batch and count of each term that was given.
    """

    by: Mapping[str, float]
    promised: Sequence[Counts]
    sums: dict[str, Tensor] = field(default_factory=dict)
    found: list[tuple[str, int, Tensor | int | float]] = field(default_factory=list)

    def objective(self, at: int, terms: Sequence[Term]) -> Tensor | None:
        """Take in the terms of micro-batch `at` and return what is differentiated."""
        total: Tensor | None = None
        for term in terms:
            if term.name not in self.by:
                raise RuntimeError(
                    f"counts() must promise every term that loss() reports: {term.name} is not "
                    f"among {', '.join(self.by)}"
                )
            part = term.weight * term.sum / self.by[term.name]
            total = part if total is None else total + part
            value = term.sum.detach().double()
            held = self.sums.get(term.name)
            self.sums[term.name] = value if held is None else held + value
            self.found.append((term.name, at, term.count))
        return total

    def check(self) -> None:
        """Compare the counts that were reported with those that were promised."""
        for name, at, count in self.found:
            if (wanted := float(self.promised[at].get(name, 0.0))) != float(count):
                raise RuntimeError(
                    f"counts() must equal what loss() reports: micro-batch {at} promised "
                    f"{name} {wanted:g}, its loss has {float(count):g}"
                )


class Step:
    """Trains `model` by one global batch a call.

    Args:
        model: Any module with `loss` and `counts`, or with a schedule `stage` and `counts`.
        layouts: Layout of each parameter, by path.
        optimizer: Steps over the shards.
        mesh: The groups.
        clip: Largest norm of the global gradient; `None` leaves it as it is.
        zero: ZeRO stage: what the ranks that hold the same parameters share out; 0 nothing, 1 the
            optimizer's states, 2 gradients too, 3 parameters too.
        schedule: Pipeline schedule; `None` runs `model.loss` on each micro-batch.
        bucket_elements: Most gradient elements that travel together.

    Raises:
        ValueError: If `zero` is no stage, or the mesh has pipeline stages and there is no schedule.
    """

    def __init__(
        self, model: nn.Module, layouts: Mapping[str, Layout], optimizer: ShardedOptimizer,
        mesh: Mesh, *, clip: float | None = 1.0, zero: int = 1, schedule: Schedule | None = None,
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:  # fmt: skip
        if zero not in (0, 1, 2, 3) or not isinstance(zero, int) or isinstance(zero, bool):
            raise ValueError(f"zero must be a ZeRO stage, 0, 1, 2 or 3; got {zero!r}")
        if schedule is None and mesh.pp is not None:
            raise ValueError(
                f"a mesh with pipeline stages (pp{mesh.degree('pp')}) needs a schedule: pass "
                f"schedule=, or leave pp out of the mesh"
            )
        self.model: Any = model
        self.optimizer = optimizer
        self.mesh = mesh
        self.clip = clip
        self.schedule = schedule
        optimizer.place(zero)
        self.units: Units | None = None
        unit = dict.fromkeys(layouts, 0)
        if zero == 3:
            rows = {path: shard.rows for path, shard in optimizer.shards.items()}
            unit, self.units = unit_of(model), Units(model, rows, optimizer.replicas)
        self.gradients = Gradients(
            dict(model.named_parameters()), layouts, mesh, zero=zero, kind=unit.__getitem__,
            elements=bucket_elements,
        )  # fmt: skip
        shards = {path: shard.layout for path, shard in optimizer.shards.items()}
        self.owned = owned(shards, mesh)

    def close(self) -> None:
        """Take the hooks off the model; under ZeRO-3 every rank has all its parameters again."""
        self.gradients.close()
        if self.units is not None:
            self.units.close()

    @contextmanager
    def opened(self, *, whole: bool = False) -> Iterator[None]:
        """Let the model be called outside a step; a collective call, and nothing below ZeRO-3.

        Under ZeRO-3 the parameters that are in no unit are gathered while the context is open.

        Args:
            whole: Whether those of the units are gathered too: to export or compare parameters.
        """
        if self.units is None:
            yield
            return
        with self.units.open(whole=whole):
            yield

    def __call__(self, batches: Sequence[Any], *, learning_rate: float) -> StepResult:
        """Train on this rank's micro-batches of one global batch.

        Args:
            batches: Micro-batches; every rank of `mesh.tokens` brings its own, all the same number.
            learning_rate: This step's rate.

        Raises:
            NonFiniteError: On every rank, if a loss or the gradient is not finite.
            ValueError: If nothing trains in the global batch.
            RuntimeError: If the model's counts differ from what its loss reports.
        """
        promised = [self.model.counts(batch) for batch in batches]
        by = _divisors(promised, self.mesh)
        self.gradients.zero()
        sums = self._accumulate(batches, _Tally(by, promised))
        shards = self.gradients.reduce()
        losses = self._mean(sums, by)
        norm = self._norm(shards, losses)
        if not (math.isfinite(norm) and all(map(math.isfinite, losses.values()))):
            shown = ", ".join(f"{name} {value}" for name, value in losses.items())
            raise NonFiniteError(f"the step is not finite: loss {shown}, gradient norm {norm}")
        coefficient = 1.0
        if self.clip is not None and norm > self.clip:
            coefficient = self.clip / (norm + 1e-6)
            torch._foreach_mul_(list(shards.values()), coefficient)
        self.optimizer.step(shards, learning_rate)
        if (after := getattr(self.model, "after_step", None)) is not None:
            after(self.mesh)
        return StepResult(losses, by, norm, coefficient)

    def accumulate(self, batches: Sequence[Any], by: Mapping[str, float]) -> dict[str, Tensor]:
        """Run forward and backward of each micro-batch and return the sum of each term."""
        return self._accumulate(batches, _Tally(by, [self.model.counts(b) for b in batches]))

    def _accumulate(self, batches: Sequence[Any], tally: _Tally) -> dict[str, Tensor]:
        with self.opened():
            if self.schedule is not None:
                self._pipeline(self.schedule, batches, tally)
            else:
                for at, batch in enumerate(batches):
                    objective = tally.objective(at, self.model.loss(batch))
                    assert objective is not None
                    with self.gradients.backward(last=at == len(batches) - 1):
                        objective.backward()
                    if self.units is not None:
                        self.units.settle()
        tally.check()
        return tally.sums

    def _pipeline(self, schedule: Schedule, batches: Sequence[Any], tally: _Tally) -> None:
        """Run the stages of this rank by the schedule; a batch travels with its number."""

        def bind(number: int) -> Callable[[Tensor | None, Any], tuple[Tensor | None, Any]]:
            def stage(x: Tensor | None, batch: Any) -> tuple[Tensor | None, Tensor | None]:
                at, inner = batch
                y, terms = self.model.stage(number, x, inner)
                return y, tally.objective(at, terms)

            return stage

        def boundary(number: int, batch: Any) -> tuple[tuple[int, ...], torch.dtype]:
            known: tuple[tuple[int, ...], torch.dtype] = self.model.boundary(number, batch[1])
            return known

        own = self.mesh.coordinate("pp")
        stages = {n: bind(n) for n, rank in enumerate(schedule.placement) if rank == own}
        with self.gradients.backward(last=True, ordered=False):
            execute(
                schedule, stages, list(enumerate(batches)), group=self.mesh.pp,
                boundary=boundary if hasattr(self.model, "boundary") else None,
            )  # fmt: skip

    def _mean(self, sums: Mapping[str, Tensor], by: Mapping[str, float]) -> dict[str, float]:
        """Return the losses, on every rank the same, wherever their terms arose."""
        packed = torch.zeros(2, len(by), dtype=torch.float64, device=device_of(self.mesh.world))
        for at, name in enumerate(by):
            if name in sums:
                packed[0, at], packed[1, at] = sums[name], 1.0
        all_reduce_(all_reduce_(packed, self.mesh.tokens), self.mesh.pp)
        totals, given = packed.tolist()
        if missing := [name for name, times in zip(by, given, strict=True) if not times]:
            raise RuntimeError(
                f"loss() must report every term that counts() promises; {', '.join(missing)} came "
                f"from no rank"
            )
        return {name: total / by[name] for name, total in zip(by, totals, strict=True)}

    def _norm(self, shards: Mapping[str, Tensor], losses: Mapping[str, float]) -> float:
        """Return the norm of the global gradient; NaN on every rank if any loss is not finite."""
        parts = [
            part
            for path, gradient in shards.items()
            for part in _counted(gradient, self.optimizer.shards[path].layout, self.owned[path])
        ]
        device = next(iter(shards.values())).device
        total = squared_norm(parts).to(device)
        if not all(map(math.isfinite, losses.values())):
            total = total * math.nan
        return math.sqrt(float(all_reduce_(total, self.mesh.world)))


def _counted(gradient: Tensor, layout: Layout, own: tuple[Piece, ...]) -> list[Tensor]:
    """Return the parts of a shard's gradient that this rank counts; padding is zero anyway."""
    if own == layout.pieces:
        return [gradient] if gradient.numel() else []
    return [piece.of_local(gradient) for piece in own]
