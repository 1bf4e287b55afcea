"""A sharded layer must equal the unsharded one: outputs and every gradient, in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

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
def test_layers_equal_unsharded(ranks, size):
    ranks(size, _toys_equal_unsharded)


def _logits_gradient():
    mesh = Mesh.build("tp2")
    tokens, _ = _batch()
    g = torch.Generator().manual_seed(9)
    dy = torch.randn(8, 11, generator=g, dtype=torch.float64)
    alone, model = Toy(None, tied=False), Toy(mesh.tp, tied=False)
    alone.head(alone.hidden(tokens)).backward(dy)
    model.head(model.hidden(tokens)).backward(dy)
    expected = {name: p.grad for name, p in assemble_parameters(alone).items()}
    for name, gradient in _gradients(model, mesh).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-10, rtol=0)


def test_gradients_through_gathered_logits(ranks):
    ranks(2, _logits_gradient)


class _Three:
    def size(self):
        return 3

    def rank(self):
        return 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: ColumnLinear(6, 8, group=g), r"features \(8\) must be divisible .* size \(3\)"),
        (lambda g: RowLinear(8, 6, group=g), r"width \(8\) must be divisible .* size \(3\)"),
        (lambda g: ColumnLinear(6, 9, group=g, parts={"q": 4, "k": 5}), r"q \(4\) must be"),
        (lambda g: ColumnLinear(6, 9, group=g, parts={"q": 3, "k": 3}), "must sum to the features"),
    ],
)
def test_bad_sizes_get_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make(_Three())


def test_padding_has_no_piece_and_is_zero():
    last = type("Last", (_Three,), {"rank": lambda self: 2})()
    layer = VocabEmbedding(7, 4, group=last)
    assert layer.weight.shape == (3, 4)
    assert [p.slices[0] for p in layouts(layer)["weight"].pieces] == [(6, 7, 1)]
    assert not layer.weight[1:].any()
