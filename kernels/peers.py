"""Others' kernels as backends: Liger, Transformer Engine, apex, flash-attn, flex attention.

They are there to be measured beside ours, and for who prefers them: a peer serves when it is named,
and is never a default. A function here takes what our public function has checked, and gives it
the peer's way: what a peer does not fuse is composed, as its own users would. None of these
packages is needed, and none is imported before it is named.

Liger is compared with ours in the tests, in Triton's interpreter; flex attention, of PyTorch, on
the CPU, where it is explicit maths. Transformer Engine, apex and flash-attn need a GPU to be
imported: how they are called is tested with stand-ins, and no GPU has run them here.

Source: the call signatures of liger-kernel 0.8, transformer-engine 2.8, apex 25.09, flash-attn 2.8.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .launch import interpreted

if TYPE_CHECKING:
    from .attention.scores import Packed, Scores

_PACKAGES = MappingProxyType(
    {
        "liger": ("liger_kernel", "liger-kernel: pip install liger-kernel"),
        "te": ("transformer_engine", "transformer-engine: pip install warploom[te]"),
        "apex": ("apex", "apex, from https://github.com/NVIDIA/apex (not PyPI's project apex)"),
        "flash_attn": ("flash_attn", "flash-attn: pip install flash-attn --no-build-isolation"),
        "flex": ("torch.nn.attention.flex_attention", "torch, with flex_attention"),
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


_NO_LSE = (
    "flash_attention: backend 'flash_attn' differentiates no log-sum-exp: leave return_lse and "
    "sinks out, or take backend 'torch'"
)
_NO_OFFSET = (
    "flash_attention: backend 'flash_attn' puts the last query at the last key: leave offset out"
)


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, *, packed: "Packed | None", scores: "Scores", return_lse: bool,
    deterministic: bool,
) -> Any:  # fmt: skip
    if return_lse:
        raise RuntimeError(_NO_LSE)
    if packed is None and scores.first(q.shape[1], k.shape[1]) != k.shape[1] - q.shape[1]:
        raise RuntimeError(_NO_OFFSET)
    module = importlib.import_module("flash_attn")
    rest: dict[str, Any] = {"softmax_scale": scores.scale, "softcap": scores.softcap}
    rest |= {"window_size": (scores.left, scores.right), "causal": scores.right == 0}
    rest |= {"deterministic": deterministic}
    if packed is None:
        return module.flash_attn_func(q, k, v, **rest), None
    longest = (
        int(cu.diff().max()) if most is None else most
        for cu, most in ((packed.q, packed.max_q), (packed.k, packed.max_k))
    )
    return module.flash_attn_varlen_func(q, k, v, packed.q, packed.k, *longest, **rest), None


@functools.cache
def _flex(compiled: bool) -> Any:
    module = importlib.import_module("torch.nn.attention.flex_attention")
    return torch.compile(module.flex_attention) if compiled else module.flex_attention


def _documents(cu: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return of each row its document, and its place there."""
    at = torch.arange(rows, device=cu.device)
    document = torch.searchsorted(cu[1:].long(), at, right=True)
    return document, at - cu.long()[document]


def _flex_attention(
    q: Tensor, k: Tensor, v: Tensor, *, packed: "Packed | None", scores: "Scores", return_lse: bool,
    deterministic: bool,
) -> Any:  # fmt: skip
    """Attend by flex attention, compiled on CUDA; its mask of blocks is made anew each call."""
    op = "flash_attention" if packed is None else "flash_attention_varlen"
    if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise RuntimeError(
            f"{op}: backend 'flex' has no gradient on the CPU, and q, k or v requires one: take "
            f"backend='torch', or call it under torch.no_grad()"
        )
    if not (q.shape[-3] and k.shape[-3]):
        raise RuntimeError(
            f"{op}: backend 'flex' needs queries and keys: take backend 'torch', got q "
            f"{[*q.shape]} and k {[*k.shape]}"
        )
    module = importlib.import_module("torch.nn.attention.flex_attention")
    if packed is not None:
        (doc_q, at_q), (doc_k, at_k) = (
            _documents(cu, len(x)) for cu, x in ((packed.q, q), (packed.k, k))
        )
        at_q = at_q + (packed.k.diff() - packed.q.diff())[doc_q]
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    first, left, right = scores.first(q.shape[1], k.shape[1]), scores.left, scores.right

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        at, key = (i + first, j) if packed is None else (at_q[i], at_k[j])
        sees = at == at if packed is None else doc_q[i] == doc_k[j]
        sees = sees & (key >= at - left) if left >= 0 else sees
        return sees & (key <= at + right) if right >= 0 else sees

    def capped(s: Tensor, *_: Tensor) -> Tensor:
        return scores.softcap * torch.tanh(s / scores.softcap)

    masked = scores.masked or packed is not None
    sizes = q.shape[1], k.shape[1]
    found = _flex(q.is_cuda)(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=capped if scores.softcap else None,
        block_mask=module.create_block_mask(seen, None, None, *sizes, device=q.device)
        if masked
        else None,
        scale=scores.scale,
        enable_gqa=True,
        return_aux=module.AuxRequest(lse=True) if return_lse else None,
    )
    out, lse = (found[0], found[1].lse) if return_lse else (found, None)
    out = out.transpose(1, 2)
    if packed is None:
        return out, lse
    return out.squeeze(0), None if lse is None else lse.squeeze(0)


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
        ("flash_attention", "flash_attn"): _flash_attn,
        ("flash_attention", "flex"): _flex_attention,
        ("flash_attention_varlen", "flash_attn"): _flash_attn,
        ("flash_attention_varlen", "flex"): _flex_attention,
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
        name: One of `PEERS`, as the caller gave it for `backend`.
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
