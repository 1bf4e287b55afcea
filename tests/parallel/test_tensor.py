"""A sharded layer must equal the unsharded one: outputs and every gradient, in float64."""

import copy
import gc
import itertools
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from warploom.parallel.collectives import all_gather_rows
from warploom.parallel.mesh import Mesh
from warploom.parallel.sharding import assemble, layouts
from warploom.parallel.tensor import ColumnLinear, RowLinear, VocabEmbedding, VocabHead


class Toy(nn.Module):
    """Embedding, two linears, and a head, tied or not: every layer of the package once."""

    def __init__(self, group, *, tied, sequence_parallel=True, bias=True):
        super().__init__()
        torch.manual_seed(0)
        keep = {"group": group, "sequence_parallel": sequence_parallel}
        self.embedding = VocabEmbedding(11, 6, **keep)
        self.up = ColumnLinear(6, 16, parts={"a": 8, "b": 8}, bias=bias, **keep)
        self.down = RowLinear(8, 6, bias=bias, **keep)
        self.head = VocabHead(11, 6, tied=self.embedding if tied else None, **keep)
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(30)  # far from linear

    def hidden(self, tokens):
        x = self.embedding(tokens)
        a, b = self.up(x).chunk(2, dim=-1)
        return x + self.down(a.tanh() * b)


def _batch():
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 11, (8,), generator=g)
    targets = torch.randint(0, 11, (8,), generator=g)
    targets[2] = -100
    return tokens, targets


def _objective(model, tokens, targets, z_loss):
    pairs = model.head.loss(model.hidden(tokens), targets, z_loss=z_loss)
    assert all(int(count) == 7 for _, count in pairs)
    weights = (0.7, 0.01)
    return sum(w * s for w, (s, _) in zip(weights, pairs, strict=False))


def _gradients(model, mesh):
    made = layouts(model)
    found = {path: p.grad for path, p in model.named_parameters()}
    for path, layout in made.items():
        for group in layout.partial:
            dist.all_reduce(found[path], group=group)
    return assemble(found, made, mesh.world)


def _toy_equals_unsharded(tied, sequence_parallel, z_loss):
    mesh = Mesh.build(f"tp{dist.get_world_size()}")
    tokens, targets = _batch()
    alone = Toy(None, tied=tied)
    want = _objective(alone, tokens, targets, z_loss)
    want.backward()
    model = Toy(mesh.tp, tied=tied, sequence_parallel=sequence_parallel)
    got = _objective(model, tokens, targets, z_loss)
    got.backward()
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    expected = {name: p.grad for name, p in assemble_parameters(alone).items()}
    found = _gradients(model, mesh)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    logits = alone.head(alone.hidden(tokens))
    torch.testing.assert_close(model.head(model.hidden(tokens)), logits, atol=1e-10, rtol=0)


def assemble_parameters(model):
    """Return the pieces of a whole model as tensors whose `.grad` is the gradient's piece."""
    result = {}
    for path, layout in layouts(model).items():
        parameter = model.get_parameter(path)
        for piece in layout.pieces:
            result[piece.name] = piece.of_local(parameter.detach()).clone()
            result[piece.name].grad = piece.of_local(parameter.grad).clone()
    return result


def _toys_equal_unsharded():
    for tied in (True, False):
        for sequence_parallel in (True, False):
            for z_loss in (True, False):
                _toy_equals_unsharded(tied, sequence_parallel, z_loss)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_layers_equal_unsharded(pool, size):
    pool(size, _toys_equal_unsharded)


def _logits_gradient():
    size = dist.get_world_size()
    mesh = Mesh.build(f"tp{size}")
    tokens, _ = _batch()
    g = torch.Generator().manual_seed(9)
    dy = torch.randn(8, 11, generator=g, dtype=torch.float64)
    for tied, sequence_parallel in itertools.product((True, False), (True, False)):
        alone = Toy(None, tied=tied)
        model = Toy(mesh.tp, tied=tied, sequence_parallel=sequence_parallel)
        alone.head(alone.hidden(tokens)).backward(dy)
        model.head(model.hidden(tokens)).backward(dy)
        expected = {name: p.grad for name, p in assemble_parameters(alone).items()}
        for name, gradient in _gradients(model, mesh).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_through_gathered_logits(pool, size):
    pool(size, _logits_gradient)


