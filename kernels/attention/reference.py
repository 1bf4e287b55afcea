"""Attention in explicit maths: the specification, with the scores of all pairs in memory.

    s = scale * q k^T,    s = cap tanh(s / cap) with a soft cap,    -inf where masked
    lse = log sum exp s,    p = exp(s - lse),    o = p v

    dv = p^T do,    dp = do v^T,    ds = p * (dp - delta + dlse),    delta = sum_L do * o
    with a soft cap ds = ds * (1 - (s / cap)^2)
    dq = scale * ds k,    dk = scale * ds^T q

A query that sees no key has o = 0, lse = -inf and no gradient.

Shapes: B batch, S queries, U keys, H query heads, G key/value heads, Q = H / G query heads that
share a key/value head, K head dimension of queries and keys, L of values.

Source: Dao 2023, https://arxiv.org/abs/2307.08691, section 2.2 (and `dlse`, by d lse / d s = p);
the soft cap: Gemma team 2024, https://arxiv.org/abs/2408.00118, section 2.
"""

import torch
from torch import Tensor

from ..library import wide
from .scores import Scores

Dense = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def _grouped(x_BSHK: Tensor, heads: int) -> Tensor:
    """Widen, and split the heads by the key/value head that they share: [B, G, Q, S, K]."""
    batch, length, all_heads, width = x_BSHK.shape
    x_BSGQK = x_BSHK.to(wide(x_BSHK.dtype)).reshape(batch, length, heads, all_heads // heads, width)
    return x_BSGQK.permute(0, 2, 3, 1, 4)


def _flat(x_BGQSK: Tensor, like: Tensor) -> Tensor:
    return x_BGQSK.permute(0, 3, 1, 2, 4).flatten(2, 3).to(like.dtype).contiguous()


def visible(queries: int, keys: int, scores: Scores, device: torch.device) -> Tensor:
    """Say which keys each query sees.

    Args:
        queries: S.
        keys: U.
        scores: The window.
        device: Of the result.

    Returns:
        `[S, U]` bool.
    """
    at_S1 = torch.arange(queries, device=device)[:, None] + scores.first(queries, keys)
    key_U = torch.arange(keys, device=device)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if scores.left >= 0:
        seen &= key_U >= at_S1 - scores.left
    if scores.right >= 0:
        seen &= key_U <= at_S1 + scores.right
    return seen


def _scores(q_BGQSK: Tensor, k_BG1UK: Tensor, scores: Scores) -> Tensor:
    s = (q_BGQSK @ k_BG1UK.mT) * scores.scale
    if scores.softcap:
        s = (s / scores.softcap).tanh() * scores.softcap
    if scores.masked:
        seen = visible(s.shape[-2], s.shape[-1], scores, s.device)
        s = s.masked_fill(~seen, -torch.inf)
    return s


def attention_reference(
    q_BSHK: Tensor, k_BUGK: Tensor, v_BUGL: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Specify `flash_attention`, differentiably; the tests hold every backend to this.

    Args:
        q_BSHK: `[B, S, H, K]`.
        k_BUGK: `[B, U, G, K]`, H a multiple of G.
        v_BUGL: `[B, U, G, L]`.
        scores: Scale, window, soft cap.

    Returns:
        `[B, S, H, L]` in the dtype of `q_BSHK`, and the log-sum-exp `[B, H, S]`, float32 at
        least; 0 and -inf where no key is seen.
    """
    heads = k_BUGK.shape[2]
    q, k, v = (_grouped(x, heads) for x in (q_BSHK, k_BUGK, v_BUGL))
    s = _scores(q, k, scores)
    low, high = scores.seeing(q.shape[-2], k.shape[-2])  # the others have no softmax
    seeing = s[..., low:high, :].logsumexp(-1)
    rest = (low, q.shape[-2] - high)
    lse = torch.nn.functional.pad(seeing, rest, value=-torch.inf)
    p = (s[..., low:high, :] - seeing[..., None]).exp()
    out = torch.nn.functional.pad(p @ v, (0, 0, *rest))
    return _flat(out, q_BSHK), lse.flatten(1, 2)


def attention_backward_reference(
    dout_BSHL: Tensor, dlse_BHS: Tensor | None, q_BSHK: Tensor, k_BUGK: Tensor, v_BUGL: Tensor,
    out_BSHL: Tensor, lse_BHS: Tensor, scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Specify the backward of `flash_attention`.

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
        The gradients of q, k and v, in their dtypes.
    """
    heads = k_BUGK.shape[2]
    q, k, v = (_grouped(x, heads) for x in (q_BSHK, k_BUGK, v_BUGL))
    dout, out = _grouped(dout_BSHL, heads), _grouped(out_BSHL, heads)
    s, lse = _scores(q, k, scores), lse_BHS.unflatten(1, (heads, -1))[..., None]
    p = (s - lse).exp().masked_fill(lse == -torch.inf, 0.0)
    shift = (dout * out).sum(-1)
    if dlse_BHS is not None:
        shift = shift - dlse_BHS.unflatten(1, (heads, -1))
    ds = p * (dout @ v.mT - shift[..., None]) * scores.scale
    if scores.softcap:
        ds = ds * (1 - (s.masked_fill(s == -torch.inf, 0.0) / scores.softcap).square())
    dk, dv = (ds.mT @ q).sum(2, keepdim=True), (p.mT @ dout).sum(2, keepdim=True)
    return _flat(ds @ k, q_BSHK), _flat(dk, k_BUGK), _flat(dv, v_BUGL)
