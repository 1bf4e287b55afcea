"""Random values that depend on a logical name and an index, and on no topology.

Element i of logical tensor `name` under `seed` is a hash of (seed, name, i): two rounds of the
splitmix64 finaliser give 64 bits, two 32-bit uniforms u1, u2 in (0, 1), and by Box and Muller one
normal value sqrt(-2 ln u1) cos(2 pi u2). A rank computes just its own slices, on its own device.

Source: Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195 (splitmix64); Salmon et
al. 2011, https://doi.org/10.1145/2063384.2063405 (counter-based generators); Box and Muller 1958,
https://doi.org/10.1214/aoms/1177706645.
"""

import hashlib
import math

import torch
from torch import Tensor

from .sharding import Layout, Piece

_BLOCK = 1 << 22  # elements at a time: bounds the int64 and float64 temporaries to some 100 MiB


def _signed(value: int) -> int:
    """Read 64 bits as a signed integer, as torch's int64 arithmetic wraps."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Finalise as splitmix64 does."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _normal(index: Tensor, key: int) -> Tensor:
    """Return one float64 normal value for each int64 index."""
    bits = _mix(_mix(index * _signed(0x9E3779B97F4A7C15) + _signed(key)))
    low, high = bits & 0xFFFFFFFF, _shifted(bits, 32)
    u1 = (low.double() + 0.5) / 2.0**32
    u2 = (high.double() + 0.5) / 2.0**32
    return torch.sqrt(-2 * u1.log()) * torch.cos(2 * math.pi * u2)


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|{name}".encode()).digest()[:8], "little")


def _indices(piece: Piece, first: int, last: int, device: torch.device) -> Tensor:
    """Return the logical index of each element in rows `first:last` of the piece's slice."""
    start, _, step = piece.slices[0]
    index = torch.arange(first, last, device=device) * step + start
    for (begin, stop, stride), size in zip(piece.slices[1:], piece.shape[1:], strict=True):
        along = torch.arange(begin, stop, stride, device=device)
        index = index[..., None] * size + along
    return index


@torch.no_grad()
def normal_(tensor: Tensor, layout: Layout, *, seed: int, std: float) -> Tensor:
    """Fill a local tensor with its part of N(0, std); padding becomes zero.

    Args:
        tensor: Local tensor, changed in place.
        layout: Its pieces.
        seed: The run's seed.
        std: Standard deviation, in the units of the parameter.

    Returns:
        `tensor`; the same logical values under every topology on the same kind of device.
    """
    tensor.zero_()
    for piece in layout.pieces:
        part = piece.of_local(tensor)
        rows = piece.logical_sizes[0]
        block = max(1, _BLOCK * rows // max(part.numel(), 1))
        for first in range(0, rows, block):
            last = min(first + block, rows)
            index = _indices(piece, first, last, tensor.device)
            part[first:last] = (_normal(index, _key(seed, piece.name)) * std).to(tensor.dtype)
    return tensor


def draw_seed() -> int:
    """Draw a seed from torch's default generator: layers that are built alone start from it."""
    return int(torch.randint(2**62, ()).item())
