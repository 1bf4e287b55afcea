"""Products with a weight whose gradient may wait: the backward in two halves.

    y = x weight^T + bias

    at once, in the backward     dx = dy weight
    later, in `queue.run()`      dweight = dy^T x,    dbias = sum over the tokens of dy

A pipeline schedule that fills its bubbles with weight gradients opens a queue around a stage's
forward. Each product that runs inside remembers the queue; its backward computes dx alone and
leaves the rest there. Every matmul runs once, whichever half it belongs to. Without an open queue
`linear` is that of the kernels.

What waits is computed by autograd itself, in one pass over nodes that have nothing but a weight
behind them: a parameter accumulates once a queue, its hooks run, and a weight that is not a leaf (a
slice, a cast) passes its gradient on.

Under recomputation the queue must be open in the backward too, so that the products that run again
save the same tensors as at first; `parallel/pipeline` does this. A product at the end of what is
recomputed does not run again: its operands are kept by `kept`, before it runs, and a checkpoint
that has them stops there.

Source: Qi et al. 2023, https://arxiv.org/abs/2401.10241, section 2 (the split backward).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from warploom.kernels.activation import swiglu
from warploom.kernels.activation import swiglu_linear as fused_swiglu_linear
from warploom.kernels.invariant import linear as plain_linear
from warploom.kernels.library import autocast, first_derivative_only

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Have torch.compile leave a function out: the nodes it makes read what `kept` made before."""
    outside = _disable_dynamo(function)  # that of torch.compiler loads the compiler at import: 2 s

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return (outside if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return run


class WeightGradients:
    """Weight gradients that wait: of one stage and one micro-batch."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def __len__(self) -> int:
        """Count the gradients that wait."""
        return len(self._waiting)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Have the products that run in this context, in this thread, put their gradients here."""
        token = _QUEUE.set(self)
        try:
            yield
        finally:
            _QUEUE.reset(token)

    def put(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Let the gradient of `weight` wait.

        Args:
            weight: A parameter, or a tensor computed from parameters.
            gradient: Computes it, in the shape of `weight`; called once, without a graph.
        """
        self._waiting.append((weight, gradient))

    def run(self) -> None:
        """Compute all that waits and accumulate it; the queue is empty afterwards."""
        waiting, self._waiting = self._waiting, []
        with torch.enable_grad():
            ends = [_Wait.apply(weight, gradient) for weight, gradient in waiting]
        del waiting
        if ends:
            with self.open():
                torch.autograd.backward(ends, [end.detach() for end in ends])


_QUEUE: ContextVar[WeightGradients | None] = ContextVar("warploom_weight_gradients", default=None)


def current_queue() -> WeightGradients | None:
    """Return the queue that is open here, if one is."""
    return _QUEUE.get()


class _Wait(torch.autograd.Function):
    """A node whose backward is the gradient of `weight`, whatever comes from above."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: Callable[[], Tensor]) -> Tensor:
        ctx.gradient = gradient
        return weight.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient(), None


class _Keep(torch.autograd.Function):
    """A node that holds tensors for the one that follows it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensors: tuple[Tensor | None, ...]) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        return None, None


def kept(*tensors: Tensor | None) -> Tensor:
    """Save tensors for the backward of an `autograd.Function`, before it computes anything.

    A function saves only once its forward is over. Give it the token as an input: it then has a
    backward, whatever else it is given, and reads there `token.grad_fn.saved_tensors`, once.

    Args:
        tensors: What to save; their graphs are not passed.

    Returns:
        An empty tensor that requires a gradient; None is a right one.
    """
    token: Tensor = _Keep.apply(torch.empty(0, requires_grad=True), tensors)
    return token


class _Split(torch.autograd.Function):
    """Computes the gradient of `x` in its backward and leaves that of `held` to the queue.

    Autograd does not see the weight here: its graph is passed once, when the queue runs.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token: Tensor, held: tuple[Tensor, Tensor | None],
        queue: WeightGradients, forward: Callable[..., Tensor],
        input_gradient: Callable[..., Tensor], weight_gradient: Callable[..., Tensor],
    ) -> Tensor:  # fmt: skip
        weight, bias = held
        # Recomputation gives saved tensors back as copies without a graph: keep the originals.
        ctx.saved, ctx.held, ctx.queue = token.grad_fn, held, queue
        ctx.input_gradient, ctx.weight_gradient = input_gradient, weight_gradient
        return forward(x, weight) if bias is None else forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("a product with a deferred weight gradient")
        (dy,) = dys
        x, value = ctx.saved.saved_tensors
        weight, bias = ctx.held
        later = ctx.weight_gradient
        ctx.queue.put(weight, lambda: later(dy, x))
        if bias is not None and bias.requires_grad:
            ctx.queue.put(bias, lambda: dy.reshape(-1, dy.shape[-1]).sum(0))
        dx = ctx.input_gradient(dy, x, value) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, None, None


@uncompiled
def deferred(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, forward: Callable[..., Tensor],
    input_gradient: Callable[[Tensor, Tensor, Tensor], Tensor],
    weight_gradient: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Apply an operator of `x` and a weight; its weight gradient waits, if a queue is open.

    Args:
        x: Input; it and the weight are kept for the backward, as autocast casts them.
        weight: The weight.
        bias: Added to the last dimension, if given.
        forward: Of `(x, weight)`, or with a bias of `(x, weight, bias)`; differentiable.
        input_gradient: Of `(dy, x, weight)`, in the shape of `x`.
        weight_gradient: Of `(dy, x)`, in the shape of `weight`; called in `queue.run()`.
    """
    queue = _QUEUE.get()
    x, weight = autocast(x, weight)
    if queue is None or not (torch.is_grad_enabled() and weight.requires_grad):
        return forward(x, weight) if bias is None else forward(x, weight, bias)
    token, held = kept(x, weight), (weight, bias)
    y: Tensor = _Split.apply(x, token, held, queue, forward, input_gradient, weight_gradient)
    return y


def _linear_input(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return dy @ weight


def _linear_weight(dy: Tensor, x: Tensor) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply `linear` of the kernels; the gradients of weight and bias wait, if a queue is open.

    Args:
        x: `[..., D]`.
        weight: `[F, D]`, in the dtype of `x`.
        bias: `[F]`, or None.

    Returns:
        `[..., F]`.
    """
    if _QUEUE.get() is None:
        return plain_linear(x, weight, bias)
    return deferred(
        x, weight, bias, forward=plain_linear, input_gradient=_linear_input,
        weight_gradient=_linear_weight,
    )  # fmt: skip


def _swiglu_input(dy: Tensor, gate_up: Tensor, weight: Tensor) -> Tensor:
    backward = torch.ops.warploom.swiglu_linear_backward.default
    dgate_up: Tensor = backward(dy, gate_up, weight, False, None)[0]
    return dgate_up


def _swiglu_weight(dy: Tensor, gate_up: Tensor) -> Tensor:
    return _linear_weight(dy, swiglu(gate_up))


def swiglu_linear(gate_up: Tensor, weight_DF: Tensor) -> Tensor:
    """Apply SwiGLU, then a linear layer; the weight's gradient waits, if a queue is open.

    The queue makes the product of gate and up again, as the whole backward does; no matmul runs
    twice.

    Args:
        gate_up: `[..., 2F]`, the gate first.
        weight_DF: `[D, F]`, in the dtype of `gate_up`.

    Returns:
        `[..., D]`.

    Raises:
        ValueError: If the widths do not fit, or the dtypes differ or are not supported.
    """
    if _QUEUE.get() is None:
        return fused_swiglu_linear(gate_up, weight_DF)
    return deferred(
        gate_up, weight_DF, forward=fused_swiglu_linear, input_gradient=_swiglu_input,
        weight_gradient=_swiglu_weight,
    )  # fmt: skip
