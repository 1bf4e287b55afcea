"""One optimizer step, and the one place that divides.

A loss returns named terms, each a sum over what this rank saw and the count it is over. The step
sums the counts over micro-batches and over all ranks that see different tokens *before* the first
forward, and differentiates

    sum over terms of  weight * sum / global count

for each micro-batch. Gradients are then only ever summed: over micro-batches, over groups on which
a parameter is partial, over `mesh.shard` and `mesh.rep`. So the gradient of a global batch does not
depend on how it is split, and no rank, schedule or reduction holds a divisor of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .collectives import all_reduce_, device_of
from .data import Gradients
from .mesh import Mesh
from .optimizer import ShardedOptimizer
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
    """What a step needs of a model."""

    def loss(self, batch: Any) -> Sequence[Term]:
        """Run the forward and return the terms."""
        ...

    def counts(self, batch: Any) -> Mapping[str, Tensor | int | float]:
        """Return the counts that `loss` will report for `batch`, without a forward."""
        ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured.

    Attributes:
        losses: Mean of each term over the global batch.
        counts: Global count of each term.
        grad_norm: Norm of the global gradient, before clipping.
    """

    losses: dict[str, float]
    counts: dict[str, float]
    grad_norm: float


class NonFiniteError(RuntimeError):
    """A loss or the gradient is not finite; no parameter was changed."""


def divisors(model: Trainable, batches: Sequence[Any], mesh: Mesh) -> dict[str, float]:
    """Sum each term's count over micro-batches and over all ranks that see different tokens.

    Raises:
        ValueError: If a term counts nothing in the whole global batch.
    """
    totals: dict[str, float] = {}
    for batch in batches:
        for name, count in model.counts(batch).items():
            totals[name] = totals.get(name, 0.0) + float(count)
    values = torch.tensor(list(totals.values()), dtype=torch.float64, device=device_of(mesh.tokens))
    all_reduce_(values, mesh.tokens)
    result = dict(zip(totals, values.tolist(), strict=True))
    empty = [name for name, total in result.items() if total == 0]
    if empty:
        raise ValueError(
            f"a global batch must hold at least one position that trains; {', '.join(empty)} "
            f"counted 0 over {len(batches)} micro-batches on every rank"
        )
    return result


class Step:
    """Trains `model` by one global batch a call.

    Args:
        model: Any module with `loss` and `counts`.
        layouts: Layout of each parameter, by path.
        optimizer: Steps over the shards.
        mesh: The groups.
        clip: Largest norm of the global gradient; `None` leaves it as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        layouts: Mapping[str, Layout],
        optimizer: ShardedOptimizer,
        mesh: Mesh,
        *,
        clip: float | None = 1.0,
    ) -> None:
        self.model: Any = model
        self.optimizer = optimizer
        self.mesh = mesh
        self.clip = clip
        self.gradients = Gradients(dict(model.named_parameters()), layouts, mesh)
        shards = {path: shard.layout for path, shard in optimizer.shards.items()}
        self.owned = owned(shards, mesh)

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
        by = divisors(self.model, batches, self.mesh)
        self.gradients.zero()
        sums = self.accumulate(batches, by)
        shards = self.gradients.reduce()
        losses = self._mean(sums, by)
        norm = self._norm(shards, losses)
        if not (math.isfinite(norm) and all(map(math.isfinite, losses.values()))):
            shown = ", ".join(f"{name} {value}" for name, value in losses.items())
            raise NonFiniteError(f"the step is not finite: loss {shown}, gradient norm {norm}")
        if self.clip is not None and norm > self.clip:
            torch._foreach_mul_(list(shards.values()), self.clip / (norm + 1e-6))
        self.optimizer.step(shards, learning_rate)
        return StepResult(losses, by, norm)

    def accumulate(self, batches: Sequence[Any], by: Mapping[str, float]) -> dict[str, Tensor]:
        """Run forward and backward of each micro-batch and return the sum of each term."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, float] = {}
        for batch in batches:
            terms = self.model.loss(batch)
            objective = sum(term.weight * term.sum / by[term.name] for term in terms)
            assert isinstance(objective, Tensor)
            objective.backward()
            for term in terms:
                value = term.sum.detach().double()
                sums[term.name] = sums[term.name] + value if term.name in sums else value
                counts[term.name] = counts.get(term.name, 0.0) + float(term.count)
        promised = {name: 0.0 for name in counts}
        for batch in batches:
            for name, count in self.model.counts(batch).items():
                promised[name] = promised.get(name, 0.0) + float(count)
        if promised != counts:
            raise RuntimeError(f"counts() must equal what loss() reports: {promised}, {counts}")
        return sums

    def _mean(self, sums: Mapping[str, Tensor], by: Mapping[str, float]) -> dict[str, float]:
        packed = all_reduce_(torch.stack(list(sums.values())), self.mesh.tokens)
        return {name: total / by[name] for name, total in zip(sums, packed.tolist(), strict=True)}

    def _norm(self, shards: Mapping[str, Tensor], losses: Mapping[str, float]) -> float:
        """Return the norm of the global gradient; NaN on every rank if any loss is not finite."""
        parts = [
            part
            for path, gradient in shards.items()
            for part in _counted(gradient, self.optimizer.shards[path].layout, self.owned[path])
        ]
        device = next(iter(shards.values())).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        if parts:
            total = torch.stack(torch._foreach_norm(parts)).double().square().sum()
        if not all(map(math.isfinite, losses.values())):
            total = total * math.nan
        return math.sqrt(float(all_reduce_(total, self.mesh.world)))


def _counted(gradient: Tensor, layout: Layout, own: tuple[Piece, ...]) -> list[Tensor]:
    """Return the parts of a shard's gradient that this rank counts; padding is zero anyway."""
    if own == layout.pieces:
        return [gradient] if gradient.numel() else []
    return [piece.of_local(gradient) for piece in own]
