"""Attention in explicit maths: the specification, with the scores of all pairs in memory.

    s = scale * q k^T  (-inf where masked),    lse = log sum exp s,    p = exp(s - lse),    o = p v

    dv = p^T do,    dp = do v^T,    ds = p * (dp - delta + dlse),    delta = sum_K do * o
    dq = scale * ds k,    dk = scale * ds^T q

Shapes: B batch, S queries, U keys, H query heads, G key/value heads, Q = H / G query heads that
share a key/value head, K head dimension.

Source: Dao 2023, https://arxiv.org/abs/2307.08691, section 2.2 (and `dlse`, by d lse / d s = p).
"""

import torch
from torch import Tensor

from ..library import wide


def _grouped(x_BSHK: Tensor, heads: int) -> Tensor:
    """Widen, and split the heads by the key/value head that they share: [B, G, Q, S, K]."""
    batch, length, all_heads, width = x_BSHK.shape
    x_BSGQK = x_BSHK.to(wide(x_BSHK.dtype)).reshape(batch, length, heads, all_heads // heads, width)
    return x_BSGQK.permute(0, 2, 3, 1, 4)


def _flat(x_BGQSK: Tensor, like: Tensor) -> Tensor:
    return x_BGQSK.permute(0, 3, 1, 2, 4).flatten(2, 3).to(like.dtype).contiguous()


def _scores(q_BGQSK: Tensor, k_BG1UK: Tensor, causal: bool, scale: float) -> Tensor:
    scores = (q_BGQSK @ k_BG1UK.mT) * scale
    if causal:
        future_SU = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future_SU, -torch.inf)
    return scores


def attention_reference(
    q_BSHK: Tensor, k_BUGK: Tensor, v_BUGK: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Specify `flash_attention`, differentiably; the tests hold every backend to this.

    Args:
        q_BSHK: `[B, S, H, K]`.
        k_BUGK: `[B, U, G, K]`, H a multiple of G.
        v_BUGK: `[B, U, G, K]`.
        causal: Whether query i sees keys 0 to i only.
        scale: Multiplies the scores; dimensionless.

    Returns:
        `[B, S, H, K]` in the dtype of `q_BSHK`, and the log-sum-exp `[B, H, S]`, float32 at
        least; 0 and -inf where there is no key.
    """
    heads = k_BUGK.shape[2]
    q, k, v = (_grouped(x, heads) for x in (q_BSHK, k_BUGK, v_BUGK))
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ v
    return _flat(out, q_BSHK), lse.flatten(1, 2)


def attention_backward_reference(
    dout_BSHK: Tensor,
    dlse_BHS: Tensor | None,
    q_BSHK: Tensor,
    k_BUGK: Tensor,
    v_BUGK: Tensor,
    out_BSHK: Tensor,
    lse_BHS: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Specify the backward of `flash_attention`.

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
        The gradients of q, k and v, in their dtypes.
    """
    heads = k_BUGK.shape[2]
    q, k, v = (_grouped(x, heads) for x in (q_BSHK, k_BUGK, v_BUGK))
    dout, out = _grouped(dout_BSHK, heads), _grouped(out_BSHK, heads)
    p = (_scores(q, k, causal, scale) - lse_BHS.unflatten(1, (heads, -1))[..., None]).exp()
    shift = (dout * out).sum(-1)
    if dlse_BHS is not None:
        shift = shift - dlse_BHS.unflatten(1, (heads, -1))
    ds = p * (dout @ v.mT - shift[..., None]) * scale
    dk, dv = (ds.mT @ q).sum(2, keepdim=True), (p.mT @ dout).sum(2, keepdim=True)
    return _flat(ds @ k, q_BSHK), _flat(dk, k_BUGK), _flat(dv, v_BUGK)
