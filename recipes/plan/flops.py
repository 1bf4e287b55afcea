"""The floating-point operations that the operators of this library really do, counted as they run.

What `models/cost.py` plans is of the model; this is of the machine: what is computed twice counts
twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from warploom.kernels.attention import Scores


def measured_flops(run: Callable[[], Any]) -> int:
    """Count the floating-point operations of the matrix products that `run` really does.

    Counts what kernels compute, so more than `flops_per_token`: five products of attention in the
    backward, one of which computes the scores again; four of the head with z-loss; whatever a
    recomputed block repeats. Causal attention counts half of the square, as everywhere here. The
    loss counts the positions that train where the others are left out, which is on the CPU.
    """
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        run()
    total: int = counter.get_total_flops()
    return total


def _formulas() -> dict[Any, Callable[..., int]]:
    """Return what each operator of this library computes, from its arguments."""
    ops = torch.ops.warploom
    found: dict[Any, Callable[..., int]] = {
        ops.flash_attention_forward: partial(_attention, first=0, products=(1, 1)),
        ops.flash_attention_backward: partial(_attention, first=2, products=(3, 2)),
        ops.fp8_gemm: _fp8_gemm,
        ops.swiglu_linear_forward: _gated_forward,
        ops.swiglu_linear_backward: _gated_backward,
        ops.linear_cross_entropy_forward: _cross_entropy,
        ops.linear_log_probs_forward: partial(_log_probs, first=0, products=1),
        ops.linear_log_probs_backward: partial(_log_probs, first=1, products=3),
    }
    for formula in found.values():
        vars(formula)["_get_raw"] = True  # pass tensors, not their shapes: lengths are values
    return found


def _fp8_gemm(*args: Any, out_val: Any = None) -> int:
    a_MK, _, b_NK = args[:3]
    return 2 * int(a_MK.numel()) * int(b_NK.shape[0])


def _gated_forward(*args: Any, out_val: Any = None) -> int:
    gate_up, weight_DF = args[:2]
    elements: int = gate_up.numel()
    return elements * int(weight_DF.shape[0])  # 2 T F D, and gate_up has 2 T F elements


def _gated_backward(*args: Any, out_val: Any = None) -> int:
    _, gate_up, weight_DF, weight_grad, _ = args
    return (1 + int(weight_grad)) * _gated_forward(gate_up, weight_DF)


def _attention(*args: Any, first: int, products: tuple[int, int], out_val: Any = None) -> int:
    q, k, v = args[first : first + 3]
    cu, cu_k, _, _, scale, left, right, offset, softcap, *_ = args[-11:]
    scores = Scores(scale=scale, left=left, right=right, offset=offset, softcap=softcap)
    if cu is None:
        pairs = q.shape[0] * _pairs(q.shape[1], k.shape[1], scores)
    else:
        lengths = [x.diff().tolist() for x in (cu, cu if cu_k is None else cu_k)]
        pairs = sum(_pairs(n, m, scores) for n, m in zip(*lengths, strict=True))
    width: int = products[0] * q.shape[-1] + products[1] * v.shape[-1]
    return int(2 * q.shape[-2] * width * pairs)


def _pairs(queries: int, keys: int, scores: Scores) -> float:
    """Count pairs of a query and a key; half of the square where causal, as everywhere here."""
    if queries == keys and scores.left < 0 and scores.right == 0 and not scores.offset:
        return queries * keys / 2
    return scores.pairs(queries, keys)


def _trained(targets_T: Tensor, ignore_index: int) -> int:
    targets_T = targets_T if targets_T.dim() == 1 else targets_T[:, 0]  # [T, M] of a teacher
    if targets_T.device.type == "cpu":
        return int((targets_T != ignore_index).sum())
    return targets_T.numel()


def _cross_entropy(*args: Any, out_val: Any = None) -> int:
    _, weight_VD, targets_T, ignore_index, _, hidden_grad, weight_grad, *_ = args
    products = 1 + hidden_grad + weight_grad
    return int(2 * products * weight_VD.numel() * _trained(targets_T, ignore_index))


def _log_probs(*args: Any, first: int, products: int, out_val: Any = None) -> int:
    weight_VD, targets_T = args[first + 1], args[first + 2]
    ignore_index = args[first + 3 + (first > 0)]  # the backward has statistics before it
    width: int = weight_VD.numel()
    return 2 * products * width * _trained(targets_T, ignore_index)
