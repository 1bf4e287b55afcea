"""The cases of each operator: `OPERATORS[op](model, tokens, itemsize)`.

The bytes are those of the roof in the operator's docstring: each tensor of the pass once, in the
dtype it has there. The flops are those of the formula; only matrix products are held to them.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from warploom.kernels import activation, moe, rope

from . import losses, norms, optimizers, quantisers
from .cases import Build, Case, Draw, Model, Work


def _rotary(m: Model, tokens: int, item: int) -> Iterator[Case]:
    elements = tokens * (m.heads + m.groups) * m.head_dim

    def draw(d: Any) -> Any:
        positions = torch.arange(tokens, device=d.device)
        cos, sin = rope.rotary_tables(positions, m.head_dim, base=1e4)
        q, k = (d(tokens, heads, m.head_dim) for heads in (m.heads, m.groups))
        return (q, k), {"cos": cos, "sin": sin}

    def ours(q: Tensor, k: Tensor, *, cos: Tensor, sin: Tensor, backend: str | None) -> Any:
        return rope.rotary(q, k, cos, sin, backend=backend)

    def eager(q: Tensor, k: Tensor, *, cos: Tensor, sin: Tensor) -> Any:
        cos, sin = (t.to(q.dtype).unsqueeze(1) for t in (cos, sin))

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        return turn(q), turn(k)

    def paired(q: Tensor, k: Tensor, *, cos: Tensor, sin: Tensor) -> Any:
        cos, sin = (t.to(q.dtype).unsqueeze(1) for t in (cos, sin))

        def turn(x: Tensor) -> Tensor:
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

        return turn(q), turn(k)

    def ours_paired(q: Tensor, k: Tensor, *, backend: str | None, **tables: Tensor) -> Any:
        return rope.rotary(q, k, *tables.values(), interleaved=True, backend=backend)

    work = Work(2 * elements * item + 4 * tokens * m.head_dim, 3 * elements)
    case = Case(
        op="rotary",
        size=f"{tokens}x({m.heads}+{m.groups})x{m.head_dim}",
        draw=draw,
        ours=ours,
        eager=eager,
        forward=work,
        backward=work,
    )
    yield case
    yield replace(case, variant="interleaved", ours=ours_paired, eager=paired, peers=False)


def _gated(
    op: str, m: Model, tokens: int, item: int, act: Callable[[Tensor], Tensor], cost: int
) -> Iterator[Case]:
    """Yield a gated activation alone, and with its result quantised by blocks of a row."""
    rows = tokens * max(m.top_k, 1)
    elements = rows * m.hidden
    ours, fused = getattr(activation, op), getattr(activation, f"{op}_fp8")

    def eager(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return act(gate) * up

    case = Case(
        op=op,
        size=f"{rows}x2x{m.hidden}",
        draw=lambda d: ((d(rows, 2 * m.hidden),), {}),
        ours=ours,
        eager=eager,
        forward=Work(3 * elements * item, cost * elements),
        backward=Work(5 * elements * item, 2 * cost * elements),
    )
    yield case
    yield replace(
        case,
        variant="fp8",
        ours=lambda x, *, backend: fused(x, scaling="block", backend=backend),
        eager=lambda x: quantisers.by_rows(eager(x).float(), 128),
        forward=Work(elements * (2 * item + 1 + 4 / 128), (cost + 4) * elements),
        backward=None,
        peers=False,
    )


def _swiglu(m: Model, tokens: int, item: int) -> Iterator[Case]:
    yield from _gated("swiglu", m, tokens, item, functional.silu, 5)


def _geglu(m: Model, tokens: int, item: int) -> Iterator[Case]:
    tanh = functools.partial(functional.gelu, approximate="tanh")
    yield from _gated("geglu", m, tokens, item, tanh, 10)


def _relu2(m: Model, tokens: int, item: int) -> Iterator[Case]:
    rows = tokens * max(m.top_k, 1)
    elements = rows * m.hidden
    yield Case(
        op="relu2",
        size=f"{rows}x{m.hidden}",
        draw=lambda d: ((d(rows, m.hidden),), {}),
        ours=activation.relu2,
        eager=lambda x: functional.relu(x).square(),
        forward=Work(2 * elements * item, 2 * elements),
        backward=Work(3 * elements * item, 3 * elements),
    )


def _route(m: Model, tokens: int, item: int) -> Iterator[Case]:
    if not m.experts:
        return
    elements = tokens * m.experts

    def ours(logits: Tensor, *, backend: str | None) -> Any:
        weights, indices, probabilities = moe.route(
            logits,
            m.top_k,
            score=m.score,
            groups=m.expert_groups,
            top_groups=m.top_groups,
            backend=backend,
        )
        return weights, probabilities, indices

    def eager(logits: Tensor) -> Any:
        x = logits.float()
        scores = x.softmax(-1) if m.score == "softmax" else x.sigmoid()
        choice = scores
        if m.expert_groups > 1:
            grouped = choice.unflatten(-1, (m.expert_groups, -1))
            best = grouped.topk(2, -1).values.sum(-1).topk(m.top_groups, -1).indices
            closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
            choice = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
        indices = choice.topk(m.top_k, -1).indices
        weights = scores.gather(-1, indices)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights, scores / scores.sum(-1, keepdim=True), indices

    chosen = tokens * m.top_k * 12.0  # a weight and an index each
    yield Case(
        op="route",
        size=f"{tokens}x{m.experts}, {m.top_k} of them",
        draw=lambda d: ((d(tokens, m.experts),), {}),
        ours=ours,
        eager=eager,
        forward=Work(elements * (item + 4) + chosen, 5 * elements),
        backward=Work(elements * (2 * item + 4) + chosen, 5 * elements),
    )


def _assignment(d: Draw, m: Model, tokens: int) -> Tensor:
    """Draw distinct experts for each token, `[T, k]`."""
    return d(tokens, m.experts, dtype=torch.float32).topk(m.top_k, -1).indices


def _permute(m: Model, tokens: int, item: int) -> Iterator[Case]:
    if not m.experts:
        return
    rows = tokens * m.top_k

    def ours(x: Tensor, *, indices: Tensor, backend: str | None) -> Any:
        return moe.permute(x, indices, m.experts, backend=backend)

    def eager(x: Tensor, *, indices: Tensor) -> Any:
        order = indices.flatten().argsort(stable=True)
        counts = torch.bincount(indices.flatten(), minlength=m.experts)
        return x.index_select(0, order // m.top_k), counts, order

    yield Case(
        op="permute",
        size=f"{tokens}x{m.width} to {rows}",
        draw=lambda d: ((d(tokens, m.width),), {"indices": _assignment(d, m, tokens)}),
        ours=ours,
        eager=eager,
        forward=Work((tokens + rows) * m.width * item + 16.0 * rows, 0),
        backward=Work((tokens + rows) * m.width * item + 8.0 * rows, rows * m.width),
    )


def _unpermute(m: Model, tokens: int, item: int) -> Iterator[Case]:
    if not m.experts:
        return
    rows = tokens * m.top_k
    moved = (tokens + rows) * m.width * item

    def draw(d: Any) -> Any:
        order = _assignment(d, m, tokens).flatten().argsort(stable=True)
        weights = d(tokens, m.top_k, dtype=torch.float32).softmax(-1)
        return (d(rows, m.width), weights), {"order": order}

    def ours(x: Tensor, weights: Tensor, *, order: Tensor, backend: str | None) -> Any:
        return moe.unpermute(x, order, weights, backend=backend)

    def eager(x: Tensor, weights: Tensor, *, order: Tensor) -> Tensor:
        weighted = x * weights.flatten()[order].unsqueeze(1).to(x.dtype)
        return x.new_zeros(tokens, m.width).index_add(0, order // m.top_k, weighted)

    yield Case(
        op="unpermute",
        size=f"{rows}x{m.width} to {tokens}",
        draw=draw,
        ours=ours,
        eager=eager,
        forward=Work(moved + 12.0 * rows, 2 * rows * m.width),
        backward=Work(moved + rows * m.width * item + 16.0 * rows, 4 * rows * m.width),
    )


OPERATORS: Mapping[str, Build] = MappingProxyType(
    {
        **norms.OPERATORS,
        "rotary": _rotary,
        "swiglu": _swiglu,
        "geglu": _geglu,
        "relu2": _relu2,
        "route": _route,
        "permute": _permute,
        "unpermute": _unpermute,
        **losses.OPERATORS,
        **optimizers.OPERATORS,
        **quantisers.OPERATORS,
    }
)
"""Every operator's cases, as a function of the model, the tokens and the bytes of an element."""
