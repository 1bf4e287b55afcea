"""Attention whose rows depend on their own query, and the keys that it sees, alone.

The scores of a query are all made before its softmax, so that their maximum, which has no order,
needs no correction later. Values are summed in tiles of 256 keys at positions that are multiples of
256 among the keys of the sequence, in order: a tile that a query does not see adds zeros, however
many there are. A column of ones beside the values gives the sum of the exponentials in the same
order. Each head of keys is a product by itself, of oneDNN: MKL's products of batches, which would
take them all at once, depend on the number of rows, without AVX-512 even on a row's place.

Memory: the scores of 128 queries at a time.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..invariant import multiply, need_tensor
from .reference import visible
from .scores import Scores

_KEYS = 256
_QUERIES = 128


def forward(
    q_BSHK: Tensor, k_BUGK: Tensor, v_BUGL: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Attend; as `attention_reference`, of float32 and narrower on the CPU.

    Args:
        q_BSHK: `[B, S, H, K]`.
        k_BUGK: `[B, U, G, K]`; key 0 is the first of its sequence.
        v_BUGL: `[B, U, G, L]`.
        scores: Scale, window, soft cap.

    Returns:
        `[B, S, H, L]` and the log-sum-exp `[B, H, S]`.
    """
    need_tensor("flash_attention", q_BSHK)
    (batch, queries, heads, _), (keys, groups) = q_BSHK.shape, k_BUGK.shape[1:3]
    out = q_BSHK.new_zeros(*q_BSHK.shape[:3], v_BUGL.shape[-1])
    lse = q_BSHK.new_full((batch, heads, queries), -torch.inf, dtype=torch.float32)
    fill = -keys % _KEYS
    k_NUK = pad(k_BUGK.float().transpose(1, 2), (0, 0, 0, fill)).flatten(0, 1)
    v_NUL = pad(pad(v_BUGL.float(), (0, 1), value=1.0).transpose(1, 2), (0, 0, 0, fill)).flatten(
        0, 1
    )
    v_NTLU = v_NUL.unflatten(1, (-1, _KEYS)).mT.contiguous()
    start, stop = scores.seeing(queries, keys)
    for low in range(start, stop, _QUERIES):
        high = min(low + _QUERIES, stop)
        first, last = scores.seen(low, high, queries, keys)
        first -= first % _KEYS
        last += -last % _KEYS
        x_BnGQK = q_BSHK[:, low:high].float().unflatten(2, (groups, -1))
        x_BGQnK = x_BnGQK.permute(0, 2, 3, 1, 4).contiguous()
        shape = x_BGQnK.shape[:-1]
        x_NMK = x_BGQnK.flatten(2, 3).flatten(0, 1)
        s = torch.stack([multiply(x, k[first:last]) for x, k in zip(x_NMK, k_NUK, strict=True)])
        s.mul_(scores.scale)
        if scores.softcap:
            s.div_(scores.softcap).tanh_().mul_(scores.softcap)
        at = replace(scores, offset=scores.first(queries, keys) + low - first)
        seen = visible(high - low, last - first, at, s.device)
        seen[:, keys - first :] = False
        s.view(*shape, -1).masked_fill_(~seen, -torch.inf)
        most = s.amax(-1, keepdim=True)
        p_NTMU = s.sub_(most).exp_().unflatten(-1, (-1, _KEYS)).transpose(1, 2)
        tiles = v_NTLU[:, first // _KEYS : last // _KEYS]
        total = torch.stack([_sum(*pair) for pair in zip(p_NTMU, tiles, strict=True)])
        y_BGQnL = (total[..., :-1] / total[..., -1:]).view(*shape, -1)
        out[:, low:high] = y_BGQnL.permute(0, 3, 1, 2, 4).flatten(2, 3)
        lse[..., low:high] = (total[..., -1:].log() + most).view(shape).flatten(1, 2)
    return out, lse


def _sum(p_TMU: Tensor, v_TLU: Tensor) -> Tensor:
    """Sum the products of tiles one after the other."""
    total = torch.zeros(())
    for p, v in zip(p_TMU, v_TLU, strict=True):
        total = total + multiply(p, v)
    return total
