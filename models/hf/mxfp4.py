"""Weights in MXFP4, as gpt-oss is published: what they stand for, exactly.

    <name>_blocks   [E, R, G, 16] uint8    two values of four bits a byte, the lower first
    <name>_scales   [E, R, G] uint8        for 32 values each: the exponent of two, plus 127
    <name>          [E, 32 G, R]           what they stand for

Source: Rouhani et al. 2023, https://arxiv.org/abs/2310.10537, table 1 (E2M1, E8M0).
"""

import torch
from torch import Tensor

GROUP = 32
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the values `[..., 32 G]`, bfloat16, of blocks `[..., G, 16]` and scales `[..., G]`.

    A scale that is no number (255) gives infinity.
    """
    values = torch.tensor([*_POSITIVE, *(-x for x in _POSITIVE)])
    codes = torch.arange(256)
    pairs = torch.stack((values[codes & 15], values[codes >> 4]), -1)[blocks.int()]
    return torch.ldexp(pairs.flatten(-2), scales.int()[..., None] - 127).flatten(-2).bfloat16()
