"""Scaled dot-product attention, of whole sequences and within packed documents.

    s = scale * q k^T,    lse = log sum exp s,    o = exp(s - lse) v    over the keys a query sees

    with a sink z of each head:    lse' = log(exp lse + exp z),    o' = o exp(lse - lse')

The formulas of the backward stand in `reference.py`. A sink is a key without a value: its weight is
taken from the finished output and log-sum-exp, and no backend needs to know of it.

Shapes: B batch, S queries, U keys, T tokens of all documents, H query heads, G key/value heads, K
head dimension of queries and keys, L of values, N documents. Bound by arithmetic: 2 H (K + L) FLOPs
forward and 2 H (3 K + 2 L) backward a pair of a query and a key that it sees.

Source: Dao 2023, https://arxiv.org/abs/2307.08691, algorithms 1 and 2; grouped heads: Ainslie et
al. 2023, https://arxiv.org/abs/2305.13245, section 2.2; sinks: OpenAI 2025,
https://arxiv.org/abs/2508.10925, section 2.2.
"""

from typing import Any

import torch
from torch import Tensor

from .. import peers
from ..backends import case_key, choose
from ..library import need_tensors
from . import documents, sdpa
from .arguments import (
    Dense,
    Window,
    cast,
    check_documents,
    check_saved,
    check_sinks,
    check_tensors,
    scores_of,
    with_sinks,
)
from .operator import BACKWARD, FORWARD
from .scores import Packed, Scores

Gradients = tuple[Tensor, Tensor, Tensor]


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, shape: str) -> None:
    wanted = f"q must be [{', '.join(shape)}], k and v"
    check_tensors(op, q, k, v, wanted, (len(shape), len(shape)))
    if len(shape) == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(
            f"{op}: q and k must have one batch size, got {q.shape[0]} and {k.shape[0]}"
        )


def _packed(
    op: str, q: Tensor, k: Tensor, cu: Tensor | None, cu_k: Tensor | None, longest: tuple[Any, Any]
) -> Packed | None:
    """Check the boundaries of documents; their values are looked at on the CPU alone."""
    if cu is None:
        return None
    check_documents(op, "cu_seqlens", cu, q)
    if cu_k is None and len(q) != len(k):
        raise ValueError(
            f"{op}: q and k must have the same tokens, or give cu_seqlens_k, got {[*q.shape]} and "
            f"{[*k.shape]}"
        )
    if cu_k is not None:
        check_documents(op, "cu_seqlens_k", cu_k, q)
        if cu_k.shape != cu.shape:
            raise ValueError(
                f"{op}: cu_seqlens and cu_seqlens_k must be of as many documents, "
                f"got {len(cu) - 1} and {len(cu_k) - 1}"
            )
    max_q, max_k = longest
    return Packed(cu, cu, max_q, max_q) if cu_k is None else Packed(cu, cu_k, max_q, max_k)


def _case(q: Tensor, v: Tensor, scores: Scores) -> str | None:
    """Name the call as the benchmarks do; None where they have no such call, or sizes vary."""
    plain = scores.left < 0 and scores.right <= 0 and scores.offset is None and not scores.softcap
    if not (plain and q.is_cuda) or torch.compiler.is_compiling():
        return None
    causal = scores.right == 0
    return case_key(causal=causal, head=q.shape[-1], value=v.shape[-1], tokens=q.shape[-3])


def _choose(
    op: str, q: Tensor, k: Tensor, v: Tensor, scores: Scores, backend: str | None,
    *, deterministic: bool, with_lse: bool,
) -> str:  # fmt: skip
    """Choose a backend, one that serves this call; an explicit choice that cannot is refused."""
    chosen, lack = choose(op, q.device, q.dtype, backend, _case(q, v, scores)), None
    if chosen == "cudnn":
        wanted = {"deterministic": deterministic, "with_lse": with_lse}
        lack = sdpa.cudnn_lacks(q, k, v, scores, **wanted)
    elif chosen == "triton" and max(q.shape[-1], v.shape[-1]) > 256:
        lack = f"needs head dimensions of at most 256, got {q.shape[-1]} and {v.shape[-1]}"
    if lack and backend:
        raise RuntimeError(f"{op}: backend {chosen!r} {lack}")
    return "torch" if lack else chosen


