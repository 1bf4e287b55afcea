"""One proof: a model, a mesh and a way to train on it, against one process with the same batch.

Every rank calls `prove`; rank 0 gets what was found. The global batch has documents of odd lengths,
unequal numbers of trained tokens on each rank, and ranks and micro-batches that train nothing.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from warploom.models.batch import Batch
from warploom.models.decoder import Decoder
from warploom.models.mup import is_hidden, learning_rates
from warploom.parallel import optimizer as optimizers
from warploom.parallel.collectives import all_reduce_, gather_json, observed
from warploom.parallel.initialise import normal_
from warploom.parallel.memory import offloaded
from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import ShardedOptimizer
from warploom.parallel.parity import Subject, Trace, differences, record

from ..plan.ledger import Ledger
from ..runner.parallel import Parallel
from . import traffic
from .batches import global_batch
from .plan import Case
from .probe import Gate, counts, layers, peak

STEPS = 3
LEARNING_RATE = 1e-2
TOLERANCE = 1e-10
EPSILON = 1e-4  # of the optimizers: large enough that a wrong scale of a gradient is seen
OPTIMIZERS = ("adamw", "muon")
SPREAD = 10.0  # times the weights as they are drawn: far from linear


def build(case: Case, mesh: Mesh) -> tuple[Decoder, ShardedOptimizer]:
    """Build the model with its weights, and its optimizer, on one rank."""
    model = Decoder.create(
        case.architecture,
        mesh=mesh,
        seed=case.seed,
        recompute=case.recompute,
        z_loss=case.z_loss,
        context=case.parallel.context,
        balance=case.parallel.balance,
        stages=case.stages,
        dtype=torch.float64,
    )
    _spread(model, case.seed)
    parameters, made = dict(model.named_parameters()), model.layouts()
    if case.optimizer == "adamw":
        return model, optimizers.AdamW(
            parameters,
            made,
            mesh,
            eps=EPSILON,
            rate=learning_rates(case.architecture),
            offload=case.parallel.offload,
        )
    return model, optimizers.Muon(
        parameters, made, mesh, hidden=is_hidden, eps=EPSILON, offload=case.parallel.offload
    )


@torch.no_grad()
def _spread(model: Decoder, seed: int) -> None:
    """Draw the norms too, and widen the rest, so that no two weights do the same."""
    made = model.logical_layouts()
    for path, parameter in model.named_parameters():
        if parameter.dim() == 1:
            normal_(parameter, made[path], seed=seed, std=0.1)
            parameter.add_(1.0)
        else:
            parameter.mul_(SPREAD)


@dataclass(frozen=True, slots=True)
class Seen:
    """What one run on one rank shows.

    Attributes:
        trace: What must not depend on the mesh.
        subject: What was trained.
        gradients: The first gradients that reached the optimizer, by path: this rank's shards.
        flows: See `Outcome`; of this rank.
    """

    trace: Trace
    subject: Subject
    gradients: dict[str, Tensor]
    flows: dict[str, float]


def train(
    case: Case, mesh: Mesh, ranks: Sequence[int], batch_of: Case, gate: Gate | None = None
) -> Seen:
    """Train on what the data ranks `ranks` of the global batch of `batch_of` get.

    A collective call over the mesh.

    Args:
        case: How.
        mesh: Where.
        ranks: Data ranks of the global batch whose parts this rank trains on.
        batch_of: Whose global batch.
        gate: Is open during the first step, but for what comes after the optimizer.
    """
    model, optimizer = build(case, mesh)

    def batches(step: int) -> list[Batch]:
        if gate is not None:
            gate.open = step == 0
        whole = global_batch(batch_of, step)
        return [whole.part(r, m, case.packed) for r in ranks for m in range(case.microbatches)]

    made, table = model.layouts(), case.table
    one = Subject(model, made, optimizer, batches, case.clip, case.parallel.zero, table)
    gradients: dict[str, Tensor] = {}
    flows = {"embedding": 0.0}
    for n in range(case.architecture.layers + case.architecture.predict):
        flows |= {f"blocks.{n}.attention": 0.0, f"blocks.{n}.feed_forward": 0.0}
    _watch(model, gradients, flows)
    inner = optimizer.step

    def keep(found: Mapping[str, Tensor], learning_rate: float) -> None:
        if not gradients:
            gradients.update({path: gradient.clone() for path, gradient in found.items()})
        inner(found, learning_rate)
        if gate is not None:
            gate.open = False

    vars(optimizer)["step"] = keep
    trace = record(one, mesh, steps=STEPS, learning_rate=LEARNING_RATE)
    return Seen(trace, one, gradients, flows)


def _watch(model: Decoder, gradients: Mapping[str, Tensor], flows: dict[str, float]) -> None:
    """Add up the squares of what the parts of the model give, until there are gradients."""

    def watch(name: str, module: nn.Module) -> None:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            if not gradients and torch._C._current_graph_task_id() == -1:
                y = output[0] if isinstance(output, tuple) else output
                flows[name] += float(y.detach().square().sum())

        module.register_forward_hook(hook)

    if hasattr(model, "embedding"):
        watch("embedding", model.embedding)
    for n, block in model.blocks.items():
        watch(f"blocks.{n}.feed_forward", block)
        for path, module in block.named_modules():
            if path in ("attention.out", "attention.out_proj"):
                watch(f"blocks.{n}.attention", module)


@lru_cache(maxsize=256)
def _reference(case: Case, batch_of: Case) -> tuple[Trace, dict[str, float]]:
    """Train on the whole global batch of `batch_of` in this one process."""
    d = batch_of.degrees
    seen = train(case, Mesh.alone(), range((d.dp or 1) * d.rep), batch_of)
    return seen.trace, seen.flows


def reference(case: Case) -> tuple[Trace, dict[str, float]]:
    """Train the same in one process; kept for cases that differ only in what must not matter."""
    d = case.degrees
    ranks = f"dp{(d.dp or 1) * d.rep}"
    dealt = f"tp{d.tp},cp{d.cp},uly{d.uly}," if d.cp > 1 else ""
    balance = case.parallel.balance if d.cp > 1 else "zigzag"
    batch_of = replace(
        case, mesh=dealt + ranks, parallel=Parallel(balance=balance), recompute="none"
    )
    return _reference(replace(batch_of, mesh=""), batch_of)


@dataclass(frozen=True, slots=True)
class Share:
    """How a wrong gradient stands to the right one.

    Attributes:
        ratio: The factor that is nearest to it.
        residual: What this factor leaves, as a share of the largest element.
        summed: The same share for the sum over all ranks that hold an element.
        holders: Most ranks that hold an element.
    """

    ratio: float
    residual: float
    summed: float
    holders: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one proof found.

    Attributes:
        differences: Absolute differences, by what they are of.
        shares: Of each gradient that differs.
        losses: Of the first step, by term: found, and of one process.
        norms: Norm of the gradient in the first step: found, and of one process.
        flows: Sum of squares of what each part adds to the stream in the first step, in the order
            of the forward pass: found, and of one process. Padding counts.
        traffic: What all ranks send, and what they should.
        peak: Bytes that a rank saves for the backward of one micro-batch: the most at a time, and
            what recipes/plan/memory.py predicts. Of the rank where these differ most, or that saves
            most; NaN where they were not measured.
    """

    differences: dict[str, float]
    shares: dict[str, Share]
    losses: dict[str, tuple[float, float]]
    norms: tuple[float, float]
    flows: dict[str, tuple[float, float]]
    traffic: list[traffic.Traffic]
    peak: tuple[float, float]


