"""Linear layers, however they overlap, equal `F.linear`: output, dX and every dW, in float64."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

from warploom.parallel.collectives import all_gather_rows, all_reduce_
from warploom.parallel.sharding import assemble, layouts
from warploom.parallel.tensor import ColumnLinear, RowLinear
from warploom.parallel.tensor.product import WeightGradients

T, D, FEATURES = 16, 6, 8
OVERLAPS = ({}, {"chunks": 2}, {"regather": True}, {"chunks": 4, "regather": True})


def near(found, wanted, what=""):
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0, msg=lambda m: f"{what}: {m}")


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def slices(x, group, dim):
    return x if group is None else x.chunk(group.size(), dim)[group.rank()].contiguous()


def gradients(layer, group):
    """Return the logical gradients, after the sums that parallel/data does in a step."""
    made = layouts(layer)
    found = {path: p.grad.clone() for path, p in layer.named_parameters()}
    for path, layout in made.items():
        for over in layout.partial:
            all_reduce_(found[path], over)
        for over, names in layout.spread:
            for name in names:
                mine = [piece for piece in layout.pieces if piece.name == name]
                buffer = found[path].new_zeros(mine[0].shape)
                for piece in mine:
                    piece.of_logical(buffer).add_(piece.of_local(found[path]))
                all_reduce_(buffer, over)
                for piece in mine:
                    piece.of_local(found[path]).copy_(piece.of_logical(buffer))
    return assemble(found, made, group)


def weights(layer, group):
    return assemble(dict(layer.named_parameters()), layouts(layer), group)


def column(group, *, parts=None, heads=None, deep=False, **options):
    """Compare one ColumnLinear with `F.linear` over its parts."""
    torch.manual_seed(3)
    sharded = options.get("sequence_parallel", True)
    features = sum((parts or {"": FEATURES}).values())
    layer = ColumnLinear(D, features, group=group, parts=parts, heads=heads, **options).double()
    held = weights(layer, group)
    for p in held.values():
        p.requires_grad_()
    shape = (T, 3, D) if deep else (T, D)
    x = draw(*shape, seed=1).requires_grad_()
    want = {n: F.linear(x, held[dot(n, "weight")], held.get(dot(n, "bias"))) for n in layer.parts}
    dy = {n: draw(*y.shape, seed=7 + i) for i, (n, y) in enumerate(want.items())}
    sum((want[n] * dy[n]).sum() for n in want).backward()
    local = (slices(x.detach(), group, 0) if sharded else x.detach().clone()).requires_grad_()
    y = layer(local)
    mine = {}
    for name, share in layer.shares.items():
        ranks, total = 1 if group is None else group.size(), layer.parts[name]
        owners = ranks * share.size // total  # ranks that hold the same rows share their dy
        part = dy[name].narrow(-1, share.first, share.size)
        place = 0 if group is None else group.rank() % owners
        mine[name] = part * ((place == 0) * 0.25 + (place + 1 == owners) * 0.75)
        assert owners <= 2 or share.shared
    wanted = [want[n].narrow(-1, s.first, s.size) for n, s in layer.shares.items()]
    near(y, torch.cat(wanted, -1).detach(), "output")
    with torch.no_grad():
        near(layer(local), y, "output without gradients")
    y.backward(torch.cat(list(mine.values()), -1))
    near(local.grad, slices(x.grad, group, 0) if sharded else x.grad, "dx")
    found = gradients(layer, group)
    assert found.keys() == held.keys()
    for name, p in held.items():
        near(found[name], p.grad, f"d{name}")


def dot(part, name):
    return f"{part}.{name}" if part else name


def row(group, *, deep=False, **options):
    """Compare one RowLinear with `F.linear`."""
    torch.manual_seed(4)
    sharded = options.get("sequence_parallel", True)
    layer = RowLinear(FEATURES, D, group=group, **options).double()
    held = weights(layer, group)
    for p in held.values():
        p.requires_grad_()
    shape = (T, 3, FEATURES) if deep else (T, FEATURES)
    x = draw(*shape, seed=2).requires_grad_()
    want = F.linear(x, held["weight"], held.get("bias"))
    dy = draw(*want.shape, seed=5)
    want.backward(dy)
    local = slices(x.detach(), group, -1).requires_grad_()
    y = layer(local)
    near(y, slices(want.detach(), group, 0) if sharded else want.detach(), "output")
    with torch.no_grad():
        near(layer(local), y, "output without gradients")
    y.backward(slices(dy, group, 0) if sharded else dy)
    near(local.grad, slices(x.grad, group, -1), "dx")
    found = gradients(layer, group)
    assert found.keys() == held.keys()
    for name, p in held.items():
        near(found[name], p.grad, f"d{name}")


def _linears_equal_unsharded():
    group = None if dist.get_world_size() == 1 else dist.group.WORLD
    for bias, deep, overlap in itertools.product((True, False), (True, False), OVERLAPS):
        column(group, bias=bias, deep=deep, **overlap)
        column(group, bias=bias, parts={"a": 4, "b": 8}, **overlap)
        if "regather" not in overlap:
            row(group, bias=bias, deep=deep, **overlap)
    for bias in (True, False):
        column(group, bias=bias, sequence_parallel=False)
        row(group, bias=bias, sequence_parallel=False)
    for heads in (1, 2, 4):
        options = {"heads": {"k": heads, "v": heads}, "parts": {"q": 8, "k": heads, "v": heads * 3}}
        column(group, bias=True, **options)
        column(group, bias=True, sequence_parallel=False, **options)
        column(group, bias=True, chunks=2, regather=True, **options)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_linears_equal_unsharded(pool, size):
    pool(size, _linears_equal_unsharded)


def _shared_heads():
    group = dist.group.WORLD
    layer = ColumnLinear(4, 12, group=group, parts={"q": 8, "k": 4}, heads={"k": 2}, bias=True)
    assert [layer.shares["k"].first // 2] == [dist.get_rank() * 2 // 4]
    made = layouts(layer)
    assert made["weight"].spread == ((group, ("k.weight",)),)
    assert made["bias"].spread == ((group, ("k.bias",)),)
    k = layer.weight.detach()[2:]
    held = all_gather_rows(k[None].clone(), group)
    assert torch.equal(held[0], held[1])
    assert torch.equal(held[2], held[3])
    assert not torch.equal(held[0], held[2])


def test_fewer_heads_than_ranks_are_held_by_neighbours(pool):
    pool(4, _shared_heads)


def _deferred_weight_gradients():
    group = dist.group.WORLD
    for options in OVERLAPS:
        torch.manual_seed(0)
        up = ColumnLinear(D, FEATURES, group=group, bias=True, **options).double()
        down = RowLinear(FEATURES, D, group=group, chunks=options.get("chunks", 1)).double()
        x = slices(draw(T, D, seed=1), group, 0).requires_grad_()
        dy = slices(draw(T, D, seed=2), group, 0)
        down(up(x).tanh()).backward(dy)
        wanted = [p.grad.clone() for p in (x, *up.parameters(), *down.parameters())]
        for p in (x, *up.parameters(), *down.parameters()):
            p.grad = None
        queue = WeightGradients()
        with queue.open():
            y = down(up(x).tanh())
        y.backward(dy)
        near(x.grad, wanted[0])
        assert len(queue) == 3
        assert all(p.grad is None for p in (*up.parameters(), *down.parameters()))
        queue.run()
        for p, want in zip((*up.parameters(), *down.parameters()), wanted[1:], strict=True):
            near(p.grad, want)


def test_weight_gradients_can_wait(pool):
    pool(2, _deferred_weight_gradients)


def _regather_keeps_only_own_rows():
    group = dist.group.WORLD
    for options, rows in (({}, T), ({"regather": True}, T // 2)):
        layer = ColumnLinear(D, FEATURES, group=group, **options)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t) or t, id):
            layer(torch.ones(T // 2, D, requires_grad=True))
        assert [len(t) for t in kept if t.shape[1:] == (D,)] == [rows, FEATURES // 2]


def test_regather_keeps_only_own_rows(pool):
    pool(2, _regather_keeps_only_own_rows)


def _frozen_and_autocast():
    group = dist.group.WORLD
    layer = ColumnLinear(D, FEATURES, group=group, chunks=2)
    layer.weight.requires_grad_(requires_grad=False)
    x = torch.ones(T // 2, D, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad
    layer.weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_frozen_weights_and_autocast(pool):
    pool(2, _frozen_and_autocast)


def _no_tokens():
    group = dist.group.WORLD
    for chunks in (1, 2):
        up = ColumnLinear(D, FEATURES, group=group, bias=True, chunks=chunks)
        down = RowLinear(FEATURES, D, group=group, bias=True, chunks=chunks)
        x = torch.ones(0, D, requires_grad=True)
        y = down(up(x))
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert not any(p.grad.any() for p in (*up.parameters(), *down.parameters()))


def test_no_tokens(pool):
    pool(2, _no_tokens)


def _compiled():
    group = dist.group.WORLD
    for regather, chunks in ((False, 2), (True, 1)):
        torch._dynamo.reset()
        up = ColumnLinear(D, FEATURES, group=group, bias=True, regather=regather).double()
        down = RowLinear(FEATURES, D, group=group, bias=True, chunks=chunks).double()
        layers = torch.nn.Sequential(up, torch.nn.Tanh(), down)
        results = []
        for run in (layers, torch.compile(layers, backend="eager")):
            layers.zero_grad()
            for seed in (1, 2):  # the second call finds what the first compiled
                x = slices(draw(T, D, seed=seed), group, 0).requires_grad_()
                y = run(x)
                y.backward(draw(*y.shape, seed=3))
            results.append([y.detach(), x.grad, *(p.grad.clone() for p in layers.parameters())])
        for found, wanted in zip(*results, strict=True):
            near(found, wanted, f"regather={regather}, chunks={chunks}")


def test_compiled_layers_equal_eager_ones(pool):
    pool(2, _compiled)


def _copied():
    group = dist.group.WORLD
    x = torch.ones(T, D)
    for options in ({}, {"chunks": 2}, {"sequence_parallel": False}):
        up = ColumnLinear(D, FEATURES, group=group, bias=True, **options)
        layers = torch.nn.Sequential(up, RowLinear(FEATURES, D, group=group, **options))
        twin, mean = copy.deepcopy(layers), AveragedModel(layers)
        assert twin[0].group is twin[1].group is group
        assert layouts(twin[0])["bias"] == layouts(up)["bias"]
        wanted = layers(x)
        with torch.no_grad():
            up.weight.zero_()
        mean.update_parameters(layers)
        assert torch.equal(twin(x), wanted)
        assert torch.equal(mean(x), layers(x))


def test_a_deep_copy_shares_the_groups(pool):
    pool(2, _copied)


def _wrong_input():
    group = dist.group.WORLD
    up = ColumnLinear(D, FEATURES, group=group, chunks=3)
    with pytest.raises(ValueError, match=r"ColumnLinear: x must have 6 features .* \[8, 5\]"):
        up(torch.ones(8, 5))
    with pytest.raises(ValueError, match=r"chunks \(3\) must divide a rank's tokens \(8\)"):
        up(torch.ones(8, D))
    down = RowLinear(FEATURES, D, group=group, chunks=3)
    with pytest.raises(ValueError, match=r"RowLinear: x must have 4 features .* \[8, 8\]"):
        down(torch.ones(8, 8))
    with pytest.raises(ValueError, match=r"rows to scatter \(7\) must be divisible"):
        down(torch.ones(7, 4))
    with pytest.raises(ValueError, match=r"chunks \(3\) must divide a rank's tokens \(4\)"):
        down(torch.ones(8, 4))
    with pytest.raises(ValueError, match=r"RowLinear with chunks \(3\) .* multiplies by itself"):
        down(torch.ones(12, 4), product=F.linear)
    with pytest.raises(ValueError, match="symmetric memory needs a CUDA group, this one is gloo"):
        RowLinear(FEATURES, D, group=group, symmetric=True)
    with pytest.raises(ValueError, match=r"chunks \(0\) must be at least 1"):
        ColumnLinear(D, FEATURES, group=group, chunks=0)
    with pytest.raises(ValueError, match="overlap what sequence_parallel=True gathers"):
        ColumnLinear(D, FEATURES, group=group, regather=True, sequence_parallel=False)
    with pytest.raises(ValueError, match=r"k: its heads \(3\) must divide .* size \(2\)"):
        ColumnLinear(D, 6, group=group, parts={"k": 6}, heads={"k": 3})
    with pytest.raises(ValueError, match=r"heads must name parts \(k\); got \['v'\]"):
        ColumnLinear(D, 6, group=group, parts={"k": 6}, heads={"v": 3})


def test_wrong_input_gets_one_sentence(pool):
    pool(2, _wrong_input)
