"""Causal convolution of each channel by itself, over packed documents.

    y_t = bias + sum over k < W of weight_k x_(t - W + 1 + k)

What lies before a document is zero, or the last W - 1 inputs of what it goes on from. A sum of W
products of whole tensors, so that a token's bits depend on no other token. Differentiable by
autograd; PyTorch's operators on any device, no kernel of its own yet.

Shapes: T tokens, C channels, W width, N documents. Bound by memory: 2 T C elements at least.

Source: Gu and Dao 2023, https://arxiv.org/abs/2312.00752, section 3.4.
"""

import torch
from torch import Tensor

from ..library import wide


def causal_convolution(
    x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor, cu_seqlens: Tensor, *,
    initial_NCW: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Convolve each document; return the result and what the documents can go on from.

    Args:
        x_TC: Inputs `[T, C]`.
        weight_CW: `[C, W]`; the last tap is that of the token itself.
        bias_C: `[C]`.
        cu_seqlens: Where documents start, and the end: `[N + 1]`, int32.
        initial_NCW: The W - 1 inputs before each document, `[N, C, W - 1]`; `None` for zeros.

    Returns:
        y `[T, C]` and the last inputs `[N, C, W - 1]`, in the dtype of `x_TC`; computed in float32
        at least.

    Raises:
        ValueError: If shapes do not fit each other.
    """
    (tokens, channels), before, count = x_TC.shape, weight_CW.shape[1] - 1, len(cu_seqlens) - 1
    if weight_CW.shape[0] != channels or bias_C.shape != (channels,):
        raise ValueError(
            f"x, weight and bias must be [T, C], [C, W] and [C]; got {[*x_TC.shape]}, "
            f"{[*weight_CW.shape]} and {[*bias_C.shape]}"
        )
    if initial_NCW is None:
        initial_NCW = x_TC.new_zeros(count, channels, before)
    elif initial_NCW.shape != (count, channels, before):
        raise ValueError(
            f"initial must be [{count}, {channels}, {before}] for {count} documents; "
            f"got {[*initial_NCW.shape]}"
        )
    # each document behind its W - 1 earlier inputs: no tap then reaches across a boundary
    token, number = (torch.arange(n, device=x_TC.device) for n in (tokens, count))
    at = token + before * torch.searchsorted(cu_seqlens[1:], token, right=True) + before
    heads = (cu_seqlens[:-1] + before * number)[:, None] + torch.arange(before, device=at.device)
    long = x_TC.new_zeros(tokens + before * count, channels).index_copy(0, at, x_TC)
    state = initial_NCW.to(x_TC.dtype).transpose(1, 2).flatten(0, 1)
    long = long.index_copy(0, heads.flatten(), state)
    dtype = wide(x_TC.dtype)
    y, weight = bias_C.to(dtype), weight_CW.to(dtype)
    for k in range(before + 1):
        y = y + long.index_select(0, at - before + k).to(dtype) * weight[:, k]
    ends = heads + cu_seqlens.diff()[:, None]
    last = long.index_select(0, ends.flatten()).unflatten(0, (count, before)).transpose(1, 2)
    return y.to(x_TC.dtype), last