def prove(case: Case, measure: bool = False) -> Outcome | None:
    """Run a case on the ranks of this world; rank 0 gets what was found.

    Args:
        case: What is proven.
        measure: Whether traffic and memory are measured too.

    Raises:
        ValueError: If the case cannot be built.
    """
    mesh = Mesh.build(case.mesh or "dp1")
    gate = Gate(Ledger(mesh))
    away: AbstractContextManager[object] = (
        offloaded(least=0) if case.parallel.offload_activations else nullcontext()
    )
    with away, observed(gate):
        seen = train(case, mesh, [mesh.data_rank], case, gate)
    found = _measure(case, mesh, counts(gate.ledger)) if measure else ([], (math.nan, math.nan))
    trace = seen.trace
    sums, holders = _held(seen, mesh)
    flows = all_reduce_(torch.tensor(list(seen.flows.values())), mesh.world).tolist()
    if mesh.rank:
        return None
    want, alone = reference(case)
    errors = differences(trace, want)
    return Outcome(
        differences=errors,
        shares={
            name: _share(trace.gradients[name], right, sums[name], holders[name])
            for name, right in want.gradients.items()
            if not errors[f"gradient {name}"] <= TOLERANCE
        },
        losses={name: (trace.losses[0][name], right) for name, right in want.losses[0].items()},
        norms=(trace.grad_norms[0], want.grad_norms[0]),
        flows={name: (x, alone[name]) for name, x in zip(alone, flows, strict=True)},
        traffic=found[0],
        peak=found[1],
    )


