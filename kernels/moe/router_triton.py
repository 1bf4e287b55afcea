"""Triton code of `route`.

A program holds some tokens with all their experts in the registers of one warp (of more where there
are more than 1024 experts), so that no step of the choice waits for another warp. A value and its
index make one 64-bit integer that sorts as the value does, NaN above all, and of equal values the
first: the choice is exact, k maxima one after the other. Groups are padded to a power of two each,
which makes a group an axis.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: ANN001, ANN201, ANN202

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import next_power_of_two, on_device

_TILE = 512  # elements a warp, where a token has no more
_MOST = 4096  # experts, with the padding of groups, that the registers of a program hold
_NAN = tl.constexpr(0x7FFFFFFF)  # above the bits of every number
_LEAST = tl.constexpr(-(2**31))  # below them
_NONE = tl.constexpr(-(2**63))
_TINY = tl.constexpr(1e-20)


def configuration(experts: int, groups: int = 1) -> dict[str, int]:
    """Choose tile and warps.

    Args:
        experts: E.
        groups: Groups among which some are chosen first; 1 where there is no such choice.

    Returns:
        ROWS, GROUPS and EACH, the shape of a tile, and num_warps.

    Raises:
        RuntimeError: If the experts of a token do not fit in the registers of one program.
    """
    of, each = next_power_of_two(groups), next_power_of_two(experts // groups)
    if of * each > _MOST:
        raise RuntimeError(f"route: triton serves experts to {_MOST}, there are {experts}")
    warps = max(1, of * each // 1024)
    return {"ROWS": max(1, _TILE // (of * each)), "GROUPS": of, "EACH": each, "num_warps": warps}


@triton.jit
def _keys(value, index, inside):
    """Pack float32 and index into integers that sort as `route` orders; outside is the least."""
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value == value, bits ^ ((bits >> 31) & _NAN), _NAN)
    bits = tl.where(inside, bits, _LEAST).to(tl.int64)
    return (bits << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _index(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _value(key):
    """Unpack the value; that of what was outside is 0."""
    bits = (key >> 32).to(tl.int32)
    value = (bits ^ ((bits >> 31) & _NAN)).to(tl.float32, bitcast=True)
    return tl.where(bits == _LEAST, 0.0, value)


@triton.jit
def _scores(z, SIGMOID: tl.constexpr, most, total):
    return tl.sigmoid(z) if SIGMOID else tl.exp(z - most) / total


@triton.jit
def forward_kernel(
    logits, bias, indices, weights, probabilities, tokens, experts, each, stride, scale,
    SCORE: tl.constexpr, BIASED: tl.constexpr, CHOSEN: tl.constexpr, NORMALISE: tl.constexpr,
    K: tl.constexpr, TOP_GROUPS: tl.constexpr, BEST: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, EACH: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """Route ROWS tokens; with CHOSEN `indices` is read and not written."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, GROUPS * EACH)
    expert = slot // EACH * each + slot % EACH
    real = (slot % EACH < each) & (expert < experts)
    inside = (row < tokens)[:, None] & real[None, :]
    from_ = logits + row[:, None] * stride
    z = tl.load(from_ + expert[None, :], inside, other=float("-inf")).to(tl.float32)
    most = tl.max(z, 1)[:, None]
    total = tl.sum(tl.exp(z - most), 1)[:, None]
    scores = _scores(z, SCORE == "sigmoid", most, total)
    out = scores
    if SCORE == "sigmoid":
        out = scores / (tl.sum(tl.where(inside, scores, 0.0), 1) + _TINY)[:, None]
    tl.store(probabilities + row[:, None] * experts + expert[None, :], out, inside)

    picked = tl.arange(0, PICKED)[None, :]
    to = row[:, None] * K + picked
    known = (row < tokens)[:, None] & (picked < K)
    if CHOSEN:
        choice = tl.load(indices + to, known, other=-1)
    else:
        ranked = z if SCORE == "softmax_after" else scores
        value = z
        if BIASED:
            ranked += tl.load(bias + expert, real, other=0.0).to(tl.float32)[None, :]
            value = ranked
        if TOP_GROUPS < GROUPS:
            keys = tl.reshape(_keys(ranked, slot[None, :], inside), [ROWS, GROUPS, EACH])
            first = tl.max(keys, 2)
            best = _value(first)
            if BEST == "top2":
                second = tl.max(tl.where(keys == first[:, :, None], _NONE, keys), 2)
                best += tl.where(each > 1, _value(second), 0.0)
            group = tl.arange(0, GROUPS)[None, :]
            left = _keys(best, group, group * each < experts)
            opened = tl.zeros([ROWS, GROUPS], tl.int32)
            for _ in range(TOP_GROUPS):
                here = left == tl.max(left, 1)[:, None]
                opened = tl.where(here, 1, opened)
                left = tl.where(here, _NONE, left)
            opened = tl.broadcast_to(opened[:, :, None], [ROWS, GROUPS, EACH])
            opened = tl.reshape(opened, [ROWS, GROUPS * EACH])
            value = tl.where(opened != 0, value, float("-inf"))
        keys = _keys(value, expert[None, :], inside)
        choice = tl.full([ROWS, PICKED], -1, tl.int64)
        for j in range(K):
            key = tl.max(keys, 1)[:, None]
            choice = tl.where(picked == j, _index(key).to(tl.int64), choice)
            keys = tl.where(keys == key, _NONE, keys)
        tl.store(indices + to, choice, known)

    held = known & (choice >= 0) & (choice < experts)
    z = tl.load(from_ + choice, held, other=float("-inf")).to(tl.float32)
    if SCORE == "softmax_after":
        weight = tl.exp(z - tl.max(z, 1)[:, None])
        weight = weight / tl.sum(weight, 1)[:, None]
    else:
        weight = tl.where(held, _scores(z, SCORE == "sigmoid", most, total), 0.0)
        if NORMALISE:
            weight = weight / (tl.sum(weight, 1)[:, None] + _TINY)
    tl.store(weights + to, tl.where(held, weight * scale, 0.0), known)


