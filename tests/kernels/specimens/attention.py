"""Specimens of `kernels/attention`: whole sequences, windows, soft cap and sinks, documents."""

import torch
from tests.kernels.specimen import Specimen

from warploom.kernels.attention import flash_attention, flash_attention_varlen
from warploom.kernels.attention.reference import attention_reference
from warploom.kernels.attention.scores import Scores

_SHAPES = ((0, 6), (1, 1), (5, 3), (65, 64), (130, 24))
_TRAINING = ((8192, 128), (8192, 64), (4096, 256))
_HEADS, _KV_HEADS = 4, 2


def _draw(draw, rows, width):
    q = draw(1, rows, _HEADS, width, seed=1)
    return (q, *(draw(1, rows, _KV_HEADS, width, seed=s) for s in (2, 3))), {}


def _draw_window(draw, rows, width):
    """More keys than queries, values of another width, one sink a head."""
    q, sinks = draw(1, rows, _HEADS, width, seed=1), draw(_HEADS, seed=4)
    k, v = draw(1, rows + 3, 1, width, seed=2), draw(1, rows + 3, 1, max(1, width // 2), seed=3)
    return (q, k, v, sinks), {"window": (7, 2), "softcap": 1.5}


def _draw_documents(draw, rows, width):
    q = draw(rows, _HEADS, width, seed=1)
    bounds = [0, rows // 3, rows // 3, rows // 2, rows]
    cu = torch.tensor(bounds, dtype=torch.int32, device=draw.device)
    keys = (draw(rows, _KV_HEADS, width, seed=s) for s in (2, 3))
    return (q, *keys), {"cu_seqlens": cu, "max_seqlen": rows}


def _plain(q, k, v, *, scores, sinks=None):
    """Attend in the dtype of the inputs, step by step."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * scores.scale
    s = (s / scores.softcap).tanh() * scores.softcap if scores.softcap else s
    i = torch.arange(s.shape[-2], device=s.device)[:, None] + scores.first(*s.shape[-2:])
    j = torch.arange(s.shape[-1], device=s.device)
    seen = (j <= i + scores.right) & ((scores.left < 0) | (j >= i - scores.left))
    s = torch.where(seen, s, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(*s.shape[:-1], 1)], -1)
    p = s.softmax(-1)[..., : k.shape[-2]]
    return (p @ v).transpose(1, 2), s.logsumexp(-1)


def _truth(q, k, v, *, scores, sinks=None):
    out, lse = attention_reference(q, k, v, scores)
    if sinks is None:
        return out, lse
    total = torch.logaddexp(lse, sinks[:, None])
    return out * (lse - total).exp().mT[..., None], total


def _causal(form):
    return lambda q, k, v: form(q, k, v, scores=Scores(scale=q.shape[-1] ** -0.5, right=0))


def _windowed(form):
    def attend(q, k, v, sinks, *, window, softcap):
        left, right = window
        scores = Scores(scale=0.7, left=left, right=right, softcap=softcap)
        return form(q, k, v, scores=scores, sinks=sinks)

    return attend


def _packed(form):
    def attend(q, k, v, *, cu_seqlens, max_seqlen):
        scores, bounds = Scores(scale=q.shape[-1] ** -0.5, right=0), cu_seqlens.tolist()
        pairs = zip(bounds, bounds[1:], strict=False)
        parts = [form(*(x[None, a:b] for x in (q, k, v)), scores=scores) for a, b in pairs]
        return torch.cat([o[0] for o, _ in parts]), torch.cat([lse[0] for _, lse in parts], -1)

    return attend


def _attend_window(q, k, v, sinks, *, backend, **fixed):
    fixed |= {"causal": False, "scale": 0.7, "return_lse": True}
    return flash_attention(q, k, v, sinks=sinks, backend=backend, **fixed)


SPECIMENS = (
    Specimen(
        name="flash_attention",
        op="flash_attention",
        draw=_draw,
        run=lambda q, k, v, *, backend: flash_attention(q, k, v, return_lse=True, backend=backend),
        truth=_causal(_truth),
        plain=_causal(_plain),
        shapes=_SHAPES,
        training=_TRAINING,
        rows=(),
        backends=("torch", "triton"),
    ),
    Specimen(
        name="flash_attention_window",
        op="flash_attention",
        draw=_draw_window,
        run=_attend_window,
        truth=_windowed(_truth),
        plain=_windowed(_plain),
        shapes=_SHAPES,
        training=((8192, 192), (8192, 64)),
        huge=False,  # a sink is taken from the output by PyTorch, which would touch it
        rows=(),
        backends=("torch", "triton"),
    ),
    Specimen(
        name="flash_attention_varlen",
        op="flash_attention_varlen",
        draw=_draw_documents,
        run=lambda q, k, v, *, cu_seqlens, max_seqlen, backend: flash_attention_varlen(
            q, k, v, cu_seqlens, max_seqlen=max_seqlen, return_lse=True, backend=backend
        ),
        truth=_packed(_truth),
        plain=_packed(_plain),
        shapes=_SHAPES,
        training=_TRAINING,
        rows=(),
        backends=("torch", "triton"),
    ),
)
