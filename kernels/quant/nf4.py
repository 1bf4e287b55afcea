"""NF4, the 4-bit type of QLoRA, with or without double quantisation: bitsandbytes to the last bit.

    a = max |x| of a block,    codes = nearest of the 16 values of NF4 to x / a
    double: c = mean of a,     codes of a = nearest of 256 values to (a - c) / a2, a2 = max |a - c|

    x is about value[code] * a,    a is about value2[code] * a2 + c

Two codes a byte, the first in the high half. A value in the middle between two takes the lower. The
blocks of `a` are 256 long. N elements, of any shape, in blocks of B. Bound by memory. Roof of the
dequantisation: N / 2 bytes and N / B of scales read, N elements written, over the bandwidth; of the
quantisation the reverse.

The 256 values are looked up as bitsandbytes 0.50 does on the CPU: on a grid of 65,536 steps; its
CUDA kernel, without the grid, may choose the neighbour of a value that is nearly in the middle. A
NaN makes its block NaN; with double quantisation, through the mean, everything.

Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, sections 2 and 3 (NF4, double
quantisation) and appendix E (the values); Dettmers et al. 2021, https://arxiv.org/abs/2110.02861,
section 2 (the 256 values).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from ..library import need_tensors, register, row_blocks
from .formats import NF4_VALUES as VALUES
from .formats import middles

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SECOND = 256  # blocks whose scales share one
_LEAST = 1e-38  # below it, and for a block of zeros, 1 / a is not finite
_STEPS = 65535
_STATE = "quant_state.bitsandbytes__nf4"


class Nf4(NamedTuple):
    """A tensor in NF4.

    Attributes:
        packed: `[ceil(N / 2), 1]` uint8, two codes each.
        absmax: Scale of each block, `[ceil(N / B)]` float32; uint8 codes if quantised themselves.
        shape: Of the tensor.
        dtype: Of the tensor.
        block: B.
        code: The values of the codes in `absmax`, `[256]` float32, or None.
        absmax2: Scale of each 256 of those, float32, or None.
        offset: Added to the scales, `[]` float32, or None.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int
    code: Tensor | None = None
    absmax2: Tensor | None = None
    offset: Tensor | None = None

    def to(self, device: torch.device | str) -> "Nf4":
        """Move it, which `Module.to` of a module that holds it does not do.

        Args:
            device: Where to.

        Returns:
            The same codes there; the same tensors if they are there already.
        """
        return self._replace(
            packed=self.packed.to(device),
            absmax=self.absmax.to(device),
            code=None if self.code is None else self.code.to(device),
            absmax2=None if self.absmax2 is None else self.absmax2.to(device),
            offset=None if self.offset is None else self.offset.to(device),
        )

    def state(self) -> dict[str, Tensor]:
        """Name the parts as checkpoints on Hugging Face do, behind the name of the weight.

        Returns:
            "absmax", "quant_map", "quant_state.bitsandbytes__nf4" (JSON, as bytes), and where the
            scales are quantised "nested_absmax" and "nested_quant_map"; `packed` is the weight.
        """
        facts = {
            "quant_type": "nf4",
            "blocksize": self.block,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": [*self.shape],
        }
        parts = {"absmax": self.absmax, "quant_map": torch.tensor(VALUES)}
        if self.code is not None and self.absmax2 is not None and self.offset is not None:
            parts |= {"nested_absmax": self.absmax2, "nested_quant_map": self.code}
            facts |= {"nested_blocksize": SECOND, "nested_dtype": "float32"}
            facts |= {"nested_offset": float(self.offset)}
        parts[_STATE] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
        return parts

    @classmethod
    def from_state(cls, packed: Tensor, state: Mapping[str, Tensor]) -> "Nf4":
        """Read what `state` or bitsandbytes made.

        Args:
            packed: The weight, uint8.
            state: The parts, by the names that `state` gives them.

        Returns:
            The tensor in NF4, its parts on the device of `packed`.

        Raises:
            ValueError: If the state is not of NF4, or of other values, or its scales are in blocks
                of another size than 256.
        """
        if _STATE not in state:
            raise ValueError(f"nf4: the state must have {_STATE}, got {', '.join(sorted(state))}")
        facts = json.loads(bytes(state[_STATE].tolist()))
        second = facts.get("nested_blocksize", SECOND)
        if second != SECOND or not torch.equal(state["quant_map"].cpu(), torch.tensor(VALUES)):
            raise ValueError(
                f"nf4: the state must have the values of NF4 and scales in blocks of {SECOND}, "
                f"got {state['quant_map'].tolist()} and {second}"
            )
        shape, dtype = tuple(facts["shape"]), getattr(torch, facts["dtype"])
        first = cls(packed, state["absmax"].to(packed.device), shape, dtype, facts["blocksize"])
        if "nested_absmax" not in state:
            return first
        return first._replace(
            code=state["nested_quant_map"].to(packed.device),
            absmax2=state["nested_absmax"].to(packed.device),
            offset=torch.tensor(facts["nested_offset"], device=packed.device),
        )


