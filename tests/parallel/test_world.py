"""Worlds of 4,096 ranks are built on one process in seconds: groups, layers, layouts, tables."""

import time

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from warploom.models.architecture import Architecture
from warploom.models.attention import Attention
from warploom.parallel.collectives import observed
from warploom.parallel.expert import MoE
from warploom.parallel.mesh import Mesh
from warploom.parallel.pipeline import Schedule, simulate
from warploom.parallel.sharding import layouts
from warploom.parallel.tensor import ColumnLinear, RowLinear, VocabEmbedding, VocabHead
from warploom.recipes.plan.ledger import Ledger, Total

WORLD = 4096
TEXT = "tp8,cp4,uly2,pp16,dp4,rep2,ep8,etp2"
SIZES = {"tp": 8, "cp": 4, "dp": 4, "rep": 2, "pp": 16, "ep": 8, "etp": 2, "edp": 8, "shard": 16}
SIZES |= {"tokens": 32, "world": WORLD, "ulysses": 2, "ring": 2}


@pytest.fixture(params=[0, 1234, WORLD - 1])
def rank(request):
    dist.init_process_group("fake", rank=request.param, world_size=WORLD, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def made_groups(monkeypatch):
    made = []
    real = dist.new_group
    monkeypatch.setattr(dist, "new_group", lambda *a, **k: made.append(a[0]) or real(*a, **k))
    return made


def test_every_axis_of_a_mesh(rank, monkeypatch):
    made = made_groups(monkeypatch)
    begun = time.process_time()
    mesh = Mesh.build(TEXT)
    assert time.process_time() - begun < 5
    assert len(made) <= 15, "a rank makes just the groups that it is in"
    assert all(rank in ranks for ranks in made)
    for axis, size in SIZES.items():
        group = getattr(mesh, axis)
        assert group.size() == size, axis
        assert dist.get_process_group_ranks(group)[group.rank()] == rank, axis
    first_or_last = mesh.coordinate("pp") in (0, 15)
    assert (mesh.ends is not None) == first_or_last
    assert mesh.coordinate("tp") == rank % 8
    assert mesh.coordinate("pp") == rank // (WORLD // 16)


@pytest.mark.parametrize(
    "text", ["dp4096", "tp4096", "pp4096", "cp4096", "rep4096", "dp4096,ep4096"]
)
def test_one_axis_over_the_whole_world(text, monkeypatch):
    dist.init_process_group("fake", rank=7, world_size=WORLD, store=FakeStore())
    try:
        made = made_groups(monkeypatch)
        begun = time.process_time()
        mesh = Mesh.build(text)
        assert time.process_time() - begun < 5
        assert made == ([[7]] if text == "pp4096" else [])  # its place in the ends' count
        assert mesh.degree(text[:2] if text[:3] != "rep" else "rep") == WORLD
    finally:
        dist.destroy_process_group()


LAYER = Architecture(
    layers=1,
    width=8192,
    heads=64,
    kv_heads=4,
    head_dim=128,
    hidden=8,
    vocabulary=8,
    max_positions=8,
)


def test_layers_and_layouts_on_meta(rank):
    mesh = Mesh.build(TEXT)
    keep = {"group": mesh.tp}
    with torch.device("meta"):
        layers = torch.nn.ModuleDict(
            {
                "embed": VocabEmbedding(128_001, 8192, **keep),
                "up": ColumnLinear(8192, 2 * 28_672, bias=True, chunks=4, regather=True, **keep),
                "down": RowLinear(28_672, 8192, chunks=4, **keep),
                "attention": Attention(LAYER, **keep),  # 4 key heads on 8 ranks
                "moe": MoE(8192, 4096, 64, 4, group=mesh.ep, etp_group=mesh.etp, tp_group=mesh.tp),
                "head": VocabHead(128_001, 8192, **keep),
            }
        )
    found = layouts(layers)
    for path, parameter in layers.named_parameters():
        assert found[path].shape == tuple(parameter.shape)
    tp = mesh.coordinate("tp")
    assert layers["up"].weight.shape == (2 * 28_672 // 8, 8192)
    k = next(p for p in found["attention.qkv.weight"].pieces if p.name.endswith("k.weight"))
    assert k.slices[0] == (tp // 2 * 128, tp // 2 * 128 + 128, 1)
    assert found["embed.weight"].pieces[0].slices[0][0] == tp * 16_001
    ledger = Ledger(mesh)
    x = torch.empty(64, 8192, device="meta", requires_grad=True)
    with observed(ledger):
        y = layers["down"](layers["up"](x)[:, : 28_672 // 8])
        y.sum().backward()
    assert y.shape == x.shape
    sent = 7 * 64 * 8192 * 4  # bytes: 7 of 8 parts of [512, 8192] in float32
    assert ledger.table() == {
        ("tp", "all_gather", "forward"): Total(4, sent),
        ("tp", "reduce_scatter", "forward"): Total(4, sent),
        ("tp", "all_gather", "backward"): Total(4 + 1, 2 * sent),
        ("tp", "reduce_scatter", "backward"): Total(4, sent),
    }


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b", "zb_h1", "zbv", "dualpipev"])
def test_schedules_of_that_world(name):
    begun = time.process_time()
    schedule = getattr(Schedule, name)(16, 64)
    schedule.validate()
    assert len(simulate(schedule).peak()) == 16
    assert time.process_time() - begun < 5
