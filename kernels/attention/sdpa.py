"""Attention by PyTorch's fused operators: its own on the CPU, FlashAttention 2 and cuDNN on CUDA.

All take grouped key/value heads as they are and any strides with a contiguous last dimension; one
head dimension, so the narrower of K and L is filled up with zeros. None takes a gradient of the
log-sum-exp. It enters as columns more: with v' = [v, 1] and do' = [do, dlse], dp' = do' v'^T is
dp + dlse, while delta = sum do' * [o, 0] stays as it is. Two such columns carry dlse in low
precision, rounded value and remainder.

Known bugs, and what is done about them: cuDNN's backward gives NaN where a tile of 128 is filled up
and the log-sum-exp is below -88.7, with a mask (pytorch #196678) and with one query (cudnn-frontend
#1072), so it never gets a mask, and whole tiles only. FlashAttention 2 says +inf for the
log-sum-exp of a query that sees no key, and takes a negative window for no limit.

The CUDA half has never run on a device: the tests marked `gpu` are its proof.

Source: Dao 2023, https://arxiv.org/abs/2307.08691, algorithms 1 and 2.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..library import wide
from .reference import visible
from .scores import Packed, Scores

_aten = torch.ops.aten
_EXTRA = 8  # columns added to carry dlse; CUDA takes head dimensions that are multiples of 8
_WIDEST = 256  # head dimension of FlashAttention 2
_CUDNN_WIDEST = 128
_CUDNN_TILE = 128

Dense = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def lacks(q: Tensor, v: Tensor, scores: Scores, dlse: Tensor | None = None) -> str | None:
    """Say what keeps PyTorch's flash operators from serving these tensors, or None.

    Args:
        q: Queries, head dimension last.
        v: Values.
        scores: Scale, window, soft cap.
        dlse: Gradient of the log-sum-exp, in a backward.

    Returns:
        The end of a sentence that begins with the backend's name.
    """
    if scores.softcap:
        return "has no soft cap"
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda":
        return f"needs the CPU or a CUDA device, the tensors are on {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16 on CUDA, the tensors are {q.dtype}"
    width, most = max(q.shape[-1], v.shape[-1]), _WIDEST - (0 if dlse is None else _EXTRA)
    return None if width <= most else f"needs head dimensions of at most {most}, got {width}"


def cudnn_lacks(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, *, deterministic: bool, with_lse: bool
) -> str | None:
    """Say what keeps cuDNN from serving these tensors, or None.

    Args:
        q: `[B, S, H, K]`, or packed.
        k: `[B, U, G, K]`.
        v: `[B, U, G, L]`.
        scores: Scale, window, soft cap.
        deterministic: Whether gradients must be the same bits each time.
        with_lse: Whether the log-sum-exp may have a gradient.

    Returns:
        The end of a sentence that begins with the backend's name.
    """
    if q.dim() != 4:
        return "takes no packed documents"
    square = scores.first(q.shape[1], k.shape[1]) == 0
    if scores.softcap or scores.left >= 0 or scores.right > 0 or (scores.right == 0 and not square):
        return "takes causal squares or no mask, no window, offset or soft cap"
    if deterministic:
        return "does not promise the same bits each time"
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return f"needs CUDA and float16 or bfloat16, the tensors are {q.dtype} on {q.device.type}"
    widths, most = (q.shape[-1], v.shape[-1]), _CUDNN_WIDEST - _EXTRA * with_lse
    if max(widths) > most or any(width % 8 for width in widths):
        return (
            f"needs head dimensions that are multiples of 8 and at most {most} "
            f"({_CUDNN_WIDEST} without the log-sum-exp), got {widths[0]} and {widths[1]}"
        )
    lengths = q.shape[1], k.shape[1]
    if not all(lengths) or any(length % _CUDNN_TILE for length in lengths):
        return (
            f"is wrong where a tile of {_CUDNN_TILE} is not full (pytorch #196678): lengths must "
            f"be multiples of it, got {lengths[0]} and {lengths[1]}"
        )
    return None


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _widened(width: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Fill the head dimension up with zeros."""
    return tuple(pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors)


