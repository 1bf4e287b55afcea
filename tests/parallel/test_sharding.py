"""Pieces: what a rank holds, cut into shards, put together again; initial values by name alone."""

import hashlib
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from warploom.parallel.initialise import normal_
from warploom.parallel.mesh import Mesh
from warploom.parallel.sharding import (
    Layout,
    Piece,
    assemble,
    layouts,
    load,
    narrow,
    owned,
    rows,
    whole,
)
from warploom.parallel.tensor import ColumnLinear, RowLinear, VocabEmbedding


def _filled(layout, logical):
    """Return the local tensor that `layout` takes from logical tensors; padding is NaN."""
    local = torch.full(layout.shape, math.nan)
    for piece in layout.pieces:
        piece.of_local(local).copy_(piece.of_logical(logical[piece.name]))
    return local


@st.composite
def _layouts(draw):
    """Draw a local tensor of stacked pieces, some transposed, some of every second row."""
    width = draw(st.integers(1, 4))
    pieces, logical, offset = [], {}, 0
    for n in range(draw(st.integers(1, 3))):
        step = draw(st.integers(1, 3))
        size, first = draw(st.integers(1, 4)), draw(st.integers(0, 2))
        stop = first + (size - 1) * step + 1
        total = stop + draw(st.integers(0, 2))
        along = ((first, stop, step), (0, width, 1))
        transposed = draw(st.booleans())
        shape = (width, total) if transposed else (total, width)
        slices = along[::-1] if transposed else along
        pieces.append(Piece(f"w{n}", shape, slices, (offset, 0), transposed))
        logical[f"w{n}"] = torch.randn(shape)
        offset += size
    padding = draw(st.integers(0, 2))
    return Layout((offset + padding, width), tuple(pieces)), logical


@given(_layouts(), st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=150, deadline=None)
def test_narrow_takes_the_same_rows_as_the_tensor(drawn, a, b):
    layout, logical = drawn
    start, stop = sorted((min(a, layout.shape[0]), min(b, layout.shape[0])))
    want = _filled(layout, logical)[start:stop]
    got = _filled(narrow(layout, start, stop), logical)
    torch.testing.assert_close(got, want, atol=0, rtol=0, equal_nan=True)


@given(_layouts())
@settings(max_examples=60, deadline=None)
def test_initial_values_depend_on_name_and_index_alone(drawn):
    layout, logical = drawn
    for name, tensor in logical.items():
        normal_(tensor, whole(name, tensor.shape), seed=3, std=0.5)
    local = torch.full(layout.shape, math.nan)
    normal_(local, layout, seed=3, std=0.5)
    torch.testing.assert_close(local, _filled(layout, logical).nan_to_num(0.0), atol=0, rtol=0)


def _splitmix64(x):
    """Finalise as initialise.py does, in integers of Python."""
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) % 2**64
    return x ^ x >> 31


def test_initial_values_are_those_of_splitmix64_and_box_muller():
    key = int.from_bytes(hashlib.sha256(b"3|a").digest()[:8], "little")
    want = []
    for index in range(6):
        bits = _splitmix64(_splitmix64((index * 0x9E3779B97F4A7C15 + key) % 2**64))
        one, two = (bits % 2**32 + 0.5) / 2**32, (bits // 2**32 + 0.5) / 2**32
        want.append(0.5 * math.sqrt(-2 * math.log(one)) * math.cos(2 * math.pi * two))
    found = normal_(torch.empty(2, 3, dtype=torch.float64), whole("a", (2, 3)), seed=3, std=0.5)
    torch.testing.assert_close(found.flatten().tolist(), want, rtol=1e-12, atol=0)


def test_initial_values_are_normal_and_differ_by_name_and_seed():
    def draw(name, seed):
        return normal_(torch.empty(500, 400), whole(name, (500, 400)), seed=seed, std=2.0)

    x = draw("a", 0)
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 2.0) < 0.02
    assert abs(float((x / 2).pow(4).mean()) - 3.0) < 0.1  # kurtosis of a normal
    for other in (draw("b", 0), draw("a", 1)):
        assert abs(float((x * other).mean())) < 0.05