def _measure(
    case: Case, mesh: Mesh, whole: traffic.Counted
) -> tuple[list[traffic.Traffic], tuple[float, float]]:
    """Compare what a step has sent, and what a micro-batch sends and saves, with theory."""
    model, optimizer = build(case, mesh)
    batch = global_batch(case, 0).part(mesh.data_rank, 0, case.packed)
    ledger = Ledger(mesh)
    seen = layers(model, batch, ledger)
    one = counts(ledger)
    layers_wanted = traffic.micro_batch(model, mesh, case, seen, ledger)
    step_wanted = traffic.step(mesh, case, optimizer, seen.tokens, ledger)
    beside = traffic.beside_layers(whole, one, case.microbatches)
    lines = [
        *traffic.compare("micro-batch", one, layers_wanted),
        *traffic.compare("step", beside, step_wanted),
    ]
    saved = gather_json(peak(model, case, batch), mesh.world)
    found, wanted = max(saved, key=lambda pair: (abs(pair[0] - pair[1]), pair[0]))
    return traffic.over_ranks(lines, mesh), (found, wanted)


def _held(seen: Seen, mesh: Mesh) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sum over all ranks what each holds of the first gradients, and count who holds it."""
    names = sorted(seen.trace.gradients)
    shapes = {name: seen.trace.gradients[name] for name in names}
    sums = {name: torch.zeros_like(x) for name, x in shapes.items()}
    holders = {name: torch.zeros_like(x) for name, x in shapes.items()}
    for path, gradient in seen.gradients.items():
        for piece in seen.subject.optimizer.shards[path].layout.pieces:
            piece.of_logical(sums[piece.name]).add_(piece.of_local(gradient))
            piece.of_logical(holders[piece.name]).add_(1.0)
    every = [*sums.values(), *holders.values()]
    flat = all_reduce_(torch.cat([x.flatten() for x in every]), mesh.world)
    for x, part in zip(every, flat.split([x.numel() for x in every]), strict=True):
        x.copy_(part.view_as(x))
    return {name: x / seen.trace.clips[0] for name, x in sums.items()}, holders


def _share(got: Tensor, want: Tensor, summed: Tensor, holders: Tensor) -> Share:
    size = float(want.abs().max()) or 1.0
    square = float(want.square().sum()) or 1.0
    ratio = float((got * want).sum()) / square
    return Share(
        ratio=ratio,
        residual=float((got - ratio * want).abs().max()) / size,
        summed=float((summed - want).abs().max()) / size,
        holders=int(holders.max()),
    )