def _with_lse(
    dlse: Tensor, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Append the columns that carry `dlse` ([..., H], beside the heads of `dout`)."""
    q, k, out = (pad(x, (0, _EXTRA)) for x in (q, k, out))
    v, dout = pad(v, (0, _EXTRA), value=1.0), pad(dout, (0, _EXTRA))
    rounded = dlse.to(dout.dtype)
    dout[..., -_EXTRA] = rounded
    dout[..., 1 - _EXTRA] = dlse - rounded
    return dout, q, k, v, out


def _mask_cpu(q: Tensor, k: Tensor, scores: Scores) -> tuple[bool, Tensor | None]:
    """Return PyTorch's causal flag, or its mask."""
    queries, keys = q.shape[1], k.shape[1]
    if scores.left < 0 and scores.right == 0 and scores.first(queries, keys) == 0:
        return True, None
    if scores.pairs(queries, keys) == queries * keys:
        return False, None
    hidden_SU = ~visible(queries, keys, scores, q.device)
    return False, torch.zeros_like(hidden_SU, dtype=q.dtype).masked_fill_(hidden_SU, -torch.inf)


def forward_cpu(q_BSHK: Tensor, k_BUGK: Tensor, v_BUGL: Tensor, scores: Scores) -> Dense:
    """Attend, on the CPU; as `attention_reference` where every query sees a key.

    Args:
        q_BSHK: `[B, S, H, K]`.
        k_BUGK: `[B, U, G, K]`.
        v_BUGL: `[B, U, G, L]`.
        scores: Scale and window.

    Returns:
        `[B, S, H, L]` and the log-sum-exp `[B, H, S]`.
    """
    width = v_BUGL.shape[-1]
    causal, mask = _mask_cpu(q_BSHK, k_BUGK, scores)
    q, k, v = _widened(max(width, q_BSHK.shape[-1]), q_BSHK, k_BUGK, v_BUGL)
    q, k, v = (_rows(x).transpose(1, 2) for x in (q, k, v))
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scores.scale
    )
    return out.transpose(1, 2)[..., :width].contiguous(), lse.contiguous()


def backward_cpu(
    dout_BSHL: Tensor, dlse_BHS: Tensor | None, q_BSHK: Tensor, k_BUGK: Tensor, v_BUGL: Tensor,
    out_BSHL: Tensor, lse_BHS: Tensor, scores: Scores,
) -> Gradients:  # fmt: skip
    """Differentiate `forward_cpu`; in float32 at least, and so are the gradients.

    Args:
        dout_BSHL: Upstream gradient of the output.
        dlse_BHS: Upstream gradient of the log-sum-exp, None for 0.
        q_BSHK: As in the forward.
        k_BUGK: As in the forward.
        v_BUGL: As in the forward.
        out_BSHL: What the forward gave.
        lse_BHS: What the forward gave.
        scores: As in the forward.

    Returns:
        The gradients of q, k and v.
    """
    dtype = wide(q_BSHK.dtype)  # in bfloat16 PyTorch sums dk and dv over blocks and heads in it
    tensors = tuple(x.to(dtype) for x in (dout_BSHL, q_BSHK, k_BUGK, v_BUGL, out_BSHL))
    keys, values = k_BUGK.shape[-1], v_BUGL.shape[-1]
    if dlse_BHS is not None:
        tensors = _with_lse(dlse_BHS.transpose(1, 2), *tensors)
    tensors = _widened(max(x.shape[-1] for x in tensors), *tensors)
    causal, mask = _mask_cpu(tensors[1], k_BUGK, scores)
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_rows(x).transpose(1, 2) for x in tensors), lse_BHS, 0.0, causal, attn_mask=mask,
        scale=scores.scale,
    )  # fmt: skip
    dq, dk, dv = (d.transpose(1, 2) for d in (dq, dk, dv))
    return dq[..., :keys], dk[..., :keys], dv[..., :values]


def _from_the_end(scores: Scores, queries: int, keys: int) -> Scores:
    """Say a window as FlashAttention does: from the diagonal that ends at the last key.

    Where each query sees a key, and each key is seen, the limits stay at least 0.
    """
    off = scores.first(queries, keys) - (keys - queries)
    left = scores.left if scores.left < 0 else scores.left - off
    right = scores.right if scores.right < 0 else scores.right + off
    assert (left < 0) == (scores.left < 0)
    assert (right < 0) == (scores.right < 0)
    return Scores(scale=scores.scale, left=left, right=right)


def _where(
    q: Tensor, k: Tensor, packed: Packed | None, scores: Scores
) -> tuple[tuple[Tensor | int | None, ...], Scores]:
    if packed is not None:
        return (packed.q, packed.k, packed.max_q, packed.max_k), scores
    queries, keys = q.shape[1], k.shape[1]
    return (None, None, queries, keys), _from_the_end(scores, queries, keys)


def _limits(scores: Scores) -> dict[str, int | None]:
    sides = {"window_size_left": scores.left, "window_size_right": scores.right}
    if scores.left < 0:  # causal or nothing: said by the flag
        sides = {name: -1 for name in sides} if scores.right <= 0 else sides
    return {name: None if size < 0 else size for name, size in sides.items()}


