"""Windows, offsets, soft caps, sinks, keys of other lengths: against explicit maths and others'."""

import itertools
import sys
import types
from functools import partial
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
    sdpa,
    tiled,
)
from warploom.kernels.attention.scores import Packed, Scores

BACKENDS = ["reference", "torch"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
BOTH = ("flash_attention", "flash_attention_varlen")


def _seen(queries, keys, left, right, at):
    """Say which keys each query sees, pair by pair."""
    rows = [
        [
            (left < 0 or j >= i + at - left) and (right < 0 or j <= i + at + right)
            for j in range(keys)
        ]
        for i in range(queries)
    ]
    return torch.tensor(rows, dtype=torch.bool).view(queries, keys)


def _oracle(q, k, v, seen, *, scale, softcap=None, sinks=None):
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


def _draw(queries, keys, *, heads=4, kv_heads=2, width=8, values=8, dtype=torch.float64, batch=2):
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
            seen = _seen(queries, keys, left, right, scores.first(queries, keys))
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
    inputs = _draw(queries, keys, values=values)
    at = keys - queries if offset is None else offset
    seen = _seen(queries, keys, window[0], 0 if causal else window[1], at)
    actual = flash_attention(
        *inputs, causal=causal, window=window, offset=offset, softcap=softcap, scale=0.6,
        return_lse=True, backend=backend,
    )  # fmt: skip
    expected = _oracle(*inputs, seen, scale=0.6, softcap=softcap)
    empty = ~seen.any(1)
    assert (actual[1][:, :, empty] == -torch.inf).all()
    actual, expected = ((o, lse.masked_fill(empty, 0.0)) for o, lse in (actual, expected))
    _same(actual, expected, inputs)


@item("values", ops=BOTH)
@each_backend
@pytest.mark.parametrize("length", [127, 128, 129, 300])
@pytest.mark.parametrize("window", [(31, 0), (0, 5), (128, 128)])
def test_tiles_of_windows(backend, length, window):
    inputs = _draw(length, length, batch=1)
    seen = _seen(length, length, *window, 0)
    options = {"causal": False, "window": window, "scale": 0.6, "return_lse": True}
    actual = flash_attention(*inputs, **options, backend=backend)
    _same(actual, _oracle(*inputs, seen, scale=0.6), inputs)
    cu = torch.tensor([0, length], dtype=torch.int32)
    out, lse = flash_attention_varlen(*(x[0] for x in inputs), cu, **options, backend=backend)
    torch.testing.assert_close((out[None], lse[None]), actual)


@item("values", "zero and odd sizes", ops=BOTH[1:])
@each_backend
@pytest.mark.parametrize("window", [(-1, -1), (6, 0)])
def test_documents_with_more_or_fewer_keys_than_queries(backend, window):
    """The last query of a document stands at its last key."""
    of_queries, of_keys = [0, 3, 3, 10, 20, 20, 30, 36], [0, 9, 14, 14, 20, 31, 41, 43]
    q, k, v = (x[0] for x in _draw(36, 43, batch=1))
    cu = [torch.tensor(b, dtype=torch.int32) for b in (of_queries, of_keys)]
    actual = flash_attention_varlen(
        q, k, v, cu[0], cu_seqlens_k=cu[1], window=window, scale=0.6, return_lse=True,
        backend=backend,
    )  # fmt: skip
    outs, lses, empty = [], [], []
    for (a, b), (c, d) in zip(*map(itertools.pairwise, (of_queries, of_keys)), strict=True):
        seen = _seen(b - a, d - c, window[0], 0, (d - c) - (b - a))
        out, lse = _oracle(*(x[None] for x in (q[a:b], k[c:d], v[c:d])), seen, scale=0.6)
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
    inputs = [x.detach()[0].requires_grad_() for x in _draw(265, 265, dtype=dtype, batch=1)]
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
    q, k, v = (x.detach() for x in _draw(6, 6, heads=2, kv_heads=2, batch=1))
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


@each_backend
def test_sinks_and_everything_at_once_by_gradcheck(backend):
    inputs = [x[:1] for x in _draw(5, 9, heads=2, kv_heads=1, width=3, values=2)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    sinks = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    options = {"window": (4, 1), "causal": False, "softcap": 0.9, "return_lse": True}

    def run(q, k, v, sinks):
        return flash_attention(q, k, v, sinks=sinks, **options, backend=backend)

    assert torch.autograd.gradcheck(run, (*inputs, sinks))
    expected = _oracle(*inputs, _seen(5, 9, 4, 1, 4), scale=3**-0.5, softcap=0.9, sinks=sinks)
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
    inputs = _draw(140, 140)
    theirs, _ = gemma.eager_attention_forward(
        _module(), *(x.transpose(1, 2) for x in inputs), _sliding(33, 140), scaling=0.4, softcap=1.1
    )
    ours = flash_attention(*inputs, window=(32, 0), scale=0.4, softcap=1.1, backend=backend)
    _same([ours], [theirs], inputs, 2e-6)


@each_backend
def test_gpt_oss_of_transformers(backend):
    """Sinks and sliding window, and their gradient."""
    oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    inputs, sinks = _draw(140, 140), torch.linspace(-2, 2, 4).double().requires_grad_()
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
    inputs = [x.detach().float() for x in _draw(33, 40, width=16, values=16)]
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
        q, k, v = _draw(length, length, heads=1, kv_heads=1, dtype=torch.float32, batch=1)
        with _Largest() as largest:
            flash_attention(q, k, v, **options).sum().backward()
        most.append(largest.elements)
    assert most[1] <= 2 * most[0] + 1024
    assert most[1] < 2048 * 2048 / 4


# CUDA's operators, by stand-ins that compute from what they are given.


def _explicit_backward(dout, q, k, v, out, lse, seen, scale):
    """Differentiate as the kernels do: from the output and log-sum-exp that they are given."""
    groups = q.shape[2] // k.shape[2]
    wide = (x.repeat_interleave(groups, 2) if x is k or x is v else x for x in (dout, q, k, v, out))
    dout, q_, k_, v_, out = (x.transpose(1, 2) for x in wide)
    s = (q_ @ k_.mT * scale).masked_fill(~seen, -torch.inf)
    p = (s - lse[..., None]).exp()
    ds = p * (dout @ v_.mT - (dout * out).sum(-1, keepdim=True)) * scale
    dq, dk, dv = (x.transpose(1, 2) for x in (ds @ k_, ds.mT @ q_, p.mT @ dout))
    return dq, *(x.unflatten(2, (-1, groups)).sum(3) for x in (dk, dv))


class _StandIns:
    """PyTorch's CUDA operators as documented, in explicit maths, and what they were asked."""

    def __init__(self):
        self.asked = []

    def _window(self, queries, keys, causal, left, right):
        left = -1 if left is None else left
        right = 0 if causal else -1 if right is None else right
        return _seen(queries, keys, left, right, keys - queries)

    def _flash_attention_forward(
        self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale,
        window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert q.shape[-1] == v.shape[-1]
        assert q.shape[-1] % 8 == 0
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        self.asked.append((causal, window_size_left, window_size_right))
        side = window_size_left, window_size_right
        if cu_q is None:
            seen = self._window(q.shape[1], k.shape[1], causal, *side)
            out, lse = _oracle(q, k, v, seen, scale=scale)
            return out, lse.masked_fill(lse == -torch.inf, torch.inf), None, None, None
        outs, lses = [], []
        bounds = (itertools.pairwise(cu.tolist()) for cu in (cu_q, cu_k))
        for (a, b), (c, d) in zip(*bounds, strict=True):
            assert b - a <= max_q
            assert d - c <= max_k
            part = [x[None] for x in (q[a:b], k[c:d], v[c:d])]
            out, lse = _oracle(*part, self._window(b - a, d - c, causal, *side), scale=scale)
            outs.append(out[0])
            lses.append(lse[0].masked_fill(lse[0] == -torch.inf, torch.inf))
        return torch.cat(outs), torch.cat(lses, 1), None, None, None

    def _flash_attention_backward(
        self, dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, seed, unused, *,
        scale, **side,
    ):  # fmt: skip
        self.asked.append(torch.are_deterministic_algorithms_enabled())
        assert not (lse == -torch.inf).any()
        side = side["window_size_left"], side["window_size_right"]
        if cu_q is None:
            seen = self._window(q.shape[1], k.shape[1], causal, *side)
            return _explicit_backward(dout, q, k, v, out, lse, seen, scale)
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        bounds = (itertools.pairwise(cu.tolist()) for cu in (cu_q, cu_k))
        for (a, b), (c, d) in zip(*bounds, strict=True):
            saved = [x[None] for x in (dout[a:b], q[a:b], k[c:d], v[c:d], out[a:b], lse[:, a:b])]
            seen = self._window(b - a, d - c, causal, *side)
            parts = _explicit_backward(*saved, seen, scale)
            for whole, part, at in zip(grads, parts, ((a, b), (c, d), (c, d)), strict=True):
                whole[slice(*at)] = part[0]
        return grads

    def _scaled_dot_product_cudnn_attention(
        self, q, k, v, bias, with_lse, dropout, causal, debug, *, scale
    ):
        assert bias is None
        assert with_lse
        self.asked.append(causal)
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        right = 0 if causal else -1
        seen = _seen(q.shape[2], k.shape[2], -1, right, 0)
        out, lse = _oracle(*rows, seen, scale=scale)
        return out.transpose(1, 2), lse[..., None], *[None] * 7

    def _scaled_dot_product_cudnn_attention_backward(
        self, dout, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout,
        causal, *, scale,
    ):  # fmt: skip
        assert lse.shape == (*q.shape[:3], 1)
        rows = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        seen = _seen(q.shape[2], k.shape[2], -1, 0 if causal else -1, 0)
        found = _explicit_backward(*rows, lse[..., 0], seen, scale)
        return tuple(x.transpose(1, 2) for x in found)


@pytest.fixture
def stand_ins(monkeypatch):
    made, before = _StandIns(), torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(sdpa, "_aten", made)
    torch.use_deterministic_algorithms(False)
    yield made
    torch.use_deterministic_algorithms(before)


def _on_cuda(monkeypatch):
    """Have the plan and the runs of `tiled` be those of a CUDA device, on CPU tensors."""
    monkeypatch.setattr(sdpa, "lacks", lambda q, v, scores, dlse=None: None)
    monkeypatch.setattr(tiled, "on_cuda", lambda q: True)


@pytest.mark.parametrize(
    ("window", "offset", "queries", "keys"),
    [((-1, -1), None, 9, 9), ((-1, 0), None, 5, 9), ((-1, 0), None, 9, 5), ((3, 0), 0, 9, 9),
     ((3, 2), 4, 9, 9), ((-1, 0), -4, 9, 9), ((2, -1), 5, 9, 9), ((2, 1), 30, 9, 9),
     ((-1, 2), -1, 9, 9)],
)  # fmt: skip
def test_flash_attention_2_is_asked_for_the_window(
    stand_ins, monkeypatch, window, offset, queries, keys
):
    """Its window counts from the last key; a negative one would be no limit."""
    _on_cuda(monkeypatch)
    q, k, v = _draw(queries, keys, width=5, values=9)
    scores = Scores(scale=0.6, left=window[0], right=window[1], offset=offset)
    at = keys - queries if offset is None else offset
    seen = _seen(queries, keys, *window, at)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = _oracle(*leaves, seen, scale=0.6)
    got = tiled.forward(q.detach(), k.detach(), v.detach(), scores)
    torch.testing.assert_close(got, (out, lse))
    dout, dlse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -torch.inf, 0.0)
    want = torch.autograd.grad((out, lse.masked_fill(lse == -torch.inf, 0.0)), leaves, (dout, dlse))
    got = tiled.backward(
        dout, dlse, *(x.detach() for x in leaves), out.detach(), lse.detach(), scores, True
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert all(ask[1] is None or ask[1] >= 0 for ask in stand_ins.asked if isinstance(ask, tuple))
    assert False not in stand_ins.asked  # the backward was the deterministic one
    assert not torch.are_deterministic_algorithms_enabled()


def test_flash_attention_2_takes_documents_as_they_are(stand_ins):
    """A document without keys: the log-sum-exp is -inf here, +inf there."""
    q, k, v = (x.detach()[0] for x in _draw(9, 12, batch=1))
    cu, cu_k = (torch.tensor(b, dtype=torch.int32) for b in ([0, 4, 6, 9], [0, 7, 7, 12]))
    packed, scores = Packed(cu, cu_k, 4, 7), Scores(scale=0.6, right=0)
    out, lse = sdpa.forward_cuda(q, k, v, packed, scores)
    want, want_lse = flash_attention_varlen(
        q, k, v, cu, cu_seqlens_k=cu_k, scale=0.6, return_lse=True, backend="reference"
    )
    torch.testing.assert_close((out, lse), (want, want_lse))
    dout, dlse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -torch.inf, 0.0)
    got = sdpa.backward_cuda(dout, dlse, q, k, v, out, lse, packed, scores, False)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    want = flash_attention_varlen(
        *leaves, cu, cu_seqlens_k=cu_k, scale=0.6, return_lse=True, backend="reference"
    )
    kept = lse != -torch.inf
    want = torch.autograd.grad((want[0], want[1][kept]), leaves, (dout, dlse[kept]))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_flash_attention_2_serves_what_it_has():
    """A head of 256 has no room for the columns that carry a gradient of the log-sum-exp."""
    q = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=torch.float16, shape=(1, 256))
    scores = Scores(scale=1.0)
    assert sdpa.lacks(q, q, scores) is None
    assert (
        sdpa.lacks(q, q, scores, torch.empty(1)) == "needs head dimensions of at most 248, got 256"
    )
    assert "soft cap" in sdpa.lacks(q, q, Scores(scale=1.0, softcap=2.0))
    q.dtype = torch.float32
    assert "needs float16 or bfloat16" in sdpa.lacks(q, q, scores)


@item("bad input", ops=BOTH[:1])
def test_cudnn_gets_no_mask_and_whole_tiles_only(stand_ins):
    """pytorch #196678, cudnn-frontend #1072: NaN gradients where a tile of 128 is filled up."""
    lacks = partial(sdpa.cudnn_lacks, deterministic=False, with_lse=False)
    fake = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")  # noqa: E731
    q = SimpleNamespace(dim=lambda: 4, device=SimpleNamespace(type="cuda"), dtype=torch.bfloat16)
    for queries, keys, served in (
        (128, 128, True), (256, 128, True), (192, 192, False), (64, 64, False), (1, 128, False),
        (128, 129, False), (704, 704, False), (0, 0, False),
    ):  # fmt: skip
        q.shape = (1, queries, 8, 64)
        k = fake(1, keys, 8, 64)
        lack = lacks(q, k, k, Scores(scale=1.0))
        assert (lack is None) == served, (queries, keys, lack)
        assert served or "196678" in lack
    q.shape = (1, 256, 8, 64)
    k = fake(1, 256, 8, 64)
    for scores in (
        Scores(scale=1.0, left=5, right=0), Scores(scale=1.0, right=3),
        Scores(scale=1.0, right=0, offset=4), Scores(scale=1.0, softcap=1.0),
    ):  # fmt: skip
        assert "no window" in lacks(q, k, k, scores)
    assert lacks(q, k, k, Scores(scale=1.0, right=0)) is None
    options = {"deterministic": True, "with_lse": False}
    assert "same bits" in sdpa.cudnn_lacks(q, k, k, Scores(scale=1.0), **options)
    q.shape, k = (1, 256, 8, 128), fake(1, 256, 8, 128)
    assert lacks(q, k, k, Scores(scale=1.0)) is None
    options = {"deterministic": False, "with_lse": True}
    assert "at most 120" in sdpa.cudnn_lacks(q, k, k, Scores(scale=1.0), **options)
    q, k, v = (x.detach() for x in _draw(128, 128))
    with pytest.raises(RuntimeError, match="'cudnn' needs CUDA and float16 or bfloat16"):
        flash_attention(q, k, v, deterministic=False, backend="cudnn")


@pytest.mark.parametrize("right", [-1, 0])
@pytest.mark.parametrize("with_lse", [False, True])
def test_cudnn_is_asked_and_answers(stand_ins, right, with_lse):
    leaves = _draw(16, 16, width=8, values=16)
    scores = Scores(scale=0.6, right=right)
    out, lse = _oracle(*leaves, _seen(16, 16, -1, right, 0), scale=0.6)
    plain = [x.detach() for x in leaves]
    torch.testing.assert_close(sdpa.forward_cudnn(*plain, scores), (out, lse))
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    want = torch.autograd.grad((out, lse), leaves, (dout, dlse if with_lse else 0 * dlse))
    got = sdpa.backward_cudnn(
        dout, dlse if with_lse else None, *plain, out.detach(), lse.detach(), scores
    )
    torch.testing.assert_close(got, want)


def test_flash_attn_is_asked(monkeypatch):
    """The package flash-attn, by a stand-in that notes what it is given."""
    asked = []
    made = types.ModuleType("flash_attn")
    made.__spec__ = SimpleNamespace(name="flash_attn")
    made.flash_attn_func = lambda q, k, v, **rest: asked.append(rest) or q
    made.flash_attn_varlen_func = lambda q, k, v, *where, **rest: asked.append((where, rest)) or q
    monkeypatch.setitem(sys.modules, "flash_attn", made)
    q, k, v = (x.detach() for x in _draw(5, 9))
    flash_attention(q, k, v, window=(3, 4), softcap=2.0, deterministic=True, backend="flash_attn")
    wanted = {"softmax_scale": 8**-0.5, "causal": True, "softcap": 2.0, "window_size": (3, 0)}
    assert asked.pop() == wanted | {"deterministic": True}
    cu, cu_k = (torch.tensor(b, dtype=torch.int32) for b in ([0, 2, 5], [0, 8, 9]))
    rows = [x[0] for x in (q, k, v)]
    flash_attention_varlen(*rows, cu, cu_seqlens_k=cu_k, causal=False, backend="flash_attn")
    where, rest = asked.pop()
    assert where[2:] == (3, 8)
    assert rest["window_size"] == (-1, -1)
    assert not rest["causal"]
    for wrong, message in (
        ({"return_lse": True}, "no log-sum-exp"),
        ({"offset": 1}, "leave offset"),
    ):
        with pytest.raises(RuntimeError, match=message):
            flash_attention(q, k, v, **wrong, backend="flash_attn")


def test_the_backward_alone_takes_the_same_window():
    """As a ring asks it, block by block."""
    q, k, v = _draw(20, 30)
    options = {"window": (5, 0), "softcap": 1.5, "scale": 0.4}
    out, lse = flash_attention(q, k, v, **options, return_lse=True)
    dout = torch.randn_like(out)
    want = torch.autograd.grad(out, (q, k, v), dout)
    plain = (x.detach() for x in (q, k, v, out, lse))
    torch.testing.assert_close(flash_attention_backward(dout, *plain, **options), want)
