"""Norm of every head of queries and keys, then their rotary embedding, in one pass; half layout.

    n = x rstd weight,    rstd = 1 / sqrt(mean(x^2) + eps)    over the K dimensions of a head
    [a, b] = halves of n;    y = [a cos - b sin, b cos + a sin]

    z = dy turned back,    g = z weight
    dx = rstd (g - x rstd^2 mean(g x)),    dweight = sum over tokens and heads of z x rstd

Nothing is rounded between the norm and the rotation. Shapes: T tokens, H query heads, G key heads,
K head dimension, J = K/2. Bound by memory. Roof of the forward: 2 T (H + G) K elements / bandwidth;
of the backward, which reads dy and x and writes dx: 3 T (H + G) K. Saved for the backward: q, k
(views of a fused projection stay views), the weights and the tables; rstd is computed again, since
the head is in registers anyway.

Source: Henry et al. 2020, https://arxiv.org/abs/2010.04245, and Yang et al. 2025,
https://arxiv.org/abs/2505.09388, section 2 (norms of queries and keys); Su et al. 2021,
https://arxiv.org/abs/2104.09864, equation 34.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..library import below_autograd, first_derivative_only, register, row_blocks, wide
from ..rope.rotate import check as check_rotary
from ..rope.rotate import rotary_reference, turn_cpu
from .common import check
from .rms import backward_cpu, forward_cpu


def qk_norm_rotary_reference(
    q_THK: Tensor, k_TGK: Tensor, q_weight_K: Tensor, k_weight_K: Tensor, cos_TJ: Tensor,
    sin_TJ: Tensor, *, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Specify `qk_norm_rotary`, differentiably; the tests hold every backend to this.

    Args:
        q_THK: Queries `[T, H, K]`.
        k_TGK: Keys `[T, G, K]`.
        q_weight_K: Scale of the queries' norm `[K]`.
        k_weight_K: Scale of the keys' norm `[K]`.
        cos_TJ: `[T, K/2]`.
        sin_TJ: `[T, K/2]`.
        eps: Added to the mean square; dimensionless.

    Returns:
        The normed and rotated queries and keys.
    """

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        x = x.to(wide(x.dtype))
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)

    q, k = rotary_reference(norm(q_THK, q_weight_K), norm(k_TGK, k_weight_K), cos_TJ, sin_TJ)
    return q.to(q_THK.dtype), k.to(k_TGK.dtype)


def _heads_cpu(
    x_THK: Tensor, weight_K: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, eps: float
) -> Tensor:
    """Norm and turn a block of tokens at a time, so that what is between stays in the cache."""
    out_THK, accumulate = x_THK.new_empty(x_THK.shape), wide(x_THK.dtype)
    tokens, heads, head_dim = x_THK.shape
    for rows in row_blocks(tokens, heads * head_dim):
        x = x_THK[rows]
        n, _ = forward_cpu(x.reshape(-1, head_dim), weight_K, eps, accumulate)
        turn_cpu(n.view(x.shape), out_THK[rows], cos_TJ[rows], sin_TJ[rows], 1.0, False)
    return out_THK


