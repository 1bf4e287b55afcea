"""Windows, offsets, soft caps, sinks, keys of other lengths: against explicit maths and others'."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.specimen import item
from torch.utils._python_dispatch import TorchDispatchMode

from warploom.kernels.attention import (
    flash_attention,
    flash_attention_backward,
    flash_attention_varlen,
    tiled,
)
from warploom.kernels.attention.scores import Scores

BACKENDS = ["reference", "torch"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
BOTH = ("flash_attention", "flash_attention_varlen")


def seen_by(queries, keys, left, right, at):
    """Say which keys each query sees, pair by pair."""
    rows = [
        [
            (left < 0 or j >= i + at - left) and (right < 0 or j <= i + at + right)
            for j in range(keys)
        ]
        for i in range(queries)
    ]
    return torch.tensor(rows, dtype=torch.bool).view(queries, keys)


def explicit(q, k, v, seen, *, scale, softcap=None, sinks=None):
    """Attend with all scores; a query that sees nothing gives 0 and -inf."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks[:, None, None].expand(*s.shape[:-1], 1)], -1)
    rows = s.amax(-1, keepdim=True).detach() > -torch.inf if s.shape[-1] else s.sum(-1, True) > 0
    p = torch.where(rows, s, 0.0).softmax(-1).masked_fill(~rows, 0.0)
    lse = torch.where(rows, s, 0.0).logsumexp(-1).masked_fill(~rows[..., 0], -torch.inf)
    return (p[..., : k.shape[-2]] @ v).transpose(1, 2), lse


def draw(queries, keys, *, heads=4, kv_heads=2, width=8, values=8, dtype=torch.float64, batch=2):
    g = torch.Generator().manual_seed(0)
    shapes = (queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, values)
    return [
        torch.randn(batch, *shape, dtype=torch.float64, generator=g).to(dtype).requires_grad_()
        for shape in shapes
    ]


def _same(actual, expected, inputs, tolerance=1e-12):
    g = torch.Generator().manual_seed(1)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)
    upstream = [torch.randn(e.shape, dtype=torch.float64, generator=g) for e in expected]
    got, want = (torch.autograd.grad(x, inputs, upstream) for x in (actual, expected))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=10 * tolerance)


def test_ranges_of_keys_and_queries_against_every_pair():
    sides = (-1, 0, 1, 3, 9)
    for queries, keys in itertools.product(range(5), range(5)):
        for left, right, offset in itertools.product(sides, sides, (None, -3, 0, 2, 7)):
            scores = Scores(scale=1.0, left=left, right=right, offset=offset)
            seen = seen_by(queries, keys, left, right, scores.first(queries, keys))
            seeing = seen.any(1).nonzero()[:, 0].tolist()
            assert list(range(*scores.seeing(queries, keys))) == seeing
            assert scores.pairs(queries, keys) == seen.sum()
            for a, b in itertools.combinations(range(queries + 1), 2):
                some = seen[a:b].any(0).nonzero()[:, 0].tolist()
                low, high = scores.seen(a, b, queries, keys)
                assert not some or low <= some[0]
                assert not some or some[-1] < high


@item("values", "zero and odd sizes", ops=BOTH[:1])
@settings(max_examples=150, deadline=None)
@given(
    queries=st.sampled_from([1, 2, 5, 63, 64, 65, 129, 200]),
    keys=st.sampled_from([0, 1, 7, 64, 127, 128, 150]),
    window=st.tuples(*[st.sampled_from([-1, 0, 1, 40, 500])] * 2),
    causal=st.booleans(),
    offset=st.sampled_from([None, 0, 3, -70, 90]),
    softcap=st.sampled_from([None, 0.8]),
    values=st.sampled_from([8, 3, 13]),
    backend=st.sampled_from(BACKENDS),
)
def test_any_window_and_offset(queries, keys, window, causal, offset, softcap, values, backend):
    """Fully masked rows too: output 0, log-sum-exp -inf, no gradient."""
    inputs = draw(queries, keys, values=values)
    at = keys - queries if offset is None else offset
    seen = seen_by(queries, keys, window[0], 0 if causal else window[1], at)
    actual = flash_attention(
        *inputs, causal=causal, window=window, offset=offset, softcap=softcap, scale=0.6,
        return_lse=True, backend=backend,
    )  # fmt: skip
    expected = explicit(*inputs, seen, scale=0.6, softcap=softcap)
    empty = ~seen.any(1)
    assert (actual[1][:, :, empty] == -torch.inf).all()
    actual, expected = ((o, lse.masked_fill(empty, 0.0)) for o, lse in (actual, expected))
    _same(actual, expected, inputs)