def _options(
    op: str, q: Tensor, k: Tensor, v: Tensor, packed: Packed | None, scores: Scores,
    deterministic: bool, with_lse: bool, backend: str | None,
) -> tuple[Any, ...]:  # fmt: skip
    """Return what the operators take behind their tensors."""
    asked = {"deterministic": deterministic, "with_lse": with_lse}
    chosen = _choose(op, q, k, v, scores, backend, **asked)
    where: tuple[Any, ...] = (None,) * 4
    if packed is not None:
        if scores.offset is not None:
            raise ValueError(f"{op}: offset goes with whole sequences alone, got {scores.offset}")
        other = packed.k is not packed.q
        where = packed.q, packed.k if other else None, packed.max_q, packed.max_k
    s = scores
    return *where, s.scale, s.left, s.right, s.offset, s.softcap, deterministic, chosen


def _repeatable(deterministic: bool | None) -> bool:
    return torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic


def _attend(
    op: str, q: Tensor, k: Tensor, v: Tensor, packed: Packed | None, scores: Scores,
    sinks: Tensor | None, return_lse: bool, deterministic: bool | None, backend: str | None,
) -> Tensor | Dense:  # fmt: skip
    if sinks is not None:
        check_sinks(op, sinks, q)
    repeatable, with_lse = _repeatable(deterministic), return_lse or sinks is not None
    if backend in peers.PEERS:
        if packed is not None and q.device.type == "cpu":
            documents.bounds_of(op, packed, len(q), len(k))
        wanted: dict[str, Any] = {"packed": packed, "scores": scores, "deterministic": repeatable}
        found: Dense = peers.serve(op, backend, q, k, v, return_lse=with_lse, **wanted)
    else:
        options = _options(op, q, k, v, packed, scores, repeatable, with_lse, backend)
        found = FORWARD(q, k, v, *options)
    out, lse = found if sinks is None else with_sinks(found, sinks)
    return (out, lse) if return_lse else out


