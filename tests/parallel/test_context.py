"""Attention over context-parallel ranks must equal attention on one: output, dq, dk and dv."""

import itertools

import pytest
import torch
import torch.distributed as dist

from warploom.kernels.attention import flash_attention, flash_attention_varlen
from warploom.parallel.collectives import observed
from warploom.parallel.context import (
    Split,
    all_gather_attention,
    attention,
    ring_attention,
    shard_sequence,
    ulysses_attention,
    unshard,
)
from warploom.parallel.mesh import Mesh

KINDS = {"ring": ring_attention, "all_gather": all_gather_attention, "ulysses": ulysses_attention}
BALANCES = ("contiguous", "zigzag", "document")
LENGTHS = {
    "packed": [1, 7, 0, 40, 1, 1, 13, 33, 2, 5],  # longer than a share, odd, of one token, empty
    "one": [61],
    "short": [3, 2],  # ranks with nothing but padding
    "equal": [16] * 4,
}


def _draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def _whole(total, heads=4, kv_heads=2, width=8):
    shapes = [(total, h, width) for h in (heads, kv_heads, kv_heads)]
    return [_draw(*shape, seed=s).requires_grad_() for s, shape in enumerate(shapes)]


def _expected(lengths, qkv, causal, scale=None):
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    out = flash_attention_varlen(*qkv, cu, causal=causal, scale=scale)
    dout = _draw(*out.shape, seed=7)
    return dout, [out.detach(), *torch.autograd.grad(out, qkv, dout)]


def _compare(run, split, lengths, *, causal=True, scale=None, rank=0, **sizes):
    """Compare `run` on this rank's tokens with its part of the whole."""
    qkv = _whole(sum(lengths), **sizes)
    dout, want = _expected(lengths, qkv, causal, scale)
    own = [shard_sequence(x.detach(), split, rank).requires_grad_() for x in qkv]
    out = run(*own)
    upstream = shard_sequence(dout, split, rank, fill=3.0)  # upstream of padding must not matter
    got = [out.detach(), *torch.autograd.grad(out, own, upstream)]
    for name, a, e in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        expected = shard_sequence(e, split, rank)
        torch.testing.assert_close(
            a, expected, atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n} of {split.rows}: {m}"
        )


def _every_kind(causal):
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    for name, balance, lengths in itertools.product(KINDS, BALANCES, LENGTHS.values()):
        split = Split.build(lengths, size, multiple=3, balance=balance)

        def run(q, k, v, kind=KINDS[name], split=split):
            return kind(q, k, v, split, group=group, causal=causal)

        _compare(run, split, lengths, causal=causal, rank=rank)


@pytest.mark.parametrize(
    ("size", "causal"), [(1, True), (2, True), (2, False), (4, True), (4, False)]
)
def test_every_kind_equals_one_rank(ranks, size, causal):
    ranks(size, _every_kind, causal)


def _hybrid(text):
    mesh = Mesh.build(text)
    uly, size, rank = mesh.degree("uly"), mesh.degree("cp"), mesh.coordinate("cp")
    cases = itertools.product(("ring", "all_gather"), BALANCES, LENGTHS.values())
    for kind, balance, lengths in cases:
        split = Split.build(lengths, size, balance=balance, ulysses=uly)

        def run(q, k, v, kind=kind, split=split):
            groups = {"ring": mesh.ring, "ulysses": mesh.ulysses}
            return attention(q, k, v, split, **groups, kind=kind, scale=0.4)

        _compare(run, split, lengths, scale=0.4, rank=rank)


@pytest.mark.parametrize("text", ["cp4,uly2", "cp4,uly4", "cp4", "cp2,uly2,dp2"])
def test_attention_over_the_groups_of_a_mesh(ranks, text):
    ranks(4, _hybrid, text)


