"""Triton code of `rotary`: a program loads the angles of a few tokens once and turns their heads.

Both dimensions of a pair are in the same thread; queries and keys share the launch; the backward is
the same kernel with sign = -1; in place the results go where the inputs were. Interleaved pairs are
loaded as one row and split in registers. Token offsets are 64-bit.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launch import near, next_power_of_two

_TILE = 1024  # pairs a tile of tokens and heads


def configuration(heads: int, pairs: int, rest: int) -> dict[str, int]:
    """Choose tile and warps.

    Args:
        heads: H, the larger of the two numbers of heads.
        pairs: J.
        rest: Dimensions of a head that are copied.

    Returns:
        TOKENS, HEADS and PAIRS, the shape of a tile, REST, the columns of the one that is copied (0
        where there is nothing to copy), and num_warps.
    """
    block = next_power_of_two(pairs)
    fit = max(1, _TILE // block)
    tile = min(next_power_of_two(heads), fit)
    return {
        "TOKENS": fit // tile,
        "HEADS": tile,
        "PAIRS": block,
        "REST": next_power_of_two(rest) if rest else 0,
        "num_warps": min(max(4, block // 256), 32),
    }


@triton.jit
def _heads(
    x, out, token, heads, here, stride, head_stride, out_stride, out_head_stride, pairs, head_dim,
    cos, sin, INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Turn the heads of TOKENS tokens, HEADS at a time; tokens are there where `here`."""
    pair = tl.arange(0, PAIRS)[None, None, :]
    both = tl.arange(0, 2 * PAIRS)[None, None, :]
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS))[None, :, None]
        there = here & (head < heads)
        at = x + token * stride + head.to(tl.int64) * head_stride
        to = out + token * out_stride + head.to(tl.int64) * out_head_stride
        if INTERLEAVED:
            inside = there & (both < 2 * pairs)
            row = tl.load(at + both, inside, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(row, [TOKENS, HEADS, PAIRS, 2]))
        else:
            inside = there & (pair < pairs)
            a = tl.load(at + pair, inside, other=0.0).to(tl.float32)
            b = tl.load(at + pairs + pair, inside, other=0.0).to(tl.float32)
        first = (a * cos - b * sin).to(out.dtype.element_ty)
        second = (b * cos + a * sin).to(out.dtype.element_ty)
        if INTERLEAVED:
            row = tl.reshape(tl.join(first, second), [TOKENS, HEADS, 2 * PAIRS])
            tl.store(to + both, row, inside)
        else:
            tl.store(to + pair, first, inside)
            tl.store(to + pairs + pair, second, inside)
        if REST:
            column = 2 * pairs + tl.arange(0, REST)[None, None, :]
            inside = there & (column < head_dim)
            tl.store(to + column, tl.load(at + column, inside), inside)


@triton.jit
def turn_kernel(
    q, k, cos, sin, q_out, k_out, tokens, q_heads, k_heads, pairs, head_dim, q_stride,
    q_head_stride, k_stride, k_head_stride, q_out_stride, q_out_head_stride, k_out_stride,
    k_out_head_stride, cos_stride, sin_stride, sign, INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Turn all heads of TOKENS tokens by `sign` times their angles."""
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    here = token < tokens
    pair = tl.arange(0, PAIRS)[None, None, :]
    inside = here & (pair < pairs)
    c = tl.load(cos + token * cos_stride + pair, inside, other=0.0).to(tl.float32)
    s = tl.load(sin + token * sin_stride + pair, inside, other=0.0).to(tl.float32) * sign
    _heads(
        q, q_out, token, q_heads, here, q_stride, q_head_stride, q_out_stride, q_out_head_stride,
        pairs, head_dim, c, s, INTERLEAVED, TOKENS, HEADS, PAIRS, REST,
    )  # fmt: skip
    _heads(
        k, k_out, token, k_heads, here, k_stride, k_head_stride, k_out_stride, k_out_head_stride,
        pairs, head_dim, c, s, INTERLEAVED, TOKENS, HEADS, PAIRS, REST,
    )  # fmt: skip


def turn(
    q_THK: Tensor, k_TGK: Tensor, q_out: Tensor, k_out: Tensor, cos_TJ: Tensor, sin_TJ: Tensor,
    sign: float, interleaved: bool,
) -> None:  # fmt: skip
    """Launch the rotation by `sign` times the angles.

    Args:
        q_THK: `[T, H, K]`.
        k_TGK: `[T, G, K]`.
        q_out: Where to, `[T, H, K]`, near in the last dimension; may be q itself.
        k_out: The same for k.
        cos_TJ: `[T, J]`.
        sin_TJ: `[T, J]`.
        sign: 1 for the forward, -1 for the backward.
        interleaved: Whether pairs are neighbours.
    """
    if not q_out.numel() + k_out.numel():
        return
    tokens, heads, head_dim = q_THK.shape
    pairs, groups = cos_TJ.shape[1], k_TGK.shape[1]
    rest = 0 if q_out is q_THK else head_dim - 2 * pairs
    q_THK, k_TGK, cos_TJ, sin_TJ = near(q_THK), near(k_TGK), near(cos_TJ), near(sin_TJ)
    first = configuration(max(heads, groups), pairs, rest)

    def start(chosen: dict[str, int]) -> None:
        turn_kernel[(triton.cdiv(tokens, chosen["TOKENS"]),)](
            q_THK, k_TGK, cos_TJ, sin_TJ, q_out, k_out, tokens, heads, groups, pairs, head_dim,
            *q_THK.stride()[:2], *k_TGK.stride()[:2], *q_out.stride()[:2], *k_out.stride()[:2],
            cos_TJ.stride(0), sin_TJ.stride(0), sign, INTERLEAVED=interleaved, **chosen,
        )  # fmt: skip

    key = heads, groups, pairs, rest, int(interleaved)
    candidates = [first] if q_out is q_THK else tuning.by_warps(first)  # in place runs once
    tuning.launch("rotary", key, candidates, start, q_THK)


def turn_in_place(
    x_THK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, sign: float, interleaved: bool
) -> None:
    """Launch the rotation of one tensor, which is written over.

    Args:
        x_THK: `[T, H, K]`.
        cos_TJ: `[T, J]`.
        sin_TJ: `[T, J]`.
        sign: 1 for the forward, -1 for its inverse.
        interleaved: Whether pairs are neighbours.
    """
    rows, none = near(x_THK), x_THK[:, :0]
    turn(rows, none, rows, none, cos_TJ, sin_TJ, sign, interleaved)
    if rows is not x_THK:
        x_THK.copy_(rows)
