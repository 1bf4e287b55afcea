"""Attention within documents by an operator for whole batches: which documents go into one call.

Neighbours of one length are a batch as they lie; every other document is a call of its own. Nothing
is copied on the way in. To fill up short documents into one batch was tried and is slower: 68
documents of 32 tokens on average, 9 heads of 64, one core: 89 ms forward and backward, against 35.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

Dense = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Neighbouring documents of one length, attended to in one call.

    Attributes:
        start: First token of the first.
        count: Documents.
        length: Tokens of each, at least 1.
    """

    start: int
    count: int
    length: int

    def view(self, x_T: Tensor) -> Tensor:
        """View the documents' part of a packed tensor, `[T, ...]`, as `[count, length, ...]`."""
        part = x_T[self.start : self.start + self.count * self.length]
        return part.unflatten(0, (self.count, self.length))  # type: ignore[no-any-return]


def check(op: str, cu_seqlens: Tensor, tokens: int, max_seqlen: int | None) -> list[int]:
    """Read where documents start, and refuse what is not a partition of the tokens.

    Args:
        op: Whose error it is.
        cu_seqlens: `[N + 1]`, int32.
        tokens: T.
        max_seqlen: What the caller says of the longest document.

    Returns:
        `cu_seqlens` as a list.

    Raises:
        ValueError: If it does not start at 0, decreases, does not end at T, or a document is longer
            than `max_seqlen`.
    """
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{op}: cu_seqlens must start at 0, got {bounds[0]}")
    for at, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if stop < start:
            raise ValueError(
                f"{op}: cu_seqlens must not decrease, got {start} and then {stop} at entry {at + 1}"
            )
        if max_seqlen is not None and stop - start > max_seqlen:
            raise ValueError(
                f"{op}: max_seqlen must be at least the longest document, got {max_seqlen}, "
                f"document {at} has {stop - start} tokens"
            )
    if bounds[-1] != tokens:
        raise ValueError(
            f"{op}: cu_seqlens must end at the number of tokens ({tokens}), got {bounds[-1]}"
        )
    return bounds


def plan(bounds: list[int]) -> list[Batch]:
    """Decide which documents go into one call.

    Args:
        bounds: `cu_seqlens`, checked.

    Returns:
        Batches that hold each token once, in order.
    """
    documents = [(a, b - a) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
    batches = []
    for length, neighbours in groupby(documents, key=lambda document: document[1]):
        starts = [start for start, _ in neighbours]
        batches.append(Batch(start=starts[0], count=len(starts), length=length))
    return batches


def forward(
    dense: Callable[..., Dense],
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    bounds: list[int],
    causal: bool,
    scale: float,
    lse_TH: Tensor,
) -> Tensor:
    """Attend within documents.

    Args:
        dense: Attends in batches, as `attention_reference`.
        q_THK: `[T, H, K]`.
        k_TGK: `[T, G, K]`.
        v_TGK: `[T, G, K]`.
        bounds: `cu_seqlens`, checked.
        causal: Whether a query sees the keys up to its own position only.
        scale: Multiplies the scores.
        lse_TH: `[T, H]`; filled.

    Returns:
        `[T, H, K]`.
    """
    out_THK = q_THK.new_empty(q_THK.shape)
    batches = plan(bounds)
    for batch in batches:
        out, lse = dense(*(batch.view(x) for x in (q_THK, k_TGK, v_TGK)), causal, scale)
        batch.view(lse_TH).copy_(lse.mT)
        if len(batches) == 1:
            return out.flatten(0, 1)  # all tokens: nothing to copy
        batch.view(out_THK).copy_(out)
    return out_THK


def backward(
    dense: Callable[..., Gradients],
    dout_THK: Tensor,
    dlse_TH: Tensor | None,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    out_THK: Tensor,
    lse_TH: Tensor,
    bounds: list[int],
    causal: bool,
    scale: float,
) -> Gradients:
    """Differentiate `forward`.

    Args:
        dense: Differentiates in batches, as `attention_backward_reference`.
        dout_THK: Upstream gradient of the output.
        dlse_TH: Upstream gradient of the log-sum-exp, None for 0.
        q_THK: As in the forward.
        k_TGK: As in the forward.
        v_TGK: As in the forward.
        out_THK: What the forward gave.
        lse_TH: What the forward gave.
        bounds: As in the forward.
        causal: As in the forward.
        scale: As in the forward.

    Returns:
        The gradients of q, k and v.
    """
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_THK, k_TGK, v_TGK))
    batches = plan(bounds)
    for batch in batches:
        dout, q, k, v, out = (batch.view(x) for x in (dout_THK, q_THK, k_TGK, v_TGK, out_THK))
        dlse = None if dlse_TH is None else batch.view(dlse_TH).mT
        gradients = dense(dout, dlse, q, k, v, out, batch.view(lse_TH).mT, causal, scale)
        if len(batches) == 1:
            dq, dk, dv = (d.flatten(0, 1) for d in gradients)  # all tokens: nothing to copy
            break
        for whole, part in zip((dq, dk, dv), gradients, strict=True):
            batch.view(whole).copy_(part)
    return dq, dk, dv
