"""Suites `fp8`, `nf4`, `grouped` and `moe_layer`: products of the sizes of real models.

Of M tokens, inputs K wide and outputs N wide a product has 2 M N K FLOPs; so have the gradient of
the input and that of the weight. Eager of FP8 is the bfloat16 product of the same numbers; with the
quantisation that of the input, the weight and the gradient count, in both layouts. Eager of NF4
multiplies by the whole weight, dequantised. Eager of experts is PyTorch's grouped product between a
sort and an indexed sum.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from warploom.kernels import backends
from warploom.kernels.gemm import (
    Fp8Recipe,
    fp8_gemm,
    fp8_linear,
    grouped_gemm,
    nf4_linear,
    nf4_linear_reference,
)
from warploom.kernels.moe import moe_block
from warploom.kernels.quant import Nf4, fp8_quantize, nf4_quantize

from . import attention
from .cases import Case, Scale, Work

_FP8 = "fp8_matmul_flops_per_s"
_DEEPSEEK = ((7168, 16_384), (4096, 7168), (24_576, 1536), (7168, 2048), (2112, 7168))
_LLAMA = (
    *((8192, 8192), (57_344, 8192), (8192, 28_672), (10_240, 8192)),  # 70B
    *((6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336)),  # 8B
)
_SMOLLM = ((3072, 576), (576, 1536))
_PRODUCTS: Mapping[Scale, tuple[tuple[int, int, int], ...]] = MappingProxyType(
    {
        "tiny": ((160, 256, 136), (136, 144, 264)),
        "cpu": tuple((512, *nk) for nk in _SMOLLM),
        "cuda": (
            *((8192, *nk) for nk in _LLAMA),
            *((4096, *nk) for nk in (*_DEEPSEEK, (32_768, 512))),
        ),
    }
)
"""Tokens M, outputs N, inputs K."""

_EXPERTS: Mapping[Scale, Mapping[str, tuple[int, int, int, int, int]]] = MappingProxyType(
    {
        "tiny": {"tiny": (96, 64, 48, 8, 2)},
        "cpu": {"qwen3-30b-a3b/8": (256, 2048, 768, 16, 4)},
        "cuda": {
            "mixtral": (4096, 4096, 14_336, 8, 2),
            "deepseek-v3/8": (4096, 7168, 2048, 32, 8),
            "qwen3-30b-a3b": (8192, 2048, 768, 128, 8),
        },
    }
)
"""Tokens, width, hidden width of an expert, experts, experts a token; `/8`: of one rank of 8."""


Scaling = Literal["tensor", "block"]


def _gemm(m: int, n: int, k: int, scaling: Scaling, which: str, item: int) -> Case:
    """Make the case of operands that are quantised before: y `[m, n]`, summed over k."""
    tiles = scaling == "block" and which != "wgrad"
    other: Literal["tensor", "block", "tile"] = "tile" if tiles else scaling

    def draw(d: Any) -> Any:
        a, b = d(m, k), d(n, k)
        q = fp8_quantize(a, scaling=scaling), fp8_quantize(b, scaling=other)
        return (), {"a": a, "b": b, "q": q}

    def ours(*, a: Tensor, b: Tensor, q: Any, backend: str | None) -> Tensor:
        return fp8_gemm(*q, dtype=a.dtype, backend=backend)

    return Case(
        op="fp8_gemm",
        variant=f"{scaling} {which}",
        size=f"{m}x{n}x{k}",
        key=backends.case_key(scaling=other, rows=m, n=n, k=k),
        draw=draw,
        ours=ours,
        eager=lambda *, a, b, q: torch.mm(a, b.t()),
        forward=Work((m + n) * k + m * n * item, 2.0 * m * n * k, products=True, ceiling=_FP8),
        backward=None,
        compiles=False,
    )


def _linear(m: int, n: int, k: int, scaling: Scaling, item: int) -> Case:
    recipe = Fp8Recipe(scaling=scaling)

    def ours(x: Tensor, weight: Tensor, *, backend: str | None) -> Tensor:
        return fp8_linear(x, weight, recipe=recipe, backend=backend)

    moved = float((m * k + n * k + m * n) * item)
    return Case(
        op="fp8_linear",
        variant=f"{scaling} with quantisation",
        size=f"{m}x{n}x{k}",
        draw=lambda d: ((d(m, k), d(n, k, scale=k**-0.5)), {}),
        ours=ours,
        eager=functional.linear,
        forward=Work(moved, 2.0 * m * n * k, products=True, ceiling=_FP8),
        backward=Work(2 * moved, 4.0 * m * n * k, products=True, ceiling=_FP8),
        compiles=False,
    )


def fp8(scale: Scale, item: int) -> Iterator[Case]:
    """Yield whole layers with their quantisation, then the three products without.

    Args:
        scale: Which sizes.
        item: Bytes of an element.
    """
    kinds: tuple[Scaling, ...] = ("block", "tensor")
    sizes = _PRODUCTS[scale]
    for m, n, k in sizes:
        for scaling in kinds:
            yield _linear(m, n, k, scaling, item)
    for m, n, k in sizes:
        for scaling in kinds:
            yield _gemm(m, n, k, scaling, "forward", item)
            yield _gemm(m, k, n, scaling, "dgrad", item)
            yield _gemm(n, k, m, scaling, "wgrad", item)


def nf4(scale: Scale, item: int) -> Iterator[Case]:
    """Yield frozen layers in NF4, whose input alone has a gradient.

    Args:
        scale: Which sizes.
        item: Bytes of an element.
    """
    for m, n, k in _PRODUCTS[scale][: len(_LLAMA)]:
        moved = (m * k + m * n) * item + n * k * 0.5  # the scales are a hundredth of that
        work = Work(moved, 2.0 * m * n * k, products=True)

        def draw(d: Any, m: int = m, n: int = n, k: int = k) -> Any:
            return (d(m, k),), {"weight": nf4_quantize(d(n, k, scale=k**-0.5))}

        yield Case(
            op="nf4_linear",
            size=f"{m}x{n}x{k}",
            draw=draw,
            ours=lambda x, *, weight, backend: nf4_linear(x, weight, backend=backend),
            eager=lambda x, *, weight: nf4_linear_reference(x, weight),
            forward=work,
            backward=work,
            compiles=False,
            memory=True,
            others={"bitsandbytes": _bitsandbytes},
        )


def _bitsandbytes(x: Tensor, *, weight: Nf4) -> Any:
    bnb: Any = importlib.import_module("bitsandbytes")
    state = bnb.functional.QuantState.from_dict(dict(weight.state()), x.device)
    return bnb.matmul_4bit(x, weight.packed.t(), quant_state=state)


def _assigned(d: Any, tokens: int, experts: int, top_k: int) -> Tensor:
    """Draw distinct experts a token `[T, k]`, some of them twice as often as others."""
    favour = torch.linspace(0, 1, experts, device=d.device)
    scores = d(tokens, experts, dtype=torch.float32) + favour
    chosen: Tensor = scores.topk(top_k, -1).indices
    return chosen


def grouped(scale: Scale, item: int) -> Iterator[Case]:
    """Yield both products of the experts of each model, alone.

    Args:
        scale: Which sizes.
        item: Bytes of an element.
    """
    for name, (tokens, width, hidden, experts, top_k) in _EXPERTS[scale].items():
        for n, k in ((2 * hidden, width), (width, hidden)):
            yield _grouped(name, (tokens, n, k), experts, top_k, item)


def _grouped(name: str, sizes: tuple[int, int, int], experts: int, top_k: int, item: int) -> Case:
    tokens, n, k = sizes
    m = tokens * top_k

    def draw(d: Any) -> Any:
        chosen = _assigned(d, tokens, experts, top_k)
        counts = torch.bincount(chosen.flatten(), minlength=experts)
        return (d(m, k), d(experts, n, k, scale=k**-0.5)), {"counts": counts}

    def ours(x: Tensor, weight: Tensor, *, counts: Tensor, backend: str | None) -> Tensor:
        return grouped_gemm(x, weight, counts, backend=backend)

    def eager(x: Tensor, weight: Tensor, *, counts: Tensor) -> Tensor:
        parts = zip(x.split(counts.tolist()), weight, strict=True)
        return torch.cat([part @ w.t() for part, w in parts])

    moved = float((m * (n + k) + experts * n * k) * item)
    return Case(
        op="grouped_gemm",
        size=f"{name} {m}x{n}x{k}, {experts} experts",
        key=backends.case_key(experts=experts, narrow=min(n, k), broad=max(n, k), rows=m),
        draw=draw,
        ours=ours,
        eager=eager,
        forward=Work(moved, 2.0 * m * n * k, products=True),
        backward=Work(2 * moved, 4.0 * m * n * k, products=True),
        compiles=False,
    )


def _experts_eager(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, *, indices: Tensor
) -> Tensor:
    """Compose the layer of PyTorch's own: sort, grouped product, activation, indexed sum."""
    order = indices.flatten().argsort(stable=True)
    counts = torch.bincount(indices.flatten(), minlength=len(gate_up))
    ends, source = counts.cumsum(0, dtype=torch.int32), order // indices.shape[1]
    h = functional.grouped_mm(x.index_select(0, source), gate_up.transpose(1, 2), offs=ends)
    gate, up = h.chunk(2, -1)
    out = functional.grouped_mm(functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
    weighted = out * weights.flatten()[order].unsqueeze(1).to(out.dtype)
    return torch.zeros_like(x).index_add(0, source, weighted)


def moe_layer(scale: Scale, item: int) -> Iterator[Case]:
    """Yield whole layers of experts, from routed tokens to their sum.

    Args:
        scale: Which sizes.
        item: Bytes of an element.
    """
    for name, sizes in _EXPERTS[scale].items():
        yield _moe(name, sizes, item)


def _moe(name: str, sizes: tuple[int, int, int, int, int], item: int) -> Case:
    tokens, width, hidden, experts, top_k = sizes
    m = tokens * top_k

    def draw(d: Any) -> Any:
        gate_up = d(experts, 2 * hidden, width, scale=width**-0.5)
        down = d(experts, width, hidden, scale=hidden**-0.5)
        weights = d(tokens, top_k, dtype=torch.float32).softmax(-1)
        indices = _assigned(d, tokens, experts, top_k)
        return (d(tokens, width), gate_up, down, weights), {"indices": indices}

    def ours(
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        *,
        indices: Tensor,
        backend: str | None,
    ) -> Tensor:
        return moe_block(x, gate_up, down, indices, weights, backend=backend)

    flops = 6.0 * m * width * hidden
    moved = float((2 * tokens * width + 3 * experts * width * hidden) * item)
    return Case(
        op="moe_block",
        size=f"{name} {tokens}x{width}x{hidden}, {top_k} of {experts}",
        key=backends.case_key(experts=experts, width=width, hidden=hidden, rows=m),
        draw=draw,
        ours=ours,
        eager=_experts_eager,
        forward=Work(moved, flops, products=True),
        backward=Work(2 * moved, 2 * flops, products=True),
        compiles=False,
        memory=True,
    )


SUITES: Mapping[str, Callable[[Scale, int], Iterator[Case]]] = MappingProxyType(
    {
        "attention": attention.suite,
        "paged": attention.paged,
        "fp8": fp8,
        "nf4": nf4,
        "grouped": grouped,
        "moe_layer": moe_layer,
    }
)
"""What `--suite` takes: from the scale and the bytes of an element to the cases."""
