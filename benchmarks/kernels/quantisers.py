"""The cases of `kernels/quant`, and the formats written out in plain PyTorch."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from warploom.kernels import quant
from warploom.kernels.quant.formats import NF4_VALUES

from .cases import Build, Case, Model, Work

_E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0
_BLOCK = 64


def by_rows(x: Tensor, block: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantise float32 `[T, D]` to e4m3 with a scale a row, or for each `block` of it."""
    width = x.shape[-1]
    if block is not None:
        x = torch.nn.functional.pad(x, (0, -width % block)).unflatten(-1, (-1, block))
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / _LARGEST
    codes = (x / scale).clamp(-_LARGEST, _LARGEST).to(_E4M3)
    codes = codes if block is None else codes.flatten(-2)[..., :width].contiguous()
    return codes, scale.squeeze(-1)


def _tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax().float().clamp_min(1e-30) / _LARGEST
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(_E4M3), scale


def _both(x: Tensor) -> tuple[Tensor, ...]:
    return *by_rows(x.float(), 128), *by_rows(x.float().t(), 128)


def _fp8_quantize(m: Model, tokens: int, item: int) -> Iterator[Case]:
    elements = tokens * m.width

    def ours(**options: Any) -> Callable[..., Any]:
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


def _mx(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise float32 `[T, D]` to MXFP8: blocks of 32, scales that are powers of two."""
    blocks = x.view(*x.shape[:-1], -1, 32)
    exponent = blocks.abs().amax(-1, keepdim=True).frexp().exponent - 9  # 8 is that of e4m3
    codes = torch.ldexp(blocks, -exponent).clamp(-_LARGEST, _LARGEST).to(_E4M3)
    return codes.view(x.shape), (exponent + 127).to(torch.uint8)


def _mx_quantize(m: Model, tokens: int, item: int) -> Iterator[Case]:
    elements = tokens * m.width

    def both(x: Tensor) -> tuple[Tensor, ...]:
        return *_mx(x.float()), *_mx(x.float().t().contiguous())

    case = Case(
        op="mx_quantize",
        size=f"{tokens}x{m.width}",
        draw=lambda d: ((d(tokens, m.width),), {}),
        ours=quant.mx_quantize,
        eager=lambda x: _mx(x.float()),
        forward=Work(elements * (item + 1 + 1 / 32), 3 * elements),
        backward=None,
    )
    yield case
    yield replace(
        case,
        variant="and transposed",
        ours=lambda x, *, backend: quant.mx_quantize(x, transpose=True, backend=backend),
        eager=both,
        forward=Work(elements * (item + 2 + 2 / 32), 6 * elements),
    )


def _nf4_values(device: torch.device) -> Tensor:
    return torch.tensor(NF4_VALUES, device=device)


def _pack(x: Tensor, *, values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise to NF4 in blocks of 64, whose scales stay float32."""
    blocks = x.float().view(-1, _BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True)
    codes = torch.bucketize(blocks / scale, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    high, low = codes.view(-1, 2).unbind(-1)
    return (high * 16 + low).unsqueeze(-1), scale.squeeze(-1)


def _nf4_quantize(m: Model, tokens: int, item: int) -> Iterator[Case]:
    elements = 2 * m.hidden * m.width

    def ours(x: Tensor, *, values: Tensor, backend: str | None) -> Any:
        return quant.nf4_quantize(x, double=False, backend=backend)

    def bitsandbytes(x: Tensor, *, values: Tensor) -> Tensor:
        packed: Tensor = _bitsandbytes().quantize_4bit(x, quant_type="nf4")[0]
        return packed

    yield Case(
        op="nf4_quantize",
        size=f"{2 * m.hidden}x{m.width}",
        draw=lambda d: ((d(2 * m.hidden, m.width),), {"values": _nf4_values(d.device)}),
        ours=ours,
        eager=_pack,
        forward=Work(elements * (item + 0.5 + 4 / _BLOCK), 3 * elements),
        backward=None,
        others={"bitsandbytes": bitsandbytes},
    )


def _nf4_dequantize(m: Model, tokens: int, item: int) -> Iterator[Case]:
    elements = 2 * m.hidden * m.width

    def draw(d: Any, double: bool) -> Any:
        x, values = d(2 * m.hidden, m.width), _nf4_values(d.device)
        q = quant.nf4_quantize(x, double=double, backend="reference")
        rest = {"double": double, "values": values, "dtype": x.dtype, "shape": x.shape}
        return (), {"q": q, "state": _state(x, double) if _is_there() else None, **rest}

    def ours(*, q: Any, backend: str | None, **rest: Any) -> Tensor:
        return quant.nf4_dequantize(q, backend=backend)

    def eager(*, q: Any, double: bool, values: Tensor, dtype: Any, shape: Any, state: Any) -> Any:
        scale = q.absmax
        if double:
            second = q.absmax2.repeat_interleave(256)[: scale.numel()]
            scale = q.code[scale.int()] * second + q.offset
        codes = torch.cat([q.packed >> 4, q.packed & 15], -1)
        y = values[codes.int()].view(-1, _BLOCK) * scale.unsqueeze(-1)
        return y.to(dtype).view(shape)

    def bitsandbytes(*, state: Any, **rest: Any) -> Any:
        return _bitsandbytes().dequantize_4bit(*state)

    case = Case(
        op="nf4_dequantize",
        size=f"{2 * m.hidden}x{m.width}",
        draw=lambda d: draw(d, False),
        ours=ours,
        eager=eager,
        forward=Work(elements * (item + 0.5 + 4 / _BLOCK), elements),
        backward=None,
        others={"bitsandbytes": bitsandbytes},
    )
    yield case
    double = Work(elements * (item + 0.5 + 1 / _BLOCK), 2 * elements)
    yield replace(case, variant="double", draw=lambda d: draw(d, True), forward=double)


def _is_there() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes.functional")


def _state(x: Tensor, double: bool) -> Any:
    return _bitsandbytes().quantize_4bit(x, quant_type="nf4", compress_statistics=double)


OPERATORS: Mapping[str, Build] = MappingProxyType(
    {
        "fp8_quantize": _fp8_quantize,
        "mx_quantize": _mx_quantize,
        "nf4_quantize": _nf4_quantize,
        "nf4_dequantize": _nf4_dequantize,
    }
)
"""As in `operators.py`."""
