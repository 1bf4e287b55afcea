"""A model made small without losing what its parallel layers can trip over.

Kept: query heads a key/value head; whether key/value heads are split or shared by tensor-parallel
ranks, and one or several of them a rank; whether the width is that of all heads; the vocabulary's
remainder; experts a rank, experts a token, their groups; dense layers before them; a remainder of
layers over stages; every kind of block; tied embeddings, norms of queries and keys, the weights of
all losses.
"""

from dataclasses import replace
from math import lcm

from warploom.models.architecture import Architecture, Experts, Kind, Latent, StateSpace
from warploom.parallel.mesh import Degrees

from ..plan.fits import check

HEAD_DIM = 4
_ODD = 5  # features that a rank has of what its degree divides: no power of two


def built_in(degrees: Degrees, stages: int) -> Architecture:
    """Return a small decoder of dense and expert layers that uses every axis of the mesh."""
    split = degrees.tp * degrees.uly
    experts = Experts(
        count=4 * degrees.ep,
        top_k=2,
        hidden=_ODD * degrees.etp,
        shared=3 * degrees.tp,
        dense_layers=1,
        balance=1e-2,
        router_z=1e-3,
        bias_rate=1e-2,
    )
    return Architecture(
        layers=max(3, stages + 1),
        width=24,
        heads=2 * split,
        kv_heads=split,
        head_dim=HEAD_DIM,
        hidden=_ODD * degrees.tp,
        vocabulary=37,
        max_positions=64,
        qk_norm="head",
        tied=True,
        experts=experts,
    )


def shrink(architecture: Architecture, degrees: Degrees, stages: int) -> Architecture:
    """Return a small architecture on which the mesh has the same to do.

    Raises:
        ValueError: If the mesh cannot split the architecture as it is.
    """
    a, d = architecture, degrees
    check(a, d, stages=stages)
    split = d.tp * d.uly
    each = a.kv_heads // split
    kv_heads = split * min(each, 2) if a.kv_heads % split == 0 else a.kv_heads
    heads = kv_heads * (a.heads // a.kv_heads)
    head_dim = min(a.head_dim, HEAD_DIM)
    experts = None if a.experts is None else _shrink_experts(a.experts, d)
    dense = 0 if experts is None else experts.dense_layers or 0
    remainder = 1 if a.layers % stages else 0
    layers = max(stages + remainder, dense + (experts is not None), 2)
    layers = max(layers, len(set(a.kinds)) + (experts is not None and dense > 0))
    made = replace(
        a,
        layers=min(layers, a.layers),
        kinds=_shrink_kinds(a, min(layers, a.layers)),
        rope_dim=None if not a.rope_dim else 2,
        window=None if a.window is None else 3,
        latent=None if a.latent is None else _shrink_latent(a.latent),
        ssm=None if a.ssm is None else _shrink_ssm(a.ssm, d),
        width=heads * head_dim + (0 if a.width == a.heads * a.head_dim else 6),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=_ODD * d.tp,
        vocabulary=lcm(d.tp, 12) + (1 if a.vocabulary % d.tp or a.vocabulary % 2 else 0),
        max_positions=64,
        experts=experts,
    )
    check(made, d, stages=stages)
    return made


def _shrink_kinds(a: Architecture, layers: int) -> tuple[Kind, ...]:
    """Keep each kind of block, in the order in which they first come."""
    found = tuple(dict.fromkeys(map(a.kind, range(a.layers))))
    return tuple(found[n % len(found)] for n in range(layers)) if a.kinds else ()


def _shrink_latent(latent: Latent) -> Latent:
    queries = None if latent.queries is None else 6
    return replace(latent, keys=5, queries=queries, rotated=2, values=3)


def _shrink_ssm(ssm: StateSpace, degrees: Degrees) -> StateSpace:
    """Keep whether groups are shared by tensor-parallel ranks."""
    split = degrees.tp * degrees.cp
    groups = min(ssm.groups, 2 * degrees.tp)
    return replace(ssm, heads=lcm(split, groups), groups=groups, head_dim=HEAD_DIM, state=3)


def _shrink_experts(experts: Experts, degrees: Degrees) -> Experts:
    groups = min(experts.groups, 4)
    top_groups = max(1, round(experts.top_groups * groups / experts.groups))
    top_k = min(experts.top_k, 4)
    unit = lcm(degrees.ep, groups)
    count = unit * min(2, max(1, experts.count // unit))
    while count // groups * top_groups < top_k and count < experts.count:
        count += unit
    return replace(
        experts,
        count=min(count, experts.count),
        top_k=top_k,
        groups=groups,
        top_groups=top_groups,
        hidden=_ODD * degrees.etp,
        shared=None if experts.shared is None else 3 * degrees.tp,
        dense_layers=1 if experts.dense_layers else None,
    )
