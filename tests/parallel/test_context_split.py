"""A split partitions the tokens, evenly and fast; what ring attention saves is O(S / R)."""

import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from warploom.parallel.context import Split, ring_attention, shard_sequence
from warploom.parallel.context.blocks import flat_blocks, own_keys, pair_blocks
from warploom.parallel.context.split import BALANCES


@st.composite
def _splits(draw):
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
    ulysses = draw(st.sampled_from([1, 2, 3]))
    options = {
        "multiple": draw(st.integers(1, 4)),
        "balance": draw(st.sampled_from(BALANCES)),
        "ulysses": ulysses,
    }
    return lengths, Split.build(lengths, ulysses * draw(st.integers(1, 5)), **options), options


@settings(max_examples=150, deadline=None)
@given(_splits())
def test_a_split_partitions_the_tokens(made):
    lengths, split, options = made
    total = sum(lengths)
    ranks = [split.indices(r) for r in range(split.ranks)]
    assert {len(x) for x in ranks} == {split.tokens}
    assert split.tokens % options["multiple"] == 0
    unit = 2 * options["multiple"] * options["ulysses"]
    assert split.members * split.share < total + split.members * unit
    everything = torch.cat(ranks)
    assert torch.equal(everything[everything >= 0].sort().values, torch.arange(total))
    assert torch.equal(everything[split.inverse], torch.arange(total))
    position = torch.cat([torch.arange(n) for n in lengths])
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    for r, own in enumerate(ranks):
        real = own[own >= 0]
        assert torch.equal(split.positions(r)[own >= 0], position[real])
        assert (split.positions(r)[own < 0] == 0).all()
        assert torch.equal(real, real.sort().values)  # in order, padding last
        assert (own[: len(real)] >= 0).all()
        for s in split.segments(r):
            assert document[s.start] == document[s.stop - 1]
            assert position[s.start] == s.start - s.document
            assert s.end == s.document + lengths[document[s.start]]
    works = [split.work(r) for r in range(0, split.ranks, split.ulysses)]
    assert sum(works) == sum(n * (n + 1) // 2 for n in lengths)
    whole = torch.arange(total * 2).view(total, 2)
    parts = torch.cat([shard_sequence(whole, split, r, fill=-1) for r in range(split.ranks)])
    assert torch.equal(parts[split.inverse], whole)
    assert (parts[everything < 0] == -1).all()


def _marked(split, member, causal, flat):
    """Count, for each pair of a member's query and any key, in how many blocks it stands."""
    per = split.ulysses
    index = torch.cat([split.indices(r) for r in range(split.ranks)]).view(split.members, -1)
    seen = torch.zeros(split.total, split.total, dtype=torch.int64)

    def mark(blocks, keys):
        for b in blocks:
            for i in range(b.count):
                rows, columns = (
                    at[s.start + i * s.step :][: s.length]
                    for s, at in ((b.queries, index[member]), (b.keys, keys))
                )
                seen[rows[:, None], columns] += 1

    own = own_keys(split, member, by_segment=flat)
    for a, b in zip(own.bounds, own.bounds[1:], strict=False):
        square = torch.ones(b - a, b - a, dtype=torch.int64)
        at = index[member, a:b]
        seen[at[:, None], at] += square.tril() if causal else square
    assert own.longest == max(
        b - a for a, b in zip(own.bounds, own.bounds[1:] or [0], strict=False)
    )
    if flat:
        mark(flat_blocks(split, member, causal=causal), torch.arange(split.total))
    else:
        for source in set(range(split.members)) - {member}:
            mark(pair_blocks(split, member, source, causal=causal), index[source])
    assert per * split.tokens == split.share
    return seen


def _marked_in_window(split, member, window, flat):
    """Count the same with a window, as the kernel masks a block."""
    index = torch.cat([split.indices(r) for r in range(split.ranks)]).view(split.members, -1)
    seen = torch.zeros(split.total, split.total, dtype=torch.int64)
    bounds = own_keys(split, member, by_segment=True).bounds
    for a, b in zip(bounds, bounds[1:], strict=False):
        at = index[member, a:b]
        seen[at[:, None], at] += torch.ones(b - a, b - a, dtype=torch.int64).tril().triu(1 - window)
    options = {"causal": True, "window": window}
    sources = (
        [] if flat else [pair_blocks(split, member, s, **options) for s in range(split.members)]
    )
    blocks = [(b, index[s]) for s, found in enumerate(sources) for b in found]
    if flat:
        blocks = [(b, torch.arange(split.total)) for b in flat_blocks(split, member, **options)]
    for b, keys in blocks:
        for i in range(b.count):
            rows = index[member][b.queries.start + i * b.queries.step :][: b.queries.length]
            columns = keys[b.keys.start + i * b.keys.step :][: b.keys.length]
            far = torch.arange(len(rows))[:, None] + (b.offset or 0) - torch.arange(len(columns))
            visible = (far >= 0) & (far < window) if b.offset is not None else far == far
            assert visible.any(0).all()
            assert visible.any(1).all()  # nothing hidden is computed
            seen[rows[:, None], columns] += visible.long()
    return seen


@settings(max_examples=60, deadline=None)
@given(_splits(), st.integers(1, 50), st.booleans())
def test_each_query_meets_each_key_of_its_window_once(made, window, flat):
    lengths, split, _ = made
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    want = (document[:, None] == document).to(torch.int64).tril().triu(1 - window)
    got = sum(_marked_in_window(split, m, window, flat) for m in range(split.members))
    assert torch.equal(got, want)


@settings(max_examples=60, deadline=None)
@given(_splits(), st.booleans(), st.booleans())
def test_each_query_meets_each_key_it_sees_once(made, causal, flat):
    lengths, split, _ = made
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    want = (document[:, None] == document).to(torch.int64)
    got = sum(_marked(split, m, causal, flat) for m in range(split.members))
    assert torch.equal(got, want.tril() if causal else want)


def _imbalance(split):
    works = [split.work(r) for r in range(0, split.ranks, split.ulysses)]
    return max(works) * len(works) / sum(works)


def test_balance_of_work():
    assert _imbalance(Split.build([4096], 8)) == 1
    assert _imbalance(Split.build([4099], 8, multiple=4)) < 1.02
    assert _imbalance(Split.build([4096], 8, balance="contiguous")) > 1.8
    assert _imbalance(Split.build([512] * 4, 8, rows=4)) == 1
    g = torch.Generator().manual_seed(0)
    short = torch.randint(1, 400, (300,), generator=g).tolist()
    for lengths in (short, [*short, 20_000], [16_000, *short], [64] * 64, [900] * 5, [6000, 5999]):
        assert _imbalance(Split.build(lengths, 8, balance="document")) < 1.03, lengths
    assert _imbalance(Split.build([16_000, *short], 8)) > 1.1  # zigzag knows no documents


def test_short_documents_stay_whole():
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 400, (300,), generator=g).tolist()
    split = Split.build(lengths, 8, balance="document")
    segments = [s for r in range(8) for s in split.segments(r)]
    cut = sum((s.stop - s.start) < s.end - s.document for s in segments)
    assert cut <= 16  # only where a rank is full


