"""Top-k routing: which experts serve a token, and with what weight.

    s = softmax(z)  or  sigmoid(z)                      scores of the experts, z the logits
    chosen = the k largest of s + bias                  the bias decides, and is no part of a weight
             (of z + bias, where the softmax comes after; of z, where there is no bias: the order is
             that of s, but z does not saturate), in the groups that are open
    w = scale s_chosen / (sum of s_chosen)              or without the sum; or softmax(z_chosen)
    p = s / (sum of s)                                  probabilities, for the losses

    dz = the gradients of w and p through the softmax or the sigmoid; none through the choice

Equal values are taken in the order of their index. With groups, a group's score is the sum of its
two best values, or the best one, and only the experts of the `top_groups` best groups are open. A
NaN poisons the weights of its own token, whose indices stay valid.

Shapes: T tokens, E experts, k experts a token. Bound by memory. Saved for the backward: z, the
indices and p.

Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, section 2.1 (softmax after the
choice); DeepSeek-AI 2024, https://arxiv.org/abs/2405.04434, section 2.2.2 (groups by their best);
DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437, equations 12 to 16 (sigmoid, groups by their two
best, bias).
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..library import below_autograd, first_derivative_only, need_tensors, register, wide

SCORES = ("softmax", "sigmoid", "softmax_after")
GROUP_SCORES = ("top2", "max")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TINY = 1e-20  # keeps a sum of scores that all underflow from dividing by 0


def _largest(values_TE: Tensor, top_k: int) -> Tensor:
    """Return the indices `[T, k]` of the largest values; the first of equal ones, NaN above all.

    `topk` is faster than a stable sort, but leaves the order of equal values open: on the CPU only
    the tokens where these matter are sorted. Elsewhere to know which would be to wait.
    """
    if values_TE.device.type != "cpu":
        order = values_TE.sort(dim=1, descending=True, stable=True).indices
        return order[:, :top_k].contiguous()
    best = values_TE.topk(min(top_k + 1, values_TE.shape[1]), dim=1)
    indices_TK = best.indices[:, :top_k].contiguous()
    tied_T = ~(best.values[:, :-1] > best.values[:, 1:]).all(1)  # or NaN
    if tied_T.any():
        order = values_TE[tied_T].sort(dim=1, descending=True, stable=True).indices
        indices_TK[tied_T] = order[:, :top_k]
    return indices_TK


def _choice(
    values_TE: Tensor, scores_TE: Tensor, top_k: int, groups: int, top_groups: int, best: int
) -> Tensor:
    """Return the indices `[T, k]` of the largest values in the groups whose `best` sum highest."""
    if top_groups < groups:
        scores_TGN = scores_TE.unflatten(1, (groups, scores_TE.shape[1] // groups))
        best_TG = scores_TGN.topk(min(best, scores_TGN.shape[2]), dim=2).values.sum(2)
        opened = _largest(best_TG, top_groups)
        closed_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter_(1, opened, False)
        values_TGN = values_TE.view_as(scores_TGN).masked_fill(closed_TG.unsqueeze(2), -torch.inf)
        values_TE = values_TGN.flatten(1)
    return _largest(values_TE, top_k)


def route_reference(
    logits_TE: Tensor, top_k: int, *, score: str = "softmax", groups: int = 1, top_groups: int = 1,
    group_score: str = "top2", bias: Tensor | None = None, normalise: bool = True,
    scale: float = 1.0, chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Specify `route`, differentiably; the arguments and results are those of `route`."""
    z_TE = logits_TE.to(wide(logits_TE.dtype))
    scores_TE = ((-z_TE).exp() + 1).reciprocal() if score == "sigmoid" else torch.softmax(z_TE, 1)
    probabilities_TE = scores_TE
    if score == "sigmoid":
        probabilities_TE = scores_TE / (scores_TE.sum(1, keepdim=True) + _TINY)
    if chosen is None:
        ranked_TE = (z_TE if score == "softmax_after" else scores_TE).detach()
        ranked_TE = ranked_TE if bias is None else ranked_TE + bias
        values_TE = z_TE.detach() if bias is None else ranked_TE
        best = 1 if group_score == "max" else 2
        indices_TK = _choice(values_TE, ranked_TE, top_k, groups, top_groups, best)
    else:
        indices_TK = chosen.clone()
    absent_TK = None if chosen is None else indices_TK < 0  # what is no expert
    values_TE = z_TE if score == "softmax_after" else scores_TE
    weights_TK = values_TE.gather(1, indices_TK.clamp(min=0))
    if score == "softmax_after":
        weights_TK = _fill(weights_TK, absent_TK, -torch.inf).softmax(1)
    elif normalise:
        weights_TK = _fill(weights_TK, absent_TK, 0.0)
        weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + _TINY)
    return _fill(weights_TK * scale, absent_TK, 0.0), indices_TK, probabilities_TE


