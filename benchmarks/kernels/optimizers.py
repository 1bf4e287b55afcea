"""The cases of `kernels/optim`: the tensors of dense layers, and one of their matrices."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from warploom.kernels import optim

from .cases import Build, Case, Model, Work

_NUMBERS = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
_RATE = 1e-4


def _shapes(m: Model) -> list[tuple[int, ...]]:
    attention = (m.heads + 2 * m.groups) * m.head_dim
    matrices = [(attention, m.width), (m.width, m.heads * m.head_dim)]
    matrices += [(2 * m.hidden, m.width), (m.width, m.hidden)]
    return [*matrices, (m.width,), (m.width,)] * m.layers


def _count(m: Model) -> int:
    return sum(torch.Size(shape).numel() for shape in _shapes(m))


def _adamw(m: Model, tokens: int, item: int) -> Iterator[Case]:
    narrow, shapes = item < 4, _shapes(m)

    def draw(d: Any) -> Any:
        weights = [d(*shape, scale=0.02) for shape in shapes]
        moments = [[d(*s, dtype=torch.float32) for s in shapes] for _ in range(2)]
        columns = [weights, [d(*shape) for shape in shapes], moments[0]]
        columns += [[v.square_() for v in moments[1]]]
        masters = [w.float() for w in weights] if narrow else None
        columns += [masters] if masters else []
        step = torch.zeros((), device=d.device)
        plan = optim.plan(*columns) if d.device.type == "cuda" else None
        return (), {"columns": columns, "step": step, "plan": plan}

    def ours(*, columns: list[list[Tensor]], step: Tensor, plan: Any, backend: str | None) -> None:
        optim.adamw_(
            *columns[:4],
            masters=columns[4] if narrow else None,
            step=step,
            learning_rate=_RATE,
            betas=(_NUMBERS["beta1"], _NUMBERS["beta2"]),
            eps=_NUMBERS["eps"],
            weight_decay=_NUMBERS["weight_decay"],
            plan=plan,
            backend=backend,
        )

    def eager(*, columns: list[list[Tensor]], step: Tensor, plan: Any) -> None:
        weights, gradients, means, squares, *rest = columns
        masters = rest[0] if narrow else weights
        gradients = [g.float() for g in gradients]
        step.add_(1)
        steps = [step] * len(weights)
        torch._fused_adamw_(
            *(masters, gradients, means, squares, [], steps),
            lr=_RATE,
            beta1=_NUMBERS["beta1"],
            beta2=_NUMBERS["beta2"],
            weight_decay=_NUMBERS["weight_decay"],
            eps=_NUMBERS["eps"],
            amsgrad=False,
            maximize=False,
        )
        if narrow:
            torch._foreach_copy_(weights, masters)

    yield Case(
        op="adamw",
        variant="masters" if narrow else "",
        size=f"{_count(m):,} parameters",
        draw=draw,
        ours=ours,
        eager=eager,
        forward=Work(28 * _count(m), 12 * _count(m)),
        backward=None,
        compiles=False,
    )


def _global_norm(m: Model, tokens: int, item: int) -> Iterator[Case]:
    yield Case(
        op="global_norm",
        size=f"{_count(m):,} parameters",
        draw=lambda d: (tuple(d(*shape) for shape in _shapes(m)), {}),
        ours=lambda *tensors, backend: optim.global_norm(tensors, backend=backend),
        eager=lambda *tensors: torch.nn.utils.get_total_norm(tensors),
        forward=Work(item * _count(m), 2 * _count(m)),
        backward=None,
    )


def _newton_schulz(m: Model, tokens: int, item: int) -> Iterator[Case]:
    n, wide = sorted((m.width, m.hidden))
    yield Case(
        op="newton_schulz",
        size=f"{m.width}x{m.hidden}",
        draw=lambda d: ((d(m.width, m.hidden),), {}),
        ours=optim.newton_schulz,
        eager=optim.newton_schulz_reference,
        forward=Work(0, 5 * (4 * n**2 * wide + 2 * n**3), products=True),
        backward=None,
    )


OPERATORS: Mapping[str, Build] = MappingProxyType(
    {"adamw": _adamw, "global_norm": _global_norm, "newton_schulz": _newton_schulz}
)
"""As in `operators.py`."""
