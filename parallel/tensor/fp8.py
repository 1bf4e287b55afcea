"""The product of a linear layer in FP8: a weight that is rounded once a step, and its scales.

    y = x weight^T,    dx = dy weight,    dweight = dy^T x       bit for bit those of fp8_linear

What is rounded when, and what stays in high precision:

    weight       once a step, with its transposed copy, from the parameter; remade when it changes
    x            in the forward; kept for the backward is x^T alone, one byte an element
    dy           in the backward, once for both gradients
    y, dx, dweight, bias, sums over ranks    in the layer's dtype; dweight in the weight's

A parameter is never rounded to FP8 in place: the optimizer steps over the parameter or its float32
master, and what it adds is not lost below a step of FP8. Where parameters come and go (ZeRO-3) the
codes go with them, and are made again at each gather.

Delayed scaling rounds x, weight and dy with scales of earlier steps. `history` and `scale` are
buffers of a layer, equal on every rank that has it; `seen` is the largest value of the step so far.
`update_scales` takes the maximum of `seen` over the ranks that hold other parts of these tensors
(tp) or other tokens, in one all-reduce a step and group, and never within a product. A tensor
whose history is empty, as in a run's first step, is rounded by its own largest value instead.
Scales without delay are those of what a rank holds: over tp they are at least as fine as one
rank's.

Recomputation that needs no more than what a product keeps stops before it multiplies.

Source: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433, section 3; DeepSeek 2024,
https://arxiv.org/abs/2412.19437, section 3.3 (what stays in high precision).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from warploom.kernels.gemm import Fp8Recipe, Fp8Weight, amax_history_update, fp8_gemm, fp8_weight
from warploom.kernels.gemm.fp8_recipe import quantize
from warploom.kernels.library import autocast, first_derivative_only
from warploom.kernels.quant.formats import MX_BLOCK
from warploom.kernels.quant.mx import Mx

from ..checkpoint import Entry
from ..collectives import Group, all_reduce_
from ..sharding import whole
from .product import WeightGradients, current_queue, kept, uncompiled

_X, _WEIGHT, _GRADIENT = range(3)  # rows of the buffers
_ALIGNED = 16  # bytes of a row that the matrix units read at a time


def check_widths(recipe: Fp8Recipe, widths: Mapping[str, int]) -> None:
    """Refuse widths of a rank that FP8 products cannot serve.

    Args:
        recipe: How the products are rounded.
        widths: What a rank's products contract or give, by name.

    Raises:
        ValueError: If one is no multiple of 16, or of the 32 of an MX block.
    """
    unit = MX_BLOCK if recipe.scaling == "mx" else _ALIGNED
    for name, width in widths.items():
        if width % unit:
            raise ValueError(
                f"fp8 with scaling {recipe.scaling!r} needs {name} to be a multiple of {unit} on a "
                f"rank, got {width}: choose another size or another tp, or leave fp8 out"
            )


class Fp8Product(nn.Module):
    """Multiplies by the weight of one layer in FP8; the layer keeps the weight.

    Args:
        recipe: How the operands are rounded.
    """

    history: Tensor | None
    scale: Tensor | None
    seen: Tensor | None

    def __init__(self, recipe: Fp8Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        delayed = recipe.delayed
        self.register_buffer("history", torch.zeros(3, recipe.history) if delayed else None)
        self.register_buffer("scale", torch.ones(3) if delayed else None)
        self.register_buffer("seen", torch.zeros(3) if delayed else None, persistent=False)
        self._made: tuple[ref[Tensor], tuple[int, int], Fp8Weight] | None = None
        self._measured: tuple[int, list[bool]] = (-1, [])

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "Fp8Product":
        """Move as modules do, but keep scales in float32, and fresh where they had no memory."""
        before = self.history, self.scale, self.seen
        super()._apply(fn, recurse)
        for name, old in zip(("history", "scale", "seen"), before, strict=True):
            new: Tensor | None = getattr(self, name)
            if old is None or new is None:
                continue
            if old.is_meta and not new.is_meta:
                old = torch.full_like(new, float(name == "scale"))
            setattr(self, name, old.to(device=new.device, dtype=torch.float32))
        self.forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made from a weight: a copy of a layer has another."""
        return {**self.__dict__, "_made": None, "_measured": (-1, [])}

    def forget(self) -> None:
        """Let go of the codes of the weight: its memory goes, or is about to be another's."""
        self._made = None

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply `[..., D]` by the weight `[F, D]` to `[..., F]`; a weight gradient may wait.

        Raises:
            RuntimeError: In the backward, if the weight was written since the forward.
        """
        return _multiply(self, x, weight)

    def codes(self, weight: Tensor, *, copy: bool) -> Fp8Weight:
        """Return the rounded weight, made anew if the weight, or the scale, is another.

        Args:
            weight: `[F, D]`.
            copy: Whether the transposed copy is needed.
        """
        version = weight._version, 0 if self.scale is None else self.scale._version
        made = self._made
        same = made is not None and made[0]() is weight and made[1] == version
        if made is not None and same and (made[2].data_t is not None or not copy):
            return made[2]
        with torch.no_grad():
            own = fp8_weight(weight, self.recipe, scale=self._known(_WEIGHT), transpose=copy)
            self._see(_WEIGHT, own)
        self._made = ref(weight), version, own
        return own

    def round(self, x: Tensor, which: int, *, transpose: bool, note: bool) -> Fp8Weight:
        """Quantise the input or a gradient.

        Args:
            x: `[T, D]`.
            which: Row of the buffers.
            transpose: Whether the transposed copy is needed.
            note: Whether its largest value counts for the step: not where nothing trains.
        """
        recipe = self.recipe
        q = quantize(
            x, recipe.scaling, recipe.gradient_dtype if which == _GRADIENT else recipe.dtype,
            self._known(which), recipe.power_of_two, transpose,
        )  # fmt: skip
        if note:
            self._see(which, q)
        return q

    def _known(self, which: int) -> Tensor | None:
        """Return the delayed scale; None where there is none, or nothing was measured yet."""
        if self.history is None or self.scale is None:
            return None
        if self._measured[0] != self.history._version:
            self._measured = self.history._version, (self.history > 0).any(1).tolist()
        return self.scale[which].clone() if self._measured[1][which] else None

    def _see(self, which: int, q: Fp8Weight) -> None:
        if self.seen is not None and not isinstance(q, Mx) and q.amax is not None:
            self.seen[which] = torch.maximum(self.seen[which], q.amax)


def _transposed(q: Fp8Weight) -> Fp8Weight:
    """Return the transposed copy as an operand."""
    assert q.data_t is not None
    assert q.scale_t is not None
    return q._replace(data=q.data_t, scale=q.scale_t, data_t=None, scale_t=None)


@uncompiled
def _multiply(product: Fp8Product, x: Tensor, weight: Tensor) -> Tensor:
    x, _ = autocast(x, x)
    graph = torch.is_grad_enabled()
    keep = graph and weight.requires_grad
    queue = current_queue() if keep else None
    rows = x.reshape(-1, x.shape[-1])
    with torch.no_grad():
        q = product.round(rows, _X, transpose=keep, note=graph)
    token = kept(q.data_t, q.scale_t) if keep else None
    q = q._replace(data_t=None, scale_t=None)
    seen = weight if keep and queue is None else None
    back = graph and x.requires_grad
    y: Tensor = _Product.apply(rows, seen, token, (weight, q), product, back, queue)
    return y.view(*x.shape[:-1], weight.shape[0])


class _Product(torch.autograd.Function):
    """The product; `held` are the weight, seen by autograd or not, and the rounded input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, token: Tensor | None,
        held: tuple[Tensor, Fp8Weight], product: Fp8Product, back: bool,
        queue: WeightGradients | None,
    ) -> Tensor:  # fmt: skip
        own, q = held
        ctx.saved = None if token is None else token.grad_fn
        ctx.held, ctx.version, ctx.product, ctx.queue = own, own._version, product, queue
        return fp8_gemm(q, product.codes(own, copy=back), dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("a product in FP8")
        (dy,), weight, product, queue = dys, ctx.held, ctx.product, ctx.queue
        if weight._version != ctx.version:
            raise RuntimeError(
                f"a weight that is multiplied in FP8 must stay as it is until the backward, but "
                f"one of shape {[*weight.shape]} was written since its forward: step the "
                f"optimizer after every backward"
            )
        wanted = ctx.saved is not None
        q = product.round(dy, _GRADIENT, transpose=wanted, note=True)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            copy = _transposed(product.codes(weight, copy=True))
            dx = fp8_gemm(q, copy, dtype=dy.dtype)
        if wanted:
            data_t, scale_t = ctx.saved.saved_tensors
            x_t = q._replace(data=data_t, scale=scale_t, data_t=None, scale_t=None)
            dy_t, dtype = _transposed(q), weight.dtype
            if queue is None:
                dweight = fp8_gemm(dy_t, x_t, dtype=dtype)
            else:
                queue.put(weight, lambda: fp8_gemm(dy_t, x_t, dtype=dtype))
        return dx, dweight, *(None,) * 5


class _Delayed(NamedTuple):
    """A product with delayed scaling, its path, and its buffers."""

    path: str
    product: Fp8Product
    history: Tensor
    scale: Tensor
    seen: Tensor


def _delayed(model: nn.Module) -> list[_Delayed]:
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, Fp8Product):
            continue
        history, scale, seen = module.history, module.scale, module.seen
        if history is not None and scale is not None and seen is not None:
            found.append(_Delayed(path, module, history, scale, seen))
    return found


