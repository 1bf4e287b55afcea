"""Scaled dot-product attention, of whole sequences and within packed documents.

    s = scale * q k^T,    lse = log sum exp s,    o = exp(s - lse) v    over the keys a query sees

The formulas of the backward stand in `reference.py`. Saved are q, k, v, o and lse, never the
scores; the log-sum-exp is differentiable, as merging the parts of ring attention needs.

Shapes: B batch, S queries, U keys, T tokens of all documents, H query heads, G key/value heads,
K head dimension, N documents. Bound by arithmetic: 4 S U H K FLOPs a sequence forward and 10
backward, half of them where causal.

Source: Dao 2023, https://arxiv.org/abs/2307.08691, algorithms 1 and 2; grouped heads: Ainslie et
al. 2023, https://arxiv.org/abs/2305.13245, section 2.2.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import choose
from ..library import below_autograd, register, wide
from . import documents, sdpa
from .reference import attention_backward_reference, attention_reference

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Dense = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def _dense(
    q_BSHK: Tensor, k_BUGK: Tensor, v_BUGK: Tensor, causal: bool, scale: float, backend: str
) -> Dense:
    run = sdpa.forward if backend == "torch" else attention_reference
    return run(q_BSHK, k_BUGK, v_BUGK, causal, scale)


def _dense_fake(
    q_BSHK: Tensor, k_BUGK: Tensor, v_BUGK: Tensor, causal: bool, scale: float, backend: str
) -> Dense:
    batch, queries, heads, _ = q_BSHK.shape
    lse_BHS = q_BSHK.new_empty(batch, heads, queries, dtype=wide(q_BSHK.dtype))
    return q_BSHK.new_empty(q_BSHK.shape), lse_BHS


def _dense_backward(
    dout_BSHK: Tensor,
    dlse_BHS: Tensor | None,
    q_BSHK: Tensor,
    k_BUGK: Tensor,
    v_BUGK: Tensor,
    out_BSHK: Tensor,
    lse_BHS: Tensor,
    causal: bool,
    scale: float,
    backend: str,
) -> Gradients:
    run = sdpa.backward if backend == "torch" else attention_backward_reference
    return run(dout_BSHK, dlse_BHS, q_BSHK, k_BUGK, v_BUGK, out_BSHK, lse_BHS, causal, scale)


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _longest(cu_seqlens: Tensor, max_seqlen: int | None) -> int:
    return int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen


def _varlen(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    causal: bool,
    scale: float,
    backend: str,
) -> Dense:
    if backend == "torch" and q_THK.is_cuda:
        longest = _longest(cu_seqlens, max_seqlen)
        return sdpa.varlen_forward_cuda(q_THK, k_TGK, v_TGK, cu_seqlens, longest, causal, scale)
    bounds = documents.check("flash_attention_varlen", cu_seqlens, len(q_THK), max_seqlen)
    dense = sdpa.forward if backend == "torch" else attention_reference
    lse_HT = q_THK.new_empty(q_THK.shape[1], len(q_THK), dtype=wide(q_THK.dtype))
    out = documents.forward(dense, q_THK, k_TGK, v_TGK, bounds, causal, scale, lse_HT.t())
    return out, lse_HT


def _varlen_fake(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    causal: bool,
    scale: float,
    backend: str,
) -> Dense:
    tokens, heads, _ = q_THK.shape
    lse_HT = q_THK.new_empty(heads, tokens, dtype=wide(q_THK.dtype))
    return q_THK.new_empty(q_THK.shape), lse_HT


def _varlen_backward(
    dout_THK: Tensor,
    dlse_HT: Tensor | None,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    causal: bool,
    scale: float,
    backend: str,
) -> Gradients:
    saved = q_THK, k_TGK, v_TGK, out_THK
    if backend == "torch" and q_THK.is_cuda:
        longest = _longest(cu_seqlens, max_seqlen)
        return sdpa.varlen_backward_cuda(
            dout_THK, dlse_HT, *saved, lse_HT, cu_seqlens, longest, causal, scale
        )
    bounds = documents.check("flash_attention_varlen", cu_seqlens, len(q_THK), max_seqlen)
    dense = sdpa.backward if backend == "torch" else attention_backward_reference
    dlse_TH = None if dlse_HT is None else dlse_HT.t()
    return documents.backward(dense, dout_THK, dlse_TH, *saved, lse_HT.t(), bounds, causal, scale)


class _Attention(torch.autograd.Function):
    """Both operators: `args` are q, k, v and what the operator takes beside them."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Dense:
        varlen = isinstance(args[3], Tensor)
        ctx.op, tensors = (_VARLEN_BACKWARD, 4) if varlen else (_DENSE_BACKWARD, 3)
        ctx.options = args[tensors:]
        out, lse = below_autograd(_VARLEN if varlen else _DENSE, *args)
        ctx.save_for_backward(*args[:3], out, lse, *args[3:tensors])
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputation unpacks them a single time
        if dout is None:
            dout = torch.zeros_like(saved[3])
        gradients = ctx.op(dout, dlse, *saved, *ctx.options)
        return *gradients, *(None for _ in (*saved[5:], *ctx.options))


