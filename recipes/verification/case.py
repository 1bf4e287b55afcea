"""One proof: a model, a mesh and a way to train on it, against one process with the same batch.

Every rank calls `prove`; rank 0 gets what was found. The global batch has documents of odd lengths,
unequal numbers of trained tokens on each rank, and ranks and micro-batches that train nothing.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from warploom.models.architecture import Architecture
from warploom.models.batch import Batch
from warploom.models.decoder import Decoder
from warploom.models.stages import Stages
from warploom.parallel import optimizer as optimizers
from warploom.parallel.collectives import all_reduce_, observed
from warploom.parallel.collectives.ledger import Ledger
from warploom.parallel.context import Split
from warploom.parallel.initialise import normal_
from warploom.parallel.memory import offloaded
from warploom.parallel.mesh import Degrees, Mesh
from warploom.parallel.optimizer import ShardedOptimizer
from warploom.parallel.parity import Subject, Trace, differences, record
from warploom.parallel.pipeline import Schedule

IGNORED = -100
STEPS = 3
LEARNING_RATE = 1e-2
TOLERANCE = 1e-10
EPSILON = 1e-4  # of the optimizers: large enough that a wrong scale of a gradient is seen
OPTIMIZERS = ("adamw", "muon")
SPREAD = 10.0  # times the weights as they are drawn: far from linear


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is proven.

    Attributes:
        architecture: Sizes, small ones.
        mesh: Degrees; dp is 1 where it is absent.
        schedule: Name of the pipeline schedule; read where pp is above 1.
        virtual: Stages of a pipeline rank, for `interleaved`.
        stage_layers: Blocks of each stage; `None` for equal ones.
        microbatches: Of each rank and step.
        zero: Stage of the optimizer's and the gradients' sharding, 0 to 3.
        recompute: As in `Decoder`.
        optimizer: `adamw` or `muon`.
        packed: Whether rows hold several documents.
        context: As in `Decoder`.
        balance: As in `Decoder`.
        offload: Whether activations and the optimizer's state wait in host memory.
        z_loss: Weight of the z-loss.
        clip: Largest norm of the gradient.
        rows: Rows of a micro-batch.
        sequence: Tokens of a row.
        seed: Of weights and batches.
    """

    architecture: Architecture
    mesh: str = ""
    schedule: str = "1f1b"
    virtual: int = 2
    stage_layers: tuple[int, ...] | None = None
    microbatches: int = 2
    zero: int = 1
    recompute: str = "none"
    optimizer: str = "adamw"
    packed: bool = True
    context: str = "ring"
    balance: str = "zigzag"
    offload: bool = False
    z_loss: float = 1e-2
    clip: float | None = 1.0
    rows: int = 2
    sequence: int = 13
    seed: int = 0

    @property
    def degrees(self) -> Degrees:
        """The degrees of the mesh, with dp filled in."""
        parsed = Degrees.parse(self.mesh)
        d = replace(parsed, dp=parsed.dp or 1)
        return d.resolve(d.world)

    @property
    def table(self) -> Schedule | None:
        """The pipeline schedule; `None` with one pipeline rank."""
        pp = self.degrees.pp
        if pp == 1:
            return None
        virtual = self.virtual if self.schedule == "interleaved" else 1
        return Schedule.named(self.schedule, pp, self.microbatches, virtual=virtual)

    @property
    def stages(self) -> Stages:
        """Which blocks are where."""
        table = self.table
        place = (0,) if table is None else table.placement
        return Stages.deal(self.architecture.layers, place, self.stage_layers)


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """What all ranks train on in one step, micro-batch after micro-batch of rank after rank.

    Attributes:
        tokens: Ids `[ranks, microbatches, rows, S]`.
        targets: Their targets, of the same shape.
        lengths: Lengths of the documents of each row, in the same order of nesting.
    """

    tokens: Tensor
    targets: Tensor
    lengths: list[list[list[list[int]]]]

    def part(self, rank: int, microbatch: int, packed: bool) -> Batch:
        """Cut out one micro-batch."""
        lengths = None
        if packed:
            flat = [n for row in self.lengths[rank][microbatch] for n in row]
            lengths = torch.tensor(flat, dtype=torch.int32)
        return Batch(self.tokens[rank, microbatch], self.targets[rank, microbatch], lengths)


def global_batch(case: Case, step: int) -> GlobalBatch:
    """Draw the batch of a step: the same for every mesh that splits it equally."""
    d = case.degrees
    ranks = (d.dp or 1) * d.rep
    shape = (ranks, case.microbatches, case.rows, case.sequence)
    g = torch.Generator().manual_seed(1000 * case.seed + step)
    tokens = torch.randint(0, case.architecture.vocabulary, shape, generator=g)
    targets = torch.randint(0, case.architecture.vocabulary, shape, generator=g)
    share = torch.rand(shape[:3], generator=g)[..., None]  # of the tokens of a row that train
    targets[torch.rand(shape, generator=g) > share] = IGNORED
    lengths = [
        [[_documents(case.sequence, g) for _ in range(case.rows)] for _ in range(shape[1])]
        for _ in range(ranks)
    ]
    _mask_whole_parts(case, targets, lengths)
    targets[0, 0, 0, :2] = tokens[0, 0, 0, 1:3]  # something trains, whatever was drawn
    return GlobalBatch(tokens, targets, lengths)


