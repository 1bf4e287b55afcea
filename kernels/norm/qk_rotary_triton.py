"""Triton code of `qk_norm_rotary`: a program holds several heads of a few tokens in registers.

Queries and keys share the launch and the angles, which are loaded once. The backward runs on a
persistent grid: a program keeps its shares of both weights' gradients in float32 registers, and
they are added in a fixed order afterwards. Token offsets are 64-bit.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launch import near, next_power_of_two, on_device, processors
from .rms_triton import add_shares

_TILE = 1024  # pairs a tile of tokens and heads
_PROGRAMS = 3  # of the backward a multiprocessor: as many as its registers hold


def configuration(heads: int, pairs: int) -> dict[str, int]:
    """Choose tile and warps.

    Args:
        heads: H, the larger of the two numbers of heads.
        pairs: J.

    Returns:
        TOKENS, HEADS and PAIRS, the shape of a tile, and num_warps.
    """
    block = next_power_of_two(pairs)
    fit = max(1, _TILE // block)
    tile = min(next_power_of_two(heads), fit)
    return {
        "TOKENS": fit // tile,
        "HEADS": tile,
        "PAIRS": block,
        "num_warps": min(max(4, block // 256), 32),
    }


@triton.jit
def _halves(x, token, head, stride, head_stride, pair, pairs, inside):
    """Load both halves of some heads."""
    at = x + token * stride + head.to(tl.int64) * head_stride + pair
    a = tl.load(at, inside, other=0.0).to(tl.float32)
    b = tl.load(at + pairs, inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _norm(a, b, pairs, eps, there):
    """Return 1 / root-mean-square of each head; 0 for those that are not there."""
    scale = tl.rsqrt(tl.sum(a * a + b * b, 2) / (2 * pairs) + eps)
    return tl.where(there, scale[:, :, None], 0.0)


@triton.jit
def _heads(
    x, weight, out, token, here, heads, pairs, stride, head_stride, cos, sin, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Norm and turn the heads of some tokens, HEADS at a time."""
    pair = tl.arange(0, PAIRS)[None, None, :]
    first = tl.load(weight + pair, pair < pairs, other=0.0).to(tl.float32)
    second = tl.load(weight + pairs + pair, pair < pairs, other=0.0).to(tl.float32)
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS))[None, :, None]
        there = here & (head < heads)
        inside = there & (pair < pairs)
        a, b = _halves(x, token, head, stride, head_stride, pair, pairs, inside)
        scale = _norm(a, b, pairs, eps, there)
        a = a * scale * first
        b = b * scale * second
        to = out + (token * heads + head) * (2 * pairs) + pair
        tl.store(to, (a * cos - b * sin).to(out.dtype.element_ty), inside)
        tl.store(to + pairs, (b * cos + a * sin).to(out.dtype.element_ty), inside)


