"""Runs a schedule on the ranks of a group.

    for each action of this rank's row:
        begin the messages that the plan has before it (`messages.py`)
        F    wait for x; y, objective = stage(x, batch); y leaves for the next stage
        I    wait for dy; gradients of x and of what no queue holds; dx leaves for the stage before
        W    run the queue of weight gradients
        B    I with the weight gradients in it

A micro-batch whose I and W are apart runs its forward with a queue open
(`parallel/tensor/product.py`), all others with none. Neighbouring stages of one rank hand their
tensors over. What the backward does not need is let go: of an output only its place in the graph is
kept.

Backward runs in the calling thread also on CUDA, so that the queue and the observers of collectives
are those of the caller.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..collectives import Group, Pending, all_reduce_, device_of, exchange_begin, place
from ..tensor.product import WeightGradients
from .messages import Message
from .schedule import Schedule
from .tables import Action

Stage = Callable[[Tensor | None, Any], tuple[Tensor | None, Tensor | None]]
Boundary = Callable[[int, Any], tuple[Sequence[int], torch.dtype]]
Key = tuple[int, int]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DIMENSIONS = 8
_SENDS = 8  # that may be under way: bounds the outputs that wait for their receiver


@dataclass(slots=True)
class _Graph:
    """What the backward of one stage and one micro-batch starts from and gives."""

    x: Tensor | None
    edge: GradientEdge | None
    shape: torch.Size
    dtype: torch.dtype
    objective: GradientEdge | None
    queue: WeightGradients | None


def execute(
    schedule: Schedule, stages: Mapping[int, Stage], batches: Sequence[Any], *, group: Group,
    boundary: Boundary | None = None,
) -> dict[Key, Tensor]:  # fmt: skip
    """Run every micro-batch through every stage, forward and, if the schedule trains, backward.

    Gradients of the objectives' sum accumulate in the parameters. A schedule without a backward
    runs under `no_grad`.

    Args:
        schedule: Of as many ranks as the group has; the same on each.
        stages: This rank's stages by global number. A stage maps `(x, batch)` to `(y, objective)`:
            x is None at the first stage, y at the last; the objective is 0-dim, or None where there
            is none, and may stand at any stage.
        batches: One a micro-batch, handed to the stages.
        group: The pipeline-parallel process group; `None` for one rank.
        boundary: Gives shape and dtype of the output of a stage for a batch, so that it can be
            received early; without it a header travels before each output.

    Returns:
        The objectives of this rank's stages, without a graph, by (stage, micro-batch).

    Raises:
        ValueError: If group, stages and batches are not those of the schedule, the schedule is not
            sound, a schedule that trains runs under `no_grad`, or a stage's outputs are not as
            above; all but the last before anything is sent.
        RuntimeError: If the ranks run different schedules.
    """
    rank, size = place(group)
    if size != schedule.ranks:
        raise ValueError(f"the schedule is for {schedule.ranks} ranks; the group has {size}")
    held = [stage for stage, at in enumerate(schedule.placement) if at == rank]
    if sorted(stages) != held:
        raise ValueError(f"rank {rank} must hold the stages {held}; it has {sorted(stages)}")
    if len(batches) != schedule.microbatches:
        raise ValueError(
            f"the schedule is for {schedule.microbatches} micro-batches; got {len(batches)}"
        )
    if schedule.trains and not torch.is_grad_enabled():
        raise ValueError(
            f"{schedule.name} trains, which no_grad forbids: use Schedule.forward_only to evaluate"
        )
    begun = (schedule.late_messages if boundary is None else schedule.messages)[rank]
    _agree(schedule, boundary is None, group)
    with torch.set_grad_enabled(schedule.trains), torch.autograd.set_multithreading_enabled(False):
        return _Run(schedule, stages, batches, group, boundary, rank).run(begun)


def _agree(schedule: Schedule, headers: bool, group: Group) -> None:
    """Compare the schedule over the ranks; also the first call that all of them make together."""
    if group is None:
        return
    own = 2 * schedule.fingerprint + headers
    most, least = all_reduce_(
        torch.tensor([own, -own], device=device_of(group)), group, op="max"
    ).tolist()
    if most != -least:
        raise RuntimeError(
            f"every rank must run the same schedule, all with a boundary or all without; rank "
            f"{group.rank()} of the pipeline has {schedule.name} of {schedule.microbatches} "
            f"micro-batches {'without' if headers else 'with'} a boundary, another does not"
        )


class _Run:
    """One call of `execute` on one rank."""

    def __init__(
        self, schedule: Schedule, stages: Mapping[int, Stage], batches: Sequence[Any], group: Group,
        boundary: Boundary | None, rank: int,
    ) -> None:  # fmt: skip
        self.schedule, self.stages, self.batches = schedule, stages, batches
        self.group, self.boundary, self.rank = group, boundary, rank
        self.device = device_of(group)
        self.split = {(a.stage, a.microbatch) for a in schedule.rows[rank] if a.kind == "I"}
        # Outputs (True) and gradients of outputs (False), by the stage that takes them.
        self.coming: dict[tuple[bool, int, int], Pending] = {}
        self.here: dict[tuple[bool, int, int], Tensor] = {}
        self.sent: deque[Pending] = deque()
        self.graphs: dict[Key, _Graph] = {}
        self.queues: dict[Key, WeightGradients] = {}
        self.objectives: dict[Key, Tensor] = {}

    def run(self, begun: Sequence[Sequence[Message]]) -> dict[Key, Tensor]:
        """Run this rank's row, beginning messages as planned."""
        for messages, action in zip(begun, self.schedule.rows[self.rank], strict=False):
            for message in messages:
                self._begin(message)
            if action.kind == "F":
                self._forward(action.stage, action.microbatch)
            elif action.kind == "W":
                self.queues.pop((action.stage, action.microbatch)).run()
            else:
                self._backward(action)
        for message in begun[-1]:
            self._begin(message)
        for pending in self.sent:
            pending.wait()
        return self.objectives

    def _begin(self, message: Message) -> None:
        key = (message.forward, message.stage, message.microbatch)
        if message.source == self.rank:
            x = self.here.pop(key)
            if message.forward and self.boundary is None:
                self._send(_header(x, self.device), message.target)
            self._send(x, message.target)
            return
        shape, dtype = self._coming_shape(message)
        x = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        self.coming[key] = exchange_begin([], [(x, message.source)], self.group)

    def _coming_shape(self, message: Message) -> tuple[Sequence[int], torch.dtype]:
        if not message.forward:
            graph = self.graphs[message.stage, message.microbatch]
            return graph.shape, graph.dtype
        if self.boundary is not None:
            return self.boundary(message.stage - 1, self.batches[message.microbatch])
        header = torch.empty(_DIMENSIONS + 2, dtype=torch.int64, device=self.device)
        exchange_begin([], [(header, message.source)], self.group).wait()
        code, dimensions, *sizes = header.tolist()
        return sizes[:dimensions], _DTYPES[code]

    def _send(self, x: Tensor, target: int) -> None:
        self.sent.append(exchange_begin([(x, target)], [], self.group))
        if len(self.sent) > _SENDS:
            self.sent.popleft().wait()

    def _take(self, forward: bool, stage: int, microbatch: int) -> Tensor:
        key = (forward, stage, microbatch)
        if key not in self.coming:
            return self.here.pop(key)
        (x,) = self.coming.pop(key).wait()
        taken: Tensor = x
        return taken

    def _forward(self, stage: int, microbatch: int) -> None:
        key, batch = (stage, microbatch), self.batches[microbatch]
        x = self._take(True, stage, microbatch) if stage else None
        if x is not None and self.schedule.trains:
            x.requires_grad_()
        queue = WeightGradients() if key in self.split else None
        with nullcontext() if queue is None else queue.open():
            y, objective = self.stages[stage](x, batch)
        self._check(stage, y, objective, batch)
        if y is not None:
            self.here[True, stage + 1, microbatch] = y.detach()
        if objective is not None:
            self.objectives[key] = objective.detach()
        if self.schedule.trains:
            shape, dtype = (torch.Size(), _DTYPES[0]) if y is None else (y.shape, y.dtype)
            self.graphs[key] = _Graph(x, _edge(y), shape, dtype, _edge(objective), queue)

    def _check(self, stage: int, y: Tensor | None, objective: Tensor | None, batch: Any) -> None:
        """Check what a stage returned."""
        if (y is None) != (stage == self.schedule.stages - 1):
            raise ValueError(
                f"every stage but the last must return an output, and the last none; stage {stage} "
                f"of {self.schedule.stages} returned {'none' if y is None else 'one'}"
            )
        if objective is not None and objective.dim():
            raise ValueError(
                f"an objective must be 0-dim; that of stage {stage} is {[*objective.shape]}"
            )
        if y is not None and (y.dtype not in _DTYPES or y.dim() > _DIMENSIONS):
            raise ValueError(
                f"the output of a stage must be floating-point of at most {_DIMENSIONS} "
                f"dimensions; that of stage {stage} is {y.dtype} {[*y.shape]}"
            )
        if y is not None and self.boundary is not None:
            shape, dtype = self.boundary(stage, batch)
            if (tuple(y.shape), y.dtype) != (tuple(shape), dtype):
                raise ValueError(
                    f"the output of stage {stage} must be as its boundary says, {[*shape]} "
                    f"{dtype}; it is {[*y.shape]} {y.dtype}"
                )

    def _backward(self, action: Action) -> None:
        kind, stage, microbatch = action
        graph = self.graphs.pop((stage, microbatch))
        roots: list[GradientEdge] = []
        gradients: list[Tensor] = []
        if stage < self.schedule.stages - 1:
            dy = self._take(False, stage, microbatch)
            if graph.edge is not None:
                roots.append(graph.edge)
                gradients.append(dy)
        if graph.objective is not None:
            roots.append(graph.objective)
            gradients.append(torch.ones_like(self.objectives[stage, microbatch]))
        if roots:
            with nullcontext() if graph.queue is None else graph.queue.open():
                torch.autograd.backward(roots, gradients)
        if graph.x is not None:
            dx = graph.x.grad
            self.here[False, stage - 1, microbatch] = (
                torch.zeros_like(graph.x) if dx is None else dx
            )
        if kind == "I":
            assert graph.queue is not None
            self.queues[stage, microbatch] = graph.queue


def _edge(x: Tensor | None) -> GradientEdge | None:
    return get_gradient_edge(x) if x is not None and x.requires_grad else None


def _header(x: Tensor, device: torch.device) -> Tensor:
    """Say dtype, dimensions and sizes of `x` in a tensor of a size that all know."""
    sizes = (*x.shape, *(0 for _ in range(_DIMENSIONS - x.dim())))
    return torch.tensor([_DTYPES.index(x.dtype), x.dim(), *sizes], device=device)