def test_layouts_follow_module_paths_and_keep_a_tied_weight_once():
    model = nn.Sequential(ColumnLinear(4, 6, group=None, parts={"q": 4, "k": 2}), nn.Linear(6, 4))
    model.append(nn.Linear(6, 4))
    model[2].weight = model[1].weight
    found = layouts(model, rename=lambda name: f"model.{name}")
    assert list(found) == ["0.weight", "1.weight", "1.bias", "2.bias"]
    assert [p.name for p in found["0.weight"].pieces] == ["model.0.q.weight", "model.0.k.weight"]


def _whole_state_comes_and_goes(size):
    group = dist.group.WORLD if size > 1 else None
    model = nn.Sequential(ColumnLinear(4, 8, group=group, parts={"q": 4, "k": 4}), nn.LayerNorm(8))
    state = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(3))
        for name, shape in {"0.q.weight": (4, 4), "0.k.weight": (4, 4), "1.weight": (8,)}.items()
    }
    before = [p.clone() for p in model.parameters()]
    for wrong in (state, state | {"1.bias": torch.ones(2)}):
        with pytest.raises(ValueError, match=r"the state must hold 1.bias \(8,\), got "):
            load(model, wrong)
    assert all(map(torch.equal, before, model.parameters()))
    state["1.bias"] = torch.ones(8)
    load(model, state | {"other": torch.ones(1)})
    back = assemble(dict(model.named_parameters()), layouts(model), group)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("size", [1, 2])
def test_a_whole_state_comes_and_goes(pool, size):
    pool(size, _whole_state_comes_and_goes, size)


def test_a_single_layer_declares_itself():
    assert layouts(RowLinear(4, 2, group=None))["weight"].pieces[0].shape == (2, 4)


def _ranks_share_out_and_reassemble():
    mesh = Mesh.build("tp2,dp2")
    torch.manual_seed(dist.get_rank())  # layers must not depend on it: the logical values do not
    torch.manual_seed(7)
    model = nn.ModuleDict(
        {
            "column": ColumnLinear(4, 12, group=mesh.tp, parts={"q": 8, "k": 4}, bias=True),
            "row": RowLinear(8, 4, group=mesh.tp, bias=True),
            "embedding": VocabEmbedding(7, 4, group=mesh.tp),
        }
    )
    made = layouts(model)
    parameters = dict(model.named_parameters())
    full = assemble(parameters, made, mesh.world)
    torch.manual_seed(7)
    alone = nn.ModuleDict(
        {
            "column": ColumnLinear(4, 12, group=None, parts={"q": 8, "k": 4}, bias=True),
            "row": RowLinear(8, 4, group=None, bias=True),
            "embedding": VocabEmbedding(7, 4, group=None),
        }
    )
    want = assemble(dict(alone.named_parameters()), layouts(alone), None)
    assert full.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(full[name], want[name], atol=0, rtol=0)
    mine = owned(made, mesh)
    counted = sum(math.prod(p.sizes) for pieces in mine.values() for p in pieces)
    total = torch.tensor([counted])
    dist.all_reduce(total)
    assert total.item() == sum(t.numel() for t in want.values())
    if mesh.coordinate("dp") == 1:
        assert counted == 0, "the lowest rank that holds an element counts it"


def test_ranks_share_out_and_reassemble(ranks):
    ranks(4, _ranks_share_out_and_reassemble)


def test_an_element_on_no_rank_is_an_error():
    layout = Layout((2, 3), (rows("w", (4, 3), 0, 2),))
    with pytest.raises(ValueError, match="w: 6 of 12 elements are on no rank"):
        assemble({"w": torch.zeros(2, 3)}, {"w": layout}, None)
