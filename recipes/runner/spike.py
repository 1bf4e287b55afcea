"""Find what made a loss or a gradient NaN or infinite: rank, pass, micro-batch and module.

A step that is not finite changes no parameter, so its micro-batches can be run again. The output of
every module is looked at in the forward pass and the gradient of every output in the backward pass;
no rank stops early, because the others wait for it in their collectives. The earliest finding of
all ranks is the one that is told.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from warploom.parallel.collectives import gather_json
from warploom.parallel.mesh import Mesh


class SpikeError(RuntimeError):
    """Training stopped because a loss or a gradient is not finite; says where it began."""


@dataclass
class _Watch:
    """Remembers the first value that is not finite."""

    batch: int = 0
    looks: int = 0
    found: dict[str, Any] | None = None
    handles: list[RemovableHandle] = field(default_factory=list)

    def see(self, value: Any, what: str, phase: str) -> None:
        self.looks += 1  # the ranks run the same program: what they see has the same order
        if self.found is not None:
            return
        for tensor in _tensors(value):
            if not bool(torch.isfinite(tensor).all()):
                kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
                at = {"phase": phase, "batch": self.batch, "look": self.looks}
                self.found = {**at, "what": what, "kind": kind}
                return

    def attach(self, name: str, module: nn.Module) -> None:
        def gradient(value: Tensor) -> None:
            self.see(value, f"the gradient of the output of {name}", "backward")

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.see(output, f"the output of {name}", "forward")
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(gradient)

        self.handles.append(module.register_forward_hook(after))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors(inner)


def locate(model: Any, batches: Sequence[Any], by: Mapping[str, float], mesh: Mesh) -> str:
    """Run the micro-batches of a step again and say where the first bad value arose.

    Args:
        model: A module with `loss`.
        batches: This rank's micro-batches of the step; a collective call.
        by: Global count of each term.
        mesh: The ranks.

    Returns:
        Part of a sentence, the same on every rank.
    """
    watch = _Watch()
    for parameter in model.parameters():
        parameter.grad = None
    for name, module in model.named_modules():
        if name:
            watch.attach(name, module)
    try:
        for watch.batch, batch in enumerate(batches):
            terms = model.loss(batch)
            for term in terms:
                watch.see(term.sum, f"the loss term {term.name}", "forward")
            sum(term.weight * term.sum / by[term.name] for term in terms).backward()
    finally:
        for handle in watch.handles:
            handle.remove()
    if watch.found is None:
        for name, parameter in model.named_parameters():
            watch.see(parameter.grad, f"the gradient of {name}", "backward")
    found = gather_json(watch.found, mesh.world)
    return _tell([(rank, one) for rank, one in enumerate(found) if one is not None])


def _tell(found: list[tuple[int, dict[str, Any]]]) -> str:
    if not found:
        return (
            "each rank's own values are finite when the step is run again: their sum over "
            "micro-batches and ranks overflows"
        )
    rank, one = min(found, key=lambda f: (f[1]["look"], f[0]))
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