@contextlib.contextmanager
def _repeatable(wanted: bool) -> Iterator[None]:
    """Have PyTorch take its deterministic backward; it has no other switch than that of all."""
    if not wanted or torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def forward_cuda(q: Tensor, k: Tensor, v: Tensor, packed: Packed | None, scores: Scores) -> Dense:
    """Attend by FlashAttention 2; as `attention_reference`.

    Args:
        q: `[B, S, H, K]`, or packed `[T, H, K]`.
        k: `[B, U, G, K]` or `[T, G, K]`.
        v: `[B, U, G, L]` or `[T, G, L]`.
        packed: Boundaries of documents, with the longest; None for whole sequences, where each
            query must see a key and each key be seen.
        scores: Scale and window.

    Returns:
        Output, and log-sum-exp `[B, H, S]` or `[H, T]`.
    """
    width = v.shape[-1]
    where, scores = _where(q, k, packed, scores)
    wide_to = -(-max(width, q.shape[-1]) // 8) * 8
    q, k, v = (_rows(x) for x in _widened(wide_to, q, k, v))
    out, lse, *_ = _aten._flash_attention_forward(
        q, k, v, *where, 0.0, scores.right == 0, False, scale=scores.scale, **_limits(scores)
    )
    if packed is not None:  # +inf stands for no key, and for a score of +inf, whose output is NaN
        none = (lse == torch.inf) & (out[..., 0] == 0).mT
        lse = lse.masked_fill(none, -torch.inf)
    return out[..., :width].contiguous(), lse


def backward_cuda(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    packed: Packed | None, scores: Scores, deterministic: bool,
) -> Gradients:  # fmt: skip
    """Differentiate `forward_cuda`.

    Args:
        dout: Upstream gradient of the output.
        dlse: Upstream gradient of the log-sum-exp, None for 0.
        q: As in the forward.
        k: As in the forward.
        v: As in the forward.
        out: What the forward gave.
        lse: What the forward gave.
        packed: As in the forward.
        scores: As in the forward.
        deterministic: Whether the gradients must be the same bits each time.

    Returns:
        The gradients of q, k and v.
    """
    widths = q.shape[-1], k.shape[-1], v.shape[-1]
    where, scores = _where(q, k, packed, scores)
    tensors: tuple[Tensor, ...] = dout, q, k, v, out
    if dlse is not None:
        tensors = _with_lse(dlse.mT, *tensors)
    wide_to = -(-max(x.shape[-1] for x in tensors) // 8) * 8
    dout, q, k, v, out = (_rows(x) for x in _widened(wide_to, *tensors))
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, of which there is none
    with _repeatable(deterministic):
        dq, dk, dv, *_ = _aten._flash_attention_backward(
            dout, q, k, v, out, lse, *where, 0.0, scores.right == 0, seed, q.new_empty(0),
            scale=scores.scale, **_limits(scores),
        )  # fmt: skip
    dq, dk, dv = (d[..., :w].contiguous() for d, w in zip((dq, dk, dv), widths, strict=True))
    return dq, dk, dv


def forward_cudnn(q_BSHK: Tensor, k_BUGK: Tensor, v_BUGL: Tensor, scores: Scores) -> Dense:
    """Attend by cuDNN, without a mask; as `attention_reference`.

    Args:
        q_BSHK: `[B, S, H, K]`.
        k_BUGK: `[B, U, G, K]`.
        v_BUGL: `[B, U, G, L]`.
        scores: Scale; causal or nothing.

    Returns:
        `[B, S, H, L]` and the log-sum-exp `[B, H, S]`.
    """
    q, k, v = (_rows(x).transpose(1, 2) for x in (q_BSHK, k_BUGK, v_BUGL))
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, scores.right == 0, False, scale=scores.scale
    )
    return out.transpose(1, 2).contiguous(), lse.squeeze(-1)


def backward_cudnn(
    dout_BSHL: Tensor, dlse_BHS: Tensor | None, q_BSHK: Tensor, k_BUGK: Tensor, v_BUGL: Tensor,
    out_BSHL: Tensor, lse_BHS: Tensor, scores: Scores,
) -> Gradients:  # fmt: skip
    """Differentiate `forward_cudnn`.

    Args:
        dout_BSHL: Upstream gradient of the output.
        dlse_BHS: Upstream gradient of the log-sum-exp, None for 0.
        q_BSHK: As in the forward.
        k_BUGK: As in the forward.
        v_BUGL: As in the forward.
        out_BSHL: What the forward gave.
        lse_BHS: What the forward gave.
        scores: As in the forward.

    Returns:
        The gradients of q, k and v.
    """
    widths = q_BSHK.shape[-1], k_BUGK.shape[-1], v_BUGL.shape[-1]
    tensors: tuple[Tensor, ...] = dout_BSHL, q_BSHK, k_BUGK, v_BUGL, out_BSHL
    if dlse_BHS is not None:
        tensors = _with_lse(dlse_BHS.mT, *tensors)
    none = q_BSHK.new_zeros((), dtype=torch.int64)
    gradients = _aten._scaled_dot_product_cudnn_attention_backward(
        *(_rows(x).transpose(1, 2) for x in tensors), lse_BHS[..., None], none, none, None, None,
        None, q_BSHK.shape[1], k_BUGK.shape[1], 0.0, scores.right == 0, scale=scores.scale,
    )  # fmt: skip
    dq, dk, dv = (
        d.transpose(1, 2)[..., :w].contiguous() for d, w in zip(gradients, widths, strict=True)
    )
    return dq, dk, dv
