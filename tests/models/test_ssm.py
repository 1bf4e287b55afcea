"""State-space layers: the unsharded one on tensor- and context-parallel ranks, and from a cache."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.parallel.test_tensor_linear import draw, gradients, near, slices
from torch.distributed import ProcessGroup

from warploom.kernels.invariant import batch_invariant
from warploom.models.architecture import Architecture, StateSpace
from warploom.models.cache import Cache
from warploom.models.cost import flops_per_token, state_bytes
from warploom.models.decoder import Decoder
from warploom.models.sequences import sequences
from warploom.models.ssm import StateSpaceMixer
from warploom.parallel.collectives import all_reduce_
from warploom.parallel.context import shard_sequence
from warploom.parallel.mesh import Mesh
from warploom.parallel.sharding import layouts

D, LENGTHS = 6, torch.tensor([5, 1, 8, 1], dtype=torch.int32)
SIZES = Architecture(
    layers=2,
    width=D,
    heads=4,
    kv_heads=2,
    head_dim=4,
    hidden=8,
    vocabulary=11,
    max_positions=64,
    kinds=("ssm", "full"),
    ssm=StateSpace(heads=8, head_dim=3, state=5, groups=2, convolution=4),
)


def _sized(groups):
    heads = 12 if groups == 3 else 8  # with 3, half of the heads end within a group
    return replace(SIZES, ssm=replace(SIZES.ssm, groups=groups, heads=heads))


def _mixer(groups, **where):
    layer = StateSpaceMixer(_sized(groups), **where).double()
    with torch.no_grad():
        for path, layout in layouts(layer).items():
            for piece in layout.pieces:
                values = draw(*piece.shape, seed=len(piece.name))
                piece.of_local(layer.get_parameter(path)).copy_(piece.of_logical(values) / 2 + 0.1)
    return layer


def _equals_unsharded(degrees, groups):
    mesh = Mesh.build(degrees)
    whole, mine = (sequences((1, 15), LENGTHS, SIZES, mesh=m) for m in (None, mesh))
    alone = _mixer(groups, group=None)
    model = _mixer(groups, group=mesh.tp, ring=mesh.ring, ulysses=mesh.ulysses)
    x, dy = draw(15, D, seed=1), draw(15, D, seed=2)
    full = x.clone().requires_grad_()
    want = alone(full, whole)
    want.backward(dy)

    def cut(t):
        if mine.split is None:
            t = F.pad(t, (0, 0, 0, mine.padding))
        else:
            t = shard_sequence(t, mine.split, mesh.coordinate("cp"))
        return slices(t, mesh.tp, 0)

    local = cut(x).clone().requires_grad_()
    got = model(local, mine)
    real = slices(mine.documents >= 0, mesh.tp, 0)
    near(got[real], cut(want.detach())[real], "output")
    got.backward(cut(dy))
    near(local.grad, cut(full.grad), "dx")
    for p in model.parameters():
        all_reduce_(p.grad, mesh.cp)
    found, expected = gradients(model, mesh.tp), gradients(alone, None)
    assert (
        found.keys()
        == expected.keys()
        == {
            *(f"in_proj.{part}.weight" for part in ("z", "x", "b", "c", "dt")),
            *(f"conv.{part}.{leaf}" for part in "xbc" for leaf in ("weight", "bias")),
            *("a_log", "d", "dt_bias", "norm.weight", "out_proj.weight"),
        }
    )
    for name, gradient in expected.items():
        near(found[name], gradient, f"d{name}")


@pytest.mark.parametrize(
    ("size", "degrees"), [(2, "tp2"), (4, "tp4"), (2, "cp2"), (4, "tp2,cp2"), (4, "cp4,uly2")]
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_sharded_layer_equals_unsharded(pool, size, degrees, groups):
    pool(size, _equals_unsharded, degrees, groups)


def test_ranks_may_share_a_group(pool):
    pool(2, _equals_unsharded, "cp2", 3)


def _cached(model, x, mix, plan):
    """Pass rows of three sequences in pieces; `plan` gives the counts of each call."""
    cache = Cache(model, pages=16, page_size=8, slots=5)
    for tensors in cache.layers.values():
        for t in tensors:
            t.fill_(torch.nan)
    tables = torch.randperm(16, dtype=torch.int32)[:9].view(3, 3)
    place, got, slots = [0] * 3, [[] for _ in x], torch.tensor([4, 0, 2])
    for counts in plan:
        live = [n for n, count in enumerate(counts) if count]
        each = [counts[n] for n in live]
        where = cache.step(
            torch.tensor([place[n] for n in live]), torch.tensor(each), tables[live], slots[live]
        )
        new = torch.cat([x[n][place[n] : place[n] + counts[n]] for n in live])
        for n, part in zip(live, mix(new, where)[: sum(each)].split(each), strict=True):
            got[n].append(part)
            place[n] += counts[n]
    return [torch.cat(parts) for parts in got]


PLAN = ((5, 0, 1), (1, 3, 1), (9, 1, 1), (1, 1, 1), (1, 1, 0), (3, 12, 0))


@torch.no_grad()
def test_chunks_through_slots_give_the_logits_of_the_whole():
    model = Decoder.create(SIZES, seed=1, dtype=torch.float64)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, dtype=p.dtype) / 5)
    rows = [torch.randint(11, (sum(counts),)) for counts in zip(*PLAN, strict=True)]
    got = _cached(model, rows, lambda x, where: model.logits(model.advance(x, where)), PLAN)
    for row, logits in zip(rows, got, strict=True):
        near(logits, model(row[None])[0])


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
def test_generation_has_the_bits_of_training_in_the_invariant_mode(threads):
    model = Decoder.create(replace(SIZES, ssm=StateSpace(heads=15, head_dim=23, state=35)), seed=1)
    mixer = model.blocks["0"].attention
    mixer.d.zero_()  # the state alone, and much of it
    mixer.dt_bias.fill_(1)
    mixer.conv_weight.mul_(50)
    lengths = [sum(counts) for counts in zip(*PLAN, strict=True)]
    sizes = torch.tensor(lengths, dtype=torch.int32)
    whole = sequences((1, sum(lengths)), sizes, SIZES, mesh=None)
    rows = [torch.randint(11, (n,)) for n in lengths]
    inside = [torch.randn(n, len(mixer.in_proj.weight)) for n in lengths]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with batch_invariant():
            want = [*model(torch.cat(rows)[None], sizes)[0].split(lengths)]
            want += mixer.mix(torch.cat(inside), whole).split(lengths)
            got = _cached(model, rows, lambda x, at: model.logits(model.advance(x, at)), PLAN)
            got += _cached(model, inside, mixer.mix, PLAN)
        for found, wanted in zip(got, want, strict=True):
            assert torch.equal(found, wanted)
    finally:
        torch.set_num_threads(before)


def test_weights_start_as_mamba_2_draws_them_on_any_mesh():
    mixer = Decoder.create(SIZES).blocks["0"].attention
    assert mixer.a_log.exp().min() >= 1
    assert mixer.a_log.exp().max() <= 16
    steps = F.softplus(mixer.dt_bias)
    assert steps.min() > 1e-3
    assert steps.max() < 0.1
    assert not mixer.conv_bias.any()
    assert mixer.d.eq(1).all()
    assert mixer.norm_weight.eq(1).all()
    halves = [StateSpaceMixer(SIZES, group=ProcessGroup(rank, 2)) for rank in (0, 1)]
    for name in ("a_log", "dt_bias"):
        both = torch.cat([half.initial(name) for half in halves])
        assert torch.equal(both, getattr(mixer, name))


def test_what_does_not_divide_gets_one_sentence():
    with pytest.raises(ValueError, match=r"tp \(3\) must divide ssm.heads \(8\).*: tp2 and tp4 do"):
        StateSpaceMixer(SIZES, group=ProcessGroup(0, 3))
    with pytest.raises(ValueError, match=r"cp \(3\) must .*heads of a tp rank \(4\): cp2 and"):
        StateSpaceMixer(SIZES, group=ProcessGroup(0, 2), ring=ProcessGroup(0, 3))


def test_costs_are_those_of_the_tensors():
    mixer = StateSpaceMixer(SIZES, group=None)
    kept = mixer.cache(1, 1, 1)
    assert state_bytes(SIZES.ssm, 4) == sum(t.numel() * t.itemsize for t in kept)
    kept = mixer.bfloat16().cache(1, 1, 1)
    assert state_bytes(SIZES.ssm, 2) == sum(t.numel() * t.itemsize for t in kept)
    matrices = [mixer.in_proj.weight, mixer.out_proj.weight, mixer.conv_weight]
    both, one = (flops_per_token(replace(SIZES, layers=n), 8) for n in (3, 2))
    feed_forward = 2 * 3 * D * SIZES.hidden
    states = 8 * 4 * 3 * 5  # of a head: written and read
    assert both.forward - one.forward == (
        2 * sum(p.numel() for p in matrices) + feed_forward + states
    )
