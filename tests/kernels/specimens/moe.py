"""Specimens of `kernels/moe`: ways of routing, with their exact choice; rows there and back."""

import torch
from tests.kernels.specimen import Specimen

from warploom.kernels.moe import (
    permute,
    permute_fp8,
    permute_reference,
    route,
    route_reference,
    unpermute,
    unpermute_reference,
)
from warploom.kernels.quant import fp8_quantize

_K = 3
_ROUTES = ((8192, 8), (8192, 64), (8192, 256), (8192, 512))


def _route(name, *, grouped=False, biased=False, chosen=False, rows=(0, 1, 2), **way):
    def draw(draw, rows, width):
        groups = next(n for n in (3, 2, 1) if width % n == 0) if grouped else 1
        top_groups = max(1, groups - 1)
        top_k = min(4, width // groups * top_groups)
        fixed = {"top_k": top_k, "groups": groups, "top_groups": top_groups}
        if biased:
            fixed["bias"] = draw(width, seed=3).float()
        if chosen:  # -1 is no expert
            fixed["chosen"] = draw.integers(width + 1, rows, top_k, seed=4) - 1
        return (draw(rows, width),), fixed

    def plain(z, *, top_k, **rest):
        indices = route_reference(z.detach(), top_k, **way, **rest)[1]
        held, absent = indices.clamp(min=0), indices < 0
        score = way.get("score", "softmax")
        s = z.sigmoid() if score == "sigmoid" else z.softmax(1)
        p = s / s.sum(1, keepdim=True) if score == "sigmoid" else s
        if score == "softmax_after":
            w = z.gather(1, held).masked_fill(absent, -torch.inf).softmax(1)
        else:
            w = s.gather(1, held).masked_fill(absent, 0.0)
            w = w / (w.sum(1, keepdim=True) + 1e-20) if way.get("normalise", True) else w
        return (w * way.get("scale", 1.0)).masked_fill(absent, 0.0), indices, p

    return Specimen(
        name=name,
        op="route",
        draw=draw,
        run=lambda z, top_k, **rest: route(z, top_k, **way, **rest),
        truth=lambda z, top_k, **rest: route_reference(z, top_k, **way, **rest),
        plain=plain,
        shapes=((0, 6), (1, 1), (1, 64), (5, 3), (9, 129), (2, 1000)),
        training=_ROUTES,
        exact=(1,),
        rows=rows,
    )


def _indices(draw, rows, experts):
    """Draw experts of tokens `[rows, k]`; -1 is none, and the last expert has no token."""
    return draw.integers(experts, rows, _K, seed=5) - 1


def _draw_permute(draw, rows, width):
    return (draw(rows, width),), {"indices": _indices(draw, rows, 5), "experts": 5}


def _plain_permute(x, *, indices, experts):
    slots = torch.where(indices < 0, experts, indices).flatten()
    order = slots.argsort(stable=True)
    rows = x[order // _K] * (slots[order] < experts).unsqueeze(1)
    counts = torch.stack([(indices == e).sum() for e in range(experts)])
    return rows, counts, torch.where(slots[order] < experts, order, -1)


def _draw_unpermute(draw, rows, width):
    indices = _indices(draw, rows, 5)
    if draw.device == "meta":
        order = indices.flatten()
    else:
        order = permute_reference(torch.zeros(rows, 1, device=draw.device), indices, 5)[2]
    weights = draw(rows, _K, seed=1)
    weights = weights if draw.dtype == torch.float64 else weights.float()
    return (draw(rows * _K, width), weights), {"order": order}


def _plain_unpermute(rows, weights, *, order):
    weighted = rows * weights.to(rows.dtype).flatten()[order.clamp(min=0)].unsqueeze(1)
    weighted = weighted.masked_fill((order < 0).unsqueeze(1), 0.0)
    y = rows.new_zeros(weights.shape[0], rows.shape[1])
    return y.index_add(0, order.clamp(min=0) // _K, weighted)


def _permute_fp8(name, **fixed):
    def run(x, *, backend=None, **rest):
        q, counts, order = permute_fp8(x, backend=backend, **rest, **fixed)
        return q.dequantize(), q.data.view(torch.uint8), q.scale, counts, order

    def truth(x, *, indices, experts, rounded):
        """Quantise what was permuted."""
        rows, counts, order = permute_reference(x, indices, experts)
        q = fp8_quantize(rows.detach().to(rounded), backend="reference", **fixed)
        value = rows + (q.dequantize().double() - rows).detach()
        return value, q.data.view(torch.uint8), q.scale, counts, order

    return Specimen(
        name=name,
        op="permute",
        draw=_draw_permute,
        run=run,
        truth=truth,
        plain=lambda x, **rest: truth(x, **rest, rounded=x.dtype),
        shapes=((0, 6), (3, 0), (1, 1), (5, 3), (9, 300), (2, 2100)),
        exact=tuple(range(5)),
        rows=(),
    )


SPECIMENS = (
    _route("route"),
    _route("route_deepseek", grouped=True, biased=True, score="sigmoid", scale=2.5),
    _route("route_groups", grouped=True, normalise=False),
    _route("route_group_max", grouped=True, normalise=False, group_score="max"),
    _route("route_after", biased=True, score="softmax_after", scale=3.0),
    _route("route_chosen", chosen=True, score="sigmoid", normalise=False, scale=0.7, rows=(2, 0)),
    _route("route_chosen_after", chosen=True, score="softmax_after", rows=(2, 0)),
    Specimen(
        name="permute",
        op="permute",
        draw=_draw_permute,
        run=permute,
        truth=lambda x, *, indices, experts: permute_reference(x, indices, experts),
        plain=_plain_permute,
        exact=(0, 1, 2),
        rows=(),
    ),
    _permute_fp8("permute_fp8_row", scaling="row"),
    _permute_fp8("permute_fp8_block", scaling="block", power_of_two=True),
    Specimen(
        name="unpermute",
        op="unpermute",
        draw=_draw_unpermute,
        run=lambda rows, weights, *, order, backend: unpermute(
            rows, order, weights, backend=backend
        ),
        truth=lambda rows, weights, *, order: unpermute_reference(rows, order, weights),
        plain=_plain_unpermute,
        rows=(),
    ),
)
