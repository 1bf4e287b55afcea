"""What a model's layers and a step should communicate, in closed form, and what they do.

A micro-batch, of what one rank sends; R tensor-parallel ranks, t tokens of a context-parallel rank,
u = (R - 1) t / R x D elements; M members of a ring, each with e elements of keys and values:

    column, row        an all-gather of u here, a reduce-scatter of u there; backward the adjoint
    embedding, head    a reduce-scatter, an all-gather; the head merges 3 t elements by all-reduces
    ring               M - 1 exchanges of e; backward twice as many
    all_gather         an all-gather of (M - 1) e; backward a reduce-scatter
    Ulysses            all-to-alls of q, k and v, and of the output; backward the same
    latent attention   all-gathers as wide as the latents, and the key that rotates, instead of D
    norm of all heads  all-reduces of t, for queries and for keys; backward the same
    states             over cp all-to-alls of x with dt, and of y, and an all-gather of B and C;
                       where R ranks share G groups, an all-reduce of G t; backward the adjoints
    experts            all-to-alls of counts, and of the rows that are routed to other ranks, there
                       and back; P etp ranks gather and scatter each row to the other P - 1
    further tokens     each what the embedding, a block and the head send
    selective, full    the gathers, or all of a block's forward, again in the backward

A step: each stage sends its micro-batches on and their gradients back; ZeRO-1 scatters each
gradient over its replicas and gathers the parameters, ZeRO-2 scatters in each micro-batch, ZeRO-3
also gathers each block twice in each, and what is outside the blocks once.

Source: Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2; Liu et al. 2023,
https://arxiv.org/abs/2310.01889; Jacobs et al. 2023, https://arxiv.org/abs/2309.14509, section 3.2;
Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 7.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from warploom.models.architecture import Architecture, Experts, StateSpace
from warploom.models.decoder import Decoder
from warploom.parallel.collectives import Group, gather_json, place
from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import ShardedOptimizer

from ..plan.ledger import Ledger, ring_bytes
from .plan import Case

ITEM = 8  # bytes of a float64
GATHER, SCATTER, REDUCE = "all_gather", "reduce_scatter", "all_reduce"
SWAP, EXCHANGE = "all_to_all", "exchange"
RECOMPUTED = ("none", "selective", "full")  # of others there is no formula here

Key = tuple[str, str, str]
Counted = dict[Key, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Traffic:
    """One kind of collective.

    Attributes:
        where: `micro-batch`, of the layers alone, or `step`, all but the layers.
        axis: Over which group.
        op: Which collective.
        phase: `forward` or `backward`; of a step `forward` is all that is no backward.
        calls: How many there were.
        calls_wanted: How many there should be; NaN without a formula.
        bytes: What was sent.
        bytes_wanted: What it should have; NaN without a formula.
    """

    where: str
    axis: str
    op: str
    phase: str
    calls: float
    calls_wanted: float
    bytes: float
    bytes_wanted: float

    @property
    def agrees(self) -> bool:
        """Whether what was counted is what should be, as far as there is a formula."""
        pairs = ((self.calls, self.calls_wanted), (self.bytes, self.bytes_wanted))
        return all(math.isnan(wanted) or got == wanted for got, wanted in pairs)

    def __add__(self, other: "Traffic") -> "Traffic":
        """Add that of another rank."""
        return replace(
            self,
            calls=self.calls + other.calls,
            calls_wanted=self.calls_wanted + other.calls_wanted,
            bytes=self.bytes + other.bytes,
            bytes_wanted=self.bytes_wanted + other.bytes_wanted,
        )


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of a micro-batch that ran.

    Attributes:
        tokens: Tokens t that this context-parallel rank holds, padding included.
        documents: Documents in all.
        routed: Experts `[t / R, k]` of this rank's tokens, of each expert layer; -1 is none.
    """

    tokens: int
    documents: int
    routed: list[Tensor]


