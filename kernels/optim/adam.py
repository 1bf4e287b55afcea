"""AdamW with decoupled weight decay, over many tensors in one launch.

    g <- scale g                                          (the coefficient of a clip)
    m <- m + (1 - b1) (g - m)        v <- b2 v + (1 - b2) g^2
    w <- w - lr wd w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

w is the parameter, or a float32 master of which the parameter is the rounded copy, written in the
same pass, or the bfloat16 parameter joined with 16 further bits (`split_remainder`). With a flag
`found_inf` that is not 0, nothing changes, the step count included. Step, rate, scale and flag are
read on the device: no call waits for it, and a CUDA graph holds for every step.

Bound by memory. Roof, bytes an element / bandwidth: 28 for float32 in place; 28 for bfloat16
parameters and gradients with masters (reads 2 + 12, writes 2 + 12); 26 with remainders and float32
gradients, 24 with bfloat16 ones.

Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2; the join of a
rounded half and a signed remainder is that of Transformer Engine's FusedAdam.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from ..library import need_tensor_list, need_tensors, register, row_blocks, wide
from .table import Plan, refuse_shared_memory

_NARROW = (torch.float16, torch.bfloat16)
_DTYPES = (*_NARROW, torch.float32, torch.float64)
_NAMES = ("parameters", "gradients", "means", "squares")
_NAN = 0x7FC00000  # the quiet NaN whose low half is 0


class Rates(NamedTuple):
    """The numbers of a step: learning rate, decay rates of the moments, eps, weight decay."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def split_remainder(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into the nearest bfloat16 (ties away from zero) and what is left of the bits.

    Args:
        master: Any shape, float32.

    Returns:
        The bfloat16 and a signed int16 remainder; `join_remainder` gives the bits back. Every NaN
        becomes the quiet one, whose bfloat16 is NaN too.

    Raises:
        ValueError: If it is not float32.
    """
    if master.dtype != torch.float32:
        raise ValueError(f"split_remainder: master must be float32, got {master.dtype}")
    bits = master.view(torch.int32)
    bits = torch.where(master.isnan(), torch.full_like(bits, _NAN), bits)
    low = bits.to(torch.int16)
    return ((bits - low) >> 16).to(torch.int16).view(torch.bfloat16), low


def join_remainder(parameter: Tensor, remainder: Tensor) -> Tensor:
    """Join what `split_remainder` split.

    Args:
        parameter: Any shape, bfloat16.
        remainder: The same shape, int16.

    Returns:
        float32, of the same shape.

    Raises:
        ValueError: If dtypes or shapes are not these.
    """
    found = parameter.dtype, remainder.dtype
    if found != (torch.bfloat16, torch.int16) or parameter.shape != remainder.shape:
        raise ValueError(
            f"join_remainder: the parameter must be bfloat16 and the remainder int16 of its shape, "
            f"got {found[0]} {[*parameter.shape]} and {found[1]} {[*remainder.shape]}"
        )
    return ((parameter.view(torch.int16).int() << 16) + remainder).view(torch.float32)


def adamw_reference(
    parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, *, step: int,
    learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Specify a step of one tensor; tests hold every backend to it.

    Args:
        parameter: Any shape.
        gradient: The same shape, as the others.
        mean: First moment.
        square: Second moment.
        step: t, at least 1.
        learning_rate: lr.
        betas: b1 and b2.
        eps: Added to the root.
        weight_decay: wd.

    Returns:
        The new parameter and moments.
    """
    m = mean + (1 - betas[0]) * (gradient - mean)
    v = betas[1] * square + (1 - betas[1]) * gradient.square()
    update = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
    return parameter * (1 - learning_rate * weight_decay) - learning_rate * update, m, v


def _advance(step: Tensor, found: Tensor | None) -> None:
    """Count a step, unless the flag is up; after all checks."""
    step.add_(1 if found is None else found == 0)


def _write(parameter: Tensor, value: Tensor, found: Tensor | None) -> None:
    parameter.copy_(value if found is None else torch.where(found != 0, parameter, value))