def flash_attention(
    q_BSHK: Tensor, k_BUGK: Tensor, v_BUGL: Tensor, *, causal: bool = True,
    window: Window = (-1, -1), offset: int | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, scale: float | None = None, return_lse: bool = False,
    deterministic: bool | None = None, backend: str | None = None,
) -> Tensor | Dense:  # fmt: skip
    """Attend from each query to the keys of its sequence.

    Args:
        q_BSHK: `[B, S, H, K]`, any strides; float16, bfloat16, float32 or float64.
        k_BUGK: `[B, U, G, K]`; H is a multiple of G, query head h reads head h * G // H.
        v_BUGL: `[B, U, G, L]`; L may differ from K.
        causal: Whether a query sees no key after its own position.
        window: How many keys before its position a query sees, and after it; -1 for all. A model
            with `sliding_window` w of Hugging Face has (w - 1, 0).
        offset: Position of query 0 among the keys; None puts the last query at the last key, so
            that queries may follow a cached prefix.
        softcap: Scores s become softcap * tanh(s / softcap); None leaves them.
        sinks: A score each query head `[H]` that takes part in the softmax without a value, any
            floating-point dtype, differentiable; None has none.
        scale: Multiplies the scores, positive; None is 1 / sqrt(K).
        return_lse: Whether to return the log-sum-exp of the scores too.
        deterministic: Whether gradients must be the same bits each time; None asks
            `torch.are_deterministic_algorithms_enabled()`.
        backend: `reference` (all scores in memory), `torch` (PyTorch's fused operators, and tiles
            of explicit maths for what they lack), `cudnn`, `triton`, `flex`, or `flash_attn`, which
            gives no log-sum-exp; None takes the fastest proven one.

    Returns:
        `[B, S, H, L]` in the dtype of `q_BSHK`, or in autocast's; with `return_lse` also the
        log-sum-exp `[B, H, S]` in nats, float32 at least, differentiable. A query that sees no key:
        0 and -inf.

    Raises:
        ValueError: If shapes, dtypes or numbers are not these.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    op = "flash_attention"
    q_BSHK, k_BUGK, v_BUGL = cast(op, q_BSHK, k_BUGK, v_BUGL)
    _check(op, q_BSHK, k_BUGK, v_BUGL, "BSHK")
    scores = scores_of(op, q_BSHK, causal, window, scale, softcap, offset)
    return _attend(
        op, q_BSHK, k_BUGK, v_BUGL, None, scores, sinks, return_lse, deterministic, backend
    )


def flash_attention_varlen(
    q_THK: Tensor, k_UGK: Tensor, v_UGL: Tensor, cu_seqlens: Tensor, *,
    cu_seqlens_k: Tensor | None = None, max_seqlen: int | None = None,
    max_seqlen_k: int | None = None, causal: bool = True, window: Window = (-1, -1),
    softcap: float | None = None, sinks: Tensor | None = None, scale: float | None = None,
    return_lse: bool = False, deterministic: bool | None = None, backend: str | None = None,
) -> Tensor | Dense:  # fmt: skip
    """Attend from each query to the keys of its own document.

    Args:
        q_THK: `[T, H, K]`, any strides; float16, bfloat16, float32 or float64.
        k_UGK: `[U, G, K]`; H is a multiple of G.
        v_UGL: `[U, G, L]`; L may differ from K.
        cu_seqlens: `[N + 1]`, int32: document n is queries cu_seqlens[n] to cu_seqlens[n + 1], from
            0 to T; a repeated entry is an empty document. The values are checked on the CPU;
            elsewhere that would wait for the device.
        cu_seqlens_k: The same of the keys, from 0 to U, where a document has more keys than
            queries (a cached prefix) or fewer: its last query stands at its last key. None: as
            `cu_seqlens`.
        max_seqlen: Queries of the longest document, or more; None finds it out where a backend
            needs it (PyTorch's on CUDA), which waits for the device.
        max_seqlen_k: Keys of the longest document, or more.
        causal: Whether a query sees no key after its own position.
        window: As in `flash_attention`.
        softcap: As in `flash_attention`.
        sinks: As in `flash_attention`.
        scale: Multiplies the scores, positive; None is 1 / sqrt(K).
        return_lse: Whether to return the log-sum-exp of the scores too.
        deterministic: As in `flash_attention`.
        backend: As in `flash_attention`, without `cudnn`.

    Returns:
        `[T, H, L]` in the dtype of `q_THK`, or in autocast's; with `return_lse` also the
        log-sum-exp `[H, T]` in nats, float32 at least, differentiable.

    Raises:
        ValueError: If shapes or dtypes are not these, or `cu_seqlens` is not a partition of T.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    op = "flash_attention_varlen"
    need_tensors(op, cu_seqlens=cu_seqlens)
    q_THK, k_UGK, v_UGL = cast(op, q_THK, k_UGK, v_UGL)
    _check(op, q_THK, k_UGK, v_UGL, "THK")
    longest = max_seqlen, max_seqlen_k
    packed = _packed(op, q_THK, k_UGK, cu_seqlens, cu_seqlens_k, longest)
    scores = scores_of(op, q_THK, causal, window, scale, softcap, None)
    return _attend(
        op, q_THK, k_UGK, v_UGL, packed, scores, sinks, return_lse, deterministic, backend
    )


def flash_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None = None, *, cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None, max_seqlen_k: int | None = None, causal: bool = True,
    window: Window = (-1, -1), offset: int | None = None, softcap: float | None = None,
    scale: float | None = None, deterministic: bool | None = None, backend: str | None = None,
) -> Gradients:  # fmt: skip
    """Differentiate attention whose output is known, by the keys given here.

    `out` and `lse` may be those over more keys (a merge of parts, a sink): the result is then the
    share of these keys in dq, and their own dk and dv, as each block of ring attention needs.

    Args:
        dout: Upstream gradient, `[B, S, H, L]`, or packed `[T, H, L]`.
        q: Queries, `[B, S, H, K]` or `[T, H, K]`.
        k: Keys, `[B, U, G, K]` or `[U, G, K]`.
        v: Values, `[B, U, G, L]` or `[U, G, L]`.
        out: Output over all keys, as `dout`.
        lse: Its log-sum-exp, `[B, H, S]` or `[H, T]`.
        cu_seqlens: Of packed documents, as in `flash_attention_varlen`; None for whole sequences.
        cu_seqlens_k: As in the forward.
        max_seqlen: As in the forward.
        max_seqlen_k: As in the forward.
        causal: As in the forward.
        window: As in the forward.
        offset: As in the forward; of whole sequences alone.
        softcap: As in the forward.
        scale: As in the forward.
        deterministic: As in the forward.
        backend: As in the forward; no peer.

    Returns:
        The gradients of q, k and v.

    Raises:
        TypeError: If what is saved is no tensor.
        ValueError: If shapes or dtypes are not these.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    op = "flash_attention" if cu_seqlens is None else "flash_attention_varlen"
    _check(op, q, k, v, "BSHK" if cu_seqlens is None else "THK")
    packed = _packed(op, q, k, cu_seqlens, cu_seqlens_k, (max_seqlen, max_seqlen_k))
    check_saved(op, q, v, dout, out, lse)
    scores = scores_of(op, q, causal, window, scale, softcap, offset)
    options = _options(op, q, k, v, packed, scores, _repeatable(deterministic), False, backend)
    gradients: Gradients = BACKWARD(dout, None, q, k, v, out, lse.contiguous(), *options)
    return gradients
