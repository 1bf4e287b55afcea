"""Merging attention over two sets of keys into attention over both.

    lse = log(exp lse_a + exp lse_b),    w_x = exp(lse_x - lse),    o = w_a o_a + w_b o_b

    do_x = w_x do,    dlse_x = w_x (dlse + sum_K do * (o_x - o))

A part without a visible key has lse -inf and weight 0; where both have none, o is 0 and lse -inf.

Shapes: T queries, H heads, K head dimension; `...` is a batch or nothing. Bound by memory: each
output is read once and one is written, 3 T H K elements forward and 5 T H K backward.

Source: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867, section 3.1 (equation 4);
Liu et al. 2023, https://arxiv.org/abs/2310.01889, section 3.
"""

from typing import Any

import torch
from torch import Tensor

from ..invariant import need_invariant
from ..library import below_autograd, first_derivative_only, need_tensors, register

Part = tuple[Tensor, Tensor]


def _weight(part: Tensor, lse: Tensor) -> Tensor:
    """Weigh a part, `[..., T, H, 1]`."""
    weight = (part - lse).exp().masked_fill(lse == -torch.inf, 0.0)
    return weight.mT.unsqueeze(-1)


def merge_reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """Specify `merge`.

    Args:
        out_a: `[..., T, H, K]`.
        lse_a: `[..., H, T]`.
        out_b: `[..., T, H, K]`.
        lse_b: `[..., H, T]`.

    Returns:
        The merged output in the wider of both dtypes, and log-sum-exp.
    """
    lse = torch.logaddexp(lse_a, lse_b).contiguous()
    out = _weight(lse_a, lse) * out_a + _weight(lse_b, lse) * out_b
    return out.to(torch.promote_types(out_a.dtype, out_b.dtype)).contiguous(), lse


def _fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    dtypes = (torch.promote_types(a.dtype, b.dtype) for a, b in ((out_a, out_b), (lse_a, lse_b)))
    out, lse = (x.new_empty(x.shape, dtype=d) for x, d in zip((out_a, lse_a), dtypes, strict=True))
    return out, lse


def _backward(
    dout: Tensor, dlse: Tensor, part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor
) -> Part:
    weight = _weight(part_lse, lse)
    shift = (dout * (part - out).to(weight.dtype)).sum(-1).mT
    dpart = (weight * dout).to(part.dtype).contiguous()
    return dpart, (weight.squeeze(-1).mT * (dlse + shift)).to(part_lse.dtype).contiguous()


def _backward_fake(dout: Tensor, dlse: Tensor, part: Tensor, part_lse: Tensor, *_: Any) -> Part:
    return part.new_empty(part.shape), part_lse.new_empty(part_lse.shape)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
        out, lse = below_autograd(_MERGE, out_a, lse_a, out_b, lse_b)
        ctx.save_for_backward(out_a, lse_a, out_b, lse_b, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
        first_derivative_only("merge")
        out_a, lse_a, out_b, lse_b, out, lse = ctx.saved_tensors
        a = _MERGE_BACKWARD(dout, dlse, out_a, lse_a, out, lse)
        return *a, *_MERGE_BACKWARD(dout, dlse, out_b, lse_b, out, lse)


_MERGE = register(
    "attention_merge_forward(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b)"
    " -> (Tensor, Tensor)",
    merge_reference,
    _fake,
    _Merge,
)
_MERGE_BACKWARD = register(
    "attention_merge_backward(Tensor dout, Tensor dlse, Tensor part, Tensor part_lse, Tensor out,"
    " Tensor lse) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """Merge attention of the same queries over two disjoint sets of keys.

    Args:
        out_a: `[T, H, K]` or `[B, T, H, K]`, as `flash_attention_varlen` or `flash_attention` gives
            it; finite also where the queries see no key.
        lse_a: Its log-sum-exp, `[H, T]` or `[B, H, T]`, in nats; -inf where no key is seen.
        out_b: As `out_a`, over the other keys.
        lse_b: As `lse_a`, over the other keys.

    Returns:
        Output and log-sum-exp over all keys, in these shapes and the wider of both dtypes;
        differentiable.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If the shapes are not these, or the dtypes are not of floating point.
        RuntimeError: In the batch-invariant mode.
    """
    both = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    need_tensors("merge", **both)
    need_invariant("merge", False, "attention over parts of the keys")
    if not all(x.is_floating_point() for x in both.values()):
        dtypes = ", ".join(str(x.dtype) for x in both.values())
        raise ValueError(f"merge: all must be of floating point, got {dtypes}")
    lse_shape = (*out_a.shape[:-3], *out_a.shape[-3:-1][::-1])
    if out_a.dim() not in (3, 4) or out_a.shape != out_b.shape:
        raise ValueError(
            f"merge: both outputs must be [T, H, K] or [B, T, H, K] of one shape, "
            f"got {[*out_a.shape]} and {[*out_b.shape]}"
        )
    if not lse_a.shape == lse_b.shape == lse_shape:
        raise ValueError(
            f"merge: the log-sum-exps of outputs {[*out_a.shape]} must be {[*lse_shape]}, "
            f"got {[*lse_a.shape]} and {[*lse_b.shape]}"
        )
    out, lse = _MERGE(out_a, lse_a, out_b, lse_b)
    return out, lse
