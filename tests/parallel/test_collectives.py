"""Each collective against algebra: <forward(x), y> = <x, backward(y)>, and values."""

import pytest
import torch
import torch.distributed as dist

from warploom.parallel.collectives import (
    all_gather_rows,
    all_gather_rows_begin,
    all_reduce_begin,
    all_to_all_rows,
    all_to_all_rows_begin,
    checked,
    copy,
    exchange_begin,
    gather,
    gather_json,
    join,
    reduce,
    reduce_scatter_rows_begin,
    scatter,
    split,
    swap,
)

# What each tensor is on the group: S sharded, R replicated, P partial (module docstring of pairs).
PAIRS = {
    "gather": (gather, "S", "R", "P", "S"),
    "scatter": (scatter, "P", "S", "S", "R"),
    "copy": (copy, "R", "R", "P", "R"),
    "reduce": (reduce, "P", "R", "R", "R"),
    "join": (join, "S", "R", "R", "S"),
    "split": (split, "R", "S", "S", "R"),
}


def _draw(kind, rows, seed):
    """Return this rank's tensor of a kind and the logical value that the ranks hold together."""
    size, rank = dist.get_world_size(), dist.get_rank()
    g = torch.Generator().manual_seed(seed)
    whole = torch.randn(rows, 3, generator=g, dtype=torch.float64)
    if kind == "R":
        return whole, whole
    if kind == "S":
        return whole.chunk(size)[rank].clone(), whole
    parts = torch.randn(size, rows, 3, generator=g, dtype=torch.float64)
    return parts[rank], parts.sum(0)


def _value(kind, x):
    """Return the logical value of this rank's tensor."""
    group = dist.group.WORLD
    if kind == "R":
        return x
    if kind == "S":
        return all_gather_rows(x, group)
    total = x.clone()
    dist.all_reduce(total)
    return total


