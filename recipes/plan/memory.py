"""What training a decoder costs in memory: exact bytes on one rank of any mesh.

Parameters are those of the model, built without memory. Activations are counted by storages, each
once however many operators save it, in a rehearsal of the micro-batch (`rehearsal.py`): every kind
of block, of every family, keeps what its own code keeps. Of T tokens on a context-parallel rank,
T/R between the blocks, a plain block keeps

    norm              its sum [T/R, D], a statistic a token; its gathered result [T, D]
    attention         rotated q and k, v (all of qkv where its norms need it), output, log-sum-exp
      all_gather      and every k and v of the batch
      ulysses         what the exchange has brought instead, and its output before the way back
    feed_forward      gate and up
    moe               rows by expert, gate and up, their product, results, order and weights
    ends              ids; the sum and statistic of the last norm, gradients of hidden and head

An operator that runs again in the backward keeps its inputs instead. With FP8 a projection keeps a
byte an element of its input, and the scales, instead of the input; attention keeps its result for
itself, and the feed-forward gate and up. Of each weight there are two copies in FP8 beside the
parameter.

A rank of a pipeline holds as many micro-batches of its stages as its schedule has in flight. What
lives for a moment (results of operators, buckets under way) is not counted, nor what recomputation
remembers of a choice.

Shapes: T tokens, D width, R tensor-parallel ranks.

Source: Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4; Rajbhandari et al.
2020, https://arxiv.org/abs/1910.02054, section 5 (states); Narayanan et al. 2021,
https://arxiv.org/abs/2104.04473, section 2.2 (micro-batches in flight).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from warploom.kernels.gemm import Fp8Recipe
from warploom.kernels.quant.formats import BLOCK, MX_BLOCK
from warploom.models.architecture import Architecture
from warploom.models.batch import Batch
from warploom.models.decoder import Decoder
from warploom.models.mup import is_hidden
from warploom.models.stages import Stages
from warploom.parallel.mesh import Degrees
from warploom.parallel.pipeline import Schedule, simulate
from warploom.parallel.tensor import Fp8Product

from .rehearsal import META, Rows, imagined, laps, saved_bytes

ONE = Degrees(dp=1)


def activations(
    architecture: Architecture, tokens: int, *, dtype: torch.dtype = torch.float32,
    degrees: Degrees = ONE, recompute: str = "none", fp8: Fp8Recipe | None = None,
    z_loss: bool = False, context: str = "ring", stages: Stages | None = None,
    held: Sequence[int] | None = None, total: int | None = None, documents: int = 0,
    lengths: Sequence[int] | None = None, rows: Sequence[Rows] | None = None,
) -> int:  # fmt: skip
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
        lengths: Tokens of each document, or of each row where these are not packed, which matter to
            blocks with a state; by default equal ones, or one row.
        rows: For each routed block that is held, those that predict further tokens last, the rows
            that this rank sends and those that its experts serve; by default balanced. Without ep
            and etp both are top_k T/R, always.

    Raises:
        ValueError: If `recompute` is unknown, or `rows` are not one for each routed block.
    """
    a, d = architecture, degrees
    stages = stages or Stages.deal(a.layers, range(d.pp))
    held = range(stages.last + 1) if held is None else held
    blocks = [n for stage in held for n in stages.blocks(stage)]
    blocks += range(a.layers, a.layers + a.predict) if stages.last in held else ()
    count = tokens * d.cp if total is None else total
    batch = _batch(count, documents - (d.cp == 1 and tokens > count), lengths)
    few = _shorten(a, stages, held, blocks, _routed(a, d, tokens, blocks, rows))
    longest = max(a.max_positions, batch.tokens.shape[1])
    model = _rehearsed(
        replace(few.architecture, max_positions=longest), d, few.stages, held, dtype=dtype,
        recompute=recompute, fp8=fp8 and replace(fp8, delayed=False),  # whose scales are as large
        z_loss=float(z_loss), balance=_balance(d, tokens, count),
    )  # fmt: skip
    kept = saved_bytes(model, held, batch, few.times, few.routed)
    if context == "ring" and not model.recompute.operators & {"attention", "block"}:
        attending = sum(a.kind(n) != "ssm" for n in blocks)
        kept -= attending * _gathered(a, d, count) * dtype.itemsize
    return kept