def test_attention_of_one_rank_is_attention():
    split = Split.build(LENGTHS["packed"], 1, multiple=8)
    for kind in ("ring", "all_gather"):
        _compare(lambda *x, kind=kind: attention(*x, split, kind=kind), split, LENGTHS["packed"])
    rows = [_draw(2, 8, h, 4) for h in (4, 2, 2)]
    for kind in KINDS.values():
        torch.testing.assert_close(kind(*rows, group=None), flash_attention(*rows))


def _shared_heads():
    """Query heads that find their key/value head split, whole or copied."""
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    split = Split.build([29], size)
    for heads, kv_heads in ((8, 1), (8, 2), (8, 8), (12, 3), (12, 6), (4, 4)):

        def run(*qkv):
            return ulysses_attention(*qkv, split, group=group)

        _compare(run, split, [29], rank=rank, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("size", [2, 4])
def test_ulysses_gives_each_rank_the_heads_it_reads(ranks, size):
    ranks(size, _shared_heads)


def _foreign_rows():
    """A program with a group and tensors: rows `[B, S / R, H, K]` and nothing else."""
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    split = Split.build([24] * 3, size, rows=3)
    qkv = [_draw(3, 24, h, 8, seed=h) for h in (4, 2, 2)]
    lengths = [10, 14, 24, 1, 23]
    for documents in (None, lengths, torch.tensor(lengths)):
        whole = [x.clone().requires_grad_() for x in qkv]
        cu = [0, 24, 48, 72] if documents is None else [0, *itertools.accumulate(lengths)]
        flat = [x.flatten(0, 1) for x in whole]
        want = flash_attention_varlen(*flat, torch.tensor(cu, dtype=torch.int32)).view(qkv[0].shape)
        upstream = _draw(*want.shape, seed=5)
        gradients = torch.autograd.grad(want, whole, upstream)
        for kind in KINDS.values():
            own = [shard_sequence(x, split, rank).requires_grad_() for x in qkv]
            assert own[0].shape == (3, 24 // size, 4, 8)
            out = kind(*own, group=group, document_lengths=documents)
            everything = unshard(out, split, group=group)
            torch.testing.assert_close(everything, want, atol=1e-10, rtol=0)
            got = torch.autograd.grad(everything, own, upstream)
            for a, e in zip(got, gradients, strict=True):
                torch.testing.assert_close(a, shard_sequence(e, split, rank), atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_of_a_foreign_program(ranks, size):
    ranks(size, _foreign_rows)


def _views():
    """Strided views of one product, as a model has them, and an upstream without storage.

    Such an upstream has no graph either: a second derivative would silently lack terms.
    """
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    split = Split.build([50], size)
    whole = _draw(50, 8, 8).requires_grad_()
    flash_attention_varlen(
        *whole.split([4, 2, 2], 1), torch.tensor([0, 50], dtype=torch.int32)
    ).sum().backward()
    for kind in KINDS.values():
        own = shard_sequence(whole.detach(), split, rank).requires_grad_()
        out = kind(*own.split([4, 2, 2], 1), split, group=group)
        (out.sum() if len(split.segments(rank)) else out.sum() * 0).backward()
        want = shard_sequence(whole.grad, split, rank)
        torch.testing.assert_close(own.grad, want, atol=1e-10, rtol=0)
        out = kind(*own.split([4, 2, 2], 1), split, group=group)
        with pytest.raises(RuntimeError, match="there is no second derivative"):
            torch.autograd.grad(out.sum(), own, create_graph=True)


def test_strided_views(ranks):
    ranks(2, _views)


def _low_precision(dtype):
    """Errors against float64 on the rounded inputs, over those of one rank in the same dtype."""
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    lengths = [150, 1, 200, 33]
    split = Split.build(lengths, size)
    rounded = [x.detach().to(dtype) for x in _whole(sum(lengths), heads=8)]
    dout = _draw(*rounded[0].shape, seed=7).to(dtype)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)

    def one_rank(kind):
        qkv = [x.to(kind, copy=True).requires_grad_() for x in rounded]
        out = flash_attention_varlen(*qkv, cu)
        return [out, *torch.autograd.grad(out, qkv, dout.to(kind))]

    plain, exact = one_rank(dtype), one_rank(torch.float64)
    for name, kind in KINDS.items():
        own = [shard_sequence(x, split, rank).requires_grad_() for x in rounded]
        out = kind(*own, split, group=group)
        upstream = shard_sequence(dout, split, rank)
        for x, p, e in zip(
            [out, *torch.autograd.grad(out, own, upstream)], plain, exact, strict=True
        ):
            assert x.dtype == dtype
            error = (x.double() - shard_sequence(e, split, rank)).abs()
            limit = (p.double() - e).abs()
            assert error.max() <= 2 * limit.max(), name
            assert error.mean() <= 1.5 * limit.mean(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_as_good_as_on_one_rank(ranks, dtype):
    ranks(2, _low_precision, dtype)


class _Ledger(list):
    def __call__(self, call):
        self.append((call.op, call.bytes))
        return torch.no_grad()


def _ledger():
    """The numbers and bytes that the modules' opening tables say; and the same bits twice."""
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    split = Split.build([64], size)
    n, kv, q = split.tokens, split.tokens * 2 * 2 * 8 * 8, split.tokens * 4 * 8 * 8
    want = {
        "ring": [("exchange", kv)] * (size - 1),
        "all_gather": [("all_gather", kv)],
        "ulysses": [("all_to_all", q + kv * max(1, size // 2)), ("all_to_all", q)],
    }
    back = {
        "ring": [("exchange", kv)] * 2 * (size - 1),
        "all_gather": [("reduce_scatter", size * kv)],
        "ulysses": want["ulysses"][::-1],
    }
    own = [shard_sequence(x.detach(), split, rank).requires_grad_() for x in _whole(64)]
    assert len(own[0]) == n
    for name, kind in KINDS.items():
        outcomes = []
        for _ in range(2):
            ledger = _Ledger()
            with observed(ledger):
                out = kind(*own, split, group=group)
            assert ledger == want[name], name
            ledger.clear()
            outcomes.append([out, *torch.autograd.grad(out.square().sum(), own)])
            assert ledger == back[name], name
        assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("size", [2, 4])
def test_what_travels_is_what_the_tables_say(ranks, size):
    ranks(size, _ledger)


def _bad_input():
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    split = Split.build([64], size)
    q, k, v = (shard_sequence(x.detach(), split, rank) for x in _whole(64))
    other = Split.build([64], 2 * size)
    for kind in KINDS.values():
        with pytest.raises(ValueError, match=r"group \(2 ranks\) must be as large .* \(4\)"):
            kind(q, k, v, other, group=group)
        with pytest.raises(ValueError, match="must hold the 32 tokens of the split"):
            kind(q[:3], k[:3], v[:3], split, group=group)
        with pytest.raises(ValueError, match="document_lengths must be left out"):
            kind(q, k, v, split, group=group, document_lengths=[64])
        with pytest.raises(ValueError, match=r"must be \[tokens, H, K\]"):
            kind(q, k[:, :, :4], v, split, group=group)
        with pytest.raises(ValueError, match=r"query heads \(3\) must be a multiple"):
            kind(q[:, :3], k, v, split, group=group)
        with pytest.raises(ValueError, match="one dtype"):
            kind(q.float(), k, v, split, group=group)
        with pytest.raises(ValueError, match="that this rank is in"):
            kind(q, k, v, split, group=dist.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(ValueError, match=r"must divide query heads \(3\): uly"):
        ulysses_attention(q[:, :3], k[:, :1], v[:, :1], split, group=group)
    with pytest.raises(ValueError, match="kind must be one of ring, all_gather"):
        attention(q, k, v, split, ring=group, kind="p2p")
    with pytest.raises(ValueError, match=r"Ulysses group \(2 ranks\) .* \(1\)"):
        attention(q, k, v, split, ring=group, ulysses=group)
    with pytest.raises(ValueError, match="tokens on each of 2 ranks"):
        unshard(q[:3], split, group=group)


def test_bad_input(ranks):
    ranks(2, _bad_input)
