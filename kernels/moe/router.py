"""Top-k routing: which experts serve a token, and with what weight.

    s = softmax(z)  or  sigmoid(z)                      scores of the experts, z the logits
    chosen = the k largest of s + bias                  the bias decides, and is no part of a weight
             (of z + bias, where the softmax comes after; of z, where there is no bias: the order is
             that of s, but z does not saturate), in the groups that are open
    w = scale s_chosen / (sum of s_chosen)              or without the sum; or softmax(z_chosen)
    p = s / (sum of s)                                  probabilities, for the losses

    dz = the gradients of w and p through the softmax or the sigmoid; none through the choice

Equal values are taken in the order of their index. With groups, a group's score is the sum of its
two best values, and only the experts of the `top_groups` best groups are open. A NaN poisons the
weights of its own token, whose indices stay valid.

Shapes: T tokens, E experts, k experts a token. Bound by memory. Saved for the backward: z and the
indices.

Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, section 2.1 (softmax after the
choice); DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437, equations 12 to 16 (sigmoid, groups,
bias).
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..library import below_autograd, first_derivative_only, register, wide

SCORES = ("softmax", "sigmoid", "softmax_after")
_NAN = 0x7FFFFFFF  # above the bits of every number
_TINY = 1e-20  # keeps a sum of scores that all underflow from dividing by 0


def _largest(values_TE: Tensor, top_k: int) -> Tensor:
    """Return the indices `[T, k]` of the largest values; the first of equal ones, NaN above all.

    In float32 value and index make one integer: none are equal, and integers sort faster.
    """
    if values_TE.dtype == torch.float64:
        order = values_TE.sort(dim=1, descending=True, stable=True).indices
        return order[:, :top_k].contiguous()
    bits = (values_TE + 0.0).view(torch.int32)  # there is no -0.0 then
    bits = torch.where(values_TE.isnan(), _NAN, bits ^ ((bits >> 31) & _NAN))
    experts = values_TE.shape[1]
    last = torch.arange(experts - 1, -1, -1, device=bits.device)
    return ((bits.to(torch.int64) << 32) | last).topk(top_k, dim=1).indices


def _choice(
    values_TE: Tensor, scores_TE: Tensor, top_k: int, groups: int, top_groups: int
) -> Tensor:
    """Return the indices `[T, k]` of the largest values in the groups with the best scores."""
    if top_groups < groups:
        scores_TGN = scores_TE.unflatten(1, (groups, scores_TE.shape[1] // groups))
        best_TG = scores_TGN.topk(min(2, scores_TGN.shape[2]), dim=2).values.sum(2)
        opened = _largest(best_TG, top_groups)
        closed_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter_(1, opened, False)
        values_TGN = values_TE.view_as(scores_TGN).masked_fill(closed_TG.unsqueeze(2), -torch.inf)
        values_TE = values_TGN.flatten(1)
    return _largest(values_TE, top_k)


def route_reference(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    groups: int = 1,
    top_groups: int = 1,
    bias: Tensor | None = None,
    normalise: bool = True,
    scale: float = 1.0,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Specify `route`, differentiably; the arguments and results are those of `route`."""
    z_TE = logits_TE.to(wide(logits_TE.dtype))
    scores_TE = torch.sigmoid(z_TE) if score == "sigmoid" else torch.softmax(z_TE, 1)
    probabilities_TE = scores_TE
    if score == "sigmoid":
        probabilities_TE = scores_TE / (scores_TE.sum(1, keepdim=True) + _TINY)
    if chosen is None:
        ranked_TE = (z_TE if score == "softmax_after" else scores_TE).detach()
        ranked_TE = ranked_TE if bias is None else ranked_TE + bias
        values_TE = z_TE.detach() if bias is None else ranked_TE
        indices_TK = _choice(values_TE, ranked_TE, top_k, groups, top_groups)
    else:
        indices_TK = chosen.clone()
    absent_TK = indices_TK < 0
    held_TK = indices_TK.clamp(min=0)
    if score == "softmax_after":
        weights_TK = z_TE.gather(1, held_TK).masked_fill(absent_TK, -torch.inf).softmax(1)
    else:
        weights_TK = scores_TE.gather(1, held_TK).masked_fill(absent_TK, 0.0)
        if normalise:
            weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + _TINY)
    return (weights_TK * scale).masked_fill(absent_TK, 0.0), indices_TK, probabilities_TE


