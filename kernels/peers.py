"""Other projects' kernels as backends: Liger, Transformer Engine and apex, where importable.

They are there to be measured beside ours, and for who prefers them: a peer serves when it is named,
and is never a default. A function here takes what our public function has checked, and gives it
the peer's way: what a peer does not fuse is composed, as its own users would. None of these
packages is needed, and none is imported before it is named.

Liger is compared with ours in the tests, in Triton's interpreter. Transformer Engine and apex need
a GPU to be imported: how they are called is tested with stand-ins, and no GPU has run them here.

Source: the call signatures of liger-kernel 0.8, transformer-engine 2.8 and apex 25.09.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .launch import interpreted

_PACKAGES = MappingProxyType(
    {
        "liger": ("liger_kernel", "liger-kernel: pip install liger-kernel"),
        "te": ("transformer_engine", "transformer-engine: pip install warploom[te]"),
        "apex": ("apex", "apex, from https://github.com/NVIDIA/apex (not PyPI's project apex)"),
    }
)
PEERS = tuple(_PACKAGES)


def _liger(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, -1)
    return gate.contiguous(), up.contiguous()


def _with_residual(norm: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor | None) -> Any:
    if residual is None:
        return norm(x)
    h = x + residual
    return norm(h), h


def _liger_rms_norm(x: Tensor, weight: Tensor, *, residual: Tensor | None, eps: float) -> Any:
    if residual is not None:
        fused = _liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
        return fused(x, residual, weight, eps, 0.0, "gemma", False)
    return _liger("rms_norm", "LigerRMSNormFunction")(x, weight, eps, 0.0, "gemma", False)


def _liger_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None, eps: float
) -> Any:
    shift = torch.zeros_like(weight) if bias is None else bias
    apply = _liger("layer_norm", "LigerLayerNormFunction")
    return _with_residual(lambda h: apply(h, weight, shift, eps), x, residual)


def _liger_rotary(q_THK: Tensor, k_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Any:
    cos, sin = (torch.cat([t, t], -1).unsqueeze(0) for t in (cos_TJ, sin_TJ))
    q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q_THK.clone(), k_TGK.clone()))
    turned = _liger("rope", "LigerRopeFunction")(q, k, cos, sin)
    return tuple(x.squeeze(0).transpose(0, 1) for x in turned)


def _liger_swiglu(gate_up: Tensor) -> Any:
    return _liger("swiglu", "LigerSiLUMulFunction")(*_halves(gate_up))


def _liger_geglu(gate_up: Tensor) -> Any:
    return _liger("geglu", "LigerGELUMulFunction")(*_halves(gate_up))


def _liger_cross_entropy(logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int) -> Tensor:
    apply = _liger("cross_entropy", "LigerCrossEntropyFunction")
    total: Tensor = apply(
        logits_TV.clone(), targets_T, None, ignore_index, 0.0, 0.0, "sum", None, False
    )[0]
    return total


def _liger_linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, ignore_index: int
) -> Tensor:
    apply = _liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    total: Tensor = apply(
        hidden_TD, weight_VD, targets_T, None, None, ignore_index, 0.0, 0.0, "sum"
    )[0]
    return total


def _te_norm(name: str, x: Tensor, parameters: dict[str, Tensor], eps: float) -> Tensor:
    te = importlib.import_module("transformer_engine.pytorch")
    made = getattr(te, name)(x.shape[-1], eps=eps, device=x.device, dtype=x.dtype)
    y: Tensor = torch.func.functional_call(made, parameters, (x,))
    return y


def _te_rms_norm(x: Tensor, weight: Tensor, *, residual: Tensor | None, eps: float) -> Any:
    return _with_residual(lambda h: _te_norm("RMSNorm", h, {"weight": weight}, eps), x, residual)


def _te_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None, eps: float
) -> Any:
    shift = torch.zeros_like(weight) if bias is None else bias
    parameters = {"weight": weight, "bias": shift}
    return _with_residual(lambda h: _te_norm("LayerNorm", h, parameters, eps), x, residual)


def _te_cross_entropy(logits_TV: Tensor, targets_T: Tensor, *, ignore_index: int) -> Tensor:
    module = importlib.import_module("transformer_engine.pytorch.cross_entropy")
    nll: Tensor = module.parallel_cross_entropy(
        logits_TV.unsqueeze(0).clone(), targets_T.unsqueeze(0), 0.0, False, None, ignore_index
    )
    return nll.sum()


def _apex_rms_norm(x: Tensor, weight: Tensor, *, residual: Tensor | None, eps: float) -> Any:
    norm = importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
    return _with_residual(lambda h: norm(h, weight, weight.shape, eps), x, residual)


def _apex_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None, eps: float
) -> Any:
    norm = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    shift = torch.zeros_like(weight) if bias is None else bias
    return _with_residual(lambda h: norm(h, weight, shift, weight.shape, eps), x, residual)


def _apex_rotary(q_THK: Tensor, k_TGK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Any:
    module = importlib.import_module("apex.transformer.functional")
    cos, sin = (torch.cat([t, t], -1)[:, None, None] for t in (cos_TJ, sin_TJ))
    turn = module.fused_apply_rotary_pos_emb_cached
    return tuple(turn(x.unsqueeze(1), cos, sin).squeeze(1) for x in (q_THK, k_TGK))


_SERVED: Mapping[tuple[str, str], Callable[..., Any]] = MappingProxyType(
    {
        ("rms_norm", "liger"): _liger_rms_norm,
        ("rms_norm", "te"): _te_rms_norm,
        ("rms_norm", "apex"): _apex_rms_norm,
        ("layer_norm", "liger"): _liger_layer_norm,
        ("layer_norm", "te"): _te_layer_norm,
        ("layer_norm", "apex"): _apex_layer_norm,
        ("rotary", "liger"): _liger_rotary,
        ("rotary", "apex"): _apex_rotary,
        ("swiglu", "liger"): _liger_swiglu,
        ("geglu", "liger"): _liger_geglu,
        ("cross_entropy", "liger"): _liger_cross_entropy,
        ("cross_entropy", "te"): _te_cross_entropy,
        ("linear_cross_entropy", "liger"): _liger_linear_cross_entropy,
    }
)


def peers_of(op: str) -> tuple[str, ...]:
    """Name the peers that have `op`, installed or not."""
    return tuple(name for name in PEERS if (op, name) in _SERVED)


def missing(name: str) -> str | None:
    """Say what a peer lacks on this machine, or None when it can be imported."""
    module, package = _PACKAGES[name]
    if importlib.util.find_spec(module) is None:
        return f"needs the package {package}"
    return None


def serve(op: str, name: str, *args: Any, plain: bool = True, **keywords: Any) -> Any:
    """Call a peer's kernel.

    Args:
        op: Operator.
        name: `liger`, `te` or `apex`, as the caller gave it for `backend`.
        *args: As our public function takes them, checked.
        plain: Whether the call asks for nothing that only our kernels have.
        **keywords: The same.

    Returns:
        What our public function returns.

    Raises:
        RuntimeError: If the peer does not have the operator, or this form of it, or is not there.
    """
    if (op, name) not in _SERVED:
        raise RuntimeError(f"{op}: backend {name!r} has no such kernel; {op} has {peers_of(op)}")
    if not plain:
        raise RuntimeError(f"{op}: backend {name!r} serves the plain form alone; leave it out")
    if lack := missing(name):
        raise RuntimeError(f"{op}: backend {name!r} {lack}")
    device = next(x.device for x in args if isinstance(x, Tensor))
    if name == "liger" and device.type == "cpu" and not interpreted():
        raise RuntimeError(
            f"{op}: backend {name!r} needs a CUDA device (or TRITON_INTERPRET=1), the tensors are "
            f"on {device}"
        )
    return _SERVED[op, name](*args, **keywords)
