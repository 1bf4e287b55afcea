"""A linear layer whose three matrix products take FP8 operands.

    y = x weight^T,    dx = dy weight,    dweight = dy^T x

Each operand is rounded once, from the tensor itself, in groups along the dimension that its product
contracts. Products of FP8 numbers are exact, sums are float32 (float64 for float64 tensors), y, dx
and dweight are rounded once to their dtype. By `recipe.scaling`:

    product   operand     contracts  tensor     row        block             mx          format
    y         x           D          one scale  of a row   1 x 128           1 x 32      forward
    y         weight      D          one scale  of a row   128 x 128         1 x 32      forward
    dx        dy          F          one scale  of a row   1 x 128           1 x 32      gradient
    dx        weight^T    F          as in y    of a row   as in y           1 x 32      forward
    dweight   dy^T        T          as in dx   of a row   1 x 128           1 x 32      gradient
    dweight   x^T         T          as in y    of a row   1 x 128           1 x 32      forward

"As in" means the same codes, transposed; a row of x^T is a feature over all tokens. The gradients
are straight-through: those of the rounded product, at the tensors before rounding.

Saved for the backward: x^T in FP8, one byte an element (and the weight's two copies, which all
calls of a step share, if they are given), not x.

Shapes: T tokens, D input width, F output width. Bound by the matrix units, 6 T D F FLOPs.

Source: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433, section 3.1; DeepSeek 2024,
https://arxiv.org/abs/2412.19437, figures 6 and 7; Mishra et al. 2025,
https://arxiv.org/abs/2506.08027, section 3.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..library import autocast, below_autograd, first_derivative_only, need_tensors, register
from ..quant.fp8 import Fp8
from ..quant.mx import Mx
from .fp8 import Product, product, scale_shape
from .fp8_recipe import Fp8Recipe, Fp8Scales, Fp8Weight, fp8_weight, need_recipe, quantize

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def _bytes(x: Tensor) -> Tensor:
    """View one-byte numbers as bytes: opcheck adds outputs up, which PyTorch cannot do in FP8."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _numbers(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mx = scale.dtype == torch.uint8
    return codes.view(dtype), scale.view(torch.float8_e8m0fnu) if mx else scale


def _copy(q: Fp8Weight) -> tuple[Tensor, Tensor]:
    """Return the transposed copy and its scale."""
    assert q.data_t is not None
    assert q.scale_t is not None
    return q.data_t, q.scale_t


def _forward(
    x: Tensor, weight: Tensor, codes: Tensor, codes_scale: Tensor, copy: Tensor, copy_scale: Tensor,
    scale: Tensor | None, gradient_scale: Tensor | None, scaling: Product, dtype: torch.dtype,
    gradient_dtype: torch.dtype, power_of_two: bool, keep: bool, backend: str | None,
) -> _Parts:  # fmt: skip
    """Return y, the transposed copy of x and its scale if kept, and max |x| if one scale is."""
    x_TD = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    q = quantize(x_TD, scaling, dtype, scale, power_of_two, keep, backend)
    second = _numbers(codes, codes_scale, dtype)
    pair: Product = "tile" if scaling == "block" else scaling
    y = product(q.data, q.scale, *second, pair, x.dtype, backend)
    y = y.view(*x.shape[:-1], codes.shape[0])
    amax = x.new_empty(0, dtype=torch.float32) if isinstance(q, Mx) or q.amax is None else q.amax
    if not keep:
        return y, x.new_empty(0, dtype=torch.uint8), amax.new_empty(0), amax
    copied, copied_scale = _copy(q)
    if copied_scale is q.scale and scale is not None:
        copied_scale = copied_scale.clone()  # an output may not be an input
    return y, _bytes(copied), _bytes(copied_scale), amax


def _forward_fake(
    x: Tensor, weight: Tensor, codes: Tensor, codes_scale: Tensor, copy: Tensor, copy_scale: Tensor,
    scale: Tensor | None, gradient_scale: Tensor | None, scaling: Product, dtype: torch.dtype,
    gradient_dtype: torch.dtype, power_of_two: bool, keep: bool, backend: str | None,
) -> _Parts:  # fmt: skip
    y = x.new_empty(*x.shape[:-1], codes.shape[0])
    amax = x.new_empty(() if scaling == "tensor" else (0,), dtype=torch.float32)
    if not keep:
        return y, x.new_empty(0, dtype=torch.uint8), amax.new_empty(0), amax
    tokens, width = x.shape[:-1].numel(), x.shape[-1]
    kind = torch.uint8 if scaling == "mx" else torch.float32
    copied_scale = x.new_empty(scale_shape(scaling, width, tokens), dtype=kind)
    return y, x.new_empty((width, tokens), dtype=torch.uint8), copied_scale, amax