def second_values() -> Tensor:
    """Make the table of the 8-bit type: fractions of seven decades of either sign, 0 and 1.

    Returns:
        `[256]` float32, in order.
    """
    parts = [torch.tensor([0.0, 1.0])]
    for digits in range(7):
        edges = torch.linspace(0.1, 1, 2**digits + 1)
        fractions = middles(edges) * 10.0 ** (digits - 6)
        parts += [fractions, -fractions]
    return torch.cat(parts).sort()[0]


def _quantize_cpu(x_N: Tensor, block: int, packed: Tensor, absmax: Tensor) -> None:
    """Fill `packed` and `absmax`; a rest that fills no block is divided, as in bitsandbytes."""
    bounds = middles(torch.tensor(VALUES, device=x_N.device))
    full = x_N.numel() // block
    for rows in row_blocks(full, block):
        x = x_N[rows.start * block : rows.stop * block].view(-1, block).to(torch.float32)
        absmax[rows] = x.abs().amax(1)
        inverse = 1.0 / absmax[rows].clamp(min=_LEAST).unsqueeze(1)
        codes = torch.bucketize((x * inverse).clamp_(-1, 1), bounds, out_int32=True).view(-1, 2)
        packed[rows.start * block // 2 : rows.stop * block // 2] = codes[:, 0] * 16 + codes[:, 1]
    if rest := x_N.numel() - full * block:
        x = x_N[-rest:].to(torch.float32)
        absmax[full:] = x.abs().max().clamp(min=_LEAST)
        x = torch.nn.functional.pad((x / absmax[full:]).clamp_(-1, 1), (0, rest % 2))
        codes = torch.bucketize(x, bounds, out_int32=True).view(-1, 2)
        packed[full * block // 2 :] = codes[:, 0] * 16 + codes[:, 1]


def _quantize(x: Tensor, block: int, backend: str | None) -> tuple[Tensor, Tensor]:
    x_N, size = x.reshape(-1), x.numel()
    absmax = x.new_empty(-(-size // block), dtype=torch.float32)
    packed = x.new_empty((size + 1) // 2, dtype=torch.uint8)
    full = 0
    if choose("nf4_quantize", x.device, x.dtype, backend) == "triton":
        from .nf4_triton import quantize

        full = size // block
        quantize(x_N, block, packed, absmax)
    _quantize_cpu(x_N[full * block :], block, packed[full * block // 2 :], absmax[full:])
    return absmax, packed.unsqueeze(1)


def _quantize_fake(x: Tensor, block: int, backend: str | None) -> tuple[Tensor, Tensor]:
    blocks = (x.numel() + block - 1) // block
    codes = x.new_empty((x.numel() + 1) // 2, 1, dtype=torch.uint8)
    return x.new_empty(blocks, dtype=torch.float32), codes


def _scales(
    absmax: Tensor, code: Tensor | None, absmax2: Tensor | None, offset: Tensor | None
) -> Tensor:
    if code is None or absmax2 is None or offset is None:
        return absmax
    index = torch.arange(absmax.numel(), device=absmax.device) // SECOND
    return code[absmax.int()] * absmax2[index] + offset


def fill(
    y_N: Tensor, packed: Tensor, absmax: Tensor, code: Tensor | None, absmax2: Tensor | None,
    offset: Tensor | None, block: int, backend: str,
) -> None:  # fmt: skip
    """Write the values of N codes, by the backend that was chosen.

    Args:
        y_N: `[N]` contiguous, to fill.
        packed: `[ceil(N / 2)]` uint8, contiguous.
        absmax: `[ceil(N / block)]`, float32 or uint8.
        code: `[256]` float32 or None.
        absmax2: Scales of the scales, of which the first 256 share the first, or None.
        offset: `[]` float32 or None.
        block: Elements that share a scale.
        backend: `reference` or `triton`.
    """
    if backend == "triton":
        from .nf4_triton import dequantize

        return dequantize(packed, absmax, code, absmax2, offset, block, y_N)
    scales = _scales(absmax, code, absmax2, offset)
    pairs = torch.tensor(VALUES, device=packed.device)
    pairs = torch.stack([pairs.repeat_interleave(16), pairs.repeat(16)], 1)  # of each byte
    for rows in row_blocks(scales.numel(), block):
        part = packed[rows.start * block // 2 : rows.stop * block // 2]
        size = min(rows.stop * block, y_N.numel()) - rows.start * block
        values = pairs.index_select(0, part.int()).view(-1)
        if missing := (rows.stop - rows.start) * block - values.numel():
            values = torch.nn.functional.pad(values, (0, missing))
        values.view(-1, block).mul_(scales[rows].unsqueeze(1))
        y_N[rows.start * block :][:size] = values[:size]
    return None


def _dequantize(
    packed: Tensor, absmax: Tensor, code: Tensor | None, absmax2: Tensor | None,
    offset: Tensor | None, shape: Sequence[int], block: int, dtype: torch.dtype,
    backend: str | None,
) -> Tensor:  # fmt: skip
    y = packed.new_empty(tuple(shape), dtype=dtype)
    chosen = choose("nf4_dequantize", packed.device, dtype, backend)
    fill(y.view(-1), packed.reshape(-1), absmax, code, absmax2, offset, block, chosen)
    return y


def _dequantize_fake(
    packed: Tensor, absmax: Tensor, code: Tensor | None, absmax2: Tensor | None,
    offset: Tensor | None, shape: Sequence[int], block: int, dtype: torch.dtype, *_: Any,
) -> Tensor:  # fmt: skip
    return packed.new_empty(tuple(shape), dtype=dtype)


_QUANTIZE = register(
    "nf4_quantize(Tensor x, int block, str? backend) -> (Tensor, Tensor)", _quantize, _quantize_fake
)
_DEQUANTIZE = register(
    "nf4_dequantize(Tensor packed, Tensor absmax, Tensor? code, Tensor? absmax2, Tensor? offset,"
    " SymInt[] shape, int block, ScalarType dtype, str? backend) -> Tensor",
    _dequantize, _dequantize_fake,
)  # fmt: skip


def _quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise scales to 8 bits: the table, the scales of 256, the mean and the codes.

    An operator, that nothing compiles it: Inductor (2.13) leaves the last row of the codes unfilled
    where it is not whole, and rounds the table differently.
    """
    code = second_values().to(absmax.device)
    offset = absmax.mean()
    size = absmax.numel()
    rest = torch.nn.functional.pad(absmax - offset, (0, -size % SECOND)).view(-1, SECOND)
    absmax2 = rest.abs().amax(1) if size else rest.new_empty(0)
    value = rest * (1.0 / absmax2).unsqueeze(1)
    step = ((value.clamp_(-1, 1) + 1) * 0.5 * _STEPS + 0.5).int()
    codes = torch.bucketize(step * 2.0 / _STEPS - 1.0, middles(code), out_int32=True)
    codes = torch.where((absmax2 == 0).unsqueeze(1), 0, codes)
    return code, absmax2, offset, codes.to(torch.uint8).view(-1)[:size]


def _quantize_scales_fake(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new, size = absmax.new_empty, absmax.numel()
    codes = new(size, dtype=torch.uint8)
    return new(SECOND), new((size + SECOND - 1) // SECOND), new(()), codes


_QUANTIZE_SCALES = register(
    "nf4_quantize_scales(Tensor absmax) -> (Tensor, Tensor, Tensor, Tensor)",
    _quantize_scales, _quantize_scales_fake,
)  # fmt: skip


def nf4_quantize(
    x: Tensor, *, block: int = 64, double: bool = True, backend: str | None = None
) -> Nf4:
    """Quantise to NF4; there is no gradient.

    Args:
        x: Any shape and strides; float16, bfloat16 or float32.
        block: Elements that share a scale: 32, 64, ... or 4096.
        double: Whether the scales are quantised to 8 bits.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        What bitsandbytes' `quantize_4bit(x, quant_type="nf4")` gives on the CPU, bit for bit.

    Raises:
        ValueError: If `block` or the dtype is not one of these.
        RuntimeError: If `backend` cannot serve this tensor here.
    """
    need_tensors("nf4_quantize", x=x)
    if block not in _BLOCKS:
        raise ValueError(f"nf4_quantize: block must be one of {[*_BLOCKS]}, got {block}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"nf4_quantize: x must be float16, bfloat16 or float32, got {x.dtype}")
    absmax, packed = _QUANTIZE(x.detach(), block, backend)
    if not double:
        return Nf4(packed, absmax, tuple(x.shape), x.dtype, block)
    code, absmax2, offset, codes = _QUANTIZE_SCALES(absmax)
    return Nf4(packed, codes, tuple(x.shape), x.dtype, block, code, absmax2, offset)


def check(op: str, q: Nf4) -> None:
    """Hold the parts to the shape and to each other.

    Args:
        op: Operator, for the message.
        q: A tensor in NF4.

    Raises:
        ValueError: If the block is none of NF4's, or a part has another size than `q` needs.
    """
    if q.block not in _BLOCKS:
        raise ValueError(f"{op}: block must be one of {[*_BLOCKS]}, got {q.block}")
    size = torch.Size(q.shape).numel()
    need = (size + 1) // 2, -(-size // q.block)
    if (q.packed.numel(), q.absmax.numel()) != need:
        raise ValueError(
            f"{op}: shape {[*q.shape]} in blocks of {q.block} needs {need[0]} bytes and "
            f"{need[1]} scales, got {q.packed.numel()} and {q.absmax.numel()}"
        )
    parts = q.code, q.absmax2, q.offset
    sizes = [None if part is None else part.numel() for part in parts]
    whole = [SECOND, -(-q.absmax.numel() // SECOND), 1]
    double = q.absmax.dtype == torch.uint8
    if sizes != (whole if double else [None] * 3):
        raise ValueError(
            f"{op}: {q.absmax.numel()} scales of {q.absmax.dtype} need "
            f"{f'code, absmax2 and offset of {whole} numbers' if double else 'no second level'}, "
            f"got {sizes}"
        )


def nf4_dequantize(
    q: Nf4, *, dtype: torch.dtype | None = None, backend: str | None = None
) -> Tensor:
    """Multiply the codes' values by the scales of their blocks.

    Args:
        q: A tensor in NF4.
        dtype: float16, bfloat16 or float32; None takes that of `q`.
        backend: `reference` or `triton`; None takes the fastest that is proven here.

    Returns:
        In the shape of `q`; what bitsandbytes' `dequantize_4bit` gives, bit for bit.

    Raises:
        ValueError: If the dtype is not one of these, or a part has another size than `q` needs.
        RuntimeError: If `backend` cannot serve this tensor here.
    """
    dtype = q.dtype if dtype is None else dtype
    if dtype not in _DTYPES or q.block not in _BLOCKS:
        raise ValueError(
            "nf4_dequantize: dtype must be float16, bfloat16 or float32 and the block one of "
            f"{[*_BLOCKS]}, got {dtype} and {q.block}"
        )
    check("nf4_dequantize", q)
    parts = q.packed, q.absmax, q.code, q.absmax2, q.offset
    y: Tensor = _DEQUANTIZE(*parts, q.shape, q.block, dtype, backend)
    return y
