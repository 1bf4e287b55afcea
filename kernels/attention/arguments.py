"""What the public functions of attention share: checks of their arguments, and sinks."""

import torch
from torch import Tensor

from ..invariant import sigmoid
from ..library import autocast, need_tensors, wide
from .scores import Scores

_MOST = 1 << 62  # what positions are added to
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Dense = tuple[Tensor, Tensor]
Window = tuple[int, int]


def check_tensors(
    op: str, q: Tensor, k: Tensor, v: Tensor, shapes: str, dims: tuple[int, int]
) -> None:
    """Refuse queries, keys and values that do not go together.

    Args:
        op: Operator, for the message.
        q: Queries, heads and head dimension last.
        k: Keys.
        v: Values.
        shapes: What they must be, for the message.
        dims: Dimensions of `q`, and of `k` and `v`.

    Raises:
        TypeError: If one is not a tensor.
        ValueError: If shapes or dtypes do not fit.
    """
    need_tensors(op, q=q, k=k, v=v)
    if (q.dim(), k.dim(), v.dim()) != (dims[0], dims[1], dims[1]):
        raise ValueError(
            f"{op}: {shapes} as the keys are, got {[*q.shape]}, {[*k.shape]} and {[*v.shape]}"
        )
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1] or not k.shape[-1] * v.shape[-1]:
        raise ValueError(
            f"{op}: k and v must have one shape but for the head dimension, and q that of k, "
            f"got q {[*q.shape]}, k {[*k.shape]} and v {[*v.shape]}"
        )
    if not k.shape[-2] or q.shape[-2] % k.shape[-2] or not q.shape[-2]:
        raise ValueError(
            f"{op}: the query heads ({q.shape[-2]}) must be a multiple of the key/value heads "
            f"({k.shape[-2]}), got q {[*q.shape]} and k {[*k.shape]}: heads come before the last "
            f"dimension, so transpose what PyTorch's SDPA takes by .transpose(-3, -2)"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise ValueError(
            f"{op}: q, k and v must have one dtype of float16, bfloat16, float32 and float64, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}"
        )


def cast(op: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Return q, k and v as autocast casts them; refuse what is no tensor."""
    need_tensors(op, q=q, k=k, v=v)
    return autocast(q, k, v)


def check_documents(op: str, name: str, cu: Tensor, q: Tensor) -> None:
    """Refuse boundaries of documents by their form; `documents.check` looks at their values.

    Args:
        op: Operator, for the message.
        name: Of the argument.
        cu: The boundaries.
        q: The queries, whose device must be theirs.

    Raises:
        TypeError: If it is not a tensor.
        ValueError: If it is not int32 `[documents + 1]` on that device.
    """
    need_tensors(op, **{name: cu})
    if cu.dtype != torch.int32 or cu.dim() != 1 or not cu.numel():
        raise ValueError(
            f"{op}: {name} must be int32 [documents + 1], got {cu.dtype} {[*cu.shape]}"
        )
    if cu.device != q.device:
        raise ValueError(f"{op}: {name} must be on the device of q ({q.device}), got {cu.device}")


def _is_integer(n: object) -> bool:
    return isinstance(n, int | torch.SymInt) and -_MOST <= n <= _MOST


def check_saved(op: str, q: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor) -> None:
    """Refuse what a backward takes from the forward, where it is not of these tensors.

    Args:
        op: Operator, for the message.
        q: Queries.
        v: Values.
        dout: Upstream gradient of the output.
        out: The output.
        lse: The log-sum-exp.

    Raises:
        TypeError: If one is not a tensor.
        ValueError: If shapes or dtypes do not fit.
    """
    need_tensors(op, dout=dout, out=out, lse=lse)
    shape, lse_shape = (*q.shape[:-1], v.shape[-1]), (*q.shape[:-3], q.shape[-2], q.shape[-3])
    fits = dout.shape == out.shape == shape and lse.shape == lse_shape
    if not fits or not dout.dtype == out.dtype == q.dtype or lse.dtype != wide(q.dtype):
        raise ValueError(
            f"{op}: dout and out must be {[*shape]} in {q.dtype} and lse {[*lse_shape]} in "
            f"{wide(q.dtype)}, got {[*dout.shape]} in {dout.dtype}, {[*out.shape]} in {out.dtype} "
            f"and {[*lse.shape]} in {lse.dtype}"
        )


def scores_of(
    op: str, q: Tensor, causal: bool, window: Window, scale: float | None, softcap: float | None,
    offset: int | None,
) -> Scores:  # fmt: skip
    """Check what the caller says of the scores, and put it into one record.

    Args:
        op: Operator, for the message.
        q: Queries, whose head dimension gives the default scale.
        causal: As in `flash_attention`.
        window: As in `flash_attention`.
        scale: As in `flash_attention`.
        softcap: As in `flash_attention`.
        offset: As in `flash_attention`.

    Raises:
        ValueError: If a number is not what it must be.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < float("inf"):  # masks are -inf before it multiplies them
        raise ValueError(f"{op}: scale must be positive and finite, got {scale}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap must be positive and finite, or None, got {softcap}")
    if (
        not isinstance(window, tuple)
        or len(window) != 2
        or not all(_is_integer(n) and n >= -1 for n in window)
    ):
        raise ValueError(
            f"{op}: window must be (keys before, keys after) in integers, -1 for all of them, "
            f"got {window!r}"
        )
    if offset is not None and not _is_integer(offset):
        raise ValueError(f"{op}: offset must be an integer, or None, got {offset!r}")
    left, right = window
    right = 0 if causal else right
    cap = 0.0 if softcap is None else float(softcap)
    return Scores(scale=scale, left=left, right=right, offset=offset, softcap=cap)


def check_sinks(op: str, sinks: Tensor, q: Tensor) -> None:
    """Refuse sinks that are not a number each query head.

    Args:
        op: Operator, for the message.
        sinks: `[H]`.
        q: `[..., H, K]`.

    Raises:
        TypeError: If it is not a tensor.
        ValueError: If it is not so, or on another device.
    """
    need_tensors(op, sinks=sinks)
    if sinks.shape != q.shape[-2:-1] or not sinks.is_floating_point():
        raise ValueError(
            f"{op}: sinks must be floating-point numbers [{q.shape[-2]}], one a query head, "
            f"got {sinks.dtype} {[*sinks.shape]}"
        )
    if sinks.device != q.device:
        raise ValueError(
            f"{op}: all tensors must be on one device, got {q.device} and {sinks.device}"
        )


def with_sinks(part: Dense, sinks: Tensor) -> Dense:
    """Have sinks take part in a softmax that is done.

    Args:
        part: Output `[..., T, H, L]` and log-sum-exp `[..., H, T]`.
        sinks: `[H]`.

    Returns:
        Both with the sinks; differentiable.
    """
    out, lse = part
    sink_H1 = sinks.to(lse.dtype)[:, None]
    kept = sigmoid(lse - sink_H1).mT[..., None]
    return (out * kept).to(out.dtype), torch.logaddexp(lse, sink_H1)
