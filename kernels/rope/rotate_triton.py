"""Triton code of `rotary`: a program loads the angles of one token once and turns all its heads.

Both halves of a head are in the same thread; queries and keys share the launch; the backward is
the same kernel with sign = -1. Token offsets are 64-bit.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl
from torch import Tensor

from ..launch import next_power_of_two, on_device

_TILE = 1024  # pairs a tile of heads


def configuration(heads: int, head_dim: int) -> dict[str, int]:
    """Choose tile and warps.

    Args:
        heads: H, the larger of the two numbers of heads.
        head_dim: K.

    Returns:
        HEADS and PAIRS, the shape of a tile, and num_warps.
    """
    pairs = next_power_of_two(head_dim // 2)
    tile = min(next_power_of_two(heads), max(1, _TILE // pairs))
    return {"HEADS": tile, "PAIRS": pairs, "num_warps": 4 if tile * pairs >= 512 else 1}


@triton.jit
def _heads(x, out, heads, half, head_stride, cos, sin, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Turn the heads of one token, HEADS at a time."""
    pair = tl.arange(0, PAIRS)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & (pair < half)[None, :]
        at = x + head.to(tl.int64)[:, None] * head_stride + pair[None, :]
        a = tl.load(at, inside, other=0.0).to(tl.float32)
        b = tl.load(at + half, inside, other=0.0).to(tl.float32)
        to = out + head[:, None] * (2 * half) + pair[None, :]
        first = a * cos[None, :] - b * sin[None, :]
        second = b * cos[None, :] + a * sin[None, :]
        tl.store(to, first.to(out.dtype.element_ty), inside)
        tl.store(to + half, second.to(out.dtype.element_ty), inside)


@triton.jit
def turn_kernel(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    q_heads,
    k_heads,
    half,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    cos_stride,
    sin_stride,
    sign,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Turn all heads of one token by `sign` times its angles."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    c = tl.load(cos + token * cos_stride + pair, pair < half, other=0.0).to(tl.float32)
    s = tl.load(sin + token * sin_stride + pair, pair < half, other=0.0).to(tl.float32) * sign
    to = token * (2 * half)
    _heads(
        q + token * q_stride, q_out + to * q_heads, q_heads, half, q_head_stride, c, s, HEADS, PAIRS
    )
    _heads(
        k + token * k_stride, k_out + to * k_heads, k_heads, half, k_head_stride, c, s, HEADS, PAIRS
    )


def _near(x: Tensor) -> Tensor:
    """Leave a strided view as it is; copy only when the elements of a head are apart."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def turn(
    q_THK: Tensor, k_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, sign: float
) -> tuple[Tensor, Tensor]:
    """Launch the rotation by `sign` times the angles.

    Args:
        q_THK: `[T, H, K]`.
        k_TGK: `[T, G, K]`.
        cos_TJ: `[T, K/2]`.
        sin_TJ: `[T, K/2]`.
        sign: 1 for the forward, -1 for the backward.

    Returns:
        The turned queries and keys, contiguous.
    """
    tokens, heads, head_dim = q_THK.shape
    q_out, k_out = q_THK.new_empty(q_THK.shape), k_TGK.new_empty(k_TGK.shape)
    if not q_out.numel() + k_out.numel():
        return q_out, k_out
    q_THK, k_TGK, cos_TJ, sin_TJ = _near(q_THK), _near(k_TGK), _near(cos_TJ), _near(sin_TJ)
    with on_device(q_THK):
        turn_kernel[(tokens,)](
            q_THK,
            k_TGK,
            cos_TJ,
            sin_TJ,
            q_out,
            k_out,
            heads,
            k_TGK.shape[1],
            head_dim // 2,
            q_THK.stride(0),
            q_THK.stride(1),
            k_TGK.stride(0),
            k_TGK.stride(1),
            cos_TJ.stride(0),
            sin_TJ.stride(0),
            sign,
            **configuration(max(heads, k_TGK.shape[1]), head_dim),
        )
    return q_out, k_out
