"""Each collective against algebra: <forward(x), y> = <x, backward(y)>, and values."""

import pytest
import torch
import torch.distributed as dist

from warploom.parallel.collectives import (
    all_gather_rows,
    checked,
    copy,
    gather,
    gather_json,
    join,
    reduce,
    scatter,
    split,
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