def _vocabularies_of_any_size():
    """V = 9 over 4 ranks leaves the last one none of the 3 rows that each has room for."""
    group, size = dist.group.WORLD, dist.get_world_size()
    for vocabulary, sharded, z_loss in itertools.product((9, 11, 12), (True, False), (True, False)):
        keep = {"group": group, "sequence_parallel": sharded}
        torch.manual_seed(1)
        embed = VocabEmbedding(vocabulary, 6, **keep).double()
        torch.manual_seed(1)
        alone = VocabEmbedding(vocabulary, 6, group=None).double()
        head, whole_head = (
            VocabHead(vocabulary, 6, tied=e, **k)
            for e, k in ((embed, keep), (alone, {"group": None}))
        )
        g = torch.Generator().manual_seed(vocabulary)
        tokens = torch.randint(0, vocabulary, (8,), generator=g)
        targets = torch.randint(0, vocabulary, (8,), generator=g)
        targets[:3] = -100
        # logits of 1,000, whose exponentials overflow unless the largest is taken off
        scale = 1000 / float((alone.weight @ alone.weight.t()).abs().max()) if z_loss else 40
        want = whole_head.loss(alone(tokens) * scale, targets, z_loss=z_loss)
        got = head.loss(embed(tokens) * scale, targets, z_loss=z_loss)
        for (mine, count), (theirs, counted) in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-13)
            assert int(count) == int(counted) == 5
        for pairs in (want, got):
            sum((0.3 + i) * total for i, (total, _) in enumerate(pairs)).backward()
        held = layouts(embed)["weight"].pieces
        assert bool(held) == (embed.start < embed.stop)
        for piece in held:
            torch.testing.assert_close(
                piece.of_local(embed.weight.grad),
                piece.of_logical(alone.weight.grad),
                atol=1e-10,
                rtol=1e-12,
            )
        assert not embed.weight.grad[embed.stop - embed.start :].any()
        for wrong in (-1, vocabulary):
            with pytest.raises(IndexError):
                embed(torch.full((size,), wrong))


@pytest.mark.parametrize("size", [2, 4])
def test_vocabularies_of_any_size(pool, size):
    pool(size, _vocabularies_of_any_size)


def _nothing_trains_on_any_token():
    head = VocabHead(11, 6, group=dist.group.WORLD).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.full((4 * dist.get_world_size(),), -100)
    for z_loss in (True, False):
        pairs = head.loss(x, targets, z_loss=z_loss)
        assert all(int(count) == 0 and float(total.detach()) == 0 for total, count in pairs)
        sum(total for total, _ in pairs).backward()
    assert not x.grad.any()
    assert not head.weight.grad.any()


def test_a_batch_without_trained_tokens_has_zero_gradients(pool):
    pool(2, _nothing_trains_on_any_token)


def _loss_under_autocast():
    group = dist.group.WORLD
    g = torch.Generator().manual_seed(5)
    x, targets = torch.randn(8, 6, generator=g), torch.randint(0, 11, (8,), generator=g)
    for z_loss, sharded in itertools.product((True, False), (True, False)):
        results = []
        for over in (None, group):
            torch.manual_seed(1)
            head = VocabHead(11, 6, group=over, sequence_parallel=sharded)
            with torch.no_grad():
                head.weight.mul_(40)
            share = x.chunk(2)[dist.get_rank()] if over and sharded else x
            mine = share.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                pairs = head.loss(mine, targets, z_loss=z_loss)
            sum(total for total, _ in pairs).backward()
            found = assemble({"weight": head.weight.grad}, layouts(head), over)["weight"]
            dx = all_gather_rows(mine.grad, over) if sharded else mine.grad
            results.append([*(total.detach() for total, _ in pairs), dx, found])
        for got, want in zip(*results, strict=True):
            assert got.dtype == want.dtype == torch.float32
            torch.testing.assert_close(got, want, atol=0.02 * float(want.abs().max()), rtol=0)