_DENSE = register(
    "flash_attention_forward(Tensor q, Tensor k, Tensor v, bool causal, float scale, str backend)"
    " -> (Tensor, Tensor)",
    _dense,
    _dense_fake,
    _Attention,
)
_DENSE_BACKWARD = register(
    "flash_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, bool causal, float scale, str backend) -> (Tensor, Tensor, Tensor)",
    _dense_backward,
    _backward_fake,
)
_VARLEN = register(
    "flash_attention_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens,"
    " int? max_seqlen, bool causal, float scale, str backend) -> (Tensor, Tensor)",
    _varlen,
    _varlen_fake,
    _Attention,
)
_VARLEN_BACKWARD = register(
    "flash_attention_varlen_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v,"
    " Tensor out, Tensor lse, Tensor cu_seqlens, int? max_seqlen, bool causal, float scale,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _varlen_backward,
    _backward_fake,
)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, shape: str) -> None:
    if not q.dim() == k.dim() == v.dim() == len(shape):
        raise ValueError(
            f"{op}: q, k and v must be [{', '.join(shape)}], "
            f"got {[*q.shape]}, {[*k.shape]} and {[*v.shape]}"
        )
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or not q.shape[-1]:
        raise ValueError(
            f"{op}: k and v must have one shape, and q their head dimension, "
            f"got q {[*q.shape]}, k {[*k.shape]} and v {[*v.shape]}"
        )
    if not k.shape[-2] or q.shape[-2] % k.shape[-2] or not q.shape[-2]:
        raise ValueError(
            f"{op}: the query heads ({q.shape[-2]}) must be a multiple of the key/value heads "
            f"({k.shape[-2]})"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise ValueError(
            f"{op}: q, k and v must all be float16, bfloat16, float32 or float64, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}"
        )


def _choose(op: str, q: Tensor, backend: str | None) -> str:
    """Choose a backend; by default `reference` where PyTorch's operator cannot serve."""
    chosen = choose(op, q.device, q.dtype, backend)
    missing = sdpa.missing(q) if chosen == "torch" else None
    if missing and backend:
        raise RuntimeError(f"{op}: backend 'torch' {missing}")
    return "reference" if missing else chosen


def _scale(q: Tensor, scale: float | None) -> float:
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < float("inf"):  # masks are -inf before it multiplies them
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return scale


def flash_attention(
    q_BSHK: Tensor,
    k_BUGK: Tensor,
    v_BUGK: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | Dense:
    """Attend from each query to the keys of its sequence.

    Args:
        q_BSHK: `[B, S, H, K]`, any strides; float16, bfloat16, float32 or float64.
        k_BUGK: `[B, U, G, K]`; H is a multiple of G, query head h reads head h * G // H.
        v_BUGK: `[B, U, G, K]`.
        causal: Whether query i sees keys 0 to i only; then U must be S.
        scale: Multiplies the scores, positive; None is 1 / sqrt(K).
        return_lse: Whether to return the log-sum-exp of the scores too.
        backend: `reference` (all scores in memory) or `torch` (PyTorch's fused operators; on CUDA
            float16 and bfloat16 only); None takes `torch` where it can serve.

    Returns:
        `[B, S, H, K]` in the dtype of `q_BSHK`; with `return_lse` also the log-sum-exp
        `[B, H, S]` in nats, float32 at least, differentiable. Without a key: 0 and -inf.

    Raises:
        ValueError: If shapes or dtypes are not these.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    _check("flash_attention", q_BSHK, k_BUGK, v_BUGK, "BSHK")
    if q_BSHK.shape[0] != k_BUGK.shape[0] or (causal and q_BSHK.shape[1] != k_BUGK.shape[1]):
        raise ValueError(
            f"flash_attention: q and k must have one batch size, and where causal one length, "
            f"got q {[*q_BSHK.shape]} and k {[*k_BUGK.shape]}, causal={causal}"
        )
    chosen, scale = _choose("flash_attention", q_BSHK, backend), _scale(q_BSHK, scale)
    out, lse = _DENSE(q_BSHK, k_BUGK, v_BUGK, causal, scale, chosen)
    return (out, lse) if return_lse else out


def flash_attention_varlen(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | Dense:
    """Attend from each query to the keys of its own document.

    Args:
        q_THK: `[T, H, K]`, any strides; float16, bfloat16, float32 or float64.
        k_TGK: `[T, G, K]`; H is a multiple of G.
        v_TGK: `[T, G, K]`.
        cu_seqlens: `[N + 1]`, int32: document n is tokens cu_seqlens[n] to cu_seqlens[n + 1], from
            0 to T; a repeated entry is an empty document. The values are checked on the CPU;
            elsewhere that would wait for the device.
        max_seqlen: Tokens of the longest document, or more; None finds it out, which waits for
            the device where there is one.
        causal: Whether a query sees the keys up to its own position only.
        scale: Multiplies the scores, positive; None is 1 / sqrt(K).
        return_lse: Whether to return the log-sum-exp of the scores too.
        backend: As in `flash_attention`.

    Returns:
        `[T, H, K]` in the dtype of `q_THK`; with `return_lse` also the log-sum-exp `[H, T]` in
        nats, float32 at least, differentiable.

    Raises:
        ValueError: If shapes or dtypes are not these, or `cu_seqlens` is not a partition of T.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    op = "flash_attention_varlen"
    _check(op, q_THK, k_TGK, v_TGK, "THK")
    if q_THK.shape[0] != k_TGK.shape[0]:
        raise ValueError(
            f"{op}: q and k must have the same tokens, got {[*q_THK.shape]} and {[*k_TGK.shape]}"
        )
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not cu_seqlens.numel():
        raise ValueError(
            f"{op}: cu_seqlens must be int32 [documents + 1], "
            f"got {cu_seqlens.dtype} {[*cu_seqlens.shape]}"
        )
    if cu_seqlens.device != q_THK.device:
        raise ValueError(
            f"{op}: cu_seqlens must be on the device of q ({q_THK.device}), got {cu_seqlens.device}"
        )
    chosen, scale = _choose(op, q_THK, backend), _scale(q_THK, scale)
    out, lse = _VARLEN(q_THK, k_TGK, v_TGK, cu_seqlens, max_seqlen, causal, scale, chosen)
    return (out, lse) if return_lse else out


def flash_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Gradients:
    """Differentiate attention whose output is known, by the keys given here.

    `out` and `lse` may be those over more keys (a merge of parts): the result is then the share of
    these keys in dq, and their own dk and dv, as each block of ring attention needs.

    Args:
        dout: Upstream gradient, `[B, S, H, K]`, or packed `[T, H, K]`.
        q: Queries, of that shape.
        k: Keys, `[B, U, G, K]` or `[T, G, K]`.
        v: Values, as `k`.
        out: Output over all keys, as `dout`.
        lse: Its log-sum-exp, `[B, H, S]` or `[H, T]`.
        cu_seqlens: Boundaries of packed documents, as in `flash_attention_varlen`; `None` for
            whole sequences.
        max_seqlen: As in `flash_attention_varlen`.
        causal: As in the forward.
        scale: As in the forward.
        backend: As in the forward.

    Returns:
        The gradients of q, k and v.

    Raises:
        ValueError: If shapes or dtypes are not these.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    op = "flash_attention" if cu_seqlens is None else "flash_attention_varlen"
    _check(op, q, k, v, "BSHK" if cu_seqlens is None else "THK")
    chosen, scale = _choose(op, q, backend), _scale(q, scale)
    saved = dout, None, q, k, v, out, lse.contiguous()
    gradients: Gradients
    if cu_seqlens is None:
        gradients = _DENSE_BACKWARD(*saved, causal, scale, chosen)
    else:
        gradients = _VARLEN_BACKWARD(*saved, cu_seqlens, max_seqlen, causal, scale, chosen)
    return gradients
