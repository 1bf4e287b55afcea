"""Attention's backends on CUDA: PyTorch's operators and flash-attn, by stand-ins.

These compute in explicit maths from what they are given, as documented, and note what they were
asked: how arguments are passed on is tested here, the operators themselves on a GPU.
"""

import itertools
import sys
import types
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tests.kernels.specimen import item
from tests.kernels.test_attention_masks import draw, explicit, seen_by

from warploom.kernels.attention import flash_attention, flash_attention_varlen, sdpa, tiled
from warploom.kernels.attention.scores import Packed, Scores

BOTH = ("flash_attention", "flash_attention_varlen")


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
        return seen_by(queries, keys, left, right, keys - queries)

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
            out, lse = explicit(q, k, v, seen, scale=scale)
            return out, lse.masked_fill(lse == -torch.inf, torch.inf), None, None, None
        outs, lses = [], []
        bounds = (itertools.pairwise(cu.tolist()) for cu in (cu_q, cu_k))
        for (a, b), (c, d) in zip(*bounds, strict=True):
            assert b - a <= max_q
            assert d - c <= max_k
            part = [x[None] for x in (q[a:b], k[c:d], v[c:d])]
            out, lse = explicit(*part, self._window(b - a, d - c, causal, *side), scale=scale)
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
        seen = seen_by(q.shape[2], k.shape[2], -1, right, 0)
        out, lse = explicit(*rows, seen, scale=scale)
        return out.transpose(1, 2), lse[..., None], *[None] * 7

    def _scaled_dot_product_cudnn_attention_backward(
        self, dout, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout,
        causal, *, scale,
    ):  # fmt: skip
        assert lse.shape == (*q.shape[:3], 1)
        rows = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        seen = seen_by(q.shape[2], k.shape[2], -1, 0 if causal else -1, 0)
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
    q, k, v = draw(queries, keys, width=5, values=9)
    scores = Scores(scale=0.6, left=window[0], right=window[1], offset=offset)
    at = keys - queries if offset is None else offset
    seen = seen_by(queries, keys, *window, at)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = explicit(*leaves, seen, scale=0.6)
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
    q, k, v = (x.detach()[0] for x in draw(9, 12, batch=1))
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
    q, k, v = (x.detach() for x in draw(128, 128))
    with pytest.raises(RuntimeError, match="'cudnn' needs CUDA and float16 or bfloat16"):
        flash_attention(q, k, v, deterministic=False, backend="cudnn")


@pytest.mark.parametrize("right", [-1, 0])
@pytest.mark.parametrize("with_lse", [False, True])
def test_cudnn_is_asked_and_answers(stand_ins, right, with_lse):
    leaves = draw(16, 16, width=8, values=16)
    scores = Scores(scale=0.6, right=right)
    out, lse = explicit(*leaves, seen_by(16, 16, -1, right, 0), scale=0.6)
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
    q, k, v = (x.detach() for x in draw(5, 9))
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