class _Theory:
    """Adds up calls and bytes."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.found: Counted = defaultdict(lambda: (0.0, 0.0))

    def add(self, group: Group, op: str, phase: str, calls: float, sent: float) -> None:
        """Count `calls` that send `sent` bytes in all."""
        if group is not None and calls:
            key = (self.ledger.axis(group), op, phase)
            before = self.found[key]
            self.found[key] = (before[0] + calls, before[1] + sent)

    def reduce(self, group: Group, phase: str, calls: float, elements: int) -> None:
        """Count all-reduces of so many elements each."""
        _, ranks = place(group)
        self.add(group, REDUCE, phase, calls, calls * ring_bytes(REDUCE, ranks, elements * ITEM))


def micro_batch(
    model: Decoder, mesh: Mesh, case: Case, seen: Seen, ledger: Ledger
) -> Counted | None:
    """Return what the layers of this rank send in one micro-batch, without its pipeline.

    Args:
        model: The model.
        mesh: The mesh.
        case: How it trains.
        seen: What the micro-batch was.
        ledger: Names the groups.

    Returns:
        Calls and bytes by axis, collective and phase; `None` where there is no formula.
    """
    if (recompute := case.recompute) not in RECOMPUTED:
        return None
    a, theory, tokens = model.architecture, _Theory(ledger), seen.tokens
    ranks, routed = mesh.degree("tp"), iter(seen.routed)
    unit = (ranks - 1) * tokens // ranks * ITEM  # of one feature

    def tensor(op: str, phase: str, calls: float, width: int = a.width) -> None:
        theory.add(mesh.tp, op, phase, calls, calls * unit * width)

    for number in map(int, model.blocks):
        _block(tensor, a, number, recompute)
        _mixer(theory, model, mesh, case, number, tokens)
        if (experts := a.routed(number)) is not None:
            found, full = next(routed), recompute == "full"
            _experts(theory, experts, mesh, a.width, seen.documents, found, full)
            losses = (experts.balance > 0) + (experts.router_z > 0)
            theory.reduce(mesh.tp, "forward", losses > 0, losses)
            again = full and losses > 0 and _keeps_on(a, number)
            theory.reduce(mesh.tp, "backward", again, losses)
    further = a.predict * (model.stages.last in model.held)
    embedded = (0 in model.held) + further
    tensor(SCATTER, "forward", embedded)
    tensor(GATHER, "backward", embedded)
    if hasattr(model, "head"):
        tensor(GATHER, "forward", 1 + further)
        tensor(SCATTER, "backward", 1 + further)
        for parts in (1, 2):
            theory.reduce(mesh.tp, "forward", 1 + further, parts * tokens)
    return dict(theory.found)


def _block(tensor: Callable[..., None], a: Architecture, number: int, recompute: str) -> None:
    """Count what the projections of a block gather and scatter of the tokens."""
    again, full, experts = recompute != "none", recompute == "full", a.routed(number)
    entered = _entered(a, number)
    for width in entered:
        tensor(GATHER, "forward", 1, width)
        tensor(SCATTER, "backward", 1, width)
    for width in entered[: None if full else 2]:  # what nothing keeps does not run again
        tensor(GATHER, "backward", again, width)
    fed = experts is None or experts.shared is not None
    tensor(GATHER, "forward", fed)
    tensor(SCATTER, "backward", fed)
    tensor(GATHER, "backward", fed and (full or (again and experts is None)))
    tensor(SCATTER, "forward", 1 + fed)
    tensor(GATHER, "backward", 1 + fed)
    left = experts is None and not _keeps_on(a, number)
    tensor(SCATTER, "backward", full * (1 + fed - left))


def _keeps_on(a: Architecture, number: int) -> bool:
    """Whether a block keeps something after its feed-forward: a norm is there."""
    return a.norm_at != "before" or number >= a.layers


def _entered(a: Architecture, number: int) -> list[int]:
    """Return the widths of what is gathered before what mixes the tokens of a block."""
    if a.latent is None or a.kind(number) == "ssm":
        return [a.width]
    return [a.latent.queries or a.width, a.latent.keys, a.latent.rotated]


def _mixer(
    theory: _Theory, model: Decoder, mesh: Mesh, case: Case, number: int, tokens: int
) -> None:
    """Count what a block sends to mix tokens, between its projections."""
    a, times = model.architecture, 2 if case.recompute == "full" else 1
    if a.kind(number) == "ssm":
        assert a.ssm is not None
        _states(theory, a.ssm, mesh, tokens, times)
        return
    _attention(theory, a, mesh, case, tokens)
    if a.qk_norm == "full":  # the sums of squares of queries, and of keys
        theory.reduce(mesh.tp, "forward", 2, tokens)
        theory.reduce(mesh.tp, "backward", 2 * times, tokens)


def _states(theory: _Theory, ssm: StateSpace, mesh: Mesh, tokens: int, times: int) -> None:
    """Count a state-space mixer, whose forward runs `times` times."""
    ranks = mesh.degree("tp")
    heads, groups = ssm.heads // ranks, max(ssm.groups // ranks, 1)
    here = tokens
    for group in (mesh.ulysses, mesh.ring):
        _, size = place(group)
        each = (ssm.head_dim + 1, ssm.head_dim)  # x with dt, and y on its way back
        sent = sum(ring_bytes(SWAP, size, tokens * heads * n * ITEM) for n in each)
        theory.add(group, SWAP, "forward", 2, sent)
        theory.add(group, SWAP, "backward", 2 * times, times * sent)
        sent = ring_bytes(GATHER, size, here * 2 * groups * ssm.state * ITEM)
        theory.add(group, GATHER, "forward", 1, sent)
        theory.add(group, GATHER, "backward", times - 1, (times - 1) * sent)
        theory.add(group, SCATTER, "backward", 1, sent)
        here *= size
    if ssm.groups < ranks:  # whose norms have sums of squares over several ranks
        theory.reduce(mesh.tp, "forward", 1, tokens * ssm.groups)
        theory.reduce(mesh.tp, "backward", times, tokens * ssm.groups)


def _attention(theory: _Theory, a: Architecture, mesh: Mesh, case: Case, tokens: int) -> None:
    again = case.recompute == "full"
    tp, uly = mesh.degree("tp"), mesh.degree("uly")
    heads, keys, values = a.heads // tp, max(a.kv_heads // tp, 1), a.head_dim
    if a.latent is not None:
        keys, values = heads, a.latent.values
    members, both = mesh.degree("cp") // uly, a.head_dim + values
    travels = max(keys // uly, 1) * tokens * uly * both * ITEM * (members - 1)
    times = 2 if again else 1
    if mesh.ring is not None and case.parallel.context == "ring":
        theory.add(mesh.ring, EXCHANGE, "forward", members - 1, travels)
        backward = (2 + again) * (members - 1)
        theory.add(mesh.ring, EXCHANGE, "backward", backward, (2 + again) * travels)
    elif mesh.ring is not None:
        theory.add(mesh.ring, GATHER, "forward", 1, travels)
        theory.add(mesh.ring, SCATTER, "backward", 1, travels)
        theory.add(mesh.ring, GATHER, "backward", again, again * travels)
    if mesh.ulysses is not None:
        spread = max(keys, uly)  # keys that are fewer than the ranks travel several times
        brought = (heads * a.head_dim + spread * both, heads * values)
        sent = sum(ring_bytes(SWAP, uly, n * tokens * ITEM) for n in brought)
        theory.add(mesh.ulysses, SWAP, "forward", 2, sent)
        theory.add(mesh.ulysses, SWAP, "backward", 2 * times, times * sent)


def _experts(
    theory: _Theory,
    experts: Experts,
    mesh: Mesh,
    width: int,
    documents: int,
    routed: Tensor,
    again: bool,
) -> None:
    """Count an expert layer; what a rank sends back is counted where it came from."""
    table, row = experts.count * ITEM, width * ITEM  # a count is as long as a float64
    rank, ranks = place(mesh.ep)
    chosen = routed[routed >= 0]
    leave = 2 * row * int((chosen // (experts.count // ranks) != rank).sum())
    counted = ring_bytes(SWAP, ranks, table)
    theory.add(mesh.ep, SWAP, "forward", 3, counted + leave)
    theory.add(mesh.ep, SWAP, "backward", 5 if again else 2, again * (counted + leave) + leave)
    shared = 2 * row * len(chosen) * (mesh.degree("etp") - 1)
    lines = ring_bytes(GATHER, mesh.degree("etp"), table)
    theory.add(mesh.etp, GATHER, "forward", 1, lines)
    theory.add(mesh.etp, SWAP, "forward", 2, shared)
    theory.add(mesh.etp, GATHER, "backward", again, again * lines)
    theory.add(mesh.etp, SWAP, "backward", 4 if again else 2, (1 + again) * shared)
    if experts.balance > 0:
        for group in (mesh.cp, mesh.tp):
            theory.reduce(group, "forward", 1, documents * (experts.count + 1))


def step(
    mesh: Mesh, case: Case, optimizer: ShardedOptimizer, tokens: int, ledger: Ledger
) -> Counted:
    """Return what a rank sends in a step beside its layers: calls are without formula.

    All-reduces are not judged, nor the all-to-alls by which Muon's owners of matrices get these.

    Args:
        mesh: The mesh.
        case: How it trains.
        optimizer: Knows the parameters.
        tokens: Tokens t that this context-parallel rank holds, padding included.
        ledger: Names the groups.
    """
    theory = _Theory(ledger)
    own, place = mesh.coordinate("pp"), case.stages.placement
    boundary = tokens // mesh.degree("tp") * case.architecture.width * ITEM
    for s, rank in enumerate(place):
        ends = [n for n in (s - 1, s + 1) if 0 <= n < len(place) and place[n] != rank]
        if rank == own:
            for _ in ends:
                theory.add(mesh.pp, EXCHANGE, "", math.nan, case.microbatches * boundary)
    zero, micro = case.parallel.zero, case.microbatches
    scatters = (0.0, 1.0, micro, micro)[zero]
    if zero >= 2 and len(place) > mesh.degree("pp"):
        scatters = math.nan  # what several stages of a rank share may leave once more
    for path, parameter in optimizer.parameters.items():
        group = mesh.edp if optimizer.layouts[path].expert else mesh.shard
        if group is None:
            continue
        ranks = group.size()
        rows = -(-parameter.shape[0] // ranks)
        sent = (ranks - 1) * rows * math.prod(parameter.shape[1:]) * ITEM
        gathers: float = 2 * micro if zero == 3 and path.startswith("blocks.") else min(zero, 1)
        if case.optimizer == "muon":
            gathers = math.nan  # the first step also gathers who owns which matrix
        theory.add(group, SCATTER, "", math.nan, scatters * sent)
        theory.add(group, GATHER, "", math.nan, gathers * sent)
    if case.optimizer == "muon":  # who owns which matrix is asked of the experts' ranks too
        theory.add(mesh.edp, GATHER, "", math.nan, math.nan)
    return dict(theory.found)


def beside_layers(counted: Counted, layers: Counted, microbatches: int) -> Counted:
    """Take the layers' share from a step's, over both phases."""
    found: Counted = defaultdict(lambda: (0.0, 0.0))
    for share, table in ((1, counted), (-microbatches, layers)):
        for (axis, op, _), (calls, sent) in table.items():
            before = found[(axis, op, "")]
            found[(axis, op, "")] = (before[0] + share * calls, before[1] + share * sent)
    judged = (SCATTER, GATHER, EXCHANGE)
    return {key: value for key, value in found.items() if key[1] in judged and any(value)}


def compare(where: str, counted: Counted, wanted: Counted | None) -> list[Traffic]:
    """Lay what was counted beside what should be; without a formula all of it, without judging."""
    nothing = (0.0, 0.0) if wanted is not None else (math.nan, math.nan)
    found = wanted or {}
    return [
        Traffic(where, *key, *_mixed(counted.get(key, (0.0, 0.0)), found.get(key, nothing)))
        for key in sorted({*counted, *found})
    ]


def _mixed(
    got: tuple[float, float], wanted: tuple[float, float]
) -> tuple[float, float, float, float]:
    return got[0], wanted[0], got[1], wanted[1]


def over_ranks(lines: list[Traffic], mesh: Mesh) -> list[Traffic]:
    """Add up the lines of all ranks; what a rank has none of counts nothing."""
    total: dict[tuple[str, str, str, str], Traffic] = {}
    for own in gather_json([asdict(line) for line in lines], mesh.world):
        for line in (Traffic(**values) for values in own):
            key = (line.where, line.axis, line.op, line.phase)
            total[key] = total[key] + line if key in total else line
    return [total[key] for key in sorted(total)]
