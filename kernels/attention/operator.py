"""The registered operators: one forward and one backward, of whole sequences and packed documents.

Saved are q, k, v, o and lse, never the scores; the log-sum-exp is differentiable, as merging the
parts of ring attention needs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..invariant import invariant
from ..library import below_autograd, first_derivative_only, register, wide
from . import documents, sdpa, tiled
from .invariant import forward as invariant_forward
from .reference import attention_backward_reference, attention_reference
from .scores import Packed, Scores

Dense = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


class _Call(NamedTuple):
    """What the operators take behind their tensors."""

    packed: Packed | None
    scores: Scores
    deterministic: bool
    backend: str


def _call(
    cu: Tensor | None, cu_k: Tensor | None, max_q: int | None, max_k: int | None, scale: float,
    left: int, right: int, offset: int | None, softcap: float, deterministic: bool, backend: str,
) -> _Call:  # fmt: skip
    packed = None
    if cu is not None:
        packed = Packed(cu, cu, max_q, max_q) if cu_k is None else Packed(cu, cu_k, max_q, max_k)
    scores = Scores(scale=scale, left=left, right=right, offset=offset, softcap=softcap)
    return _Call(packed, scores, deterministic, backend)


def _measured(packed: Packed) -> Packed:
    """Find the longest documents out where nobody said them: that waits for the device."""
    longest = [
        int(cu.diff().max()) if most is None and len(cu) > 1 else most or 0
        for cu, most in ((packed.q, packed.max_q), (packed.k, packed.max_k))
    ]
    return Packed(packed.q, packed.k, *longest)


def _fused_packed(q: Tensor, v: Tensor, scores: Scores, dlse: Tensor | None = None) -> bool:
    """Tell whether FlashAttention 2 takes documents as they are."""
    return q.is_cuda and sdpa.lacks(q, v, scores, dlse) is None and bool(len(q))


def _batches(packed: Packed, q: Tensor, k: Tensor) -> list[documents.Batch]:
    bounds = documents.bounds_of("flash_attention_varlen", packed, len(q), len(k))
    return documents.plan(*bounds)


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Dense:
    packed, scores, _, backend = _call(*rest)
    if backend == "triton":
        from .flash_triton import forward

        return forward(q, k, v, packed, scores)
    if backend == "torch" and packed is not None and _fused_packed(q, v, scores):
        return sdpa.forward_cuda(q, k, v, _measured(packed), scores)
    runs: dict[str, Callable[..., Dense]] = {
        "reference": attention_reference,
        "torch": tiled.forward,
        "cudnn": sdpa.forward_cudnn,
    }
    run = invariant_forward if invariant() else runs[backend]
    dense = partial(run, scores=scores)
    if packed is None:
        return dense(q, k, v)
    return documents.forward(dense, q, k, v, _batches(packed, q, k), wide(q.dtype))


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *_: Any) -> Dense:
    heads, width = q.shape[-2], v.shape[-1]
    lse_shape = (q.shape[0], heads, q.shape[1]) if cu_seqlens is None else (heads, q.shape[0])
    return q.new_empty(*q.shape[:-1], width), q.new_empty(lse_shape, dtype=wide(q.dtype))


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *rest: Any,
) -> Gradients:  # fmt: skip
    packed, scores, deterministic, backend = _call(*rest)
    saved = dout, dlse, q, k, v, out, lse
    if backend == "triton":
        from .flash_backward_triton import backward

        return backward(*saved, packed, scores)
    if backend == "torch" and packed is not None and _fused_packed(q, v, scores, dlse):
        return sdpa.backward_cuda(*saved, _measured(packed), scores, deterministic)
    runs: dict[str, Callable[..., Gradients]] = {
        "reference": attention_backward_reference,
        "torch": partial(tiled.backward, deterministic=deterministic),
        "cudnn": sdpa.backward_cudnn,
    }
    dense = partial(runs[backend], scores=scores)
    if packed is None:
        return dense(*saved)
    return documents.backward(dense, *saved, _batches(packed, q, k))


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Attention(torch.autograd.Function):
    """The arguments are q, k, v, two boundaries or None, and what follows."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Dense:
        out, lse = below_autograd(FORWARD, *args)
        where = [cu for cu in args[3:5] if cu is not None]
        ctx.save_for_backward(*args[:3], out, lse, *where)
        ctx.options = args[5:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        first_derivative_only("flash_attention")
        saved = ctx.saved_tensors  # once: recomputation unpacks them a single time
        if dout is None:
            dout = torch.zeros_like(saved[3])
        where = (*saved[5:], None, None)[:2]
        gradients = BACKWARD(dout, dlse, *saved[:5], *where, *ctx.options)
        return *gradients, None, None, *(None for _ in ctx.options)


_WHERE = "Tensor? cu_seqlens, Tensor? cu_seqlens_k, SymInt? max_seqlen, SymInt? max_seqlen_k"
_SCORES = "float scale, SymInt left, SymInt right, SymInt? offset, float softcap"
FORWARD = register(
    f"flash_attention_forward(Tensor q, Tensor k, Tensor v, {_WHERE}, {_SCORES},"
    " bool deterministic, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _Attention,
)
BACKWARD = register(
    "flash_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
    f" Tensor lse, {_WHERE}, {_SCORES}, bool deterministic, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
