"""Recipes of FP8 training: which tensor is rounded how, and the scales of delayed scaling.

Delayed scaling rounds with a scale from earlier steps, which is known before the tensor is read:

    history = [amax, history without its oldest]
    scale = max(history) / MAX * 2^margin          or the scale as it was, while the history is 0

An amax that is not finite is left out of the history: a step that overflows does not set a scale.

Source: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433, sections 2 and 3.1 (e4m3
forward, e5m2 for gradients); DeepSeek 2024, https://arxiv.org/abs/2412.19437, section 3.3.2 (e4m3
throughout, blocks and tiles); Mishra et al. 2025, https://arxiv.org/abs/2506.08027, section 3 (MX).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..library import need_tensors
from ..quant.fp8 import Fp8, fp8_quantize, fp8_scales
from ..quant.mx import Mx, mx_quantize
from .fp8 import Product

Format = Literal["e4m3", "e5m2"]
Fp8Weight = Fp8 | Mx
"""A weight that is quantised once a step, with its transposed copy for the input gradient."""

_TYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
)
_SCALINGS = ("tensor", "row", "block", "mx")


@dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """How the matrix products of a layer are rounded; see the table of `fp8_training`.

    Attributes:
        scaling: What shares a scale: the "tensor", a "row", a "block" of 128 elements (weights: a
            tile of 128 x 128), or "mx", blocks of 32 with E8M0 scales, rounded up.
        forward: Format of inputs and weights.
        gradient: Format of upstream gradients; None takes e5m2 for "tensor" and "row", whose scale
            spans many magnitudes, and e4m3 for "block" and "mx".
        power_of_two: Whether scales are rounded up to powers of two; those of "mx" always are.
        delayed: Whether the scales of inputs and gradients come from earlier steps ("tensor" only).
        history: Steps whose largest values delayed scaling looks at, at least 1.
        margin: Powers of two that delayed scaling leaves above the largest value, at least 0.
    """

    scaling: Literal["tensor", "row", "block", "mx"] = "block"
    forward: Format = "e4m3"
    gradient: Format | None = None
    power_of_two: bool = False
    delayed: bool = False
    history: int = 16
    margin: int = 0

    def __post_init__(self) -> None:
        if self.scaling not in _SCALINGS:
            hint = ": delayed scaling is scaling='tensor', delayed=True"
            raise ValueError(
                f"Fp8Recipe: scaling must be one of {', '.join(_SCALINGS)}, got {self.scaling!r}"
                f"{hint if str(self.scaling) == 'delayed' else ''}"
            )
        if self.forward not in _TYPES or self.gradient not in (*_TYPES, None):
            raise ValueError(
                f"Fp8Recipe: forward and gradient must be e4m3 or e5m2, got {self.forward!r} and "
                f"{self.gradient!r}"
            )
        if self.delayed and self.scaling != "tensor":
            raise ValueError(
                f"Fp8Recipe: delayed scaling goes with scaling 'tensor', got {self.scaling!r}"
            )
        steps, margin = self.history, self.margin
        if not (isinstance(steps, int) and isinstance(margin, int) and steps > 0 <= margin):
            raise ValueError(
                f"Fp8Recipe: history must be an integer of at least 1 and margin one of at least "
                f"0, got {steps!r} and {margin!r}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and weights."""
        return _TYPES[self.forward]

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype of upstream gradients."""
        coarse = self.scaling in ("tensor", "row")
        return _TYPES[self.gradient or ("e5m2" if coarse else "e4m3")]


def need_recipe(op: str, recipe: Fp8Recipe) -> None:
    """Refuse what is no recipe, such as its name.

    Args:
        op: Operator, for the message.
        recipe: What was given.

    Raises:
        TypeError: If it is not an `Fp8Recipe`.
    """
    if not isinstance(recipe, Fp8Recipe):
        raise TypeError(
            f"{op}: recipe must be an Fp8Recipe, got {recipe!r}: make one, such as "
            f"Fp8Recipe(scaling='block')"
        )


class Fp8Scales(NamedTuple):
    """Scales of delayed scaling, float32 `[]`; the gradient of each is the amax of what it scaled.

    So a backward leaves in `.grad`, or gives to a hook, what the history needs. Autograd adds up
    the gradients of a tensor that is used twice: give each call tensors of its own, with
    `requires_grad_()`.

    Attributes:
        x: Of the input.
        gradient: Of the upstream gradient.
    """

    x: Tensor
    gradient: Tensor


def quantize(
    x: Tensor, scaling: Product, dtype: torch.dtype, scale: Tensor | None = None,
    power_of_two: bool = False, transpose: bool = False, backend: str | None = None,
) -> Fp8 | Mx:  # fmt: skip
    """Quantise as a recipe does.

    Args:
        x: `[T, D]`.
        scaling: "tensor", "row", "block", "tile" or "mx".
        dtype: float8_e4m3fn or float8_e5m2.
        scale: Of delayed scaling, or None.
        power_of_two: Whether scales are powers of two; a given one is used as it is.
        transpose: Whether to add the transposed copy, quantised along T.
        backend: Of the product: `torch`, which has no quantiser, takes the default one.
    """
    backend = None if backend == "torch" else backend
    if scaling == "mx":
        return mx_quantize(x, dtype=dtype, rounding="ceil", transpose=transpose, backend=backend)
    return fp8_quantize(
        x, scaling=scaling, dtype=dtype, scale=scale, power_of_two=power_of_two and scale is None,
        transpose=transpose, backend=backend,
    )  # fmt: skip


def fp8_weight(
    weight: Tensor, recipe: Fp8Recipe, *, scale: Tensor | None = None, transpose: bool = True,
    backend: str | None = None,
) -> Fp8Weight:  # fmt: skip
    """Quantise a weight for the products of a step.

    Args:
        weight: `[F, D]`; float16, bfloat16, float32 or float64. Its graph is left: the gradient
            reaches it through `fp8_linear`.
        recipe: How it is rounded.
        scale: With `recipe.delayed`, of an earlier step, float32 `[]`; None computes it.
        transpose: Whether to add the transposed copy, which the input gradient needs.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        The weight `[F, D]` and its copy `[D, F]`: an `Mx` with scaling "mx", else an `Fp8`, whose
        `amax` is set with scaling "tensor".

    Raises:
        TypeError: If `weight` or `scale` is no tensor, or `recipe` no recipe.
        ValueError: If the weight is not a matrix, or a scale is given where none is delayed.
        RuntimeError: If `backend` cannot serve this weight here.
    """
    need_tensors("fp8_weight", weight=weight, **({} if scale is None else {"scale": scale}))
    need_recipe("fp8_weight", recipe)
    if weight.dim() != 2:
        raise ValueError(f"fp8_weight: weight must be [F, D], got {[*weight.shape]}")
    if scale is not None and not recipe.delayed:
        raise ValueError(
            f"fp8_weight: scale goes with a recipe that is delayed, got scaling {recipe.scaling!r} "
            f"with delayed=False"
        )
    scaling: Product = "tile" if recipe.scaling == "block" else recipe.scaling
    rest = recipe.dtype, scale, recipe.power_of_two, transpose, backend
    return quantize(weight.detach(), scaling, *rest)


def amax_history_update(
    history: Tensor, amax: Tensor, scale: Tensor, recipe: Fp8Recipe, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Put the largest value of a step into the history and compute the next scale.

    Ranks that share a tensor take the maximum of their amax first.

    Args:
        history: `[..., H]` float32, the newest first; zeros at the start.
        amax: `[...]` float32: max |x| of the step.
        scale: `[...]` float32, the scale of the step; ones at the start, by which gradients may
            become 0: that step is then good for its amax alone.
        recipe: Gives margin and `power_of_two`.
        dtype: Which the scale is for: `recipe.dtype` or `recipe.gradient_dtype`.

    Returns:
        The history and the scale of the next step, new tensors.

    Raises:
        ValueError: If the shapes do not fit.
    """
    need_tensors("amax_history_update", history=history, amax=amax, scale=scale)
    shape = *amax.shape, history.shape[-1] if history.dim() else 0
    if history.shape != shape or scale.shape != amax.shape or not history.numel():
        raise ValueError(
            f"amax_history_update: history must be [..., H], H at least 1, where amax and scale "
            f"are [...], got {[*history.shape]}, {[*amax.shape]} and {[*scale.shape]}"
        )
    amax = torch.where(amax.isfinite(), amax, 0.0)
    history = torch.cat([amax.unsqueeze(-1), history[..., :-1]], -1)
    top = history.amax(-1)
    scales, _ = fp8_scales(top, dtype, recipe.power_of_two)
    return history, torch.where(top > 0, scales * 2.0**recipe.margin, scale)
