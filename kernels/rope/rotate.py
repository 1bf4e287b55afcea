"""Rotary position embedding of queries and keys, in one call.

    half layout          [a, b, c] = dimensions [0, J), [J, 2J), [2J, K) of a head
    interleaved layout   a and b are the even and the odd ones of the first 2J

    a' = a cos - b sin,    b' = b cos + a sin,    c' = c   (partial rotary: 2J < K)
    the backward is the same with -sin (a rotation's inverse is its transpose)

Shapes: T tokens, H query heads, G key heads, K head dimension, J pairs that turn. Bound by memory.
Roof of forward and backward alike: 2 T (H + G) K elements / bandwidth. Saved: the tables alone.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 34, which interleaves, as GPT-J
does; checkpoints in the Hugging Face format have the half layout.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..library import below_autograd, need_tensors, refuse_tangents, register, row_blocks, wide
from ..peers import PEERS, serve

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _pairs(x: Tensor, pairs: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return views of the first and second of each pair, `[..., J]`."""
    if interleaved:
        return x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    return x[..., :pairs], x[..., pairs : 2 * pairs]


def rotary_reference(
    q_THK: Tensor, k_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Specify `rotary`, differentiably; the tests hold every backend to this.

    Args:
        q_THK: Queries `[T, H, K]`.
        k_TGK: Keys `[T, G, K]`.
        cos_TJ: `[T, J]`.
        sin_TJ: `[T, J]`.
        interleaved: Whether pairs are neighbours.

    Returns:
        The rotated queries and keys.
    """
    pairs = cos_TJ.shape[1]

    def turn(x: Tensor) -> Tensor:
        a, b = _pairs(x.to(wide(x.dtype)), pairs, interleaved)
        cos, sin = cos_TJ.unsqueeze(1), sin_TJ.unsqueeze(1)
        both = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
        return torch.cat([turned.to(x.dtype), x[..., 2 * pairs :]], -1)

    return turn(q_THK), turn(k_TGK)


def turn_cpu(
    x_THK: Tensor, out_THK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, sign: float, interleaved: bool
) -> None:
    """Rotate by `sign` times the angles: two products, two fused multiply-adds, one rounding.

    Args:
        x_THK: `[T, H, K]`.
        out_THK: Where to, `[T, H, K]`; may be x itself.
        cos_TJ: `[T, J]`.
        sin_TJ: `[T, J]`.
        sign: 1, or -1 for the inverse.
        interleaved: Whether pairs are neighbours.
    """
    pairs, accumulate = cos_TJ.shape[1], wide(x_THK.dtype)
    direct = accumulate == out_THK.dtype and out_THK is not x_THK
    for rows in row_blocks(x_THK.shape[0], x_THK.shape[1] * x_THK.shape[2]):
        cos = cos_TJ[rows].to(accumulate).unsqueeze(1)
        sin = sin_TJ[rows].to(accumulate).unsqueeze(1)
        out, x = out_THK[rows], x_THK[rows].to(accumulate)
        turned = out if direct else torch.empty_like(x)
        a, b = _pairs(x, pairs, interleaved)
        first, second = _pairs(turned, pairs, interleaved)
        torch.mul(a, cos, out=first).addcmul_(b, sin, value=-sign)
        torch.mul(b, cos, out=second).addcmul_(a, sin, value=sign)
        if not direct:
            out[..., : 2 * pairs].copy_(turned[..., : 2 * pairs])
    if out_THK is not x_THK and 2 * pairs < x_THK.shape[2]:
        out_THK[..., 2 * pairs :].copy_(x_THK[..., 2 * pairs :])


def _forward(
    q_THK: Tensor, k_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, inverse: bool, interleaved: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q_out, k_out = q_THK.new_empty(q_THK.shape), k_TGK.new_empty(k_TGK.shape)
    sign = -1.0 if inverse else 1.0
    if choose("rotary", q_THK.device, q_THK.dtype, backend) == "triton":
        from .rotate_triton import turn

        turn(q_THK, k_TGK, q_out, k_out, cos_TJ, sin_TJ, sign, interleaved)
    else:
        turn_cpu(q_THK, q_out, cos_TJ, sin_TJ, sign, interleaved)
        turn_cpu(k_TGK, k_out, cos_TJ, sin_TJ, sign, interleaved)
    return q_out, k_out


def _fake(q_THK: Tensor, k_TGK: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q_THK.new_empty(q_THK.shape), k_TGK.new_empty(k_TGK.shape)


def _in_place(
    x_THK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, inverse: bool, interleaved: bool,
    backend: str | None,
) -> None:  # fmt: skip
    sign = -1.0 if inverse else 1.0
    if choose("rotary", x_THK.device, x_THK.dtype, backend) == "triton":
        from .rotate_triton import turn_in_place

        turn_in_place(x_THK, cos_TJ, sin_TJ, sign, interleaved)
    else:
        turn_cpu(x_THK, x_THK, cos_TJ, sin_TJ, sign, interleaved)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THK: Tensor, k_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_TJ, sin_TJ)
        ctx.rest = rest
        turned: tuple[Tensor, Tensor] = below_autograd(
            _FORWARD, q_THK, k_TGK, cos_TJ, sin_TJ, *rest
        )
        return turned

    @staticmethod
    def backward(ctx: Any, dq_THK: Tensor, dk_TGK: Tensor) -> tuple[Tensor | None, ...]:
        inverse, interleaved, backend = ctx.rest
        turned = _FORWARD(dq_THK, dk_TGK, *ctx.saved_tensors, not inverse, interleaved, backend)
        return *turned, None, None, None, None, None


class _RotaryInPlace(torch.autograd.Function):
    """One tensor: autograd lets a function change a view only if it has a single result."""

    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(cos_TJ, sin_TJ)
        ctx.rest = rest
        below_autograd(_IN_PLACE, x_THK, cos_TJ, sin_TJ, *rest)
        ctx.mark_dirty(x_THK)
        return x_THK

    @staticmethod
    def backward(ctx: Any, dx_THK: Tensor) -> tuple[Tensor | None, ...]:
        """Turn back a copy: the gradient may be someone else's too."""
        inverse, interleaved, backend = ctx.rest
        none = dx_THK[:, :0]
        dx_THK, _ = _FORWARD(dx_THK, none, *ctx.saved_tensors, not inverse, interleaved, backend)
        return dx_THK, None, None, None, None, None


_FORWARD = register(
    "rotary_forward(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse, bool interleaved,"
    " str? backend) -> (Tensor, Tensor)",
    _forward, _fake, _Rotary,
)  # fmt: skip


def _in_place_with_gradient(x_THK: Tensor, *rest: Any) -> None:
    refuse_tangents("rotary", (x_THK,))
    if torch.is_grad_enabled() and x_THK.requires_grad:
        _RotaryInPlace.apply(x_THK, *rest)
    else:
        below_autograd(_IN_PLACE, x_THK, *rest)
        torch.autograd.graph.increment_version(x_THK)  # a kernel writes unseen by autograd


_IN_PLACE = register(
    "rotary_in_place(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse, bool interleaved,"
    " str? backend) -> ()",
    _in_place, lambda *args: None, _in_place_with_gradient,
)  # fmt: skip


def check(q_THK: Tensor, k_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, name: str) -> None:
    """Refuse what does not fit together.

    Args:
        q_THK: `[T, H, K]`.
        k_TGK: `[T, G, K]`.
        cos_TJ: `[T, J]`, 2 J <= K.
        sin_TJ: `[T, J]`.
        name: Of the operator, for the message.

    Raises:
        ValueError: If shapes or dtypes do not match, or a table asks for a gradient.
    """
    need_tensors(name, q=q_THK, k=k_TGK, cos=cos_TJ, sin=sin_TJ)
    if q_THK.dim() != 3:
        raise ValueError(f"{name}: q must be [T, H, K], got {[*q_THK.shape]}")
    tokens, _, head_dim = q_THK.shape
    if k_TGK.dim() != 3 or (k_TGK.shape[0], k_TGK.shape[2]) != (tokens, head_dim):
        raise ValueError(
            f"{name}: q [T, H, K] and k [T, G, K] must agree in T and K, "
            f"got {[*q_THK.shape]} and {[*k_TGK.shape]}"
        )
    if (
        cos_TJ.dim() != 2
        or cos_TJ.shape != sin_TJ.shape
        or cos_TJ.shape[0] != tokens
        or not 0 < 2 * cos_TJ.shape[1] <= head_dim
    ):
        raise ValueError(
            f"{name}: cos and sin must have shape [{tokens}, J] with J from 1 to {head_dim // 2}, "
            f"got {[*cos_TJ.shape]} and {[*sin_TJ.shape]}"
        )
    if q_THK.dtype not in _DTYPES or k_TGK.dtype != q_THK.dtype:
        raise ValueError(
            f"{name}: q and k must both be float16, bfloat16, float32 or float64, "
            f"got {q_THK.dtype} and {k_TGK.dtype}"
        )
    if any(table.dtype not in (torch.float32, torch.float64) for table in (cos_TJ, sin_TJ)):
        raise ValueError(
            f"{name}: cos and sin must be float32 or float64, got {cos_TJ.dtype} and "
            f"{sin_TJ.dtype}: convert them with .float(), or better tabulate anew"
        )
    if cos_TJ.requires_grad or sin_TJ.requires_grad:
        raise ValueError(f"{name}: cos and sin have no gradient here: pass detached tables")


def _overlap(q_THK: Tensor, k_TGK: Tensor) -> bool:
    """Tell whether a token's queries and keys share memory, where the strides let that be seen."""
    if q_THK.untyped_storage()._cdata != k_TGK.untyped_storage()._cdata:
        return False
    if not q_THK.numel() or not k_TGK.numel():
        return False
    if any(x.stride()[1:] != (x.shape[2], 1) for x in (q_THK, k_TGK)):
        return False
    starts = [x.storage_offset() for x in (q_THK, k_TGK)]
    spans = zip(starts, (x.shape[1] * x.shape[2] for x in (q_THK, k_TGK)), strict=True)
    (start, length), (other, _) = sorted(spans)  # of the first token; the others follow alike
    return q_THK.stride(0) == k_TGK.stride(0) and other < start + length


def rotary(
    q_THK: Tensor, k_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, *, interleaved: bool = False,
    inplace: bool = False, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rotate queries and keys by the angles of their tokens.

    Args:
        q_THK: Queries `[T, H, K]`; may be a strided view of a fused projection. float16, bfloat16,
            float32 or float64.
        k_TGK: Keys `[T, G, K]`, the same.
        cos_TJ: Cosines `[T, J]` of `rotary_tables`, float32 or float64; no gradient. The first 2J
            dimensions of a head turn, the others are copied.
        sin_TJ: Sines, the same.
        interleaved: Whether a pair is dimensions (2j, 2j + 1), as in GPT-J; else it is (j, j + J).
        inplace: Whether to write over q and k. Autograd sees to it as for every operator that does:
            a leaf that asks for a gradient is refused, and so is what `split` or `chunk` returns
            (take slices of the fused projection).
        backend: `reference` or `triton`, or a peer, `liger` or `apex`, for the plain form; None
            takes the fastest of ours that is proven here.

    Returns:
        The rotated queries and keys, contiguous, in their dtype, computed in float32 at least; with
        `inplace` q and k themselves.

    Raises:
        ValueError: If shapes or dtypes do not match, a table asks for a gradient, or q or k is to
            be written in place and is expanded.
        RuntimeError: If `backend` cannot serve these tensors here, or autograd forbids to write in
            place.
    """
    check(q_THK, k_TGK, cos_TJ, sin_TJ, "rotary")
    if backend in PEERS:
        plain = not (interleaved or inplace) and 2 * cos_TJ.shape[1] == q_THK.shape[2]
        found: tuple[Tensor, Tensor] = serve(
            "rotary", backend, q_THK, k_TGK, cos_TJ, sin_TJ, plain=plain
        )
        return found
    if not inplace:
        q, k = _FORWARD(q_THK, k_TGK, cos_TJ, sin_TJ, False, interleaved, backend)
        return q, k
    for x in (q_THK, k_TGK):
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            raise ValueError(
                f"rotary: an expanded tensor cannot be written in place, shape {[*x.shape]} has "
                f"strides {[*x.stride()]}: pass a copy, or inplace=False"
            )
    if not torch.compiler.is_compiling() and _overlap(q_THK, k_TGK):
        raise ValueError(
            f"rotary: q {[*q_THK.shape]} and k {[*k_TGK.shape]} share memory, which would turn "
            f"twice in place: pass slices that are apart, or inplace=False"
        )
    for x in (q_THK, k_TGK):
        _IN_PLACE(x, cos_TJ, sin_TJ, False, interleaved, backend)
    return q_THK, k_TGK