def _torch(
    parameters: list[Tensor], gradients: list[Tensor], means: list[Tensor], squares: list[Tensor],
    extra: list[Tensor], step: Tensor, rate: Tensor | None, scale: Tensor | None,
    found: Tensor | None, rates: Rates,
) -> None:  # fmt: skip
    """Step with torch's fused kernel, block by block where something is to be converted."""
    _advance(step, found)
    skip = None if found is None else (found != 0).float()

    def fused(w: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor]) -> None:
        torch._fused_adamw_(
            *(w, g, m, v, [], [step] * len(w)), lr=rates.learning_rate if rate is None else rate,
            beta1=rates.beta1, beta2=rates.beta2, weight_decay=rates.weight_decay, eps=rates.eps,
            amsgrad=False, maximize=False, found_inf=skip,
        )  # fmt: skip

    if not extra and scale is None and gradients[0].dtype == parameters[0].dtype:
        fused(parameters, gradients, means, squares)
        return
    for n in range(len(parameters)):
        tensors = [column[n].view(-1) for column in (parameters, gradients, means, squares)]
        size = tensors[0].numel()
        for part in row_blocks(size, 1, size) if step.is_cuda else row_blocks(size, 1):
            w, g, m, v = (t[part] for t in tensors)
            e = extra[n].view(-1)[part] if extra else None
            master = w if e is None else join_remainder(w, e) if e.dtype == torch.int16 else e
            g = g.to(master.dtype)
            fused([master], [g if scale is None else g * scale], [m], [v])
            if e is None:
                continue
            if e.dtype == torch.int16:
                high, low = split_remainder(master)
                _write(w, high, found)
                _write(e, low, found)
            else:
                _write(w, master.to(w.dtype), found)


def _adamw(
    parameters: list[Tensor], gradients: list[Tensor], means: list[Tensor], squares: list[Tensor],
    extra: list[Tensor], step: Tensor, rate: Tensor | None, scale: Tensor | None,
    found: Tensor | None, learning_rate: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, plan: list[Tensor] | None, backend: str | None,
) -> None:  # fmt: skip
    if not parameters:
        _advance(step, found)
        return
    gradients = [g.contiguous() for g in gradients]
    rates = Rates(learning_rate, beta1, beta2, eps, weight_decay)
    lists = (parameters, gradients, means, squares, extra)
    names = dict(zip(_NAMES, lists[:4], strict=True))
    if extra:
        names["masters or remainders"] = extra
    if plan is None:  # a plan has seen to it
        refuse_shared_memory("adamw_", names)
    if choose("adamw", step.device, parameters[0].dtype, backend) == "triton":
        from .adam_triton import update

        update(*lists, step, rate, scale, found, rates, plan)
    else:
        _torch(*lists, step, rate, scale, found, rates)
    torch.autograd.graph.increment_version([*parameters, *means, *squares, *extra])


_ADAMW = register(
    "adamw_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] means, Tensor(c!)[] squares,"
    " Tensor(d!)[] extra, Tensor(e!) step, Tensor? rate, Tensor? scale, Tensor? found,"
    " float learning_rate, float beta1, float beta2, float eps, float weight_decay,"
    " Tensor[]? plan, str? backend) -> ()",
    _adamw, lambda *_: None,
)  # fmt: skip


def _check_lists(columns: dict[str, Sequence[Tensor]], device: torch.device) -> None:
    """Hold each list to the parameters: number, shapes, device, strides, and then the dtypes."""
    if len(columns) > len(_NAMES) + 1:
        raise ValueError(
            f"adamw_: give masters or remainders, not both; got {len(columns['masters'])} and "
            f"{len(columns['remainders'])}"
        )
    need_tensor_list("adamw_", "parameters", columns["parameters"])
    shapes = [p.shape for p in columns["parameters"]]
    for name, column in columns.items():
        if len(column) != len(shapes):
            raise ValueError(f"adamw_: there are {len(shapes)} parameters and {len(column)} {name}")
        need_tensor_list("adamw_", name, column)
        for n, (t, shape) in enumerate(zip(column, shapes, strict=True)):
            if t.shape != shape:
                raise ValueError(
                    f"adamw_: {name}[{n}] has shape {[*t.shape]}, parameters[{n}] {[*shape]}"
                )
            if t.device != device:
                raise ValueError(
                    f"adamw_: all tensors must be on one device, got {device} (step) and {t.device}"
                )
            if t.dtype != column[0].dtype:
                raise ValueError(
                    f"adamw_: a call serves one dtype a list, but {name}[{n}] is {t.dtype} and "
                    f"{name}[0] {column[0].dtype}: call once for each"
                )
            if name != "gradients" and not t.is_contiguous():
                raise ValueError(
                    f"adamw_: what is written must be contiguous, {name}[{n}] has shape "
                    f"{[*shape]} and strides {[*t.stride()]}"
                )
    if shapes:
        _check_dtypes(columns)


