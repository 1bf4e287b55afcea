"""Attention by PyTorch: its own flash operator on the CPU, FlashAttention 2 on CUDA.

Both take grouped key/value heads as they are and any strides with a contiguous last dimension.
Neither takes a gradient of the log-sum-exp. It enters as columns more: with v' = [v, 1] and
do' = [do, dlse], dp' = do' v'^T is dp + dlse, while delta = sum do' * [o, 0] stays as it is. Two
such columns carry dlse in low precision, rounded value and remainder.

The CUDA half has never run on a device: the tests marked `gpu` are its proof.

Source: Dao 2023, https://arxiv.org/abs/2307.08691, algorithms 1 and 2.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..library import wide

_aten = torch.ops.aten
_EXTRA = 8  # columns added to carry dlse; CUDA takes head dimensions that are multiples of 8
_CUDA_HEAD_DIM = 256

Dense = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def missing(q: Tensor) -> str | None:
    """Say what keeps PyTorch's operators from serving `q`, or None when they can.

    Args:
        q: Queries, head dimension last.

    Returns:
        The end of a sentence that begins with the backend's name.
    """
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda":
        return f"needs the CPU or a CUDA device, the tensors are on {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16 on CUDA, the tensors are {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > _CUDA_HEAD_DIM:
        return (
            f"needs a head dimension on CUDA that is a multiple of 8 and at most {_CUDA_HEAD_DIM}, "
            f"got {q.shape[-1]}"
        )
    return None


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(q_BSHK: Tensor, k_BUGK: Tensor, v_BUGK: Tensor, causal: bool, scale: float) -> Dense:
    """Attend; as `attention_reference`.

    Args:
        q_BSHK: `[B, S, H, K]`.
        k_BUGK: `[B, U, G, K]`.
        v_BUGK: `[B, U, G, K]`.
        causal: Whether query i sees keys 0 to i only.
        scale: Multiplies the scores.

    Returns:
        `[B, S, H, K]` and the log-sum-exp `[B, H, S]`.
    """
    batch, queries, heads, _ = q_BSHK.shape
    if not q_BSHK.numel() or not k_BUGK.numel():  # PyTorch's CPU kernel divides by these sizes
        out, dtype = (
            torch.zeros_like(q_BSHK, memory_format=torch.contiguous_format),
            wide(q_BSHK.dtype),
        )
        return out, out.new_full((batch, heads, queries), -torch.inf, dtype=dtype)
    q, k, v = (_rows(x) for x in (q_BSHK, k_BUGK, v_BUGK))
    if q.is_cuda:
        out, lse, *_ = _aten._flash_attention_forward(
            q, k, v, None, None, queries, k.shape[1], 0.0, causal, False, scale=scale
        )
        return out, lse
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def backward(
    dout_BSHK: Tensor,
    dlse_BHS: Tensor | None,
    q_BSHK: Tensor,
    k_BUGK: Tensor,
    v_BUGK: Tensor,
    out_BSHK: Tensor,
    lse_BHS: Tensor,
    causal: bool,
    scale: float,
) -> Gradients:
    """Differentiate `forward`; as `attention_backward_reference`.

    Args:
        dout_BSHK: Upstream gradient of the output.
        dlse_BHS: Upstream gradient of the log-sum-exp, None for 0.
        q_BSHK: As in the forward.
        k_BUGK: As in the forward.
        v_BUGK: As in the forward.
        out_BSHK: What the forward gave.
        lse_BHS: What the forward gave.
        causal: As in the forward.
        scale: As in the forward.

    Returns:
        The gradients of q, k and v.
    """
    if not q_BSHK.numel() or not k_BUGK.numel():
        return torch.zeros_like(q_BSHK), torch.zeros_like(k_BUGK), torch.zeros_like(v_BUGK)
    tensors: tuple[Tensor, ...] = dout_BSHK, q_BSHK, k_BUGK, v_BUGK, out_BSHK
    if not q_BSHK.is_cuda:  # in bfloat16 this operator sums dk and dv over blocks and heads in it
        dtype = wide(q_BSHK.dtype)
        tensors = tuple(x.to(dtype) for x in tensors)
    if dlse_BHS is not None:
        tensors = _with_lse(dlse_BHS.transpose(1, 2), *tensors)
    dout, q, k, v, out = (_rows(x) for x in tensors)
    if q.is_cuda:
        gradients = _cuda_backward(dout, q, k, v, out, lse_BHS, None, q.shape[1], causal, scale)
    else:
        gradients = tuple(
            d.transpose(1, 2)
            for d in _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(x.transpose(1, 2) for x in (dout, q, k, v, out)),
                lse_BHS,
                0.0,
                causal,
                scale=scale,
            )
        )
    width, dtype = q_BSHK.shape[-1], q_BSHK.dtype
    dq, dk, dv = (d[..., :width].to(dtype).contiguous() for d in gradients)
    return dq, dk, dv


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


def _cuda_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    longest: int,
    causal: bool,
    scale: float,
) -> Gradients:
    if q.shape[-1] > _CUDA_HEAD_DIM:
        raise RuntimeError(
            f"flash_attention: backend 'torch' needs a head dimension of at most "
            f"{_CUDA_HEAD_DIM - _EXTRA} for a gradient of the log-sum-exp, "
            f"got {q.shape[-1] - _EXTRA}"
        )
    keys = k.shape[1] if cu_seqlens is None else longest
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, of which there is none
    gradients: Gradients = _aten._flash_attention_backward(
        dout, q, k, v, out, lse, cu_seqlens, cu_seqlens, longest, keys, 0.0, causal, seed,
        q.new_empty(0), scale=scale,
    )  # fmt: skip
    return gradients


def varlen_forward_cuda(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    causal: bool,
    scale: float,
) -> Dense:
    """Attend within documents, on CUDA.

    Args:
        q_THK: `[T, H, K]`.
        k_TGK: `[T, G, K]`.
        v_TGK: `[T, G, K]`.
        cu_seqlens: `[N + 1]`, int32, on the device.
        longest: Tokens of the longest document, or more.
        causal: Whether a query sees the keys up to its own position only.
        scale: Multiplies the scores.

    Returns:
        `[T, H, K]` and the log-sum-exp `[H, T]`.
    """
    out, lse, *_ = _aten._flash_attention_forward(
        _rows(q_THK), _rows(k_TGK), _rows(v_TGK), cu_seqlens, cu_seqlens, longest, longest,
        0.0, causal, False, scale=scale,
    )  # fmt: skip
    return out, lse


def varlen_backward_cuda(
    dout_THK: Tensor,
    dlse_HT: Tensor | None,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    causal: bool,
    scale: float,
) -> Gradients:
    """Differentiate `varlen_forward_cuda`.

    Args:
        dout_THK: Upstream gradient of the output.
        dlse_HT: Upstream gradient of the log-sum-exp, None for 0.
        q_THK: As in the forward.
        k_TGK: As in the forward.
        v_TGK: As in the forward.
        out_THK: What the forward gave.
        lse_HT: What the forward gave.
        cu_seqlens: As in the forward.
        longest: As in the forward.
        causal: As in the forward.
        scale: As in the forward.

    Returns:
        The gradients of q, k and v.
    """
    tensors = dout_THK, q_THK, k_TGK, v_TGK, out_THK
    if dlse_HT is not None:
        tensors = _with_lse(dlse_HT.t(), *tensors)
    dout, q, k, v, out = (_rows(x) for x in tensors)
    gradients = _cuda_backward(dout, q, k, v, out, lse_HT, cu_seqlens, longest, causal, scale)
    dq, dk, dv = (d[..., : q_THK.shape[-1]].contiguous() for d in gradients)
    return dq, dk, dv