def _backward(
    dy: Tensor, x_copy: Tensor, x_scale: Tensor, copy: Tensor, copy_scale: Tensor,
    scale: Tensor | None, scaling: Product, dtype: torch.dtype, gradient_dtype: torch.dtype,
    power_of_two: bool, input_wanted: bool, weight_dtype: torch.dtype | None, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, dweight if it has a dtype, and max |dy| if one scale is; empty what is not."""
    dy_TF = dy.reshape(dy.shape[:-1].numel(), dy.shape[-1])
    keep = weight_dtype is not None
    q = quantize(dy_TF, scaling, gradient_dtype, scale, power_of_two, keep, backend)
    dx, dweight = dy.new_empty(0), dy.new_empty(0, dtype=weight_dtype)
    if input_wanted:
        pair: Product = "tile" if scaling == "block" else scaling
        second = _numbers(copy, copy_scale, dtype)
        dx = product(q.data, q.scale, *second, pair, dy.dtype, backend)
        dx = dx.view(*dy.shape[:-1], copy.shape[0])
    if keep:
        second = _numbers(x_copy, x_scale, dtype)
        dweight = product(*_copy(q), *second, scaling, weight_dtype, backend)
    amax = dy.new_empty(0, dtype=torch.float32) if isinstance(q, Mx) or q.amax is None else q.amax
    return dx, dweight, amax


def _backward_fake(
    dy: Tensor, x_copy: Tensor, x_scale: Tensor, copy: Tensor, copy_scale: Tensor,
    scale: Tensor | None, scaling: Product, dtype: torch.dtype, gradient_dtype: torch.dtype,
    power_of_two: bool, input_wanted: bool, weight_dtype: torch.dtype | None, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = dy.new_empty((*dy.shape[:-1], copy.shape[0]) if input_wanted else 0)
    shape = 0 if weight_dtype is None else (dy.shape[-1], x_copy.shape[0])
    amax = dy.new_empty(() if scaling == "tensor" else 0, dtype=torch.float32)
    return dx, dy.new_empty(shape, dtype=weight_dtype), amax


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> _Parts:
        parts: _Parts = below_autograd(_FORWARD, *args)
        _, x_copy, x_scale, amax = parts
        copy, copy_scale, gradient_scale = args[4], args[5], args[7]
        ctx.save_for_backward(x_copy, x_scale, amax, copy, copy_scale, gradient_scale)
        ctx.weight_dtype, ctx.rest = args[1].dtype, args[8:12]
        ctx.backend = args[13]
        ctx.mark_non_differentiable(*parts[1:])
        ctx.set_materialize_grads(False)
        return parts

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        first_derivative_only("fp8_linear")
        wanted = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(wanted)
        x_copy, x_scale, amax, copy, copy_scale, gradient_scale = ctx.saved_tensors
        dtype = ctx.weight_dtype if wanted[1] else None
        saved = x_copy, x_scale, copy, copy_scale, gradient_scale
        dx, dweight, dy_amax = _BACKWARD(dy, *saved, *ctx.rest, wanted[0], dtype, ctx.backend)
        gradients: list[Tensor | None] = [None] * len(wanted)
        for place, gradient in ((0, dx), (1, dweight), (6, amax), (7, dy_amax)):
            gradients[place] = gradient if wanted[place] else None
        return tuple(gradients)


_FORWARD = register(
    "fp8_linear_forward(Tensor x, Tensor weight, Tensor codes, Tensor codes_scale, Tensor copy,"
    " Tensor copy_scale, Tensor? scale, Tensor? gradient_scale, str scaling, ScalarType dtype,"
    " ScalarType gradient_dtype, bool power_of_two, bool keep, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _Linear,
)  # fmt: skip
_BACKWARD = register(
    "fp8_linear_backward(Tensor dy, Tensor x_copy, Tensor x_scale, Tensor copy, Tensor copy_scale,"
    " Tensor? scale, str scaling, ScalarType dtype, ScalarType gradient_dtype, bool power_of_two,"
    " bool input_wanted, ScalarType? weight_dtype, str? backend) -> (Tensor, Tensor, Tensor)",
    _backward, _backward_fake,
)  # fmt: skip


def _rounding(recipe: Fp8Recipe) -> tuple[Product, torch.dtype, torch.dtype, bool]:
    return recipe.scaling, recipe.dtype, recipe.gradient_dtype, recipe.power_of_two


def _check_scales(recipe: Fp8Recipe, *scales: Tensor | None) -> tuple[Tensor | None, ...]:
    """Hold the scales of delayed scaling to be there when they are needed, and only then."""
    need_recipe("fp8_linear", recipe)
    for scale in scales:
        if (scale is None) == recipe.delayed:
            raise ValueError(
                f"fp8_linear: scales must be given with a recipe that is delayed, and only then, "
                f"got {'none' if scale is None else 'some'} with delayed={recipe.delayed}"
            )
        if scale is None:
            continue
        need_tensors("fp8_linear", scales=scale)
        if scale.dim() or scale.dtype != torch.float32:
            raise ValueError(
                f"fp8_linear: scales must be float32 [], got {scale.dtype} {[*scale.shape]}"
            )
    return scales


def _fits(codes: Tensor, scale: Tensor, recipe: Fp8Recipe, shape: torch.Size) -> bool:
    grouping: Product = "tile" if recipe.scaling == "block" else recipe.scaling
    dtype = torch.float8_e8m0fnu if grouping == "mx" else torch.float32
    same = codes.shape == shape and codes.dtype == recipe.dtype and scale.dtype == dtype
    return same and scale.shape == scale_shape(grouping, *shape)


def _check_weight(
    weight: Tensor, recipe: Fp8Recipe, quantized: Fp8Weight, copy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Refuse the quantised form of another weight; return its parts as the operator takes them."""
    if not isinstance(quantized, Fp8 | Mx):
        name = type(quantized).__name__
        raise TypeError(f"fp8_linear: quantized must be fp8_weight(weight, recipe), got {name}")
    parts = [(quantized.data, quantized.scale, weight.shape)]
    if quantized.data_t is not None and quantized.scale_t is not None:
        parts.append((quantized.data_t, quantized.scale_t, weight.shape[::-1]))
    elif copy:
        raise ValueError(
            f"fp8_linear: the gradient of x takes the transposed copy of the weight, got "
            f"data_t={quantized.data_t}: make it with fp8_weight(..., transpose=True)"
        )
    for codes, scale, shape in parts:
        if not _fits(codes, scale, recipe, shape):
            raise ValueError(
                f"fp8_linear: quantized must be fp8_weight(weight, recipe) of weight "
                f"{[*weight.shape]} with scaling {recipe.scaling!r} in {recipe.dtype}, got "
                f"{[*codes.shape]} with scales {[*scale.shape]} in {codes.dtype} and {scale.dtype}"
            )
    data, scale, _ = parts[0]
    copied, copied_scale = data.new_empty(0), scale.new_empty(0, dtype=torch.float32)
    if len(parts) == 2:
        copied, copied_scale, _ = parts[1]
    return _bytes(data), _bytes(scale), _bytes(copied), _bytes(copied_scale)


def _check(name: str, x: Tensor, weight: Tensor) -> None:
    """Refuse a tensor, x `[..., D]` or dy `[..., F]`, that does not fit the weight `[F, D]`."""
    need_tensors("fp8_linear", **{name: x, "weight": weight})
    if not x.dim() or weight.dim() != 2 or x.shape[-1] != weight.shape[name == "x"]:
        width = "D" if name == "x" else "F"
        raise ValueError(
            f"fp8_linear: {name} must be [..., {width}] and weight [F, D], got {[*x.shape]} and "
            f"{[*weight.shape]}"
        )
    if x.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        raise ValueError(
            f"fp8_linear: {name} and weight must be float16, bfloat16, float32 or float64, got "
            f"{x.dtype} and {weight.dtype}"
        )


def fp8_linear(
    x: Tensor, weight: Tensor, *, recipe: Fp8Recipe, quantized: Fp8Weight | None = None,
    scales: Fp8Scales | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Multiply by a weight in FP8; differentiable in both.

    Args:
        x: `[..., D]`; float16, bfloat16, float32 or float64; under autocast it is cast first.
        weight: `[F, D]`, in any of these dtypes, which is that of its gradient: a float32 master
            beside a bfloat16 `x` has a float32 gradient.
        recipe: How the operands are rounded.
        quantized: `fp8_weight(weight, recipe)`, made once a step; None rounds the weight here
            (under autocast after its cast), by its own largest values even with delayed scales.
        scales: With a recipe that is delayed, and only then; the gradient of each is the amax for
            `amax_history_update`.
        backend: `reference`, `torch` or `triton`; None takes the fastest that is proven here.

    Returns:
        `[..., F]` in the dtype of `x`.

    Raises:
        TypeError: If `x` or `weight` is no tensor, `recipe` no recipe, or `quantized` no weight.
        ValueError: If shapes or dtypes do not fit, `quantized` is of another weight or recipe, or
            scales are missing or not wanted.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    _check("x", x, weight)
    both = _check_scales(recipe, *((None, None) if scales is None else scales))
    choose("fp8_linear", x.device, x.dtype, backend)
    x, cast = autocast(x, weight if quantized is None else weight.new_empty(0))
    graph = torch.is_grad_enabled()
    if quantized is None:
        weight = cast
        own = None if backend == "torch" else backend
        needed = graph and x.requires_grad
        quantized = fp8_weight(weight, recipe, transpose=needed, backend=own)
    parts = _check_weight(weight, recipe, quantized, graph and x.requires_grad)
    keep = graph and weight.requires_grad
    y: Tensor = _FORWARD(x, weight, *parts, *both, *_rounding(recipe), keep, backend)[0]
    return y


def fp8_linear_input_gradient(
    dy: Tensor, weight: Tensor, *, recipe: Fp8Recipe, quantized: Fp8Weight | None = None,
    scale: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Return the input gradient of `fp8_linear` alone: the same bits as in its backward.

    Args:
        dy: Upstream gradient `[..., F]`.
        weight: `[F, D]`.
        recipe: As in the forward.
        quantized: As in the forward.
        scale: Of `dy`, with a recipe that is delayed, float32 `[]`.
        backend: As in the forward.

    Returns:
        `[..., D]` in the dtype of `dy`.

    Raises:
        ValueError: If shapes or dtypes do not fit.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    _check("dy", dy, weight)
    _check_scales(recipe, scale)
    choose("fp8_linear", dy.device, dy.dtype, backend)
    if quantized is None:
        quantized = fp8_weight(weight, recipe, backend=None if backend == "torch" else backend)
    *_, copy, copy_scale = _check_weight(weight, recipe, quantized, True)
    none = dy.new_empty(0, dtype=torch.uint8), dy.new_empty(0, dtype=torch.float32)
    dx: Tensor = _BACKWARD(
        dy, *none, copy, copy_scale, scale, *_rounding(recipe), True, None, backend
    )[0]
    return dx


def fp8_linear_weight_gradient(
    dy: Tensor, x: Tensor, *, recipe: Fp8Recipe, scales: Fp8Scales | None = None,
    dtype: torch.dtype | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Return the weight gradient of `fp8_linear` alone: the same bits as in its backward.

    Args:
        dy: Upstream gradient `[..., F]`.
        x: Input `[..., D]` of the forward.
        recipe: As in the forward.
        scales: As in the forward.
        dtype: Of the result, such as float32 for a main gradient; None takes that of `x`.
        backend: As in the forward.

    Returns:
        `[F, D]`.

    Raises:
        ValueError: If shapes or dtypes do not fit.
        RuntimeError: If `backend` cannot serve these tensors here.
    """
    need_tensors("fp8_linear", dy=dy, x=x)
    served = {dy.dtype, x.dtype, dtype or x.dtype} <= {*_DTYPES}
    if dy.shape[:-1] != x.shape[:-1] or not x.dim() or not dy.dim() or not served:
        raise ValueError(
            f"fp8_linear: dy must be [..., F] and x [..., D] of the same tokens, all and dtype of "
            f"floating point, got {[*dy.shape]} in {dy.dtype}, {[*x.shape]} in {x.dtype}, {dtype}"
        )
    scale, gradient_scale = _check_scales(recipe, *((None, None) if scales is None else scales))
    choose("fp8_linear", x.device, x.dtype, backend)
    x_TD = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    rounding = recipe.dtype, scale, recipe.power_of_two, True, backend
    copy = map(_bytes, _copy(quantize(x_TD, recipe.scaling, *rounding)))
    none = dy.new_empty(0, dtype=torch.uint8), dy.new_empty(0, dtype=torch.float32)
    rest = *none, gradient_scale, *_rounding(recipe), False, dtype or x.dtype, backend
    dweight: Tensor = _BACKWARD(dy, *copy, *rest)[1]
    return dweight
