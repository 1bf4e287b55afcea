"""What the formats are, for hosts and kernels: sizes of groups, largest numbers, tables of values.

Source: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433, section 3 (FP8); Open Compute
Project 2023, Microscaling Formats (MX) Specification v1.0, section 5; Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314, appendix E (NF4).
"""

import torch
from torch import Tensor

MAXIMA = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
EXPONENTS = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}  # of the largest number
BLOCK = 128  # elements that share a scale in "block"; rows and columns in "tile"
MX_BLOCK = 32
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


def middles(values: Tensor) -> Tensor:
    """Return the middles between neighbours of a sorted table: what is above takes the higher."""
    return (values[:-1] + values[1:]) / 2
