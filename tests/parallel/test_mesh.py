"""The mesh: right ranks on every axis, two meshes in one process, errors that say what to do."""

from itertools import product

import pytest
import torch
import torch.distributed as dist

from warploom.parallel.mesh import DENSE, Degrees, Mesh, _build, _new_group, check_degree


def _rank_lists(text, world):
    """Return, for each rank, the ranks of each of its groups."""
    degrees = Degrees.parse(text).resolve(world)
    return [_build(degrees, rank, lambda ranks: ranks) for rank in range(world)]


def test_tp_varies_fastest_and_pp_slowest():
    meshes = _rank_lists("tp2,cp2,dp2,rep2,pp2", 32)
    assert meshes[0].tp == [0, 1]
    assert meshes[0].cp == [0, 2]
    assert meshes[0].dp == [0, 4]
    assert meshes[0].rep == [0, 8]
    assert meshes[0].pp == [0, 16]
    assert meshes[21].tp == [20, 21]
    assert meshes[0].shard == [0, 2, 4, 6]
    assert meshes[0].tokens == [0, 2, 4, 6, 8, 10, 12, 14]


@pytest.mark.parametrize("text", ["tp2,cp2,dp2,ep4,etp2", "tp4,dp2,ep8", "tp2,dp4,ep2,pp2"])
def test_expert_axes_fold_into_the_dense_ones(text):
    degrees = Degrees.parse(text)
    world = degrees.tp * degrees.cp * degrees.dp * degrees.pp
    meshes = _rank_lists(text, world)
    inner = degrees.tp * degrees.cp * degrees.dp
    for mesh in meshes:
        assert mesh.degree("etp") * mesh.degree("ep") * mesh.degree("edp") == inner
        joined = {r for e in mesh.ep for r in meshes[e].etp}
        assert len(joined) == degrees.ep * degrees.etp
        assert set(mesh.edp) & joined == {mesh.rank}


@pytest.mark.parametrize("text", ["tp2,cp2,dp2,rep2,pp2,ep4", "tp8,dp4,rep2,pp4"])
def test_every_axis_partitions_the_world(text):
    d = Degrees.parse(text)
    world = d.tp * d.cp * d.dp * d.rep * d.pp
    meshes = _rank_lists(text, world)
    for axis in (*DENSE, "ep", "etp", "edp", "shard", "tokens", "world"):
        groups = {tuple(getattr(mesh, axis)) for mesh in meshes}
        assert sorted(r for group in groups for r in group) == list(range(world)), axis


def test_absent_dp_is_what_is_left():
    assert Degrees.parse("tp2").resolve(8).dp == 4
    assert Degrees.parse("").resolve(1).dp == 1


@pytest.mark.parametrize(
    ("text", "world", "message"),
    [
        ("tp2,dp3", 8, r"mesh \(tp2 x dp3 = 6 ranks\) must multiply to the world size \(8\)"),
        ("tp3", 4, r"must multiply to the world size \(4\)"),
        ("xp2", 2, "mesh must list degrees of tp, .* got 'xp2'"),
        ("tp0", 2, "got 'tp0'"),
        ("tp2,tp2", 4, "tp is twice"),
        ("dp4,ep3", 4, r"ep x etp \(3 x 1\) must divide tp x cp x dp"),
    ],
)
def test_bad_meshes_get_one_sentence(text, world, message):
    with pytest.raises(ValueError, match=message):
        Degrees.parse(text).resolve(world)


def test_one_process_needs_no_distributed():
    mesh = Mesh.build("")
    assert mesh.size == 1
    assert mesh.tp is None
    assert mesh.shard is None
    assert mesh.coordinate("dp") == 0


def _two_meshes():
    a, b = Mesh.build("tp2,dp2"), Mesh.build("tp4")
    for mesh, want in ((a, 2), (b, 4)):
        x = torch.ones(1)
        dist.all_reduce(x, group=mesh.tp)
        assert x.item() == want
    assert b.dp is None
    assert a.coordinate("dp") == dist.get_rank() // 2


def test_two_meshes_in_one_process(ranks):
    ranks(4, _two_meshes)


@pytest.mark.parametrize("world", [4, 6, 12])
def test_ranks_of_a_group_have_made_as_many_groups(world, monkeypatch):
    """torch names a group by that number: a rank that makes fewer never meets the others."""
    made = []
    monkeypatch.setattr(dist, "new_group", lambda ranks, **_: made.append(tuple(ranks)) or ranks)
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    for tp, cp, pp, ep, etp in product(sizes, repeat=5):
        if world % (tp * cp * pp) or world // pp % (ep * etp):
            continue
        names = {}
        for rank in range(world):
            made.clear()
            degrees = Degrees(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp).resolve(world)
            _build(degrees, rank, _new_group(world, rank))
            for at, ranks in enumerate(made):
                names.setdefault(ranks, set()).add(at)
            names.setdefault("all", set()).add(len(made))
        assert all(len(found) == 1 for found in names.values()), (tp, cp, pp, ep, etp, names)


def test_a_mesh_of_4096_ranks_is_built_in_no_time():
    degrees = Degrees.parse("tp8,cp2,pp16,dp16,ep8").resolve(4096)
    mesh = _build(degrees, 4095, lambda ranks: ranks)
    assert len(mesh.shard) == 32
    assert mesh.pp[-1] == 4095


def test_of_any_degree_the_nearest_is_found_at_once():
    sentence = r"tp \(1000000000000\) must divide heads \(6\): tp6 does"
    with pytest.raises(ValueError, match=sentence):
        check_degree("tp", 10**12, {"heads": 6})
    with pytest.raises(ValueError, match="tp3 and tp6 do"):
        check_degree("tp", 4, {"heads": 6})
