"""The cases of `kernels/loss`."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from warploom.kernels import loss

from .cases import Build, Case, Model, Work

_ROWS = 4096  # logits of more tokens are as many calls


def _cross_entropy(m: Model, tokens: int, item: int) -> Iterator[Case]:
    rows = min(tokens, _ROWS)
    elements = rows * m.vocabulary

    def draw(d: Any) -> Any:
        return (d(rows, m.vocabulary),), {"targets": d.integers(m.vocabulary, rows)}

    def ours(logits: Tensor, *, targets: Tensor, backend: str | None) -> Any:
        return loss.cross_entropy(logits, targets, backend=backend)[0]

    def eager(logits: Tensor, *, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits, targets, reduction="sum")

    yield Case(
        op="cross_entropy",
        size=f"{rows}x{m.vocabulary}",
        draw=draw,
        ours=ours,
        eager=eager,
        forward=Work(elements * item, 4 * elements),
        backward=Work(2 * elements * item, 4 * elements),
    )


def _head(m: Model, tokens: int, item: int) -> tuple[str, Callable[..., Any], Work, Work]:
    """Return what the losses over a linear head have in common."""
    rows = min(tokens, _ROWS)

    def draw(d: Any) -> Any:
        hidden, weight = d(rows, m.width), d(m.vocabulary, m.width, scale=m.width**-0.5)
        return (hidden, weight), {"targets": d.integers(m.vocabulary, rows)}

    product = 2.0 * rows * m.width * m.vocabulary
    operands = (rows + m.vocabulary) * m.width * item
    forward = Work(operands, product, products=True)
    return f"{rows}x{m.width}x{m.vocabulary}", draw, forward, Work(2 * operands, 2 * product, True)


def _linear_cross_entropy(m: Model, tokens: int, item: int) -> Iterator[Case]:
    size, draw, forward, backward = _head(m, tokens, item)

    def ours(hidden: Tensor, weight: Tensor, *, targets: Tensor, backend: str | None) -> Any:
        return loss.linear_cross_entropy(hidden, weight, targets, backend=backend)[0]

    def eager(hidden: Tensor, weight: Tensor, *, targets: Tensor) -> Tensor:
        return functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")

    yield Case(
        op="linear_cross_entropy",
        size=size,
        draw=draw,
        ours=ours,
        eager=eager,
        forward=forward,
        backward=backward,
    )


def _linear_log_probs(m: Model, tokens: int, item: int) -> Iterator[Case]:
    size, draw, forward, backward = _head(m, tokens, item)

    def ours(hidden: Tensor, weight: Tensor, *, targets: Tensor, backend: str | None) -> Any:
        return loss.linear_log_probs(hidden, weight, targets, backend=backend)

    def eager(hidden: Tensor, weight: Tensor, *, targets: Tensor) -> Tensor:
        return -functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")

    yield Case(
        op="linear_log_probs",
        size=size,
        draw=draw,
        ours=ours,
        eager=eager,
        forward=forward,
        backward=backward,
    )


def _linear_top_k_kl(m: Model, tokens: int, item: int) -> Iterator[Case]:
    size, _, forward, backward = _head(m, tokens, item)
    rows, top = min(tokens, _ROWS), min(64, m.vocabulary)

    def draw(d: Any) -> Any:
        hidden, weight = d(rows, m.width), d(m.vocabulary, m.width, scale=m.width**-0.5)
        teacher = d(rows, m.vocabulary, dtype=torch.float32).log_softmax(-1)
        log_probs, indices = teacher.topk(top, -1)
        return (hidden, weight), {"indices": indices, "log_probs": log_probs}

    def ours(x: Tensor, w: Tensor, *, indices: Tensor, log_probs: Tensor, backend: Any) -> Any:
        return loss.linear_top_k_kl(x, w, indices, log_probs, backend=backend)

    def eager(x: Tensor, w: Tensor, *, indices: Tensor, log_probs: Tensor) -> Tensor:
        student = (x @ w.t()).float().log_softmax(-1).gather(-1, indices)
        rest = [torch.log1p(-p.exp().sum(-1, keepdim=True)) for p in (log_probs, student)]
        p, q = torch.cat([log_probs, rest[0]], -1), torch.cat([student, rest[1]], -1)
        return functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    yield Case(
        op="linear_top_k_kl",
        size=f"{size}, top {top}",
        draw=draw,
        ours=ours,
        eager=eager,
        forward=forward,
        backward=backward,
    )


OPERATORS: Mapping[str, Build] = MappingProxyType(
    {
        "cross_entropy": _cross_entropy,
        "linear_cross_entropy": _linear_cross_entropy,
        "linear_log_probs": _linear_log_probs,
        "linear_top_k_kl": _linear_top_k_kl,
    }
)
"""As in `operators.py`."""
