"""Windows, soft caps, sinks and values of another width, over context-parallel ranks as on one."""

import itertools

import pytest
import torch
import torch.distributed as dist

from warploom.kernels.attention import flash_attention
from warploom.parallel.context import (
    Split,
    all_gather_attention,
    attention,
    ring_attention,
    shard_sequence,
    ulysses_attention,
)
from warploom.parallel.mesh import Mesh

KINDS = (ring_attention, all_gather_attention, ulysses_attention)
BALANCES = ("contiguous", "zigzag", "document")
PACKED = [1, 7, 0, 40, 1, 1, 13, 33, 2, 5]  # longer than a share, odd, of one token, empty
EVERYTHING = {"softcap": 1.5, "sinks": True, "scale": 0.4}


def _draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def _whole(total, heads=4, kv_heads=2, keys=8, values=8):
    shapes = [(total, heads, keys), (total, kv_heads, keys), (total, kv_heads, values), (heads,)]
    return [_draw(*shape, seed=s).requires_grad_() for s, shape in enumerate(shapes)]


def _expected(lengths, whole, window, options):
    """Output and gradients of one rank: of explicit scores, masked pair by pair."""
    q, k, v, sinks = whole
    position = torch.arange(len(q))
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    distance = position[:, None] - position
    seen = (document[:, None] == document) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhk,uhk->hqu", q, k) * options.get("scale", q.shape[2] ** -0.5)
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if options.get("sinks"):
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], 2)
    out = torch.einsum("hqu,uhl->qhl", scores.softmax(2)[..., : len(q)], v)
    dout = _draw(*out.shape, seed=7).bfloat16().to(q.dtype)
    return dout, [out.detach(), *torch.autograd.grad(out, whole, dout, allow_unused=True)]


def _compare(run, split, lengths, window, rank, group, **sizes):
    """Compare this rank with the whole: with every option, and with the window alone."""
    for options in (EVERYTHING, {}) if window == 6 else (EVERYTHING,):
        whole = _whole(sum(lengths), **sizes)
        dout, (*want, dsinks) = _expected(lengths, whole, window, options)
        own = [shard_sequence(x.detach(), split, rank).requires_grad_() for x in whole[:3]]
        sinks = whole[3].detach().clone().requires_grad_()
        given = {**options, "sinks": sinks} if options.get("sinks") else options
        out = run(*own, window=window, **given)
        upstream = shard_sequence(dout, split, rank, fill=3.0)
        leaves = [*own, sinks] if "sinks" in given else own
        got = [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
        for name, a, e in zip(("out", "dq", "dk", "dv"), got, want, strict=False):
            expected = shard_sequence(e, split, rank)
            torch.testing.assert_close(
                a, expected, atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n}, {window}: {m}"
            )
        if "sinks" in given:
            part = got[4].clone()
            if group is not None:
                dist.all_reduce(part, group=group)
            torch.testing.assert_close(part, dsinks, atol=1e-10, rtol=0)


def _every_kind():
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    cases = itertools.product(KINDS, BALANCES, (None, 1, 6, 29, 200))
    for kind, balance, window in cases:
        split = Split.build(PACKED, size, multiple=3, balance=balance)

        def run(q, k, v, kind=kind, split=split, **options):
            return kind(q, k, v, split, group=group, **options)

        _compare(run, split, PACKED, window, rank, group, values=6)


@pytest.mark.parametrize("size", [2, 4])
def test_every_kind_with_every_option(ranks, size):
    ranks(size, _every_kind)


def _hybrid():
    mesh = Mesh.build("cp4,uly2")
    rank = mesh.coordinate("cp")
    for kind, window, kv_heads in itertools.product(("ring", "all_gather"), (None, 7), (1, 2)):
        split = Split.build(PACKED, 4, balance="document", ulysses=2)

        def run(q, k, v, kind=kind, split=split, **options):
            groups = {"ring": mesh.ring, "ulysses": mesh.ulysses}
            return attention(q, k, v, split, **groups, kind=kind, **options)

        _compare(run, split, PACKED, window, rank, mesh.cp, values=12, kv_heads=kv_heads)


def test_hybrid_with_every_option(ranks):
    ranks(4, _hybrid)


def test_one_rank_with_every_option():
    for window in (None, 6):
        split = Split.build(PACKED, 1, multiple=8)
        _compare(lambda *x, s=split, **o: attention(*x, s, **o), split, PACKED, window, 0, None)
        rows = [_draw(2, 8, h, 4, seed=h) for h in (4, 2, 2)]
        sinks = _draw(4)
        left = -1 if window is None else window - 1
        want = flash_attention(*rows, window=(left, -1), sinks=sinks, softcap=2.0)
        for kind in KINDS:
            got = kind(*rows, group=None, window=window, sinks=sinks, softcap=2.0)
            torch.testing.assert_close(got, want)


def _low_precision():
    """In bfloat16, with sinks and a window: errors over those of explicit scores in that dtype."""
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    lengths = [150, 1, 200, 33]
    split = Split.build(lengths, size)
    rounded = [x.detach().bfloat16() for x in _whole(sum(lengths), heads=8)]

    def explicit(dtype):
        whole = [x.to(dtype, copy=True).requires_grad_() for x in rounded]
        return _expected(lengths, whole, 64, {"sinks": True})

    (dout, plain), (_, exact) = explicit(torch.bfloat16), explicit(torch.float64)
    for kind in KINDS:
        own = [shard_sequence(x, split, rank).requires_grad_() for x in rounded[:3]]
        sinks = rounded[3].clone().requires_grad_()
        out = kind(*own, split, group=group, window=64, sinks=sinks)
        *got, dsinks = torch.autograd.grad(out, [*own, sinks], shard_sequence(dout, split, rank))
        for x, p, e in zip([out, *got], plain, exact, strict=False):
            error = (x.double() - shard_sequence(e, split, rank)).abs()
            limit = (p.double() - e).abs()
            assert error.max() <= 2 * limit.max(), kind
            assert error.mean() <= 1.5 * limit.mean(), kind
        total = dsinks.double()
        dist.all_reduce(total, group=group)
        torch.testing.assert_close(total, exact[4], rtol=0.02, atol=0.05)


def test_low_precision_is_as_good_as_on_one_rank(ranks):
    ranks(2, _low_precision)


def _bad_options():
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    split = Split.build([32], size)
    q, k, v = (shard_sequence(x.detach(), split, rank) for x in _whole(32)[:3])
    for kind in KINDS:
        with pytest.raises(ValueError, match="window must be at least 1 and causal.*got 0 with"):
            kind(q, k, v, split, group=group, window=0)
        with pytest.raises(ValueError, match="got 4 with causal=False"):
            kind(q, k, v, split, group=group, window=4, causal=False)
        with pytest.raises(ValueError, match=r"sinks must be \[4\], one a query head, got \[3\]"):
            kind(q, k, v, split, group=group, sinks=torch.zeros(3))
        with pytest.raises(ValueError, match=r"v \[tokens, G, L\]"):
            kind(q, k, v[:, :1], split, group=group)


def test_bad_options(ranks):
    ranks(2, _bad_options)