class _Few(NamedTuple):
    """Stages with fewer blocks, and how often each of these is there in the whole ones."""

    architecture: Architecture
    stages: Stages
    times: list[int]
    routed: list[Rows]


def _shorten(
    a: Architecture, stages: Stages, held: Sequence[int], blocks: Sequence[int], rows: list[Rows]
) -> _Few:
    """Keep two of each lap of blocks: what the second one saves, every further one does."""
    served = iter(rows)
    sort = {n: (a.kind(n), next(served) if a.routed(n) else None) for n in blocks}
    few, times, layers = list[int](), list[int](), [0] * (stages.last + 1)
    for stage in held:
        own = stages.blocks(stage)
        for start, length, number in laps([sort[n] for n in own]):
            kept = min(number, 2) * length
            few += own[start : start + kept]
            times += [max(number - 1, 1) if at >= length else 1 for at in range(kept)]
            layers[stage] += kept
    ahead = [n for n in blocks if n >= a.layers]
    every, some = [*few, *ahead], few or [0]  # an architecture has a block, a stage may have none
    kinds = tuple(a.kind(n) for n in (*some, *ahead)) if a.kinds else ()
    dense = sum(a.routed(n) is None for n in some)
    made = replace(
        a, layers=len(some), kinds=kinds, window=a.window if "sliding" in kinds else None,
        ssm=a.ssm if "ssm" in kinds else None,
        experts=None if a.experts is None else replace(a.experts, dense_layers=dense),
    )  # fmt: skip
    routed = [found for n in every if (found := sort[n][1]) is not None]
    return _Few(made, Stages(stages.placement, tuple(layers)), times + [1] * len(ahead), routed)