@item("values", ops=BOTH)
@each_backend
@pytest.mark.parametrize("length", [127, 128, 129, 300])
@pytest.mark.parametrize("window", [(31, 0), (0, 5), (128, 128)])
def test_tiles_of_windows(backend, length, window):
    inputs = draw(length, length, batch=1)
    seen = seen_by(length, length, *window, 0)
    options = {"causal": False, "window": window, "scale": 0.6, "return_lse": True}
    actual = flash_attention(*inputs, **options, backend=backend)
    _same(actual, explicit(*inputs, seen, scale=0.6), inputs)
    cu = torch.tensor([0, length], dtype=torch.int32)
    out, lse = flash_attention_varlen(*(x[0] for x in inputs), cu, **options, backend=backend)
    torch.testing.assert_close((out[None], lse[None]), actual)


@item("values", "zero and odd sizes", ops=BOTH[1:])
@each_backend
@pytest.mark.parametrize("window", [(-1, -1), (6, 0)])
def test_documents_with_more_or_fewer_keys_than_queries(backend, window):
    """The last query of a document stands at its last key."""
    of_queries, of_keys = [0, 3, 3, 10, 20, 20, 30, 36], [0, 9, 14, 14, 20, 31, 41, 43]
    q, k, v = (x[0] for x in draw(36, 43, batch=1))
    cu = [torch.tensor(b, dtype=torch.int32) for b in (of_queries, of_keys)]
    actual = flash_attention_varlen(
        q, k, v, cu[0], cu_seqlens_k=cu[1], window=window, scale=0.6, return_lse=True,
        backend=backend,
    )  # fmt: skip
    outs, lses, empty = [], [], []
    for (a, b), (c, d) in zip(*map(itertools.pairwise, (of_queries, of_keys)), strict=True):
        seen = seen_by(b - a, d - c, window[0], 0, (d - c) - (b - a))
        out, lse = explicit(*(x[None] for x in (q[a:b], k[c:d], v[c:d])), seen, scale=0.6)
        outs.append(out[0])
        lses.append(lse[0])
        empty.append(~seen.any(1))
    empty = torch.cat(empty)
    assert (actual[1][:, empty] == -torch.inf).all()
    expected = torch.cat(outs), torch.cat(lses, 1).masked_fill(empty, 0.0)
    _same((actual[0], actual[1].masked_fill(empty, 0.0)), expected, [q, k, v])