@triton.jit
def backward_kernel(
    dweights, dprobabilities, logits, indices, probabilities, dlogits, tokens, experts, stride,
    dprobabilities_stride, scale, SCORE: tl.constexpr, WEIGHTS: tl.constexpr,
    PROBABILITIES: tl.constexpr, NORMALISE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, EACH: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """Write dlogits of ROWS tokens, from the gradients that are there."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EACH)[None, :]
    inside = (row < tokens)[:, None] & (expert < experts)
    if SCORE == "softmax":
        values, values_stride = probabilities, experts
    else:
        values, values_stride = logits, stride
    if SCORE == "sigmoid":
        z = tl.load(logits + row[:, None] * stride + expert, inside, other=float("-inf"))
        scores = tl.sigmoid(z.to(tl.float32))
    else:
        scores = tl.load(probabilities + row[:, None] * experts + expert, inside, other=0.0)
    chosen = tl.zeros([ROWS, EACH], tl.float32)
    if WEIGHTS:
        picked = tl.arange(0, PICKED)[None, :]
        to = row[:, None] * K + picked
        known = (row < tokens)[:, None] & (picked < K)
        choice = tl.load(indices + to, known, other=-1)
        held = known & (choice >= 0) & (choice < experts)
        above = tl.load(dweights + to, held, other=0.0).to(tl.float32) * scale
        value = tl.load(values + row[:, None] * values_stride + choice, held, other=float("-inf"))
        value = value.to(tl.float32)
        if SCORE == "softmax_after":
            weight = tl.exp(value - tl.max(value, 1)[:, None])
            weight = tl.where(held, weight / tl.sum(weight, 1)[:, None], 0.0)
            above = weight * (above - tl.sum(weight * above, 1)[:, None])
        elif NORMALISE:
            weight = tl.sigmoid(value) if SCORE == "sigmoid" else tl.where(held, value, 0.0)
            total = tl.sum(weight, 1)[:, None] + _TINY
            above = (above - tl.sum(weight * above, 1)[:, None] / total) / total
        for j in range(K):
            here = held & (picked == j)
            at = tl.sum(tl.where(here, choice + 1, 0), 1)[:, None] - 1
            part = tl.sum(tl.where(here, above, 0.0), 1)[:, None]
            chosen += tl.where(expert == at, part, 0.0)
    dscores = tl.zeros([ROWS, EACH], tl.float32) if SCORE == "softmax_after" else chosen
    if PROBABILITIES:
        at = dprobabilities + row[:, None] * dprobabilities_stride + expert
        above = tl.load(at, inside, other=0.0).to(tl.float32)
        if SCORE == "sigmoid":
            total = tl.sum(scores, 1)[:, None] + _TINY
            above = (above - tl.sum(above * scores, 1)[:, None] / total) / total
        dscores += above
    if SCORE == "sigmoid":
        dz = dscores * scores * (1.0 - scores)
    else:
        dz = scores * (dscores - tl.sum(scores * dscores, 1)[:, None])
        if SCORE == "softmax_after":
            dz = dz + chosen if PROBABILITIES else chosen
    to = dlogits + row[:, None] * experts + expert
    tl.store(to, dz.to(dlogits.dtype.element_ty), inside)


def _strided(x_TE: Tensor) -> Tensor:
    """Leave strided rows as they are; copy only when the elements of a row are apart."""
    return x_TE if x_TE.stride(1) == 1 or x_TE.shape[1] == 1 else x_TE.contiguous()


def forward(
    logits_TE: Tensor, bias_E: Tensor | None, chosen_TK: Tensor | None, top_k: int, score: str,
    groups: int, top_groups: int, group_score: str, normalise: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the forward.

    Args:
        logits_TE: `[T, E]`.
        bias_E: `[E]` or None.
        chosen_TK: `[T, k]` int64 or None.
        top_k: k.
        score: `softmax`, `sigmoid` or `softmax_after`.
        groups: Groups of experts.
        top_groups: How many of them are open to a token.
        group_score: `top2` or `max`.
        normalise: Whether the weights of a token sum to `scale`.
        scale: Factor on the weights.

    Returns:
        weights `[T, k]` float32, indices `[T, k]` int64, probabilities `[T, E]` float32.
    """
    tokens, experts = logits_TE.shape
    if top_groups == groups or chosen_TK is not None:
        groups = top_groups = 1
    chosen = configuration(experts, groups)
    logits_TE = _strided(logits_TE)
    weights = logits_TE.new_empty(tokens, top_k, dtype=torch.float32)
    probabilities = logits_TE.new_empty(tokens, experts, dtype=torch.float32)
    indices = logits_TE.new_empty(tokens, top_k, dtype=torch.int64)
    if chosen_TK is not None:
        indices.copy_(chosen_TK)
    if tokens:
        with on_device(logits_TE):
            forward_kernel[(triton.cdiv(tokens, chosen["ROWS"]),)](
                logits_TE, logits_TE if bias_E is None else bias_E.contiguous(), indices, weights,
                probabilities, tokens, experts, experts // groups, logits_TE.stride(0), scale,
                SCORE=score, BIASED=bias_E is not None, CHOSEN=chosen_TK is not None,
                NORMALISE=normalise, K=top_k, TOP_GROUPS=top_groups, BEST=group_score,
                PICKED=next_power_of_two(top_k), **chosen,
            )  # fmt: skip
    return weights, indices, probabilities


def backward(
    dweights_TK: Tensor | None, dprobabilities_TE: Tensor | None, logits_TE: Tensor,
    indices_TK: Tensor, probabilities_TE: Tensor, score: str, normalise: bool, scale: float,
) -> Tensor:  # fmt: skip
    """Launch the backward.

    Args:
        dweights_TK: Gradient of the weights, `[T, k]`, or None.
        dprobabilities_TE: Gradient of the probabilities, `[T, E]`, or None.
        logits_TE: `[T, E]`.
        indices_TK: `[T, k]` int64, contiguous.
        probabilities_TE: `[T, E]` float32, contiguous.
        score: `softmax`, `sigmoid` or `softmax_after`.
        normalise: Whether the weights of a token sum to `scale`.
        scale: Factor on the weights.

    Returns:
        dlogits `[T, E]`.
    """
    (tokens, experts), top_k = logits_TE.shape, indices_TK.shape[1]
    chosen = configuration(experts)
    logits_TE = _strided(logits_TE)
    dlogits = logits_TE.new_empty(tokens, experts)
    dprobabilities = logits_TE if dprobabilities_TE is None else _strided(dprobabilities_TE)
    if tokens:
        with on_device(logits_TE):
            backward_kernel[(triton.cdiv(tokens, chosen["ROWS"]),)](
                logits_TE if dweights_TK is None else dweights_TK.contiguous(), dprobabilities,
                logits_TE, indices_TK, probabilities_TE, dlogits, tokens, experts,
                logits_TE.stride(0), dprobabilities.stride(0), scale, SCORE=score,
                WEIGHTS=dweights_TK is not None, PROBABILITIES=dprobabilities_TE is not None,
                NORMALISE=normalise, K=top_k, PICKED=next_power_of_two(top_k), **chosen,
            )  # fmt: skip
    return dlogits