def test_blocks_of_rows_and_of_one_document_are_few():
    rows = Split.build([64] * 4, 4, rows=4)
    one = Split.build([256], 4)
    for split in (rows, one):
        for member in range(4):
            assert len(own_keys(split, member).bounds) == (5 if split is rows else 2)
            for source in {0, 1, 2, 3} - {member}:
                (block,) = pair_blocks(split, member, source, causal=True)
                assert block.count == (4 if split is rows else 1)


def test_many_documents_are_split_in_no_time():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (4400,), generator=g)
    for balance in BALANCES:
        start = time.process_time()
        split = Split.build(lengths, 16, balance=balance)
        split.indices(3), split.inverse
        own_keys(split, 3)
        for source in range(16):
            pair_blocks(split, 3, source, causal=True)
        flat_blocks(split, 3, causal=True)
        assert time.process_time() - start < 1, balance


def test_bad_splits():
    for lengths in ([], [0, 0], [3, -1]):
        with pytest.raises(ValueError, match="document lengths must be at least 0"):
            Split.build(lengths, 2)
    with pytest.raises(ValueError, match="balance must be one of contiguous, zigzag, document"):
        Split.build([8], 2, balance="even")
    with pytest.raises(ValueError, match=r"ulysses divide the ranks, got 4, 3, 1 and 1"):
        Split.build([8], 4, ulysses=3)
    with pytest.raises(ValueError, match=r"rows \(2 of 20 tokens in all\) .* divisible by 8"):
        Split.build([10, 10], 4, rows=2)
    with pytest.raises(ValueError, match="pad the rows"):
        Split.build([16, 16], 4, rows=2, balance="document")
    with pytest.raises(ValueError, match="must hold the 8 tokens"):
        shard_sequence(torch.zeros(7), Split.build([8], 2), 0)


class _Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operator makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def _memory(total, heads, width):
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    split = Split.build([total // 2, total // 2], size)
    own = [torch.randn(split.tokens, heads, width, requires_grad=True) for _ in range(3)]
    split.indices(rank)  # made once a batch, for all layers
    unit = split.tokens * heads * width * 4  # bytes of q
    saved = []
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), _Largest() as largest:
        out = ring_attention(*own, split, group=group)
        made = out.detach()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    assert sum(storages.values()) <= 4.25 * unit  # q, k, v, out, and lse
    with largest:
        out.backward(made)
    assert largest.bytes == 2 * unit  # k and v in one; no tensor of all tokens, no scores


@pytest.mark.parametrize("size", [2, 4])
def test_memory_of_ring_attention_falls_with_the_ranks(ranks, size):
    ranks(size, _memory, 1024, 2, 8)
