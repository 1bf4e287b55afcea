"""Parity: what a mesh computes against what one process does.

Knows no model: a *subject* is a callable that builds a model and its optimizer on a mesh and gives
the micro-batches of a step. `record` runs it and keeps, by logical name and in full, what must not
depend on the mesh: losses, every gradient, its norm, the clip coefficient and the parameters
after the steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .mesh import Mesh
from .optimizer import ShardedOptimizer
from .pipeline import Schedule
from .sharding import Layout, assemble
from .step import Step


@dataclass(frozen=True)
class Subject:
    """What is proven.

    Attributes:
        model: A module with `loss` and `counts`.
        layouts: Its layouts, by parameter path.
        optimizer: Its optimizer.
        batches: This rank's micro-batches of step n.
        clip: Largest gradient norm.
        zero: ZeRO stage.
        schedule: Pipeline schedule, where the mesh has stages.
    """

    model: nn.Module
    layouts: Mapping[str, Layout]
    optimizer: ShardedOptimizer
    batches: Callable[[int], Sequence[Any]]
    clip: float | None = 1.0
    zero: int = 1
    schedule: Schedule | None = None


@dataclass(frozen=True)
class Trace:
    """What must not depend on the mesh.

    Attributes:
        losses: Of each step, by term.
        grad_norms: Of each step.
        clips: Clip coefficient of each step.
        gradients: Of the first step, before clipping, by logical name.
        parameters: After the steps, by logical name.
    """

    losses: list[dict[str, float]]
    grad_norms: list[float]
    clips: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def record(subject: Subject, mesh: Mesh, *, steps: int = 3, learning_rate: float = 1e-2) -> Trace:
    """Train `steps` steps on `mesh` and gather what happened; a collective call."""
    step = Step(
        subject.model, subject.layouts, subject.optimizer, mesh, clip=subject.clip,
        zero=subject.zero, schedule=subject.schedule,
    )  # fmt: skip
    seen: dict[str, Tensor] = {}
    inner = subject.optimizer.step

    def watch(gradients: Mapping[str, Tensor], learning_rate: float) -> None:
        if not seen:
            seen.update({path: gradient.clone() for path, gradient in gradients.items()})
        inner(gradients, learning_rate)

    subject.optimizer.step = watch  # type: ignore[method-assign]
    results = [step(subject.batches(n), learning_rate=learning_rate) for n in range(steps)]
    step.close()
    seen = {path: gradient / results[0].clip_coefficient for path, gradient in seen.items()}
    shards = {path: shard.layout for path, shard in subject.optimizer.shards.items()}
    parameters = dict(subject.model.named_parameters())
    return Trace(
        losses=[result.losses for result in results],
        grad_norms=[result.grad_norm for result in results],
        clips=[result.clip_coefficient for result in results],
        gradients=assemble(seen, shards, mesh.world),
        parameters=assemble(parameters, subject.layouts, mesh.world),
    )


def differences(got: Trace, want: Trace) -> dict[str, float]:
    """Return the largest absolute difference of everything in two traces, by what it is of.

    Raises:
        ValueError: If the traces are of different tensors or terms.
    """
    result: dict[str, float] = {}
    for n, (a, b) in enumerate(zip(got.losses, want.losses, strict=True)):
        if a.keys() != b.keys():
            raise ValueError(f"terms differ: {sorted(a)} and {sorted(b)}")
        result |= {f"loss {name}, step {n}": abs(a[name] - b[name]) for name in a}
    for n, (x, y) in enumerate(zip(got.grad_norms, want.grad_norms, strict=True)):
        result[f"gradient norm, step {n}"] = abs(x - y)
    for n, (x, y) in enumerate(zip(got.clips, want.clips, strict=True)):
        result[f"clip coefficient, step {n}"] = abs(x - y)
    for kind, left, right in (
        ("gradient", got.gradients, want.gradients),
        ("parameter", got.parameters, want.parameters),
    ):
        if left.keys() != right.keys():
            raise ValueError(f"{kind}s differ: only in one are {left.keys() ^ right.keys()}")
        result |= {f"{kind} {name}": float((left[name] - right[name]).abs().max()) for name in left}
    return result


def failures(found: Mapping[str, float], *, tolerance: float = 1e-10) -> dict[str, float]:
    """Return the differences above `tolerance`, the largest first; NaN counts as above."""
    bad = {name: value for name, value in found.items() if not value <= tolerance}
    return dict(sorted(bad.items(), key=lambda item: -item[1]))