def _forward(
    logits: Tensor,
    bias: Tensor | None,
    chosen: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    normalise: bool,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if choose("route", logits.device, logits.dtype, backend) == "triton":
        from .router_triton import forward

        return forward(logits, bias, chosen, top_k, score, groups, top_groups, normalise, scale)
    return route_reference(
        logits,
        top_k,
        score=score,
        groups=groups,
        top_groups=top_groups,
        bias=bias,
        normalise=normalise,
        scale=scale,
        chosen=chosen,
    )


def _forward_fake(
    logits: Tensor,
    bias: Tensor | None,
    chosen: Tensor | None,
    top_k: int,
    score: str,
    groups: int,
    top_groups: int,
    normalise: bool,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, shape = wide(logits.dtype), (logits.shape[0], top_k)
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(logits.shape, dtype=dtype),
    )


def _through_softmax(dp: Tensor, p: Tensor) -> Tensor:
    return p * (dp - (p * dp).sum(1, keepdim=True))


def _backward(
    dweights: Tensor | None,
    dprobabilities: Tensor | None,
    logits: Tensor,
    indices: Tensor,
    score: str,
    normalise: bool,
    scale: float,
    backend: str | None,
) -> Tensor:
    """Return dlogits `[T, E]`: the scores are computed again, as they are cheaper than kept."""
    if choose("route", logits.device, logits.dtype, backend) == "triton":
        from .router_triton import backward

        return backward(dweights, dprobabilities, logits, indices, score, normalise, scale)
    z_TE = logits.to(wide(logits.dtype))
    s_TE = torch.sigmoid(z_TE) if score == "sigmoid" else torch.softmax(z_TE, 1)
    ds_TE = torch.zeros_like(s_TE)
    dz_TE = torch.zeros_like(s_TE)
    if dweights is not None:
        absent_TK, held_TK = indices < 0, indices.clamp(min=0)
        dw_TK = dweights.masked_fill(absent_TK, 0.0) * scale
        if score == "softmax_after":
            chosen_TK = z_TE.gather(1, held_TK).masked_fill(absent_TK, -torch.inf)
            dchosen_TK = _through_softmax(dw_TK, chosen_TK.softmax(1)).masked_fill(absent_TK, 0.0)
            dz_TE.scatter_add_(1, held_TK, dchosen_TK)
        else:
            if normalise:
                s_TK = s_TE.gather(1, held_TK).masked_fill(absent_TK, 0.0)
                total = s_TK.sum(1, keepdim=True) + _TINY
                dw_TK = (dw_TK - (dw_TK * s_TK).sum(1, keepdim=True) / total) / total
            ds_TE.scatter_add_(1, held_TK, dw_TK.masked_fill(absent_TK, 0.0))
    if score == "sigmoid":
        if dprobabilities is not None:
            total = s_TE.sum(1, keepdim=True) + _TINY
            ds_TE += (dprobabilities - (dprobabilities * s_TE).sum(1, keepdim=True) / total) / total
        return (ds_TE * s_TE * (1 - s_TE)).to(logits.dtype)
    if dprobabilities is not None:
        ds_TE += dprobabilities
    return dz_TE.add_(_through_softmax(ds_TE, s_TE)).to(logits.dtype)


def _backward_fake(
    dweights: Tensor | None,
    dprobabilities: Tensor | None,
    logits: Tensor,
    indices: Tensor,
    score: str,
    normalise: bool,
    scale: float,
    backend: str | None,
) -> Tensor:
    return logits.new_empty(logits.shape)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        weights, indices, probabilities = below_autograd(_FORWARD, logits, *args)
        _, _, _, score, _, _, *rest = args
        ctx.rest = (score, *rest)  # with normalise, scale and backend
        ctx.save_for_backward(logits, indices)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return weights, indices, probabilities

    @staticmethod
    def backward(
        ctx: Any, dweights: Tensor | None, _: None, dprobabilities: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        first_derivative_only("route")
        logits, indices = ctx.saved_tensors
        dlogits = _BACKWARD(dweights, dprobabilities, logits, indices, *ctx.rest)
        return dlogits, *(None,) * 9


_FORWARD = register(
    "route_forward(Tensor logits, Tensor? bias, Tensor? chosen, int top_k, str score, int groups,"
    " int top_groups, bool normalise, float scale, str? backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _Route,
)
_BACKWARD = register(
    "route_backward(Tensor? dweights, Tensor? dprobabilities, Tensor logits, Tensor indices,"
    " str score, bool normalise, float scale, str? backend) -> Tensor",
    _backward,
    _backward_fake,
)


def check_routing(
    experts: int, top_k: int, score: str, groups: int, top_groups: int, normalise: bool
) -> None:
    """Refuse a way of routing that cannot be.

    Raises:
        ValueError: As `route` says.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k ({top_k}) must be from 1 to the number of experts ({experts})")
    if groups < 1 or experts % groups or not 1 <= top_groups <= groups:
        raise ValueError(
            f"groups ({groups}) must divide the experts ({experts}), and top_groups ({top_groups}) "
            f"must be from 1 to groups"
        )
    if top_k > experts // groups * top_groups:
        raise ValueError(
            f"top_k ({top_k}) must be at most the experts of {top_groups} groups "
            f"({experts // groups * top_groups})"
        )
    if score == "softmax_after" and not normalise:
        raise ValueError(
            f"{score} gives weights that sum to 1: normalise must stay True, got {normalise}"
        )


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    groups: int = 1,
    top_groups: int = 1,
    bias: Tensor | None = None,
    normalise: bool = True,
    scale: float = 1.0,
    chosen: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the experts of each token.

    Args:
        logits: `[T, E]`, any floating dtype; computed in float32 at least.
        top_k: Experts a token.
        score: `softmax` over all experts, `sigmoid`, or `softmax_after`: over the chosen ones.
        groups: Groups of neighbouring experts.
        top_groups: How many of the groups are open to a token.
        bias: Added to the scores for the choice alone, `[E]`; has no gradient.
        normalise: Whether the weights of a token sum to `scale`.
        scale: Factor on the weights.
        chosen: The indices `[T, k]` int64 of an earlier call, to be used again; -1 is no expert.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        weights `[T, k]` and, last, probabilities `[T, E]` that sum to 1 a token, both in float32
        (float64 for float64) with a gradient to `logits`; between them the indices `[T, k]` int64,
        the best first.

    Raises:
        ValueError: If `score` is unknown, `top_k`, `groups` or `top_groups` do not fit the experts,
            `softmax_after` is not to be normalised, or a shape does not fit.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    if logits.dim() != 2:
        raise ValueError(f"route: logits must be [tokens, experts], got {[*logits.shape]}")
    check_routing(logits.shape[1], top_k, score, groups, top_groups, normalise)
    if bias is not None and bias.shape != logits.shape[1:]:
        raise ValueError(f"route: bias has shape {[*bias.shape]}, logits {[*logits.shape]}")
    if chosen is not None and tuple(chosen.shape) != (logits.shape[0], top_k):
        raise ValueError(
            f"route: chosen must be [{logits.shape[0]}, {top_k}], got {[*chosen.shape]}"
        )
    weights, indices, probabilities = _FORWARD(
        logits, bias, chosen, top_k, score, groups, top_groups, normalise, scale, backend
    )
    return weights, indices, probabilities