def _fill(x_TK: Tensor, absent_TK: Tensor | None, value: float) -> Tensor:
    return x_TK if absent_TK is None else x_TK.masked_fill(absent_TK, value)


def _forward(
    logits: Tensor, bias: Tensor | None, chosen: Tensor | None, top_k: int, score: str, groups: int,
    top_groups: int, group_score: str, normalise: bool, scale: float, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if choose("route", logits.device, logits.dtype, backend) == "triton":
        from .router_triton import forward

        way = (score, groups, top_groups, group_score, normalise, scale)
        return forward(logits, bias, chosen, top_k, *way)
    if chosen is not None and chosen.device.type == "cpu" and (chosen >= logits.shape[1]).any():
        raise ValueError(f"route: chosen must be below {logits.shape[1]}, got {int(chosen.max())}")
    return route_reference(
        logits.contiguous(), top_k, score=score, groups=groups, top_groups=top_groups,
        group_score=group_score, bias=bias, normalise=normalise, scale=scale, chosen=chosen,
    )  # fmt: skip


def _forward_fake(
    logits: Tensor, bias: Tensor | None, chosen: Tensor | None, top_k: int, score: str, groups: int,
    top_groups: int, group_score: str, normalise: bool, scale: float, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, shape = wide(logits.dtype), (logits.shape[0], top_k)
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(logits.shape, dtype=dtype),
    )


def _through_softmax(dp: Tensor, p: Tensor) -> Tensor:
    return torch._softmax_backward_data(dp, p, 1, p.dtype)


def _absent(indices_TK: Tensor) -> Tensor | None:
    """Find what is no expert; None where the CPU sees that there is nothing."""
    absent_TK = indices_TK < 0
    return absent_TK if indices_TK.device.type != "cpu" or absent_TK.any() else None


def _dchosen(
    dweights: Tensor, values_TE: Tensor, indices_TK: Tensor, score: str, normalise: bool,
    scale: float,
) -> Tensor:  # fmt: skip
    """Return the gradient of the chosen scores for `softmax`, else of the chosen logits, `[T, k]`.

    `values_TE` holds the former or the latter.
    """
    absent_TK = _absent(indices_TK)
    dw_TK = _fill(dweights, absent_TK, 0.0) * scale
    values_TK = values_TE.gather(1, indices_TK.clamp(min=0)).to(dw_TK.dtype)
    if score == "softmax_after":
        dw_TK = _through_softmax(dw_TK, _fill(values_TK, absent_TK, -torch.inf).softmax(1))
        return _fill(dw_TK, absent_TK, 0.0)
    s_TK = values_TK.sigmoid() if score == "sigmoid" else values_TK
    if normalise:
        s_TK = _fill(s_TK, absent_TK, 0.0)
        total = s_TK.sum(1, keepdim=True) + _TINY
        dw_TK = (dw_TK - (dw_TK * s_TK).sum(1, keepdim=True) / total) / total
    if score == "sigmoid":
        dw_TK = torch.ops.aten.sigmoid_backward(dw_TK, s_TK)
    return _fill(dw_TK, absent_TK, 0.0)


def _backward(
    dweights: Tensor | None, dprobabilities: Tensor | None, logits: Tensor, indices: Tensor,
    probabilities: Tensor, score: str, normalise: bool, scale: float, backend: str | None,
) -> Tensor:  # fmt: skip
    """Return dlogits `[T, E]`."""
    args = (score, normalise, scale)
    if choose("route", logits.device, logits.dtype, backend) == "triton":
        from .router_triton import backward

        return backward(dweights, dprobabilities, logits, indices, probabilities, *args)
    if dprobabilities is None:
        dz_TE = torch.zeros_like(probabilities)
    elif score == "softmax":
        dz_TE = dprobabilities.clone()
    elif score == "softmax_after":
        dz_TE = _through_softmax(dprobabilities, probabilities)
    else:
        s_TE = torch.sigmoid(logits.to(probabilities.dtype))
        dz_TE = dprobabilities - (dprobabilities * probabilities).sum(1, keepdim=True)
        dz_TE.div_(s_TE.sum(1, keepdim=True) + _TINY)
        dz_TE = torch.ops.aten.sigmoid_backward(dz_TE, s_TE)
    if dweights is not None:
        values_TE = probabilities if score == "softmax" else logits
        part_TK = _dchosen(dweights, values_TE, indices, *args)
        dz_TE.scatter_add_(1, indices.clamp(min=0), part_TK)
    if score == "softmax":
        dz_TE = _through_softmax(dz_TE, probabilities)
    return dz_TE.to(logits.dtype)


def _backward_fake(
    dweights: Tensor | None, dprobabilities: Tensor | None, logits: Tensor, indices: Tensor,
    probabilities: Tensor, score: str, normalise: bool, scale: float, backend: str | None,
) -> Tensor:  # fmt: skip
    return logits.new_empty(logits.shape)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        weights, indices, probabilities = below_autograd(_FORWARD, logits, *args)
        _, _, _, score, _, _, _, *rest = args
        ctx.rest = (score, *rest)  # with normalise, scale and backend
        ctx.save_for_backward(logits, indices, probabilities)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return weights, indices, probabilities

    @staticmethod
    def backward(
        ctx: Any, dweights: Tensor | None, _: None, dprobabilities: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        first_derivative_only("route")
        dlogits = _BACKWARD(dweights, dprobabilities, *ctx.saved_tensors, *ctx.rest)
        return dlogits, *(None,) * 10


_FORWARD = register(
    "route_forward(Tensor logits, Tensor? bias, Tensor? chosen, int top_k, str score, int groups,"
    " int top_groups, str group_score, bool normalise, float scale, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _Route,
)
_BACKWARD = register(
    "route_backward(Tensor? dweights, Tensor? dprobabilities, Tensor logits, Tensor indices,"
    " Tensor probabilities, str score, bool normalise, float scale, str? backend) -> Tensor",
    _backward,
    _backward_fake,
)


def check_routing(
    experts: int, top_k: int, score: str, groups: int, top_groups: int, normalise: bool,
    group_score: str = "top2",
) -> None:  # fmt: skip
    """Refuse a way of routing that cannot be.

    Raises:
        ValueError: As `route` says.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    if group_score not in GROUP_SCORES:
        raise ValueError(
            f"group_score must be one of {', '.join(GROUP_SCORES)}, got {group_score!r}"
        )
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
    logits: Tensor, top_k: int, *, score: str = "softmax", groups: int = 1, top_groups: int = 1,
    group_score: str = "top2", bias: Tensor | None = None, normalise: bool = True,
    scale: float = 1.0, chosen: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Choose the experts of each token.

    Args:
        logits: `[T, E]`; float16, bfloat16, float32 or float64; computed in float32 at least.
        top_k: Experts a token.
        score: `softmax` over all experts, `sigmoid`, or `softmax_after`: over the chosen ones.
        groups: Groups of neighbouring experts.
        top_groups: How many of the groups are open to a token.
        group_score: What the groups are chosen by: the sum of their `top2`, or their `max`.
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
        ValueError: If `score` or `group_score` is unknown, `top_k`, `groups` or `top_groups` do not
            fit the experts, `softmax_after` is not to be normalised, or a shape or dtype does not
            fit.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    need_tensors("route", logits=logits)
    if logits.dim() != 2:
        raise ValueError(f"route: logits must be [tokens, experts], got {[*logits.shape]}")
    check_routing(logits.shape[1], top_k, score, groups, top_groups, normalise, group_score)
    if bias is not None and bias.shape != logits.shape[1:]:
        raise ValueError(f"route: bias has shape {[*bias.shape]}, logits {[*logits.shape]}")
    if chosen is not None and tuple(chosen.shape) != (logits.shape[0], top_k):
        raise ValueError(
            f"route: chosen must be [{logits.shape[0]}, {top_k}], got {[*chosen.shape]}"
        )
    integers = torch.int64 if chosen is None else chosen.dtype
    if logits.dtype not in _DTYPES or integers != torch.int64:
        raise ValueError(
            f"route: logits must be float16, bfloat16, float32 or float64 and chosen int64, "
            f"got {logits.dtype} and {integers}"
        )
    way = (score, groups, top_groups, group_score, normalise, scale, backend)
    weights, indices, probabilities = _FORWARD(logits, bias, chosen, top_k, *way)
    return weights, indices, probabilities