def test_loss_under_autocast(pool):
    pool(2, _loss_under_autocast)


def _vocabularies_are_copied():
    embedding = VocabEmbedding(11, 6, group=dist.group.WORLD)
    model = nn.Sequential(embedding, VocabHead(11, 6, group=dist.group.WORLD, tied=embedding))
    twin = copy.deepcopy(model)
    assert twin[0].group is twin[1].group is dist.group.WORLD
    assert twin[0].weight is twin[1].weight is not embedding.weight
    assert torch.equal(twin(torch.arange(8)), model(torch.arange(8)))


def test_a_deep_copy_shares_the_groups(pool):
    pool(2, _vocabularies_are_copied)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: ColumnLinear(6, 8, group=g), r"tp \(3\) must divide features \(8\): tp2"),
        (lambda g: RowLinear(8, 6, group=g), r"tp \(3\) must divide width \(8\): tp2 and"),
        (lambda g: ColumnLinear(6, 9, group=g, parts={"q": 4, "k": 5}), r"divide q \(4\): tp2"),
        (lambda g: ColumnLinear(6, 9, group=g, parts={"q": 3, "k": 3}), "must sum to the features"),
    ],
)
def test_bad_sizes_get_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make(ProcessGroup(0, 3))


def test_wrong_hidden_states_get_one_sentence():
    head = VocabHead(7, 4, group=None)
    with pytest.raises(ValueError, match=r"VocabHead: x must have 4 features, .* \[3, 5\]"):
        head(torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"hidden states \(3 rows .* as many as targets \(2\)"):
        head.loss(torch.ones(3, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"a tied head must have .* \(7, 4\), got \(8, 4\)"):
        VocabHead(8, 4, group=None, tied=VocabEmbedding(7, 4, group=None))


def test_padding_has_no_piece_and_is_zero():
    layer = VocabEmbedding(7, 4, group=ProcessGroup(2, 3))
    assert layer.weight.shape == (3, 4)
    assert [p.slices[0] for p in layouts(layer)["weight"].pieces] == [(6, 7, 1)]
    assert not layer.weight[1:].any()


class _Operators(TorchDispatchMode):
    """Notes every operator that runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _cost(module, x):
    """Return the operators of a forward and a backward, and the Python calls of a forward."""
    calls = []
    module(x)
    gc.collect()
    gc.disable()  # a collection within the forward would count finalizers that are not its own
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event == "call" else None)
    module(x)
    sys.setprofile(None)
    gc.enable()
    module.zero_grad()
    with _Operators() as operators:
        module(x).sum().backward()
    return operators.seen, len(calls)


@pytest.mark.parametrize("bias", [True, False])
def test_one_rank_costs_next_to_nothing(bias):
    x, ids = torch.randn(4, 8), torch.arange(4)
    embedding = VocabEmbedding(11, 8, group=None)
    for layer, peer, at in (
        (ColumnLinear(8, 16, group=None, bias=bias, regather=True, chunks=3), nn.Linear(8, 16), x),
        (RowLinear(8, 16, group=None, bias=bias, chunks=2), nn.Linear(8, 16), x),
        (VocabHead(11, 8, group=None, tied=embedding), nn.Linear(8, 11), x),
        (embedding, nn.Embedding(11, 8), ids),
    ):
        if getattr(layer, "bias", None) is None and isinstance(peer, nn.Linear):
            peer.bias = None
        (operators, calls), (expected, fewest) = _cost(layer, at), _cost(peer, at)
        assert operators == expected, layer
        assert calls <= fewest + 4, layer
