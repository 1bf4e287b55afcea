"""Registration of operators with `torch.library`, and how their CPU code walks over rows.

An operator is `warploom::<name>_forward` and `warploom::<name>_backward`, both functional. The
kernel under the Autograd key is a `torch.autograd.Function` (measured over the body: 12
microseconds a call, against 27 of `torch.library.custom_op`); it is skipped when no gradient is
asked for.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

_LIBRARY = Library("warploom", "FRAGMENT")
_BLOCK = 1 << 18  # elements: 1 MiB in float32, so that a block and its temporaries stay in cache


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function] | Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register an operator under `warploom::`.

    Args:
        schema: Name and signature, `name(Tensor x, ...) -> ...`; must be functional.
        run: The body, on real tensors of any device.
        fake: The same on tensors without storage: shapes, dtypes and strides of the results.
        function: Carries the gradient; its `forward` calls the operator `below_autograd`. None
            gives the results no gradient. What is no class is the kernel under the Autograd key.

    Returns:
        The operator, `torch.ops.warploom.<name>.default`.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _on_one_device(name, run), "CompositeExplicitAutograd")
    fake = _on_one_device(name, fake)
    torch.library.register_fake(f"warploom::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.warploom, name).default
    apply: Any = getattr(function, "apply", None)

    def differentiable(*args: Any) -> Any:
        refuse_tangents(name, args)
        graph = torch.is_grad_enabled() and apply is not None
        if graph and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return apply(*args)
        return below_autograd(op, *args)

    own = function is not None and apply is None
    _LIBRARY.impl(name, function if own else differentiable, "Autograd")
    return op


def need_tensors(op: str, **named: object) -> None:
    """Refuse what is no tensor, before its shape is asked for.

    Args:
        op: Operator, for the message.
        **named: Arguments by name.

    Raises:
        TypeError: If one of them is not a tensor.
    """
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")


def need_tensor_list(op: str, name: str, listed: Iterable[object]) -> None:
    """Refuse a list that holds something else than tensors, such as a gradient that is None.

    Args:
        op: Operator, for the message.
        name: Of the list.
        listed: Its elements.

    Raises:
        TypeError: If one of them is not a tensor.
    """
    for n, x in enumerate(listed):
        if not isinstance(x, Tensor):
            need_tensors(op, **{f"{name}[{n}]": x})


def refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Refuse forward-mode differentiation, which would silently give nothing.

    Args:
        name: Of the operator.
        args: Its arguments.

    Raises:
        RuntimeError: If one of them carries a tangent.
    """
    if forward_ad._current_level < 0:
        return
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"{name.removesuffix('_forward')}: no forward-mode derivative (jvp, make_dual): "
                f"differentiate backwards"
            )


def _on_one_device(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse tensors of several devices, and switch autocast off: a body says its own dtypes.

    A number (0-dim, on the CPU) may go with tensors of any device.
    """

    @functools.wraps(body)
    def checked(*args: Any) -> Any:
        first = None
        for a in args:
            for x in a if isinstance(a, list) else (a,):
                if not isinstance(x, Tensor) or x.device == first:
                    continue
                if first is not None and not (x.dim() == 0 and x.device.type == "cpu"):
                    op = name.removesuffix("_forward").removesuffix("_backward")
                    raise ValueError(
                        f"{op}: all tensors must be on one device, got {first} and {x.device}: "
                        f"move them with .to({str(first)!r})"
                    )
                first = first or x.device
        kind = "cpu" if first is None else first.type
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return body(*args)
        return body(*args)

    return checked


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """Call `op` so that it is dispatched below the Autograd key."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def first_derivative_only(op: str) -> None:
    """Refuse a backward that is to be differentiated again: its graph would silently lack terms.

    Args:
        op: Operator, for the message.

    Raises:
        RuntimeError: If the backward runs with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: there is no second derivative; create_graph must be False")


def row_blocks(rows: int, width: int, block: int = _BLOCK) -> Iterator[slice]:
    """Cut `rows` of `width` elements into equal blocks whose temporaries fit the CPU's caches.

    Args:
        rows: At least 0.
        width: Elements a row.
        block: Elements a block, about; a block has at least one row.

    Yields:
        Slices that cover `range(rows)` in order; nothing for 0 rows.
    """
    if not rows:
        return
    count = -(-rows * width // block) or 1
    step = -(-rows // count)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def wide(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype to compute in: float32, or float64 when the input is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(*factors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast would, if it is on: what is kept is then what is multiplied.

    Args:
        factors: Of matrix products, such as an input and its weight.

    Returns:
        They in the dtype of autocast, float64 as it is; unchanged where autocast is off.
    """
    kind = factors[0].device.type  # meta knows no autocast
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return factors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in factors)