def _keeps_the_logical_value_both_ways(name):
    fn, before, after, gradient_after, gradient_before = PAIRS[name]
    x, logical = _draw(before, 8, 0)
    x = x.clone().requires_grad_()
    y = fn(x, dist.group.WORLD)
    torch.testing.assert_close(_value(after, y.detach()), logical, atol=1e-12, rtol=0)
    dy, dlogical = _draw(gradient_after, 8, 1)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(_value(gradient_before, dx), dlogical, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("size", [2, 4])
def test_pair_keeps_the_logical_value_both_ways(ranks, name, size):
    ranks(size, _keeps_the_logical_value_both_ways, name)


@pytest.mark.parametrize("name", PAIRS)
def test_one_rank_is_the_identity(name):
    x = torch.randn(4, 2)
    assert PAIRS[name][0](x, None) is x


def _own(rows, seed):
    g = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    return torch.randn(rows, 3, generator=g, dtype=torch.float64)


def _inner(x, y):
    """Return <x, y> over all ranks."""
    total = (x * y).sum()
    dist.all_reduce(total)
    return total


def _adjoint(forth, back, rows, rows_after):
    """Check <forth(x), y> = <x, back(y)>; each rank's part is drawn alone."""
    x, y = _own(rows, 1), _own(rows_after, 2)
    left, right = _inner(forth(x), y), _inner(x, back(y))
    torch.testing.assert_close(left, right, atol=1e-12, rtol=1e-12)
    assert left.abs() > 1e-6


def _swaps_are_adjoint_to_those_back():
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    counts = [[(2 * a + 3 * b + a * b) % 4 for b in range(size)] for a in range(size)]
    counts[1] = [0] * size  # one rank sends nothing
    sent, got = counts[rank], [row[rank] for row in counts]
    for parts, back, n, m in (
        ((None, None), (None, None), 2 * size, 2 * size),
        ((sent, got), (got, sent), sum(sent), sum(got)),
    ):
        _adjoint(
            lambda x, p=parts: all_to_all_rows(x, group, *p),
            lambda y, p=back: all_to_all_rows_begin(y, group, *p).wait(),
            n,
            m,
        )
        x, dy = _own(n, 3).requires_grad_(), _own(m, 4)
        y = swap(x, group, *parts)
        torch.testing.assert_close(swap(y.detach(), group, *back), x.detach(), atol=0, rtol=0)
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(_inner(y.detach(), dy), _inner(x.detach(), dx))
        torch.testing.assert_close(dx, all_to_all_rows(dy, group, *back), atol=0, rtol=0)
    with pytest.raises(ValueError, match="must be the sum of those sent"):
        swap(torch.ones(1, 3), group, [2] * size, [2] * size)
    with pytest.raises(ValueError, match=rf"rows to swap \({size + 1}\) must be divisible"):
        swap(torch.ones(size + 1, 3), group)


def _what_is_begun_keeps_the_algebra():
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    out = torch.empty(4, 3, dtype=torch.float64)
    into = torch.empty(4 * size, 3, dtype=torch.float64)
    for full, part in ((None, None), (into, out)):
        _adjoint(
            lambda x, o=full: all_gather_rows_begin(x, group, out=o).wait(),
            lambda y, o=part: reduce_scatter_rows_begin(y, group, out=o).wait(),
            4,
            4 * size,
        )
    _adjoint(
        lambda x: all_reduce_begin(x.clone(), group).wait(),
        lambda y: all_reduce_begin(y.clone(), group).wait(),
        4,
        4,
    )
    x = _own(4, 5)
    assert torch.equal(all_reduce_begin(x.clone(), group, op="max").wait()[0], _most(x)[0])
    after, before = (rank + 1) % size, (rank - 1) % size

    def shift(x, to, source):
        pairs = [torch.empty_like(part) for part in x.split((1, 3))]
        sends, receives = [(p, to) for p in x.split((1, 3))], [(p, source) for p in pairs]
        pending = exchange_begin(sends, receives, group)
        return torch.cat(pending.wait())

    _adjoint(lambda x: shift(x, after, before), lambda y: shift(y, before, after), 4, 4)
    assert exchange_begin([], [], group).wait() == []


def _most(x):
    return all_gather_rows(x[None], dist.group.WORLD).amax(0)


def _algebra():
    _swaps_are_adjoint_to_those_back()
    _what_is_begun_keeps_the_algebra()


@pytest.mark.parametrize("size", [2, 3])
def test_swaps_and_what_is_begun_are_adjoint(ranks, size):
    ranks(size, _algebra)


def test_one_rank_sends_nothing():
    x, out = torch.randn(4, 2), torch.empty(4, 2)
    assert swap(x, None) is x
    for begin in (all_reduce_begin, all_to_all_rows_begin):
        assert begin(x, None).wait() is x
    for begin in (all_gather_rows_begin, reduce_scatter_rows_begin):
        assert begin(x, None).wait() is x
        assert begin(x, None, out=out).wait() is out
        assert torch.equal(out, x)
    assert exchange_begin([], [(out, 0)], None).wait() == [out]


def _a_missing_reduction_is_an_error():
    group, rank = dist.group.WORLD, dist.get_rank()
    with checked():
        copy(torch.ones(3), group)
        with pytest.raises(RuntimeError, match="a reduction is missing"):
            copy(torch.ones(3) * rank, group)
        x = torch.ones(2, requires_grad=True)
        y = reduce(x * 2, group)
        with pytest.raises(RuntimeError, match="must be equal on the 2 ranks"):
            y.backward(torch.full((2,), float(rank)))
    copy(torch.ones(3) * rank, group)  # outside: not compared


def test_a_missing_reduction_is_an_error_in_debug_mode(ranks):
    ranks(2, _a_missing_reduction_is_an_error)


def _json_travels():
    values = gather_json({"rank": dist.get_rank(), "text": "ü" * dist.get_rank()}, dist.group.WORLD)
    assert values == [{"rank": r, "text": "ü" * r} for r in range(3)]


def test_json_travels(ranks):
    ranks(3, _json_travels)


def test_rows_that_do_not_divide_get_a_sentence():
    class Two:
        def size(self):
            return 2

    with pytest.raises(ValueError, match=r"rows to scatter \(3\) must be divisible by the group"):
        scatter(torch.ones(3, 1), Two())


def _outside_a_group_nothing_is_built():
    import torch.distributed as dist

    from warploom.parallel.expert import Experts
    from warploom.parallel.tensor import ColumnLinear, VocabEmbedding

    group = dist.new_group([0])
    if dist.get_rank() == 0:
        ColumnLinear(4, 4, group=group)
        return
    for build in (
        lambda: ColumnLinear(4, 4, group=group),
        lambda: VocabEmbedding(4, 4, group=group),
        lambda: Experts(4, 4, 4, group=group, etp_group=None),
    ):
        with pytest.raises(ValueError, match="group must be a process group that this rank is in"):
            build()


def test_outside_a_group_nothing_is_built(ranks):
    ranks(2, _outside_a_group_nothing_is_built)