def _check_dtypes(columns: dict[str, Sequence[Tensor]]) -> None:
    """Refuse dtypes in which a step would lose bits silently."""
    found = {name: column[0].dtype for name, column in columns.items()}
    own = found["parameters"]
    if "remainders" in found:
        right = own == torch.bfloat16 and found["remainders"] == torch.int16
        rule = "remainders are int16, of bfloat16 parameters"
    elif "masters" in found:
        right = own in _DTYPES and found["masters"] == wide(own)
        rule = "masters are float32, float64 of float64 parameters"
    else:
        right = own in (torch.float32, torch.float64)
        rule = "parameters of 16 bits need masters or remainders, or small steps are lost"
    if not right:
        raise ValueError(f"adamw_: {rule}; got {_shown(found)}")
    if found["means"] != wide(own) or found["squares"] != wide(own):
        raise ValueError(f"adamw_: means and squares must be {wide(own)}; got {_shown(found)}")
    if found["gradients"] not in _DTYPES[: 4 if own == torch.float64 else 3]:
        raise ValueError(
            f"adamw_: gradients must be float16, bfloat16 or float32, or float64 of float64 "
            f"parameters; got {_shown(found)}"
        )


def _shown(found: dict[str, torch.dtype]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in found.items())


def _pair(betas: tuple[float, float]) -> tuple[float, float]:
    if len(betas) != 2:
        raise ValueError(f"adamw_: betas must be two numbers, got {betas}")
    return betas


def _check_scalars(rates: Rates, step: Tensor, scalars: dict[str, Tensor | None]) -> None:
    need_tensors("adamw_", step=step)
    for name, t in {"step": step, **scalars}.items():
        if t is None:
            continue
        need_tensors("adamw_", **{name: t})
        if t.dim() or t.device != step.device or not t.is_floating_point():
            raise ValueError(
                f"adamw_: {name} must be 0-dim, floating and on {step.device}, got {[*t.shape]}, "
                f"{t.dtype} on {t.device}"
            )
        if name in ("step", "learning_rate") and t.dtype != torch.float32:
            raise ValueError(f"adamw_: {name} must be float32, got {t.dtype}")
    for name, value in rates._asdict().items():
        below = 1.0 if name.startswith("beta") else math.inf
        if not 0 <= value < below:
            raise ValueError(f"adamw_: {name} must be at least 0 and below {below}, got {value}")


def adamw_(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], means: Sequence[Tensor],
    squares: Sequence[Tensor], *, masters: Sequence[Tensor] | None = None,
    remainders: Sequence[Tensor] | None = None, step: Tensor, learning_rate: float | Tensor,
    betas: tuple[float, float], eps: float, weight_decay: float, scale: Tensor | None = None,
    found_inf: Tensor | None = None, plan: Plan | None = None, backend: str | None = None,
) -> None:  # fmt: skip
    """Take AdamW's step on many tensors, in place.

    Each list has one dtype; sizes are free (0, 1, more than 2^31), and so is alignment: tensors
    that begin at a multiple of 16 bytes are faster. No two tensors may share memory.

    Args:
        parameters: float32 or float64; with `masters` or `remainders` of 16 bits. Contiguous, as
            all that is written.
        gradients: Same shapes, any strides; float16, bfloat16 or float32, converted in the pass.
        means: First moments, float32 (float64 for float64).
        squares: Second moments, as `means`.
        masters: float32 weights; the step is theirs, the parameters receive the rounded result.
        remainders: int16 bits below bfloat16 parameters, as `split_remainder` makes them.
        step: Steps taken before, 0-dim float32 on the device; the call adds one.
        learning_rate: A number, or 0-dim float32 on the device.
        betas: Decay rates of the two moments, at least 0 and below 1.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled: the step takes `learning_rate * weight_decay` of the weight.
        scale: What the gradients are multiplied with, 0-dim on the device; they stay as they are.
        found_inf: 0-dim on the device; unless it is 0 the call changes nothing, `step` included.
        plan: `plan(parameters, gradients, means, squares[, masters or remainders])`, for the Triton
            backend, which needs one inside a CUDA graph.
        backend: `reference` (torch's fused kernel, and copies) or `triton`; None takes the fastest
            that is proven here.

    Raises:
        ValueError: If lists, shapes, dtypes, devices, strides or numbers are not as above, tensors
            share memory, or the plan is of others.
        RuntimeError: If `backend` cannot serve these tensors here, or a CUDA graph lacks a plan.
    """
    wide_or_rest = {"masters": masters, "remainders": remainders}
    lists = [list(column) for column in (parameters, gradients, means, squares)]
    given = {name: list(column) for name, column in wide_or_rest.items() if column is not None}
    rate = learning_rate if isinstance(learning_rate, Tensor) else None
    number = 0.0 if isinstance(learning_rate, Tensor) else float(learning_rate)
    rates = Rates(number, *_pair(betas), eps, weight_decay)
    _check_scalars(rates, step, {"learning_rate": rate, "scale": scale, "found_inf": found_inf})
    _check_lists({**dict(zip(_NAMES, lists, strict=True)), **given}, step.device)
    extra = [t for column in given.values() for t in column]
    with torch.no_grad():
        _ADAMW(*lists, extra, step, rate, scale, found_inf, *rates, plan, backend)
