"""Experts on one rank: capacity, bias, replay, recomputation, deferred gradients, bad input."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parallel.test_expert import (
    HIDDEN,
    D,
    E,
    K,
    N,
    _randn,
    _swiglu,
    build,
    choose,
    logical,
    oracle,
)
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from warploom.parallel.collectives import Group
from warploom.parallel.expert import (
    MoE,
    bias_entries,
    record_routing,
    replay_routing,
    update_biases,
)
from warploom.parallel.expert.router import drop_beyond
from warploom.parallel.memory import Recompute
from warploom.parallel.sharding import layouts, narrow
from warploom.parallel.tensor.product import WeightGradients


def _gradients(layer, x, dy, run=None, **options):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y, losses = (run or layer)(x, **options)
    ((y * dy).sum() + sum(losses.values(), y.sum() * 0)).backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


def _same(got, want, atol=0.0):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("drop", ["position", "probability"])
@pytest.mark.parametrize("capacity", [0.3, 1.0, 8.0])
def test_capacity_drops_what_plain_python_drops(drop, capacity):
    layer = build(capacity=capacity, drop=drop)
    weights = logical(layer)
    x, dy = _randn(12, D, seed=1).requires_grad_(), _randn(12, D, seed=2)
    documents = torch.tensor([0, 0, -1, 0, 1, 1, 1, -1, 2, 2, 2, 2])
    chosen, kept, _, _ = choose(x, weights)
    limit = math.ceil(capacity * K * 10 / E)
    dropped = set()
    for e in range(E):
        slots = [(t, j) for t in range(12) for j in range(K)
                 if chosen[t][j] == e and documents[t] >= 0]  # fmt: skip
        if drop == "probability":
            slots.sort(key=lambda s: -float(kept[s[0]][s[1]].detach()))
        dropped |= set(slots[limit:])
    assert bool(dropped) == (capacity < 2)
    want, _ = oracle(x, weights, documents, dropped=dropped)
    wanted = torch.autograd.grad((want * dy).sum(), [x, *weights.values()])
    mine = x.detach().clone().requires_grad_()
    y, _ = layer(mine, documents, N)
    (y * dy).sum().backward()
    torch.testing.assert_close(y, want, atol=1e-10, rtol=0)
    torch.testing.assert_close(mine.grad, wanted[0], atol=1e-10, rtol=0)
    router = dict(zip(weights, wanted[1:], strict=True))["router.weight"]
    torch.testing.assert_close(layer.router.weight.grad, router, atol=1e-10, rtol=0)
    assert not layer.invariant
    assert build().invariant
    assert not build(balance="batch").invariant


def test_equal_weights_are_dropped_from_the_end():
    indices, weights = torch.tensor([[0, 1], [0, -1], [0, 1]]), torch.ones(3, 2)
    for by in ("position", "probability"):
        assert drop_beyond(indices, weights, 2, 1, by).tolist() == [[0, 1], [-1, -1], [-1, -1]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-1, 2), min_size=1, max_size=9), st.data())
def test_no_split_into_micro_batches_changes_the_gradient(documents, data):
    """Documents in any order, padding anywhere, cut between documents or not at all."""
    documents = torch.tensor(documents)
    layer = build(balance="sequence", z_loss=True)
    x, dy = _randn(len(documents), D, seed=1), _randn(len(documents), D, seed=2)
    want = _gradients(layer, x, dy, documents=documents, count=N)
    batch = torch.tensor([data.draw(st.integers(0, 1)) for _ in range(N)])
    order = torch.tensor(data.draw(st.permutations(range(len(documents)))))
    total = None
    for part in (0, 1):
        own = order[(batch[documents.clamp(min=0)] == part)[order]]
        found = _gradients(layer, x[own], dy[own], documents=documents[own], count=N)
        full = [torch.zeros_like(x).index_copy(0, own, f) for f in found[:2]] + found[2:]
        total = full if total is None else [a + b for a, b in zip(total, full, strict=True)]
    _same(total, want, atol=1e-10)


def test_an_even_load_gives_one():
    layer = build(balance="sequence", top_k=1)
    with torch.no_grad():
        layer.router.weight.zero_()
    layer.router.top_k = E
    _, losses = layer(_randn(4, D, seed=1))
    torch.testing.assert_close(losses["load_balance"], torch.tensor(1.0).double())


def test_the_bias_follows_the_load():
    layer = build(bias=True)
    bias = layer.router.bias.clone()
    x = _randn(9, D, seed=1)
    with record_routing() as recorded:
        layer(x)
        layer(x[:4])
    with torch.no_grad():
        layer(x)  # an evaluation does not count
    load = torch.stack([sum((r == e).sum() for r in recorded) for e in range(E)])
    assert torch.equal(layer.router.load, load)
    update_biases(layer, 0.25)
    want = bias + 0.25 * torch.sign(load.double().mean() - load).float()
    torch.testing.assert_close(layer.router.bias, want)
    assert not layer.router.load.any()
    (entry,) = bias_entries(torch.nn.ModuleDict({"a": layer}), rename=lambda n: f"model.{n}")
    assert [p.name for p in entry.pieces] == ["buffer/model.a.router.bias"]
    assert entry.tensor is layer.router.bias
    assert bias_entries(build()) == []


def test_the_bias_stays_float32_and_starts_at_zero():
    layer = MoE(D, HIDDEN, E, K, group=None, bias=True).bfloat16()
    assert layer.router.bias.dtype == torch.float32
    assert layer.router.weight.dtype == torch.bfloat16
    with torch.device("meta"):
        layer = MoE(D, HIDDEN, E, K, group=None, bias=True)
    layer = layer.to(torch.bfloat16).to_empty(device="cpu")
    assert layer.router.bias.dtype == torch.float32
    assert not layer.router.bias.any()
    assert not layer.router.load.any()


def test_replayed_experts_serve_with_weights_of_today():
    layer, x, dy = build(balance="sequence"), _randn(9, D, seed=1), _randn(9, D, seed=2)
    documents = torch.tensor([0, 0, 0, -1, 1, 1, 1, 1, 1])
    run = partial(_gradients, layer, x, dy, documents=documents, count=2)
    want = run()
    with record_routing() as recorded:
        run()
    assert [tuple(r.shape) for r in recorded] == [(9, K)]
    assert recorded[0][3].tolist() == [-1, -1]
    with replay_routing(recorded):
        _same(run(), want)
    with torch.no_grad():
        layer.router.weight.neg_()
    other = run()
    with replay_routing(recorded), record_routing() as again:
        got = run()
    assert torch.equal(again[0], recorded[0])
    assert got[2].any(), "the router learns from replayed experts"
    assert not torch.equal(got[0], other[0])
    weights = logical(layer)
    scores = (x @ weights["router.weight"].t()).softmax(1)
    for t in (0, 1, 8):
        chosen = recorded[0][t].tolist()
        parts = [scores[t, e] * _swiglu(x[t], weights, f"experts.{e}.") for e in chosen]
        torch.testing.assert_close(got[0][t], sum(parts) / scores[t, chosen].sum())


def _replays(recorded, layer, *inputs):
    with replay_routing(recorded):
        for x in inputs:
            layer(x)


def test_replay_refuses_other_layers():
    layer, x = build(), _randn(5, D, seed=1)
    with record_routing() as recorded:
        layer(x)
    with pytest.raises(RuntimeError, match="1 recorded layers, and one more ran"):
        _replays(recorded, layer, x, x)
    with pytest.raises(RuntimeError, match=r"chose \[5, 2\] experts, .* chooses \[4, 2\]"):
        _replays(recorded, layer, x[:4])
    with pytest.raises(RuntimeError, match="1 recorded layers, but 0 ran"):
        _replays(recorded, layer)


@pytest.mark.parametrize("options", [{}, {"capacity": 0.7, "drop": "probability"}, {"chunks": 2}])
def test_recomputation_changes_nothing(options):
    layer = build(bias=True, balance="sequence", z_loss=True, **options)
    x, dy = _randn(9, D, seed=1), _randn(9, D, seed=2)
    want = _gradients(layer, x, dy)
    load = layer.router.load.clone()
    again = partial(Recompute.parse("moe").run, "moe", layer)
    _same(_gradients(layer, x, dy, again), want)
    assert torch.equal(layer.router.load, 2 * load), "a second run is not counted"
    foreign = partial(checkpoint, layer, use_reentrant=False)
    with record_routing() as recorded:
        _same(_gradients(layer, x, dy, foreign), want)
    assert torch.equal(layer.router.load, 3 * load)
    assert len(recorded) == 1
    forced = [recorded[0].flip(0)]
    with replay_routing(forced):
        want = _gradients(layer, x, dy)
    with replay_routing(forced):
        _same(_gradients(layer, x, dy, again), want)
    with replay_routing(forced):
        y, _ = again(x.clone().requires_grad_())
    layer.zero_grad()
    (y * dy).sum().backward()  # after the context has ended
    with replay_routing(forced):
        y, _ = foreign(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="recompute with warploom.parallel.memory.Recompute"):
        (y * dy).sum().backward()


def test_weight_gradients_wait_in_a_queue():
    layer = build(shared=4, balance="sequence", chunks=2)
    x, dy = _randn(9, D, seed=1), _randn(9, D, seed=2)
    want = _gradients(layer, x, dy)
    layer.zero_grad()
    queue, mine = WeightGradients(), x.clone().requires_grad_()
    with queue.open():
        y, losses = layer(mine)
        ((y * dy).sum() + losses["load_balance"]).backward()
    assert all(p.grad is None for p in layer.parameters())
    torch.testing.assert_close(mine.grad, want[1], atol=1e-12, rtol=0)
    queue.run()
    _same([p.grad for p in layer.parameters()], want[2:], atol=1e-12)


def test_shards_of_an_optimizer_cut_experts():
    made = layouts(build())["experts.gate_up"]
    assert made.expert
    part = narrow(made, 5, 20)  # rows: 8 of each gate and up
    assert [p.name for p in part.pieces] == ["experts.0.gate.weight", "experts.0.up.weight",
                                             "experts.1.gate.weight"]  # fmt: skip
    assert [p.slices[0] for p in part.pieces] == [(5, 8, 1), (0, 8, 1), (0, 4, 1)]


def test_low_precision_runs():
    layer = MoE(D, HIDDEN, E, K, group=None, shared=4, **{"balance": "sequence"}).bfloat16()
    x = torch.randn(9, D, dtype=torch.bfloat16, requires_grad=True)
    y, losses = layer(x)
    assert y.dtype == torch.bfloat16
    assert losses["load_balance"].dtype == torch.float32
    (y.sum() + losses["load_balance"]).backward()
    assert x.grad.isfinite().all()
    routed = MoE(D, HIDDEN, E, K, group=None, router_dtype=torch.float32).bfloat16().router(x)
    assert routed.logits.dtype == torch.float32


def test_transformers_agrees():
    """The whole block, with the weights of Mixtral's."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=D, intermediate_size=HIDDEN, num_local_experts=E, num_experts_per_tok=K
    )
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = build()
    with torch.no_grad():
        ours.router.weight.copy_(theirs.gate.weight)
        ours.experts.gate_up.copy_(theirs.experts.gate_up_proj.flatten(0, 1))
        ours.experts.down.copy_(theirs.experts.down_proj.flatten(0, 1))
    x = _randn(2, 11, D, seed=4)
    want = theirs(x)
    want = want[0] if isinstance(want, tuple) else want
    torch.testing.assert_close(ours(x.view(22, D))[0], want.view(22, D), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": ProcessGroup(0, 3)}, r"ep \(3\) must divide experts \(8\): ep2 and ep4"),
        ({"etp_group": ProcessGroup(0, 3)}, r"etp \(3\) must divide hidden \(8\): etp2 and etp4"),
        ({"top_k": 9}, r"top_k \(9\) must be from 1 to the number of experts \(8\)"),
        ({"groups": 3}, r"groups \(3\) must divide the experts \(8\)"),
        ({"capacity": 0.0}, "capacity must be above 0 and finite.*got 0.0"),
        ({"capacity": math.inf}, "capacity must be above 0 and finite"),
        ({"drop": "last"}, "drop must be one of position, probability, got 'last'"),
        ({"chunks": 0}, "chunks must be at least 1, got 0"),
        ({"balance": "token"}, "balance must be one of sequence, batch or None, got 'token'"),
        ({"shared": -1}, "shared must be the hidden width .* got -1"),
        ({"hidden": 0}, "width, hidden and experts must be at least 1; got 6, 0, 8"),
    ],
)
def test_bad_sizes_get_one_sentence(options, message):
    group: Group = options.pop("group", None)
    sizes = {"hidden": HIDDEN, "top_k": K} | options
    with pytest.raises(ValueError, match=message):
        MoE(width=D, experts=E, group=group, **sizes)


def test_bad_tokens_get_one_sentence():
    layer = build()
    with pytest.raises(ValueError, match=r"x must be \[tokens, 6\], got \[4, 5\]"):
        layer(torch.ones(4, 5).double())
    with pytest.raises(
        ValueError, match=r"documents must be \[4\] and count at least 1, got \[3\]"
    ):
        layer(torch.ones(4, D).double(), torch.zeros(3, dtype=torch.int64))
