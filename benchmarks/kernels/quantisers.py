"""The cases of `kernels/quant`, and the formats written out in plain PyTorch."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from warploom.kernels import quant

from .cases import Build, Case, Model, Work

_E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0


def by_rows(x: Tensor, block: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantise float32 `[T, D]` to e4m3 with a scale a row, or for each `block` of it."""
    shaped = x if block is None or x.shape[-1] % block else x.unflatten(-1, (-1, block))
    scale = shaped.abs().amax(-1, keepdim=True).clamp_min(1e-30) / _LARGEST
    codes = (shaped / scale).clamp(-_LARGEST, _LARGEST).to(_E4M3)
    return codes.view(x.shape), scale.squeeze(-1)


def _tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax().float().clamp_min(1e-30) / _LARGEST
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(_E4M3), scale


def _both(x: Tensor) -> tuple[Tensor, ...]:
    return *by_rows(x.float(), 128), *by_rows(x.float().t(), 128)


def _fp8_quantize(m: Model, tokens: int, item: int) -> Iterator[Case]:
    elements = tokens * m.width

    def ours(**options: object) -> object:
        return lambda x, *, backend: quant.fp8_quantize(x, **options, backend=backend)

    plain = Work(elements * (item + 1), 4 * elements)
    case = Case(
        op="fp8_quantize",
        variant="row",
        size=f"{tokens}x{m.width}",
        draw=lambda d: ((d(tokens, m.width),), {}),
        ours=ours(scaling="row"),
        eager=lambda x: by_rows(x.float()),
        forward=plain,
        backward=None,
    )
    yield case
    twice = Work(elements * (2 * item + 1), 4 * elements)  # the scale needs all of x first
    yield replace(case, variant="tensor", ours=ours(), eager=_tensor, forward=twice)
    block = ours(scaling="block")
    yield replace(case, variant="block", ours=block, eager=lambda x: by_rows(x.float(), 128))
    copied = Work(elements * (item + 2), 8 * elements)
    both = ours(scaling="block", transpose=True)
    yield replace(case, variant="block and transposed", ours=both, eager=_both, forward=copied)


OPERATORS: Mapping[str, Build] = MappingProxyType({"fp8_quantize": _fp8_quantize})
"""As in `operators.py`."""
