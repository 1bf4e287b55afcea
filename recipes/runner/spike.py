"""Find what made a loss or a gradient NaN or infinite: rank, pass, micro-batch and module.

A step that is not finite changes no parameter, so its micro-batches can be run again. The output of
every module is looked at in the forward pass and the gradient of every output in the backward pass;
no rank stops early, because the others wait for it in their collectives. The earliest finding of
all ranks is the one that is told.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from warploom.parallel.collectives import gather_json
from warploom.parallel.step import Step, divisors


class SpikeError(RuntimeError):
    """Training stopped because a loss or a gradient is not finite; says where it began."""


@dataclass
class _Watch:
    """Remembers the first value that is not finite."""

    stage: int = 0
    batch: int = 0
    looks: int = 0
    found: dict[str, Any] | None = None
    handles: list[RemovableHandle] = field(default_factory=list)

    def see(self, value: Any, what: str, phase: str, batch: int) -> None:
        self.looks += 1  # the ranks of a stage run the same program: what they see has one order
        if self.found is not None:
            return
        for tensor in _tensors(value):
            if not bool(torch.isfinite(tensor).all()):
                kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
                at = {"phase": phase, "batch": batch, "look": self.looks, "stage": self.stage}
                self.found = {**at, "what": what, "kind": kind}
                return

    def attach(self, name: str, module: nn.Module) -> None:
        what = f"the output of {name}"

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            batch = self.batch
            self.see(output, what, "forward", batch)
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self.look_back, f"the gradient of {what}", batch))

        self.handles.append(module.register_forward_hook(after))

    def look_back(self, what: str, batch: int, gradient: Tensor) -> None:
        self.see(gradient, what, "backward", batch)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors(inner)


def locate(step: Step, batches: Sequence[Any]) -> str:
    """Run the micro-batches of a step again and say where the first bad value arose.

    Args:
        step: What trains the model; no parameter changes.
        batches: This rank's micro-batches of the step; a collective call.

    Returns:
        Part of a sentence, the same on every rank.
    """
    model, mesh = step.model, step.mesh
    watch = _Watch(stage=mesh.coordinate("pp"))
    numbers = {id(batch): number for number, batch in enumerate(batches)}
    run = model.stage

    def stage(number: int, x: Tensor | None, batch: Any) -> Any:
        watch.batch = numbers[id(batch)]
        y, terms = run(number, x, batch)
        for term in terms:
            watch.see(term.sum, f"the loss term {term.name}", "forward", watch.batch)
        return y, terms

    step.gradients.zero()
    for name, module in model.named_modules():
        if name:
            watch.attach(name, module)
    model.stage = stage
    try:
        step.accumulate(batches, divisors(model, batches, mesh))
    finally:
        del model.stage
        for handle in watch.handles:
            handle.remove()
    if watch.found is None:
        for name, parameter in model.named_parameters():
            watch.see(parameter.grad, f"the gradient of {name}", "backward", len(batches) - 1)
    step.gradients.zero()
    found = gather_json(watch.found, mesh.world)
    return _tell([(rank, one) for rank, one in enumerate(found) if one is not None])


def _order(found: tuple[int, dict[str, Any]]) -> tuple[int, ...]:
    """Sort by what came first: forwards go up the stages, backwards down."""
    rank, one = found
    backward = one["phase"] == "backward"
    stage = -one["stage"] if backward else one["stage"]
    return backward, one["batch"], stage, one["look"], rank


def _tell(found: list[tuple[int, dict[str, Any]]]) -> str:
    if not found:
        return (
            "each rank's own values are finite when the step is run again: their sum over "
            "micro-batches and ranks overflows"
        )
    rank, one = min(found, key=_order)
    others = [str(r) for r, _ in found if r != rank]
    also = f" (and on rank {', '.join(others)})" if others else ""
    return (
        f"{one['what']} was the first to hold {one['kind']}, in the {one['phase']} pass of "
        f"micro-batch {one['batch']} on rank {rank}{also}"
    )


def sentence(step: int, found: str, where: str, last_good: Path | None) -> str:
    """Say it all in one sentence.

    Args:
        step: Step that was being done, counted from 1.
        found: The values that are not finite, as `NonFiniteError` has them.
        where: From `locate`.
        last_good: The newest checkpoint, if there is one.
    """
    good = (
        f"the last good checkpoint is {last_good}"
        if last_good
        else "there is no checkpoint before it"
    )
    return (
        f"step {step} must have a finite loss and gradient, but {found}: {where}; no parameter was "
        f"changed and {good}: lower the learning rate, or look at that batch"
    )
