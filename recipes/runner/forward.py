"""Forward passes without a step, on any mesh: to evaluate, and to look at the logits.

Without pipeline stages a model is called; with them its stages run forward by a schedule, and only
the ranks that hold the last one have the result.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from warploom.models.batch import Batch
from warploom.models.decoder import Decoder
from warploom.parallel.collectives import broadcast_
from warploom.parallel.mesh import Mesh
from warploom.parallel.pipeline import Schedule, execute
from warploom.parallel.step import Term


@torch.no_grad()
def language_model_terms(model: Any, batches: Sequence[Batch], mesh: Mesh) -> list[Term]:
    """Return the term `language_model` of each batch; nothing on ranks without the last stage.

    A collective call: every rank of a pipeline brings the same batches.
    """
    found: list[Term] = []

    def keep(terms: Sequence[Term]) -> None:
        found.extend(term for term in terms if term.name == "language_model")

    if mesh.pp is None:
        for batch in batches:
            keep(model.loss(batch))
        return found

    def bind(number: int) -> Callable[[Tensor | None, Batch], tuple[Tensor | None, None]]:
        def stage(x: Tensor | None, batch: Batch) -> tuple[Tensor | None, None]:
            y, terms = model.stage(number, x, batch)
            keep(terms)
            return y, None

        return stage

    _forward(model, bind, batches, mesh, model.boundary)
    return found


@torch.no_grad()
def logits(model: Decoder, tokens: Tensor, mesh: Mesh) -> Tensor:
    """Return the logits `[B, S, V]` on every rank of the model; a collective call.

    Args:
        model: The model.
        tokens: Ids `[B, S]`, the same on every rank that holds a part of the model.
        mesh: The ranks.
    """
    if mesh.pp is None:
        whole: Tensor = model(tokens)
        return whole
    last = model.stages.last
    dtype = next(model.parameters()).dtype
    shape = (*tokens.shape, model.architecture.vocabulary)
    result = torch.empty(shape, dtype=dtype, device=tokens.device)

    def bind(number: int) -> Callable[[Tensor | None, Tensor], tuple[Tensor | None, None]]:
        def stage(x: Tensor | None, tokens: Tensor) -> tuple[Tensor | None, None]:
            y = model.infer(number, x, tokens)
            if number < last:
                return y, None
            result.copy_(y)
            return None, None

        return stage

    _forward(model, bind, [tokens], mesh, None)
    return broadcast_(result, mesh.pp, source=model.stages.placement[-1])


def _forward(
    model: Any, bind: Callable[[int], Any], batches: Sequence[Any], mesh: Mesh, boundary: Any
) -> None:
    """Run the stages of this rank forward over all batches."""
    table = Schedule.forward_only(model.stages.placement, len(batches))
    stages = {number: bind(number) for number in model.held}
    execute(table, stages, batches, group=mesh.pp, boundary=boundary)