@item("determinism", "batch invariance", ops=BOTH)
@each_backend
@pytest.mark.parametrize("window", [(-1, -1), (40, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_equal_separate_ones_bit_for_bit(backend, window, dtype):
    lengths = [1, 64, 64, 129, 7]
    bounds = [0, *itertools.accumulate(lengths)]
    inputs = [x.detach()[0].requires_grad_() for x in draw(265, 265, dtype=dtype, batch=1)]
    cu = torch.tensor(bounds, dtype=torch.int32)
    options = {"window": window, "return_lse": True, "deterministic": True, "backend": backend}
    out, lse = flash_attention_varlen(*inputs, cu, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed = out, lse.t(), *torch.autograd.grad((out, lse), inputs, (upstream, 1 + 0 * lse))
    for a, b in itertools.pairwise(bounds):
        alone = [x.detach()[None, a:b].requires_grad_() for x in inputs]
        out, lse = flash_attention(*alone, **options)
        separate = (
            out,
            lse.mT,
            *torch.autograd.grad((out, lse), alone, (upstream[None, a:b], 1 + 0 * lse)),
        )
        assert all(torch.equal(p[a:b], s[0]) for p, s in zip(packed, separate, strict=True))


@item("NaN and inf", ops=BOTH)
@each_backend
def test_infinite_scores_stay_in_their_rows(backend):
    """A score of -inf weighs nothing; one of +inf makes its row NaN, as in softmax."""
    q, k, v = (x.detach() for x in draw(6, 6, heads=2, kv_heads=2, batch=1))
    q[..., 0] = q[..., 0].abs() + 0.1
    clean = flash_attention(q, k, v, causal=False, backend=backend)
    hidden, blown = k.clone(), q.clone()
    hidden[0, 2, :, 0] = -torch.inf
    without = [torch.cat([x[:, :2], x[:, 3:]], 1) for x in (k, v)]
    expected = flash_attention(q, *without, causal=False, backend=backend)
    torch.testing.assert_close(
        flash_attention(q, hidden, v, causal=False, backend=backend), expected
    )
    blown[0, 4, 1, 0] = torch.inf
    got = flash_attention(blown, k, v, causal=False, backend=backend)
    assert got[0, 4, 1].isnan().all()
    got[0, 4, 1] = clean[0, 4, 1]
    torch.testing.assert_close(got, clean)


@item("NaN and inf", ops=BOTH)
@each_backend
@pytest.mark.parametrize("keys", [1, 5, 9, 21])
@pytest.mark.parametrize("spoilt", "qk")
def test_a_nan_arrives_over_however_few_keys(backend, keys, spoilt):
    """PyTorch's operator on the CPU answers 0 where all scores in the rest of a vector are NaN."""
    q, k, v = (x.detach() for x in draw(keys, keys, heads=2, kv_heads=2, batch=1))
    clean = flash_attention(q, k, v, window=(0, 0), return_lse=True, backend=backend)
    (q if spoilt == "q" else k)[:, keys - 1] = torch.nan
    out, lse = flash_attention(q, k, v, window=(0, 0), return_lse=True, backend=backend)
    assert out[:, -1].isnan().all()
    assert lse[..., -1].isnan().all()
    if spoilt == "q":  # a key may spoil its whole document
        assert torch.equal(out[:, :-1], clean[0][:, :-1])
        assert torch.equal(lse[..., :-1], clean[1][..., :-1])


def test_only_the_tile_of_a_query_that_may_be_lost_is_computed_again(monkeypatch):
    """A first token of zeros looks lost: its log-sum-exp and its output are 0."""
    rows, run = [], tiled.attention_reference

    def noted(q, k, v, scores):
        rows.append(q.shape[1])
        return run(q, k, v, scores)

    monkeypatch.setattr(tiled, "attention_reference", noted)
    q, k, v = (x.detach().clone() for x in draw(300, 300))
    q[:, 0] = k[:, 0] = v[:, 0] = 0
    out = flash_attention(q, k, v, backend="torch")
    assert rows == [128]
    torch.testing.assert_close(out, flash_attention(q, k, v, backend="reference"))


@each_backend
def test_sinks_and_everything_at_once_by_gradcheck(backend):
    inputs = [x[:1] for x in draw(5, 9, heads=2, kv_heads=1, width=3, values=2)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    sinks = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    options = {"window": (4, 1), "causal": False, "softcap": 0.9, "return_lse": True}

    def run(q, k, v, sinks):
        return flash_attention(q, k, v, sinks=sinks, **options, backend=backend)

    assert torch.autograd.gradcheck(run, (*inputs, sinks))
    expected = explicit(*inputs, seen_by(5, 9, 4, 1, 4), scale=3**-0.5, softcap=0.9, sinks=sinks)
    torch.testing.assert_close(run(*inputs, sinks), expected)


def _sliding(window, length):
    masking = pytest.importorskip("transformers.masking_utils")
    seen = [[masking.sliding_window_overlay(window)(0, 0, i, j) for j in range(length)]
            for i in range(length)]  # fmt: skip
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = torch.tensor(seen) & causal
    return torch.zeros(length, length).double().masked_fill(~seen, -torch.inf)


def _module(**members):
    return SimpleNamespace(num_key_value_groups=2, training=False, head_dim=8, **members)


@each_backend
def test_gemma2_of_transformers(backend):
    """Soft cap and sliding window; its softmax is in float32."""
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    inputs = draw(140, 140)
    theirs, _ = gemma.eager_attention_forward(
        _module(), *(x.transpose(1, 2) for x in inputs), _sliding(33, 140), scaling=0.4, softcap=1.1
    )
    ours = flash_attention(*inputs, window=(32, 0), scale=0.4, softcap=1.1, backend=backend)
    _same([ours], [theirs], inputs, 2e-6)


@each_backend
def test_gpt_oss_of_transformers(backend):
    """Sinks and sliding window, and their gradient."""
    oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    inputs, sinks = draw(140, 140), torch.linspace(-2, 2, 4).double().requires_grad_()
    theirs, _ = oss.eager_attention_forward(
        _module(sinks=sinks), *(x.transpose(1, 2) for x in inputs), _sliding(33, 140), scaling=0.4
    )
    ours = flash_attention(*inputs, window=(32, 0), scale=0.4, sinks=sinks, backend=backend)
    _same([ours], [theirs], [*inputs, sinks])


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [(-1, -1), (9, 0)])
def test_flex_attention_agrees(window, softcap):
    """PyTorch's flex attention as a backend: whole sequences, and documents of other lengths.

    Forward alone: it has no backward on the CPU.
    """
    inputs = [x.detach().float() for x in draw(33, 40, width=16, values=16)]
    options = {"window": window, "softcap": softcap, "return_lse": True}
    expected = flash_attention(*inputs, **options)
    actual = flash_attention(*inputs, **options, backend="flex")
    torch.testing.assert_close(actual, expected)
    flat = [x[0] for x in inputs]
    cu, cu_k = (torch.tensor(b, dtype=torch.int32) for b in ([0, 5, 5, 33], [0, 8, 10, 40]))
    options |= {"cu_seqlens_k": cu_k}
    expected = flash_attention_varlen(*flat, cu, **options)
    torch.testing.assert_close(
        flash_attention_varlen(*flat, cu, **options, backend="flex"), expected
    )
    inputs[0].requires_grad_()
    with pytest.raises(RuntimeError, match="flash_attention: backend 'flex' has no gradient on"):
        flash_attention(*inputs, backend="flex")


@item("bad input", ops=("flash_attention_varlen",))
def test_flex_attention_refuses_what_it_would_get_wrong():
    q, k, v = (x.detach().float()[0] for x in draw(8, 8, width=16, values=16))
    for bounds, message in (
        ([0, 9], r"must end at the number of tokens \(8\), got 9"),
        ([0, 5, 3, 8], "must not decrease, got 5 and then 3"),
        ([1, 8], "must start at 0, got 1"),
    ):
        cu = torch.tensor(bounds, dtype=torch.int32)
        with pytest.raises(ValueError, match=message):
            flash_attention_varlen(q, k, v, cu, backend="flex")
    with pytest.raises(RuntimeError, match=r"needs queries and keys: .* got q \[1, 0, 4, 16\]"):
        flash_attention(q[None, :0], k[None], v[None], backend="flex")


class _Largest(TorchDispatchMode):
    """Note the most elements that an operator's result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else (found,):
            if isinstance(x, torch.Tensor) and not x._is_view():
                self.elements = max(self.elements, x.numel())
        return found


@pytest.mark.parametrize("options", [{}, {"window": (100, 0)}, {"softcap": 1.0}, {"offset": 70}])
def test_memory_grows_with_the_sequence_not_with_its_square(options):
    most = []
    for length in (1024, 2048):
        q, k, v = draw(length, length, heads=1, kv_heads=1, dtype=torch.float32, batch=1)
        with _Largest() as largest:
            flash_attention(q, k, v, **options).sum().backward()
        most.append(largest.elements)
    assert most[1] <= 2 * most[0] + 1024
    assert most[1] < 2048 * 2048 / 4


def test_the_backward_alone_takes_the_same_window():
    """As a ring asks it, block by block."""
    q, k, v = draw(20, 30)
    options = {"window": (5, 0), "softcap": 1.5, "scale": 0.4}
    out, lse = flash_attention(q, k, v, **options, return_lse=True)
    dout = torch.randn_like(out)
    want = torch.autograd.grad(out, (q, k, v), dout)
    plain = (x.detach() for x in (q, k, v, out, lse))
    torch.testing.assert_close(flash_attention_backward(dout, *plain, **options), want)


@item("bad input", ops=BOTH)
def test_what_the_backward_alone_cannot_take_is_refused():
    q, k, v = (x.detach().float() for x in draw(6, 6))
    out, lse = flash_attention(q, k, v, return_lse=True)
    for wrong, message in (
        ({"dout": out[:, :1]}, r"dout and out must be .*, got \[2, 1, "),
        ({"out": out[..., :2]}, r"got .* in torch.float32, \[2, 6, 4, 2\] in torch.float32"),
        ({"lse": lse.mT}, r"and lse \[2, 4, 6\] in torch.float32, got .* and \[2, 6, 4\]"),
        ({"lse": lse.double()}, r"and \[2, 4, 6\] in torch.float64"),
    ):
        given = {"dout": out, "q": q, "k": k, "v": v, "out": out, "lse": lse, **wrong}
        with pytest.raises(ValueError, match=message):
            flash_attention_backward(**given)
    with pytest.raises(TypeError, match="lse must be a tensor, got NoneType"):
        flash_attention_backward(out, q, k, v, out, None)
    cu = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="offset goes with whole sequences alone, got 3"):
        flash_attention_backward(out[0], q[0], k[0], v[0], out[0], lse[0], cu, offset=3)
    for offset in (1.5, 1 << 63):
        with pytest.raises(ValueError, match=f"offset must be an integer, or None, got {offset}"):
            flash_attention(q, k, v, offset=offset)
