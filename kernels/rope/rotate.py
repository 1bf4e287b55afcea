"""Rotary position embedding of queries and keys, in one call; half layout.

    [a, b] = halves of a head;    out = [a cos - b sin, b cos + a sin]
    the backward is the same with -sin (a rotation's inverse is its transpose)

    angle of token t, pair j:  position_t / base^(2j / K)

Shapes: T tokens, H query heads, G key heads, K head dimension, J = K/2. Bound by memory. Roof of
forward and backward alike: 2 T (H + G) K elements / bandwidth. Saved: the tables alone.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 34; pairs (j, j + K/2) instead
of (2j, 2j + 1), as checkpoints in the Hugging Face format have them.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..library import below_autograd, first_derivative_only, register, row_blocks, wide

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rotary_tables(positions: Tensor, head_dim: int, *, base: float) -> tuple[Tensor, Tensor]:
    """Tabulate cosine and sine of every angle, rounded as in the Hugging Face implementation.

    Args:
        positions: Position of each token in its document, `[T]`, integers.
        head_dim: K, even.
        base: The longest wavelength is about 2 pi times this many positions.

    Returns:
        cos and sin, `[T, K/2]`, float32.

    Raises:
        ValueError: If `head_dim` is odd or not positive, `base` is not above 0 and finite, or the
            positions are not integers.
    """
    if not 0 < base < float("inf"):
        raise ValueError(f"rotary_tables: base must be above 0 and finite, got {base}")
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"rotary_tables: head_dim must be even and positive, got {head_dim}")
    if positions.is_floating_point() or positions.is_complex():
        raise ValueError(f"rotary_tables: positions must be integers, got {positions.dtype}")
    pairs_J = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles_TJ = positions.float().unsqueeze(-1) * (1.0 / base ** (pairs_J / head_dim))
    return angles_TJ.cos(), angles_TJ.sin()


def rotary_reference(
    q_THK: Tensor, k_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor
) -> tuple[Tensor, Tensor]:
    """Specify `rotary`, differentiably; the tests hold every backend to this.

    Args:
        q_THK: Queries `[T, H, K]`.
        k_TGK: Keys `[T, G, K]`.
        cos_TJ: `[T, K/2]`.
        sin_TJ: `[T, K/2]`.

    Returns:
        The rotated queries and keys.
    """

    def turn(x: Tensor) -> Tensor:
        a, b = x.to(wide(x.dtype)).chunk(2, -1)
        cos, sin = cos_TJ.unsqueeze(1), sin_TJ.unsqueeze(1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    return turn(q_THK), turn(k_TGK)


def _turn_cpu(x_THK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, sign: float) -> Tensor:
    """Rotate by `sign` times the angles: two products, two fused multiply-adds, one rounding."""
    half = x_THK.shape[2] // 2
    out_THK = torch.empty_like(x_THK, memory_format=torch.contiguous_format)
    accumulate = wide(x_THK.dtype)
    for rows in row_blocks(x_THK.shape[0], x_THK.shape[1] * x_THK.shape[2]):
        cos = cos_TJ[rows].to(accumulate).unsqueeze(1)
        sin = sin_TJ[rows].to(accumulate).unsqueeze(1)
        out = out_THK[rows]
        x = x_THK[rows].to(accumulate)
        turned = out if accumulate == out.dtype else torch.empty_like(x)
        a, b = x.split(half, 2)
        first, second = turned.split(half, 2)
        torch.mul(a, cos, out=first).addcmul_(b, sin, value=-sign)
        torch.mul(b, cos, out=second).addcmul_(a, sin, value=sign)
        if turned is not out:
            out.copy_(turned)
    return out_THK


def _run(
    q_THK: Tensor, k_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, sign: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    if choose("rotary", q_THK.device, q_THK.dtype, backend) == "triton":
        from .rotate_triton import turn

        return turn(q_THK, k_TGK, cos_TJ, sin_TJ, sign)
    return (
        _turn_cpu(q_THK, cos_TJ, sin_TJ, sign),
        _turn_cpu(k_TGK, cos_TJ, sin_TJ, sign),
    )


def _forward(
    q_THK: Tensor, k_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    return _run(q_THK, k_TGK, cos_TJ, sin_TJ, 1.0, backend)


def _backward(
    dq_THK: Tensor, dk_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    return _run(dq_THK, dk_TGK, cos_TJ, sin_TJ, -1.0, backend)


def _fake(
    q_THK: Tensor, k_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    return q_THK.new_empty(q_THK.shape), k_TGK.new_empty(k_TGK.shape)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THK: Tensor, k_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_TJ, sin_TJ)
        ctx.backend = backend
        turned: tuple[Tensor, Tensor] = below_autograd(
            _FORWARD, q_THK, k_TGK, cos_TJ, sin_TJ, backend
        )
        return turned

    @staticmethod
    def backward(ctx: Any, dq_THK: Tensor, dk_TGK: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("rotary")
        return *_BACKWARD(dq_THK, dk_TGK, *ctx.saved_tensors, ctx.backend), None, None, None


_FORWARD = register(
    "rotary_forward(Tensor q, Tensor k, Tensor cos, Tensor sin, str? backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _Rotary,
)
_BACKWARD = register(
    "rotary_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin, str? backend)"
    " -> (Tensor, Tensor)",
    _backward,
    _fake,
)


def rotary(
    q_THK: Tensor, k_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of their tokens.

    Args:
        q_THK: Queries `[T, H, K]`; may be a strided view of a fused projection. float16, bfloat16,
            float32 or float64.
        k_TGK: Keys `[T, G, K]`, the same.
        cos_TJ: Cosines `[T, K/2]` of `rotary_tables`, float32 or float64; no gradient.
        sin_TJ: Sines, the same.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        The rotated queries and keys, contiguous, in their dtype; computed in float32 at least.

    Raises:
        ValueError: If shapes or dtypes do not match, or a table asks for a gradient.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    if q_THK.dim() != 3:
        raise ValueError(f"rotary: q must be [T, H, K], got {[*q_THK.shape]}")
    tokens, _, head_dim = q_THK.shape
    if k_TGK.dim() != 3 or (k_TGK.shape[0], k_TGK.shape[2]) != (tokens, head_dim) or head_dim % 2:
        raise ValueError(
            f"rotary: q [T, H, K] and k [T, G, K] must agree in T and in an even K, "
            f"got {[*q_THK.shape]} and {[*k_TGK.shape]}"
        )
    if cos_TJ.shape != (tokens, head_dim // 2) or sin_TJ.shape != cos_TJ.shape:
        raise ValueError(
            f"rotary: cos and sin must have shape {[tokens, head_dim // 2]}, "
            f"got {[*cos_TJ.shape]} and {[*sin_TJ.shape]}"
        )
    if q_THK.dtype not in _DTYPES or k_TGK.dtype != q_THK.dtype:
        raise ValueError(
            f"rotary: q and k must both be float16, bfloat16, float32 or float64, "
            f"got {q_THK.dtype} and {k_TGK.dtype}"
        )
    if cos_TJ.requires_grad or sin_TJ.requires_grad:
        msg = "rotary: cos and sin have no gradient here: pass detached tables"
        raise ValueError(msg)
    q, k = _FORWARD(q_THK, k_TGK, cos_TJ, sin_TJ, backend)
    return q, k
