"""The cases of `kernels/norm`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from warploom.kernels import norm
from warploom.kernels.rope import rotary_tables

from .cases import Build, Case, Model, Work
from .quantisers import by_rows

_EPS = 1e-6


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, _EPS)


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, weight.shape, weight, bias, _EPS)


def _norm(
    op: str, plain: Callable[..., Tensor], parameters: int, m: Model, tokens: int, item: int
) -> Iterator[Case]:
    """Yield a norm alone, with the residual added, and quantised as well."""
    elements = tokens * m.width
    ours, fused = getattr(norm, op), getattr(norm, f"{op}_fp8")

    def eager(x: Tensor, residual: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return plain(h, *rest), h

    def eager_fp8(*inputs: Tensor) -> Any:
        y, h = eager(*inputs)
        return by_rows(y.float(), 128), h

    def with_residual(x: Tensor, residual: Tensor, *rest: Tensor, backend: str | None) -> Any:
        return ours(x, *rest, residual=residual, eps=_EPS, backend=backend)

    def with_fp8(x: Tensor, residual: Tensor, *rest: Tensor, backend: str | None) -> Any:
        block = {"scaling": "block", "backend": backend}
        return fused(x, *rest, residual=residual, eps=_EPS, **block)

    def draw(d: Any, tensors: int) -> Any:
        x = [d(tokens, m.width) for _ in range(tensors)]
        return (*x, *(d(m.width) for _ in range(parameters))), {}

    case = Case(
        op=op,
        size=f"{tokens}x{m.width}",
        draw=lambda d: draw(d, 1),
        ours=lambda *inputs, backend: ours(*inputs, eps=_EPS, backend=backend),
        eager=plain,
        forward=Work(2 * elements * item, 4 * elements),
        backward=Work(3 * elements * item, 9 * elements),
    )
    yield case
    residual = replace(
        case,
        variant="residual",
        draw=lambda d: draw(d, 2),
        ours=with_residual,
        eager=eager,
        forward=Work(4 * elements * item, 5 * elements),
        backward=Work(4 * elements * item, 10 * elements),
    )
    yield residual
    yield replace(
        residual,
        variant="residual, fp8",
        ours=with_fp8,
        eager=eager_fp8,
        forward=Work(elements * (3 * item + 1 + 4 / 128), 9 * elements),
        backward=None,
        peers=False,
    )


def _rms_norm(m: Model, tokens: int, item: int) -> Iterator[Case]:
    yield from _norm("rms_norm", _rms, 1, m, tokens, item)


def _layer_norm(m: Model, tokens: int, item: int) -> Iterator[Case]:
    yield from _norm("layer_norm", _layer, 2, m, tokens, item)


def _qk_norm_rotary(m: Model, tokens: int, item: int) -> Iterator[Case]:
    elements = tokens * (m.heads + m.groups) * m.head_dim

    def draw(d: Any) -> Any:
        cos, sin = rotary_tables(torch.arange(tokens, device=d.device), m.head_dim, base=1e4)
        q, k = (d(tokens, heads, m.head_dim) for heads in (m.heads, m.groups))
        return (q, k, d(m.head_dim), d(m.head_dim)), {"cos": cos, "sin": sin}

    def ours(
        q: Tensor, k: Tensor, *weights: Tensor, cos: Tensor, sin: Tensor, backend: str | None
    ) -> Any:
        return norm.qk_norm_rotary(q, k, weights[0], weights[1], cos, sin, backend=backend)

    def eager(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, *, cos: Tensor, sin: Tensor) -> Any:
        cos, sin = (t.to(q.dtype).unsqueeze(1) for t in (cos, sin))

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        return turn(_rms(q, wq)), turn(_rms(k, wk))

    tables = 4 * tokens * m.head_dim
    yield Case(
        op="qk_norm_rotary",
        size=f"{tokens}x({m.heads}+{m.groups})x{m.head_dim}",
        draw=draw,
        ours=ours,
        eager=eager,
        forward=Work(2 * elements * item + tables, 7 * elements),
        backward=Work(3 * elements * item + tables, 12 * elements),
    )


OPERATORS: Mapping[str, Build] = MappingProxyType(
    {"rms_norm": _rms_norm, "layer_norm": _layer_norm, "qk_norm_rotary": _qk_norm_rotary}
)
"""As in `operators.py`."""
