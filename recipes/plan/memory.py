"""What training a decoder costs in memory: exact bytes on one rank of any mesh.

Activations are counted by storages, each once however many operators save it: a block names what it
keeps, and a name that two operators, or two blocks, share is one storage. An operator that runs
again in the backward keeps its inputs instead. Of T tokens on a context-parallel rank, T/R between
the blocks:

    norm              its sum [T/R, D], a statistic a token; its gathered result [T, D]
    attention         rotated q and k, v (all of qkv where its norms need it), output, log-sum-exp
      all_gather      and every k and v of the batch
      ulysses         what the exchange has brought instead, and its output before the way back
    feed_forward      gate and up
    moe               rows by expert, gate and up, their product, results, order and weights
    ends              ids; the sum and statistic of the last norm, gradients of hidden and head

With FP8 a projection keeps a byte an element of its input, and the scales, instead of the input;
attention keeps its result for itself, and the feed-forward gate and up. Of each weight there are
two copies in FP8 beside the parameter.

A rank of a pipeline holds as many micro-batches of its stages as its schedule has in flight. What
lives for a moment (results of operators, buckets under way) is not counted, nor what recomputation
remembers of a choice.

Shapes: T tokens, D width, F feed-forward width, H query heads, G key/value heads, K head dimension,
E experts, M rows that experts serve, R tensor-parallel ranks.

Source: Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4; Rajbhandari et al.
2020, https://arxiv.org/abs/1910.02054, section 5 (states); Narayanan et al. 2021,
https://arxiv.org/abs/2104.04473, section 2.2 (micro-batches in flight).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from warploom.kernels.gemm import Fp8Recipe
from warploom.kernels.quant.formats import BLOCK, MX_BLOCK
from warploom.models.architecture import Architecture, Experts
from warploom.models.stages import Stages
from warploom.parallel.memory import Recompute
from warploom.parallel.mesh import Degrees
from warploom.parallel.pipeline import Schedule, simulate

Rows = tuple[int, int]
Kept = dict[str, int]
ONE = Degrees(dp=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rank:
    """One rank and one micro-batch."""

    a: Architecture
    d: Degrees
    tokens: int
    total: int
    documents: int
    context: str
    operators: frozenset[str]
    narrow: int
    wide: int
    fp8: Fp8Recipe | None

    @property
    def own(self) -> int:
        """Tokens between the blocks."""
        return self.tokens // self.d.tp

    @property
    def stream(self) -> int:
        """Bytes of `[T/R, D]`."""
        return self.own * self.a.width * self.narrow

    @property
    def gathered(self) -> int:
        """Bytes of `[T, D]`."""
        return self.tokens * self.a.width * self.narrow

    @property
    def heads(self) -> Rows:
        """Query and key/value heads of a tensor-parallel rank."""
        return self.a.heads // self.d.tp, max(self.a.kv_heads // self.d.tp, 1)

    def projected(self, width: int) -> int:
        """Bytes that a projection keeps of its input `[T, width]`."""
        if self.fp8 is None:
            return self.tokens * width * self.narrow
        return width * self.tokens + _scales(self.fp8, width, self.tokens)


def _scales(recipe: Fp8Recipe, rows: int, columns: int) -> int:
    """Return the bytes of the scales of codes `[rows, columns]`, a weight's apart."""
    if recipe.scaling == "mx":
        return rows * -(-columns // MX_BLOCK)
    groups = {"tensor": 1, "row": rows, "block": rows * -(-columns // BLOCK)}
    return 4 * groups[recipe.scaling]


def activations(
    architecture: Architecture,
    tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    degrees: Degrees = ONE,
    recompute: str = "none",
    fp8: Fp8Recipe | None = None,
    z_loss: bool = False,
    context: str = "ring",
    stages: Stages | None = None,
    held: Sequence[int] | None = None,
    total: int | None = None,
    documents: int = 0,
    rows: Sequence[Rows] | None = None,
) -> int:
    """Return the bytes that one micro-batch saves for its backward on one rank.

    Parameters are not counted. Of a vocabulary that does not divide over the ranks it is the first
    rank's part.

    Args:
        architecture: Sizes.
        tokens: Tokens T of a context-parallel rank, padding included, a multiple of `tp`.
        dtype: Of the activations.
        degrees: Of the mesh.
        recompute: As in `Decoder`.
        fp8: As in `Decoder`.
        z_loss: Whether `Decoder` has the z-loss.
        context: How keys and values cross the ring, `ring` or `all_gather`.
        stages: As in `Decoder`; by default one stage a pipeline rank.
        held: Stages that are counted; by default, without pipeline ranks, all.
        total: Tokens of the batch without padding; by default T on each context-parallel rank.
        documents: Documents, of packed rows, or of any where Ulysses alone splits them; padding
            that completes a multiple of `tp` is one more. 0 for rows that are not packed.
        rows: For each routed block that is held the rows that this rank sends and those that its
            experts serve; by default balanced. Without ep and etp both are top_k T/R, always.

    Raises:
        ValueError: If `recompute` is unknown, or `rows` are not one for each routed block.
    """
    a, d = architecture, degrees
    stages = stages or Stages.deal(a.layers, range(d.pp))
    held = range(len(stages.placement)) if held is None else held
    rank = _Rank(
        a=a,
        d=d,
        tokens=tokens,
        total=tokens * d.cp if total is None else total,
        documents=documents,
        context=context,
        operators=Recompute.parse(recompute).operators,
        narrow=dtype.itemsize,
        wide=torch.promote_types(dtype, torch.float32).itemsize,
        fp8=fp8,
    )
    return sum(_kept(rank, stages, held, z_loss, rows).values())


def _kept(
    rank: _Rank, stages: Stages, held: Sequence[int], z_loss: bool, rows: Sequence[Rows] | None
) -> Kept:
    """Name what the stages `held` keep of a micro-batch."""
    a = rank.a
    blocks = [(stage, n) for stage in held for n in stages.blocks(stage)]
    routed = [n for _, n in blocks if a.routed(n) is not None]
    if rows is None:
        rows = [_balanced(rank)] * len(routed)
    if len(rows) != len(routed):
        raise ValueError(
            f"rows must be one pair for each routed block that is held ({len(routed)}), "
            f"got {len(rows)}"
        )
    of_block = dict(zip(routed, rows, strict=True))
    kept: Kept = {}
    for stage, n in blocks:
        kept |= _block(rank, n, n == stages.blocks(stage).start, of_block.get(n, (0, 0)))
    if 0 in held:
        kept["ids"] = rank.tokens * (8 + (rank.d.tp > 1))  # and which are on other ranks
    if stages.last in held:
        kept |= _loss(rank, z_loss)
    return kept


def _balanced(r: _Rank) -> Rows:
    sent = r.own * (0 if r.a.experts is None else r.a.experts.top_k)
    return sent, sent * r.d.etp


def _block(r: _Rank, layer: int, first: bool, rows: Rows) -> Kept:
    """Name what one block keeps; the stream that it takes over has the name of its maker."""
    entry = f"{layer}.added"
    if "block" in r.operators:
        return {entry: r.stream}
    middle = entry if first else f"{layer}.middle"  # the stream before the second norm
    features = r.heads[0] * r.a.head_dim
    own: Kept = {"mixed": r.projected(features)}
    if "norm" in r.operators:
        kept = {entry: r.stream} if first else {entry: r.stream, f"{layer}.stream": r.stream}
    else:
        kept = {middle: r.stream}
        own |= {"first statistic": r.own * r.wide, "first result": r.projected(r.a.width)}
    if "attention" in r.operators:
        own["qkv"] = _qkv(r)
    else:
        own |= _attention(r)
        if r.fp8 is not None and r.d.uly == 1:  # else the projection kept it for both
            own["result"] = r.tokens * features * r.narrow
        kept["tables"] = r.tokens * r.a.head_dim * 4
        if r.documents and r.d.uly == r.d.cp:  # no ring
            kept["boundaries"] = 4 * (r.documents + 1)
    experts = r.a.routed(layer)
    again = "norm" if "feed_forward" not in r.operators else "feed_forward"
    if experts is None and again in r.operators:
        kept |= {f"{layer}.mixed": r.stream, middle: r.stream}
    else:
        kept[f"{layer + 1}.stream"] = r.stream
        own["second statistic"] = r.own * r.wide
        own["second result"] = r.projected(r.a.width) if experts is None else r.stream
    if experts is not None and "moe" not in r.operators:
        own |= _experts(r, experts, *rows)
    if experts is None and "feed_forward" not in r.operators:
        own["gate and up"] = r.tokens * 2 * r.a.hidden // r.d.tp * r.narrow
        own["product"] = 0 if r.fp8 is None else r.projected(r.a.hidden // r.d.tp)
    return kept | {f"{layer} {name}": size for name, size in own.items()}


def _qkv(r: _Rank) -> int:
    queries, keys = r.heads
    return r.tokens * (queries + 2 * keys) * r.a.head_dim * r.narrow


def _attention(r: _Rank) -> Kept:
    """Name what the norms of queries and keys, and attention, keep, but for its result."""
    queries, keys = r.heads
    tokens, size = r.tokens, r.a.head_dim * r.narrow
    kept: Kept = {}
    if r.a.qk_norm:
        kept |= {"qkv": _qkv(r), "statistics": tokens * (queries + keys) * r.wide}
    if r.d.uly == 1:
        kept |= {"q": tokens * queries * size, "k": tokens * keys * size}
        if not r.a.qk_norm:
            kept["v"] = tokens * keys * size  # else a view of qkv
    else:
        mine = queries // r.d.uly
        sharing = math.gcd(mine, queries // keys)  # query heads that read one key head
        tokens, queries, keys = tokens * r.d.uly, mine, mine // sharing
        kept["exchanged"] = tokens * (queries + 2 * keys) * size
        if r.d.uly == r.d.cp:
            tokens = r.total  # padding is cut off
        kept["result"] = tokens * queries * size
    kept["log-sum-exp"] = tokens * queries * r.wide
    if r.context == "all_gather" and r.d.uly < r.d.cp:
        kept["all k and v"] = r.total * 2 * keys * size
    return kept


def _experts(r: _Rank, e: Experts, sent: int, served: int) -> Kept:
    """Name what a layer of experts keeps beside its input, which is this rank's tokens."""
    slots, width = r.own * e.top_k, r.a.width * r.narrow
    kept: Kept = {
        "logits": r.own * e.count * r.narrow,
        "probabilities": r.own * e.count * r.wide,
        "choice": slots * 8,
        "weights": slots * r.wide,
        "order": slots * 8,
        "counts": e.count * 8,
    }
    if r.d.ep * r.d.etp > 1:
        kept["counts"] = e.count // r.d.ep * 8
        kept["order of the served"] = 2 * served * 8  # there and back
    else:
        sent = served = slots
    features = e.hidden // r.d.etp * r.narrow
    kept |= {"rows": served * width, "expert gate and up": served * 2 * features}
    kept |= {"expert product": served * features, "results": sent * width}
    if e.shared:
        kept["shared gate and up"] = r.tokens * 2 * e.shared // r.d.tp * r.narrow
        kept["shared input"] = r.gathered if r.d.tp > 1 else 0  # else the tokens themselves
    if e.balance:
        kept["balance"] = r.own * e.count * r.wide
    if e.router_z:
        kept["router z"] = r.own * (r.wide + 1)  # and a mask
        kept["wide logits"] = 0 if r.narrow == r.wide else r.own * e.count * r.wide
    return kept


def _loss(r: _Rank, z_loss: bool) -> Kept:
    """Name what the last norm and the loss keep."""
    kept = {"last sum": r.stream, "last statistic": r.own * r.wide, "hidden": r.gathered}
    if z_loss:  # the head's backward computes the logits again
        statistics = r.tokens * (3 * r.wide + 1)  # target logit, lse; lse and whether it trains
        return kept | {"targets": r.tokens * 8, "statistics": statistics}
    return kept | {"dweight": -(-r.a.vocabulary // r.d.tp) * r.a.width * r.narrow}


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        parameters: In the model's dtype and in FP8, with the routers' biases; of ZeRO-3 own rows,
            the root unit, and the two neighbouring blocks that are largest.
        gradients: In float32 at least, where they are accumulated and summed.
        optimizer: Moments, and float32 masters where the model's dtype is narrower.
        activations: Saved for the backward by the micro-batches in flight.
        host: What offload keeps in host memory instead: the optimizer's state and masters.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        """The sum of all that is on the device."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def memory(
    architecture: Architecture,
    tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    degrees: Degrees = ONE,
    zero: int = 1,
    optimizer: str = "adamw",
    offload: bool = False,
    recompute: str = "none",
    fp8: Fp8Recipe | None = None,
    z_loss: bool = False,
    context: str = "ring",
    stages: Stages | None = None,
    schedule: Schedule | None = None,
    rank: int | None = None,
) -> Memory:
    """Return the bytes on one rank of training, without what is alive for a moment.

    Args:
        architecture: Sizes.
        tokens: Tokens T of a micro-batch on a context-parallel rank.
        dtype: Of parameters and activations.
        degrees: Of the mesh, resolved.
        zero: ZeRO stage, from 0 to 3.
        optimizer: `adamw`, or `muon` with one moment for the matrices of the blocks.
        offload: Whether the optimizer's state is in host memory.
        recompute: As in `Decoder`.
        fp8: As in `Decoder`.
        z_loss: As in `activations`.
        context: As in `activations`.
        stages: As in `activations`.
        schedule: The pipeline's; `None` holds one micro-batch.
        rank: Pipeline rank; `None` for the one that needs most.

    Raises:
        ValueError: If `recompute` is unknown, or `stages` are not those of the schedule.
    """
    if stages is None:
        place = range(degrees.pp) if schedule is None else schedule.placement
        stages = Stages.deal(architecture.layers, place)
    if schedule is not None and schedule.placement != stages.placement:
        raise ValueError(
            f"stages must be placed as the schedule's are: {stages.placement} is not "
            f"{schedule.placement}"
        )
    options: dict[str, Any] = {"dtype": dtype, "degrees": degrees, "stages": stages}
    options |= {"recompute": recompute, "fp8": fp8, "z_loss": z_loss, "context": context}
    numbers = range(stages.last + 1)
    sizes = [activations(architecture, tokens, held=(s,), **options) for s in numbers]
    flying = None if schedule is None else simulate(schedule).peak(sizes.__getitem__)
    found, muon = list[Memory](), optimizer == "muon"
    for at in range(degrees.pp) if rank is None else (rank,):
        held = stages.on(at)
        saved = sum(sizes[s] for s in held) if flying is None else int(flying[at])
        made = list(_parameters(architecture, degrees, stages, held))
        states = _states(made, degrees, dtype, fp8=fp8, zero=zero, muon=muon, offload=offload)
        parameters = states.parameters + _biases(architecture, stages, held)
        found.append(replace(states, parameters=parameters, activations=saved))
    return max(found, key=lambda one: one.total)


class _Parameter(NamedTuple):
    """A local parameter: its unit (a block; -1 for the root), rows, columns, and its kind."""

    unit: int
    rows: int
    columns: int
    expert: bool = False
    projects: bool = False

    def coded(self, recipe: Fp8Recipe | None) -> int:
        """Bytes of both copies in FP8 of a projection's weight; of tiles without their scales."""
        if recipe is None or not self.projects:
            return 0
        size = 2 * self.rows * self.columns
        if recipe.scaling in ("tensor", "block"):
            return size
        both = (self.rows, self.columns), (self.columns, self.rows)
        return size + sum(_scales(recipe, *shape) for shape in both)

    def shared(self, ranks: int) -> int:
        """Elements of the rows that the first of so many ranks owns."""
        return -(-self.rows // ranks) * self.columns


def _parameters(
    a: Architecture, d: Degrees, stages: Stages, held: Sequence[int]
) -> Iterator[_Parameter]:
    """Yield the parameters of the stages of a rank."""
    vocabulary = -(-a.vocabulary // d.tp)
    if 0 in held:
        yield _Parameter(-1, vocabulary, a.width)
    if stages.last in held:
        yield _Parameter(-1, a.width, 1)
        if not (a.tied and 0 in held):
            yield _Parameter(-1, vocabulary, a.width)
    queries, keys = a.heads // d.tp * a.head_dim, max(a.kv_heads // d.tp, 1) * a.head_dim
    for n in sorted(n for stage in held for n in stages.blocks(stage)):
        yield _Parameter(n, queries + 2 * keys, a.width, projects=True)
        yield _Parameter(n, a.width, queries, projects=True)
        norms = [a.width, a.width, *[a.head_dim] * (2 if a.qk_norm else 0)]
        yield from (_Parameter(n, width, 1) for width in norms)
        experts = a.routed(n)
        dense = a.hidden if experts is None else experts.shared
        if dense:
            projects = experts is None
            yield _Parameter(n, 2 * dense // d.tp, a.width, projects=projects)
            yield _Parameter(n, a.width, dense // d.tp, projects=projects)
        if experts is not None:
            yield _Parameter(n, experts.count, a.width)
            mine, part = experts.count // d.ep, experts.hidden // d.etp
            yield _Parameter(n, mine * 2 * part, a.width, expert=True)
            yield _Parameter(n, mine * a.width, part, expert=True)


def _biases(a: Architecture, stages: Stages, held: Sequence[int]) -> int:
    """Return the bytes of the routers' balancing biases and of the loads that they follow."""
    routed = [a.routed(n) for stage in held for n in stages.blocks(stage)]
    return sum(e.count * (4 + 8) for e in routed if e is not None and e.bias_rate > 0)


def _states(
    parameters: list[_Parameter],
    d: Degrees,
    dtype: torch.dtype,
    *,
    fp8: Fp8Recipe | None,
    zero: int,
    muon: bool,
    offload: bool,
) -> Memory:
    """Return what lasts from step to step, and the gradients; no activations."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    narrow = dtype.itemsize < wide
    inner = d.tp * d.cp * (d.dp or 1)
    units: dict[int, int] = {}
    values = gradients = device = host = 0
    for p in parameters:
        ranks = inner // (d.ep * d.etp) if p.expert else d.cp * (d.dp or 1)
        whole, rows = p.shared(1), p.shared(ranks)
        if zero == 3 and ranks > 1:
            values += rows * dtype.itemsize
            units[p.unit] = units.get(p.unit, 0) + whole * dtype.itemsize + p.coded(fp8)
        else:
            values += whole * dtype.itemsize + p.coded(fp8)
        if zero >= 2 and ranks > 1:
            gradients += rows * wide
        else:  # narrow gradients are summed elsewhere than where they are accumulated
            apart = narrow and ranks * d.rep > 1
            gradients += (whole + apart * (whole if zero == 0 else rows)) * wide
        state = (1 if muon and p.unit >= 0 and p.columns > 1 else 2) * wide
        state += wide if narrow or offload else 0
        size = (whole if zero == 0 else rows) * state
        device, host = (device, host + size) if offload else (device + size, host)
    root = units.pop(-1, 0)
    there = [units[n] for n in sorted(units)]
    values += root + max((x + y for x, y in pairwise(there)), default=sum(there))
    return Memory(
        parameters=values, gradients=gradients, optimizer=device, activations=0, host=host
    )