@triton.jit
def _heads_backward(
    dy, x, weight, dx, token, here, heads, pairs, dy_stride, dy_head_stride, stride, head_stride,
    cos, sin, eps, first_share, second_share, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Turn the gradient of some tokens back and through the norm; return the grown shares."""
    pair = tl.arange(0, PAIRS)[None, None, :]
    first = tl.load(weight + pair, pair < pairs, other=0.0).to(tl.float32)
    second = tl.load(weight + pairs + pair, pair < pairs, other=0.0).to(tl.float32)
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS))[None, :, None]
        there = here & (head < heads)
        inside = there & (pair < pairs)
        a, b = _halves(x, token, head, stride, head_stride, pair, pairs, inside)
        da, db = _halves(dy, token, head, dy_stride, dy_head_stride, pair, pairs, inside)
        scale = _norm(a, b, pairs, eps, there)
        a *= scale
        b *= scale
        za = da * cos + db * sin
        zb = db * cos - da * sin
        first_share += za * a
        second_share += zb * b
        za *= first
        zb *= second
        slope = (tl.sum(za * a + zb * b, 2) / (2 * pairs))[:, :, None]
        to = dx + (token * heads + head) * (2 * pairs) + pair
        tl.store(to, ((za - a * slope) * scale).to(dx.dtype.element_ty), inside)
        tl.store(to + pairs, ((zb - b * slope) * scale).to(dx.dtype.element_ty), inside)
    return first_share, second_share


@triton.jit
def _angles(cos, sin, token, here, pairs, cos_stride, sin_stride, PAIRS: tl.constexpr):
    pair = tl.arange(0, PAIRS)[None, None, :]
    inside = here & (pair < pairs)
    c = tl.load(cos + token * cos_stride + pair, inside, other=0.0).to(tl.float32)
    s = tl.load(sin + token * sin_stride + pair, inside, other=0.0).to(tl.float32)
    return c, s


@triton.jit
def forward_kernel(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, tokens, q_heads, k_heads, pairs, q_stride,
    q_head_stride, k_stride, k_head_stride, cos_stride, sin_stride, eps, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Norm and turn all heads of TOKENS tokens."""
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    here = token < tokens
    c, s = _angles(cos, sin, token, here, pairs, cos_stride, sin_stride, PAIRS)
    _heads(
        q, q_weight, q_out, token, here, q_heads, pairs, q_stride, q_head_stride, c, s, eps, HEADS,
        PAIRS,
    )  # fmt: skip
    _heads(
        k, k_weight, k_out, token, here, k_heads, pairs, k_stride, k_head_stride, c, s, eps, HEADS,
        PAIRS,
    )  # fmt: skip


@triton.jit
def _store_share(shares, first, second, pairs, PAIRS: tl.constexpr):
    """Write this program's share of a weight's gradient."""
    pair = tl.arange(0, PAIRS)
    to = shares + tl.program_id(0).to(tl.int64) * (2 * pairs) + pair
    tl.store(to, tl.sum(tl.sum(first, 0), 0), pair < pairs)
    tl.store(to + pairs, tl.sum(tl.sum(second, 0), 0), pair < pairs)


@triton.jit
def backward_kernel(
    dq, dk, q, k, q_weight, k_weight, cos, sin, q_out, k_out, q_shares, k_shares, tokens, q_heads,
    k_heads, pairs, dq_stride, dq_head_stride, dk_stride, dk_head_stride, q_stride, q_head_stride,
    k_stride, k_head_stride, cos_stride, sin_stride, eps, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """Stride over tiles of tokens: write the gradients, keep the shares of the weights'."""
    q_first = tl.zeros([TOKENS, HEADS, PAIRS], tl.float32)
    q_second = tl.zeros([TOKENS, HEADS, PAIRS], tl.float32)
    k_first = tl.zeros([TOKENS, HEADS, PAIRS], tl.float32)
    k_second = tl.zeros([TOKENS, HEADS, PAIRS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, TOKENS), tl.num_programs(0)):
        token = (tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]
        here = token < tokens
        c, s = _angles(cos, sin, token, here, pairs, cos_stride, sin_stride, PAIRS)
        q_first, q_second = _heads_backward(
            dq, q, q_weight, q_out, token, here, q_heads, pairs, dq_stride, dq_head_stride,
            q_stride, q_head_stride, c, s, eps, q_first, q_second, HEADS, PAIRS,
        )  # fmt: skip
        k_first, k_second = _heads_backward(
            dk, k, k_weight, k_out, token, here, k_heads, pairs, dk_stride, dk_head_stride,
            k_stride, k_head_stride, c, s, eps, k_first, k_second, HEADS, PAIRS,
        )  # fmt: skip
    _store_share(q_shares, q_first, q_second, pairs, PAIRS)
    _store_share(k_shares, k_first, k_second, pairs, PAIRS)


def forward(
    q_THK: Tensor, k_TGK: Tensor, q_weight_K: Tensor, k_weight_K: Tensor, cos_TJ: Tensor,
    sin_TJ: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward.

    Args:
        q_THK: `[T, H, K]`.
        k_TGK: `[T, G, K]`.
        q_weight_K: `[K]`.
        k_weight_K: `[K]`.
        cos_TJ: `[T, K/2]`.
        sin_TJ: `[T, K/2]`.
        eps: Added to the mean square.

    Returns:
        The normed and turned queries and keys, contiguous.
    """
    q_out, k_out = q_THK.new_empty(q_THK.shape), k_TGK.new_empty(k_TGK.shape)
    if not q_out.numel() + k_out.numel():
        return q_out, k_out
    tokens, heads, head_dim = q_THK.shape
    q_THK, k_TGK, cos_TJ, sin_TJ = near(q_THK), near(k_TGK), near(cos_TJ), near(sin_TJ)
    weights = q_weight_K.contiguous(), k_weight_K.contiguous()

    def start(chosen: dict[str, int]) -> None:
        forward_kernel[(triton.cdiv(tokens, chosen["TOKENS"]),)](
            q_THK, k_TGK, *weights, cos_TJ, sin_TJ, q_out, k_out, tokens, heads, k_TGK.shape[1],
            head_dim // 2, *q_THK.stride()[:2], *k_TGK.stride()[:2], cos_TJ.stride(0),
            sin_TJ.stride(0), eps, **chosen,
        )  # fmt: skip

    first = configuration(max(heads, k_TGK.shape[1]), head_dim // 2)
    key = "forward", heads, head_dim, k_TGK.shape[1]
    tuning.launch("qk_norm_rotary", key, tuning.by_warps(first), start, q_THK)
    return q_out, k_out


def backward(
    dq_THK: Tensor, dk_TGK: Tensor, q_THK: Tensor, k_TGK: Tensor, q_weight_K: Tensor,
    k_weight_K: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward and the addition of the shares.

    Args:
        dq_THK: Gradient of the queries, `[T, H, K]`.
        dk_TGK: Gradient of the keys, `[T, G, K]`.
        q_THK: As in `forward`.
        k_TGK: The same.
        q_weight_K: The same.
        k_weight_K: The same.
        cos_TJ: The same.
        sin_TJ: The same.
        eps: The same.

    Returns:
        The gradients of q, k and both weights.
    """
    q_out, k_out = q_THK.new_empty(q_THK.shape), k_TGK.new_empty(k_TGK.shape)
    tokens, heads, head_dim = q_THK.shape
    if not q_out.numel() + k_out.numel():
        return q_out, k_out, q_weight_K.new_zeros(head_dim), k_weight_K.new_zeros(head_dim)
    dq_THK, dk_TGK, q_THK, k_TGK, cos_TJ, sin_TJ = (
        near(x) for x in (dq_THK, dk_TGK, q_THK, k_TGK, cos_TJ, sin_TJ)
    )
    first = configuration(max(heads, k_TGK.shape[1]), head_dim // 2)
    programs = min(_PROGRAMS * processors(q_THK.device), triton.cdiv(tokens, first["TOKENS"]))
    q_shares = q_THK.new_empty(programs, head_dim, dtype=torch.float32)
    k_shares = torch.empty_like(q_shares)
    weights = q_weight_K.contiguous(), k_weight_K.contiguous()

    def start(chosen: dict[str, int]) -> None:
        backward_kernel[(programs,)](
            *(dq_THK, dk_TGK, q_THK, k_TGK), *weights,
            *(cos_TJ, sin_TJ, q_out, k_out, q_shares, k_shares), tokens, heads, k_TGK.shape[1],
            head_dim // 2, *(n for x in (dq_THK, dk_TGK, q_THK, k_TGK) for n in x.stride()[:2]),
            cos_TJ.stride(0), sin_TJ.stride(0), eps, **chosen,
        )  # fmt: skip

    key = "backward", heads, head_dim, k_TGK.shape[1]
    tuning.launch("qk_norm_rotary", key, tuning.by_warps(first), start, q_THK)
    with on_device(q_THK):
        return q_out, k_out, add_shares(q_shares, q_weight_K), add_shares(k_shares, k_weight_K)
