"""What a plain decoder saves for its backward, in closed form: an oracle beside the rehearsal.

Activations are counted by storages: a block names what it keeps, and a name that two operators, or
two blocks, share is one storage. Written down from Korthikanti et al. 2022,
https://arxiv.org/abs/2205.05198, section 4, and by hand, of Llama, Qwen 3 and Mixtral: a block that
keeps more than it must fails a test here, though a rehearsal would follow it.

Shapes: T tokens, D width, F feed-forward width, H query heads, G key/value heads, K head dimension,
E experts, M rows that experts serve, R tensor-parallel ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from warploom.kernels.gemm import Fp8Recipe
from warploom.kernels.quant.formats import BLOCK, MX_BLOCK
from warploom.models.architecture import Architecture, Experts
from warploom.models.stages import Stages
from warploom.parallel.memory import Recompute
from warploom.parallel.mesh import Degrees

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
    """As `activations` of recipes/plan/memory.py, whose arguments these are."""
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
