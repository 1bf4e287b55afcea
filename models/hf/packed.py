"""Weights as they are published in four and eight bits: what they stand for.

MXFP4, as gpt-oss is:

    <name>_blocks      [E, R, G, 16] uint8    two values of four bits a byte, the lower first
    <name>_scales      [E, R, G] uint8        for 32 values each: the exponent of two, plus 127
    <name>             [E, 32 G, R]           what they stand for, exactly

FP8, as DeepSeek-V3 is; S = ceil(R / 128), D = ceil(C / 128):

    <name>             [R, C] float8_e4m3fn
    <name>_scale_inv   [S, D]                 by which 128 x 128 values are multiplied

Source: Rouhani et al. 2023, https://arxiv.org/abs/2310.10537, table 1 (E2M1, E8M0); DeepSeek-AI
2024, https://arxiv.org/abs/2412.19437, section 3.3.2.
"""

import torch
from torch import Tensor

GROUP = 32
SIDE = 128
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the values `[..., 32 G]`, bfloat16, of blocks `[..., G, 16]` and scales `[..., G]`.

    A scale that is no number (255) gives infinity.
    """
    values = torch.tensor([*_POSITIVE, *(-x for x in _POSITIVE)])
    codes = torch.arange(256)
    pairs = torch.stack((values[codes & 15], values[codes >> 4]), -1)[blocks.int()]
    return torch.ldexp(pairs.flatten(-2), scales.int()[..., None] - 127).flatten(-2).bfloat16()


def decode_fp8(codes: Tensor, scales: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the values `[R, C]`, float32, of codes `[R, C]` that are those rows and columns."""
    return codes.float().mul_(scales.float()[:, columns // SIDE][rows // SIDE])
