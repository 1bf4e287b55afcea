"""The mesh: which ranks form a group on which axis.

    axis    ranks that differ on it hold                                     varies
    tp      slices of each layer (tensor and sequence parallel)              fastest
    cp      parts of each sequence (context parallel)
    dp      different sequences, and shards of the optimizer's state (data)
    rep     different sequences, replicas of everything (data, replicated)
    pp      different layers (pipeline parallel)                             slowest

    etp, ep, edp re-slice the same tp x cp x dp ranks for experts (etp fastest, then ep, then edp):
    they add no ranks, and etp x ep x edp = tp x cp x dp.

uly splits cp again: uly neighbouring ranks of cp exchange heads (Ulysses), and the ranks of a
ring have cp / uly members: `ulysses` and `ring` are their groups.

Three groups are products of axes: `shard` = cp x dp, over which the optimizer's state is sharded
(these ranks hold the same parameters), `tokens` = cp x dp x rep, whose ranks see different tokens,
and `stage` = tp x cp x dp, which together hold one pipeline stage once. `ends` are the first and
the last rank of pp, which may share a tied embedding. A group of one rank is `None`, and nothing
communicates over it.

A mesh is a frozen value. There is no current mesh: two may live in one process.

Source: Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, section 3 (the order of the axes);
Liu et al. 2025, https://arxiv.org/abs/2504.14960 (folding the expert axes).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from types import MappingProxyType

import torch.distributed as dist

from .collectives import Group

DENSE = ("tp", "cp", "dp", "rep", "pp")  # fastest first
NAMED = (*DENSE, "ep", "etp", "uly")


@dataclass(frozen=True, kw_only=True, slots=True)
class Degrees:
    """How many ways each axis splits. `dp=None` stands for what is left of the world."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int | None = None
    rep: int = 1
    ep: int = 1
    etp: int = 1
    uly: int = 1

    @staticmethod
    def parse(text: str) -> "Degrees":
        """Read degrees such as `tp2,pp2,dp4`; an axis that is absent has degree 1.

        Raises:
            ValueError: If a part is not an axis and a degree, or an axis is named twice.
        """
        found: dict[str, int] = {}
        for part in filter(None, text.replace(" ", "").split(",")):
            match = re.fullmatch(r"([a-z]+)([1-9]\d*)", part)
            if match is None or match[1] not in NAMED:
                raise ValueError(
                    f"mesh must list degrees of {', '.join(NAMED)}, such as tp2,dp4; got {part!r}"
                )
            if match[1] in found:
                raise ValueError(f"mesh must name each axis once; {match[1]} is twice in {text!r}")
            found[match[1]] = int(match[2])
        return Degrees(**found)

    def resolve(self, world: int) -> "Degrees":
        """Fill in `dp` for a world of `world` ranks.

        Raises:
            ValueError: If the degrees do not multiply to `world`, or the expert axes do not fold.
        """
        rest = self.tp * self.cp * self.pp * self.rep
        dp = max(world // rest, 1) if self.dp is None else self.dp
        if rest * dp != world:
            named = " x ".join(
                f"{name}{value}"
                for name in DENSE
                if (value := dp if name == "dp" else getattr(self, name)) > 1
            )
            raise ValueError(
                f"mesh ({named or 'dp1'} = {rest * dp} ranks) must multiply to the world size "
                f"({world}): start {rest * dp} processes, or change the degrees"
            )
        inner = self.tp * self.cp * dp
        if inner % (self.ep * self.etp):
            raise ValueError(
                f"ep x etp ({self.ep} x {self.etp}) must divide tp x cp x dp "
                f"({self.tp} x {self.cp} x {dp} = {inner}): the expert axes fold into them"
            )
        check_degree("uly", self.uly, {"cp": self.cp})
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Degrees(**{**values, "dp": dp})

    @property
    def world(self) -> int:
        """Ranks in all; the degrees must be resolved."""
        return math.prod(getattr(self, name) for name in DENSE)


def check_degree(
    axis: str, degree: int, whole: Mapping[str, int],
    either: Mapping[str, int] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Refuse a degree that cannot split these sizes, and name the nearest that can.

    Args:
        axis: Its name in a mesh.
        degree: How many ways it splits.
        whole: Sizes that it must divide, by name.
        either: Sizes that it must divide or be a multiple of, by name.

    Raises:
        ValueError: If it does not.
    """

    def fits(n: int) -> bool:
        crossed = (size % n and n % size for size in either.values())
        return not any((*crossed, *(size % n for size in whole.values())))

    if not fits(degree):
        ways = (range(min(degree, most := min(whole.values())), 0, -1), range(degree, most + 1))
        good = [f"{axis}{n}" for way in ways for n in [*filter(fits, way)][:1]]
        lists = (", ".join(f"{name} ({size})" for name, size in x.items()) for x in (whole, either))
        what = ", and divide or be a multiple of ".join(filter(None, lists))
        does = f"{' and '.join(good)} {'do' if len(good) > 1 else 'does'}"
        raise ValueError(f"{axis} ({degree}) must divide {what}: {does}")


def _line(sizes: Sequence[int], kept: Sequence[int], rank: int) -> list[int]:
    """List the ranks that differ from `rank` only on the dimensions `kept`, the first fastest."""
    strides = [math.prod(sizes[:d]) for d in range(len(sizes))]
    at = [rank // strides[d] % sizes[d] for d in range(len(sizes))]
    axes = [range(sizes[d]) if d in kept else [at[d]] for d in range(len(sizes))]
    return sorted(
        sum(i * s for i, s in zip(index, strides, strict=True)) for index in product(*axes)
    )


@dataclass(frozen=True, eq=False)
class Mesh:
    """The groups that this rank is in; build it with `Mesh.build`.

    Attributes:
        degrees: Resolved degrees.
        rank: This process in the world.
        world: All ranks, as a group.
        shard: cp x dp: these ranks hold the same parameters and shard the optimizer's state.
        tokens: cp x dp x rep: these ranks see different tokens.
        stage: tp x cp x dp: the ranks of one pipeline stage within one replica.
        edp: The ranks that hold the same experts.
        ulysses: The ranks of cp that exchange heads.
        ring: The ranks of cp between which keys and values travel.
        ends: The first and the last rank of pp, on these two only; elsewhere `None`.
    """

    degrees: Degrees
    rank: int
    world: Group
    tp: Group
    cp: Group
    dp: Group
    rep: Group
    pp: Group
    ep: Group
    etp: Group
    edp: Group
    shard: Group
    tokens: Group
    stage: Group
    ulysses: Group
    ring: Group
    ends: Group

    @staticmethod
    def build(text: str = "", *, world: int | None = None) -> "Mesh":
        """Build the mesh `text` over all ranks; a collective call.

        Without torch.distributed the world is this one process.

        Args:
            text: Degrees such as `tp2,dp4`; an absent dp is what is left of the world.
            world: Expected number of ranks; by default that of torch.distributed.

        Raises:
            ValueError: If `text` is malformed or does not fit the world.
        """
        ready = dist.is_available() and dist.is_initialized()
        size = dist.get_world_size() if ready else 1
        if world is not None and world != size:
            raise ValueError(f"mesh was asked for {world} ranks, torch.distributed has {size}")
        degrees = Degrees.parse(text).resolve(size)
        rank = dist.get_rank() if ready else 0
        return _build(degrees, rank, _new_group(degrees.world, rank))

    @staticmethod
    def alone() -> "Mesh":
        """Return the mesh of this one process, whatever world it is in."""
        return _build(Degrees.parse("").resolve(1), 0, lambda ranks: None)

    def degree(self, axis: str) -> int:
        """Return how many ways `axis` (tp, cp, dp, rep, pp, ep, etp, edp, uly) splits."""
        if axis == "edp":
            d = self.degrees
            return d.tp * d.cp * (d.dp or 1) // (d.ep * d.etp)
        value: int = getattr(self.degrees, axis)
        return value

    def coordinate(self, axis: str) -> int:
        """Return this rank's place on `axis`."""
        group: Group = getattr(self, axis)
        return 0 if group is None else group.rank()

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.degrees.world

    @property
    def data_ranks(self) -> int:
        """How many ways the batch is dealt: dp x rep; context-parallel ranks get the same rows."""
        return self.degree("dp") * self.degree("rep")

    @property
    def data_rank(self) -> int:
        """Which of these parts this rank gets."""
        return self.coordinate("dp") + self.degree("dp") * self.coordinate("rep")


def _new_group(world: int, rank: int) -> Callable[[list[int]], Group]:
    """Return a maker of groups that gives the same group for the same ranks.

    torch names a group by its ranks and by how many groups the process has made. So a rank that
    makes none where others do makes one of itself, or the next group would have two names and
    its ranks never meet.
    """
    made: dict[tuple[int, ...], Group] = {}

    def new(ranks: list[int]) -> Group:
        key = tuple(ranks)
        if key not in made:
            if len(ranks) == 1:
                made[key] = None
            elif len(ranks) == world:
                made[key] = dist.group.WORLD
            else:
                here = ranks if rank in ranks else [rank]
                made[key] = dist.new_group(here, use_local_synchronization=True)
        return made[key]

    return new


def _build(degrees: Degrees, rank: int, new: Callable[[list[int]], Group]) -> Mesh:
    sizes = [getattr(degrees, name) for name in DENSE]
    index = {name: d for d, name in enumerate(DENSE)}

    def group(*axes: str) -> Group:
        return new(_line(sizes, [index[a] for a in axes], rank))

    inner = math.prod(sizes[:3])
    experts = [degrees.etp, degrees.ep, inner // (degrees.ep * degrees.etp)]
    base = rank - rank % inner

    def expert_group(d: int) -> Group:
        return new([base + r for r in _line(experts, [d], rank % inner)])

    line = _line(sizes, [index["cp"]], rank)
    at = line.index(rank)
    stages = _line(sizes, [index["pp"]], rank)
    first_last = sorted({stages[0], stages[-1]})
    ends = new(first_last)  # on every rank, in the middle too
    return Mesh(
        degrees=degrees, rank=rank, world=group(*DENSE), **{name: group(name) for name in DENSE},
        shard=group("cp", "dp"), tokens=group("cp", "dp", "rep"), stage=group("tp", "cp", "dp"),
        etp=expert_group(0), ep=expert_group(1), edp=expert_group(2),
        ulysses=new(line[at - at % degrees.uly :][: degrees.uly]),
        ring=new(line[at % degrees.uly :: degrees.uly]), ends=ends if rank in first_last else None,
    )  # fmt: skip