def _documents(total: int, g: torch.Generator) -> list[int]:
    """Cut a row into documents of odd and even lengths, one of them long."""
    first = int(torch.randint(1, max(2, total // 3), (), generator=g))
    rest = total - first
    last = int(torch.randint(1, max(2, rest // 2), (), generator=g))
    return [n for n in (first, rest - last, last) if n]


def _mask_whole_parts(case: Case, targets: Tensor, lengths: list[list[list[list[int]]]]) -> None:
    """Let the last data rank, the last micro-batch and one context-parallel rank train nothing."""
    ranks, microbatches, rows, length = targets.shape
    if ranks > 1:
        targets[-1] = IGNORED
    if microbatches > 1:
        targets[0, -1] = IGNORED
    d = case.degrees
    if d.cp == 1:
        return
    for m in range(microbatches):
        sizes = [n for row in lengths[0][m] for n in row] if case.packed else [length] * rows
        split = Split.build(sizes, d.cp, multiple=d.tp, balance=case.balance, ulysses=d.uly)
        own = split.indices(d.cp - 1)
        targets[0, m].view(-1)[own[own >= 0]] = IGNORED


def build(case: Case, mesh: Mesh) -> tuple[Decoder, ShardedOptimizer]:
    """Build the model with its weights, and its optimizer, on one rank."""
    model = Decoder.create(
        case.architecture,
        mesh=mesh,
        seed=case.seed,
        recompute=case.recompute,
        z_loss=case.z_loss,
        context=case.context,
        balance=case.balance,
        stages=case.stages,
        dtype=torch.float64,
    )
    _spread(model, case.seed)
    parameters, made = dict(model.named_parameters()), model.layouts()
    if case.optimizer == "adamw":
        adamw = optimizers.AdamW(parameters, made, mesh, eps=EPSILON, offload=case.offload)
        return model, adamw
    return model, optimizers.Muon(
        parameters,
        made,
        mesh,
        hidden=lambda path, parameter: path.startswith("blocks.") and parameter.dim() == 2,
        eps=EPSILON,
        offload=case.offload,
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


def train(case: Case, mesh: Mesh, ranks: Sequence[int], batch_of: Case) -> Seen:
    """Train on what the data ranks `ranks` of the global batch of `batch_of` get.

    A collective call over the mesh.
    """
    model, optimizer = build(case, mesh)

    def batches(step: int) -> list[Batch]:
        whole = global_batch(batch_of, step)
        return [whole.part(r, m, case.packed) for r in ranks for m in range(case.microbatches)]

    made, table = model.layouts(), case.table
    one = Subject(model, made, optimizer, batches, case.clip, case.zero, table)
    gradients: dict[str, Tensor] = {}
    flows = {"embedding": 0.0}
    for n in range(case.architecture.layers):
        flows |= {f"blocks.{n}.attention": 0.0, f"blocks.{n}.feed_forward": 0.0}
    _watch(model, gradients, flows)
    inner = optimizer.step

    def keep(found: Mapping[str, Tensor], learning_rate: float) -> None:
        if not gradients:
            gradients.update({path: gradient.clone() for path, gradient in found.items()})
        inner(found, learning_rate)

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
            if path == "attention.out":
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
    balance = case.balance if d.cp > 1 else "zigzag"
    batch_of = replace(
        case,
        mesh=dealt + ranks,
        balance=balance,
        zero=1,
        recompute="none",
        context="ring",
        offload=False,
        schedule="1f1b",
        virtual=2,
        stage_layers=None,
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
        ledger: Calls and bytes of each rank, by axis, collective and phase.
    """

    differences: dict[str, float]
    shares: dict[str, Share]
    losses: dict[str, tuple[float, float]]
    norms: tuple[float, float]
    flows: dict[str, tuple[float, float]]
    ledger: dict[tuple[str, str, str], tuple[int, int]]


def prove(case: Case) -> Outcome | None:
    """Run a case on the ranks of this world; rank 0 gets what was found.

    Raises:
        ValueError: If the case cannot be built.
    """
    mesh = Mesh.build(case.mesh or "dp1")
    ledger = Ledger(mesh)
    away: AbstractContextManager[object] = offloaded(least=0) if case.offload else nullcontext()
    with away, observed(ledger):
        seen = train(case, mesh, [mesh.data_rank], case)
    trace = seen.trace
    sums, holders = _held(seen, mesh)
    flows = all_reduce_(torch.tensor(list(seen.flows.values())), mesh.world).tolist()
    if mesh.rank:
        return None
    want, alone = reference(case)
    found = differences(trace, want)
    return Outcome(
        differences=found,
        shares={
            name: _share(trace.gradients[name], right, sums[name], holders[name])
            for name, right in want.gradients.items()
            if not found[f"gradient {name}"] <= TOLERANCE
        },
        losses={name: (trace.losses[0][name], right) for name, right in want.losses[0].items()},
        norms=(trace.grad_norms[0], want.grad_norms[0]),
        flows={name: (x, alone[name]) for name, x in zip(alone, flows, strict=True)},
        ledger={key: (total.calls, total.bytes) for key, total in ledger.table().items()},
    )


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