@torch.no_grad()
def update_scales(model: nn.Module, *groups: Group) -> None:
    """Put what the step has seen into every history of the model; once a step.

    A collective call over the groups, one all-reduce each for all layers of a recipe.

    Args:
        model: Any module that holds layers with delayed scaling.
        groups: Ranks that hold other parts of the tensors, or other tokens: `mesh.tp` and
            `mesh.tokens`.
    """
    found = _delayed(model)
    for recipe in dict.fromkeys(one.product.recipe for one in found):
        layers = [one for one in found if one.product.recipe == recipe]
        seen = torch.stack([one.seen for one in layers])
        seen = torch.where(seen.isfinite(), seen, 0.0)
        for group in groups:
            all_reduce_(seen, group, op="max")
        history = torch.stack([one.history for one in layers])
        scale = torch.stack([one.scale for one in layers])
        forward, backward = slice(_X, _WEIGHT + 1), slice(_GRADIENT, None)
        made = [
            amax_history_update(history[:, rows], seen[:, rows], scale[:, rows], recipe, dtype)
            for rows, dtype in ((forward, recipe.dtype), (backward, recipe.gradient_dtype))
        ]
        history, scale = (torch.cat(parts, 1) for parts in zip(*made, strict=True))
        measured = (history > 0).any(2).tolist()
        for n, one in enumerate(layers):
            one.history.copy_(history[n])
            one.scale.copy_(scale[n])
            one.seen.zero_()
            one.product._measured = one.history._version, measured[n]


def scale_entries(model: nn.Module, rename: Callable[[str], str] | None = None) -> list[Entry]:
    """List histories and scales for a checkpoint, as `buffer/<path>.history` and `.scale`.

    Args:
        model: Any module that holds layers with delayed scaling.
        rename: From the name by module path to the name in the unsharded model.
    """
    rename = rename or (lambda name: name)
    return [
        Entry("buffer", buffer, whole(rename(f"{one.path}.{name}"), buffer.shape))
        for one in _delayed(model)
        for name, buffer in (("history", one.history), ("scale", one.scale))
    ]