def _heads_backward_cpu(
    dy_THK: Tensor, x_THK: Tensor, weight_K: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Turn the gradient of a block of tokens back, then through the norm."""
    dx_THK, accumulate = x_THK.new_empty(x_THK.shape), wide(x_THK.dtype)
    tokens, heads, head_dim = x_THK.shape
    weight = weight_K.to(accumulate)
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    for rows in row_blocks(tokens, heads * head_dim):
        dy, x = dy_THK[rows], x_THK[rows].to(accumulate).reshape(-1, head_dim)
        z = x.new_empty(dy.shape)
        turn_cpu(dy, z, cos_TJ[rows], sin_TJ[rows], -1.0, False)
        rstd = torch.linalg.vector_norm(x, dim=-1).square_().div_(head_dim).add_(eps).rsqrt_()
        dx, share = backward_cpu(z.view(x.shape), None, x, weight, rstd)
        dx_THK[rows].copy_(dx.view(dy.shape))
        dweight.add_(share)
    return dx_THK, dweight.to(weight_K.dtype)


def _forward(
    q_THK: Tensor, k_TGK: Tensor, q_weight_K: Tensor, k_weight_K: Tensor, cos_TJ: Tensor,
    sin_TJ: Tensor, eps: float, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if choose("qk_norm_rotary", q_THK.device, q_THK.dtype, backend) == "triton":
        from .qk_rotary_triton import forward

        return forward(q_THK, k_TGK, q_weight_K, k_weight_K, cos_TJ, sin_TJ, eps)
    return (
        _heads_cpu(q_THK, q_weight_K, cos_TJ, sin_TJ, eps),
        _heads_cpu(k_TGK, k_weight_K, cos_TJ, sin_TJ, eps),
    )


def _forward_fake(q_THK: Tensor, k_TGK: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q_THK.new_empty(q_THK.shape), k_TGK.new_empty(k_TGK.shape)


def _backward(
    dq_THK: Tensor, dk_TGK: Tensor, q_THK: Tensor, k_TGK: Tensor, q_weight_K: Tensor,
    k_weight_K: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, eps: float, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if choose("qk_norm_rotary", q_THK.device, q_THK.dtype, backend) == "triton":
        from .qk_rotary_triton import backward

        return backward(dq_THK, dk_TGK, q_THK, k_TGK, q_weight_K, k_weight_K, cos_TJ, sin_TJ, eps)
    dq, dq_weight = _heads_backward_cpu(dq_THK, q_THK, q_weight_K, cos_TJ, sin_TJ, eps)
    dk, dk_weight = _heads_backward_cpu(dk_TGK, k_TGK, k_weight_K, cos_TJ, sin_TJ, eps)
    return dq, dk, dq_weight, dk_weight


def _backward_fake(
    dq_THK: Tensor, dk_TGK: Tensor, q_THK: Tensor, k_TGK: Tensor, q_weight_K: Tensor,
    k_weight_K: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k = q_THK.new_empty(q_THK.shape), k_TGK.new_empty(k_TGK.shape)
    return q, k, q_weight_K.new_empty(q_THK.shape[2]), k_weight_K.new_empty(q_THK.shape[2])


class _QkNormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.eps, ctx.backend = args
        ctx.save_for_backward(*tensors)
        turned: tuple[Tensor, Tensor] = below_autograd(_FORWARD, *args)
        return turned

    @staticmethod
    def backward(ctx: Any, dq_THK: Tensor, dk_TGK: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("qk_norm_rotary")
        found = _BACKWARD(dq_THK, dk_TGK, *ctx.saved_tensors, ctx.eps, ctx.backend)
        return *found, None, None, None, None


_FORWARD = register(
    "qk_norm_rotary_forward(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos,"
    " Tensor sin, float eps, str? backend) -> (Tensor, Tensor)",
    _forward, _forward_fake, _QkNormRotary,
)  # fmt: skip
_BACKWARD = register(
    "qk_norm_rotary_backward(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor q_weight,"
    " Tensor k_weight, Tensor cos, Tensor sin, float eps, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip


def qk_norm_rotary(
    q_THK: Tensor, k_TGK: Tensor, q_weight_K: Tensor, k_weight_K: Tensor, cos_TJ: Tensor,
    sin_TJ: Tensor, *, eps: float = 1e-6, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Normalise each head of queries and keys to unit root-mean-square, scale it, rotate it.

    Args:
        q_THK: Queries `[T, H, K]`; may be a strided view of a fused projection. float16, bfloat16,
            float32 or float64.
        k_TGK: Keys `[T, G, K]`, the same.
        q_weight_K: Scale of the queries' norm `[K]`, any of these dtypes.
        k_weight_K: Scale of the keys' norm `[K]`, the same.
        cos_TJ: Cosines `[T, K/2]` of `rotary_tables`, float32 or float64; no gradient.
        sin_TJ: Sines, the same.
        eps: Added to the mean square; dimensionless.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        The normed and rotated queries and keys, contiguous, in their dtype, rounded once;
        gradients are accumulated in float32 at least.

    Raises:
        ValueError: If shapes or dtypes do not match, a table asks for a gradient or is narrower
            than K/2, or `eps` is negative or not finite.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    check_rotary(q_THK, k_TGK, cos_TJ, sin_TJ, "qk_norm_rotary")
    check("qk_norm_rotary", q_THK, q_weight_K, None, None, eps)
    check("qk_norm_rotary", k_TGK, k_weight_K, None, None, eps)
    if 2 * cos_TJ.shape[1] != q_THK.shape[2]:
        raise ValueError(
            f"qk_norm_rotary: cos and sin must have {q_THK.shape[2]} / 2 columns, got "
            f"{cos_TJ.shape[1]}: for partial rotary call rms_norm, then rotary"
        )
    q, k = _FORWARD(q_THK, k_TGK, q_weight_K, k_weight_K, cos_TJ, sin_TJ, eps, backend)
    return q, k