def _routed(
    a: Architecture, d: Degrees, tokens: int, blocks: Sequence[int], rows: Sequence[Rows] | None
) -> list[Rows]:
    """Return the rows of each routed block, balanced where they are not given."""
    routed = [experts for n in blocks if (experts := a.routed(n)) is not None]
    sent = [tokens // d.tp * experts.top_k for experts in routed]
    found = [(n, n * d.etp) for n in sent] if rows is None else list(rows)
    if len(found) != len(routed):
        raise ValueError(
            f"rows must be one pair for each routed block that is held ({len(routed)}), "
            f"got {len(found)}"
        )
    return found


def _batch(count: int, documents: int, lengths: Sequence[int] | None) -> Batch:
    """Return a batch of so many tokens, without their values."""
    sizes = lengths
    if sizes is None:
        each, rest = divmod(count, max(documents, 1))
        sizes = [each + rest, *[each] * (documents - 1)]
    packed = documents > 0
    shape = (1, count) if packed else (len(sizes), sizes[0])
    ids = torch.empty(shape, dtype=torch.int64, device=META)
    bounds = torch.tensor(sizes, dtype=torch.int32) if packed else None
    return Batch(ids, torch.empty_like(ids), bounds)


def _balance(d: Degrees, tokens: int, total: int) -> str:
    """Return a way of dealing `total` tokens by which a rank gets `tokens`."""
    unit = d.cp * d.tp
    return "contiguous" if -(-total // unit) * d.tp == tokens else "zigzag"


def _rehearsed(
    a: Architecture, d: Degrees, stages: Stages, held: Sequence[int], **options: Any
) -> Decoder:
    """Build the stages `held` as if they were all that is on a pipeline rank."""
    here = Stages(tuple(int(s not in held) for s in range(stages.last + 1)), stages.layers)
    how: dict[str, Any] = {"mesh": imagined(d), "context": "all_gather", "device": META}
    return Decoder(a, stages=here, **how, **options)


def _gathered(a: Architecture, d: Degrees, total: int) -> int:
    """Return the elements of all keys and values that a rank's attention gathers of a batch."""
    if d.uly == d.cp:
        return 0
    heads, keys, values = a.heads // d.tp, max(a.kv_heads // d.tp, 1), a.head_dim
    if a.latent is not None:
        keys, values = heads, a.latent.values
    if d.uly > 1:  # of the query heads that it attends with, those that read one key head share it
        keys = heads // d.uly // math.gcd(heads // d.uly, heads // keys)
    return total * keys * (a.head_dim + values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        parameters: In the model's dtype and in FP8, with buffers such as the routers' biases; of
            ZeRO-3 own rows, the root unit, and the two neighbouring blocks that are largest.
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
    architecture: Architecture, tokens: int, *, dtype: torch.dtype = torch.float32,
    degrees: Degrees = ONE, zero: int = 1, optimizer: str = "adamw", offload: bool = False,
    recompute: str = "none", fp8: Fp8Recipe | None = None, z_loss: bool = False,
    context: str = "ring", lengths: Sequence[int] | None = None, stages: Stages | None = None,
    schedule: Schedule | None = None, rank: int | None = None,
) -> Memory:  # fmt: skip
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
        lengths: Tokens of each row of the micro-batch, as in `activations`, whose sum is its total.
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
    options |= {"lengths": lengths, "total": None if lengths is None else sum(lengths)}
    numbers = range(stages.last + 1)
    sizes = [activations(architecture, tokens, held=(s,), **options) for s in numbers]
    flying = None if schedule is None else simulate(schedule).peak(sizes.__getitem__)
    found, muon = list[Memory](), optimizer == "muon"
    for at in range(degrees.pp) if rank is None else (rank,):
        held = stages.on(at)
        saved = sum(sizes[s] for s in held) if flying is None else int(flying[at])
        model = _rehearsed(architecture, degrees, stages, held, dtype=dtype, fp8=fp8)
        states = _states(model, degrees, zero=zero, muon=muon, offload=offload)
        found.append(replace(states, activations=saved))
    return max(found, key=lambda one: one.total)


def _scales(recipe: Fp8Recipe, rows: int, columns: int) -> int:
    """Return the bytes of the scales of codes `[rows, columns]`, a weight's apart."""
    if recipe.scaling == "mx":
        return rows * -(-columns // MX_BLOCK)
    groups = {"tensor": 1, "row": rows, "block": rows * -(-columns // BLOCK)}
    return 4 * groups[recipe.scaling]


def _coded(model: Decoder, path: str) -> int:
    """Return the bytes of both copies in FP8 of a weight, if it has any; tiles without scales."""
    owner = model.get_submodule(path.rpartition(".")[0])
    product, weight = getattr(owner, "fp8", None), model.get_parameter(path)
    if not isinstance(product, Fp8Product) or weight.dim() != 2:
        return 0
    recipe, (rows, columns) = product.recipe, weight.shape
    size = 2 * rows * columns
    if recipe.scaling in ("tensor", "block"):
        return size
    return size + _scales(recipe, rows, columns) + _scales(recipe, columns, rows)


def _states(model: Decoder, d: Degrees, *, zero: int, muon: bool, offload: bool) -> Memory:
    """Return what lasts from step to step, and the gradients; no activations."""
    layouts, inner = model.layouts(), d.tp * d.cp * (d.dp or 1)
    units: dict[int, int] = {}
    values = sum(x.nbytes for x in model.buffers())
    gradients = device = host = 0
    for path, p in model.named_parameters():
        ranks = inner // (d.ep * d.etp) if layouts[path].expert else d.cp * (d.dp or 1)
        wide = torch.promote_types(p.dtype, torch.float32).itemsize
        narrow = p.dtype.itemsize < wide
        whole, rows = p.numel(), -(-len(p) // ranks) * p[0].numel()
        if zero == 3 and ranks > 1:
            values += rows * p.dtype.itemsize
            unit = int(path.split(".")[1]) if path.startswith("blocks.") else -1
            units[unit] = units.get(unit, 0) + p.nbytes + _coded(model, path)
        else:
            values += p.nbytes + _coded(model, path)
        if zero >= 2 and ranks > 1:
            gradients += rows * wide
        else:  # narrow gradients are summed elsewhere than where they are accumulated
            apart = narrow and ranks * d.rep > 1
            gradients += (whole + apart * (whole if zero == 0 else rows)) * wide
        state = (1 if muon and is_hidden(path, p) else 2) * wide
        state += wide if narrow or offload else 0
        size = (whole if zero == 0 else rows) * state
        device, host = (device, host + size) if offload else (device + size, host)
    root = units.pop(-1, 0)
    there = [units[n] for n in sorted(units)]
    values += root + max((x + y for x, y in pairwise(there)), default=sum(there))
    return Memory(
        parameters=values, gradients=gradients, optimizer=device, activations=0, host=host
    )
