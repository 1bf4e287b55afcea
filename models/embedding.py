"""A learned vector for each position, added to the embedding of the token that stands there.

Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section
4.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.parallel.collectives import Group, place
from warploom.parallel.sharding import Layout, whole


class LearnedPositions(nn.Module):
    """Vectors `[P, D]`, whole on each rank, which looks up those of its own tokens.

    Args:
        positions: Longest sequence P.
        width: Model width D.
        group: The tensor-parallel process group, over which the tokens are sharded; `None` for one
            rank.
    """

    def __init__(self, positions: int, width: int, *, group: Group) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.empty(positions, width))

    def declare_layouts(self) -> dict[str, Layout]:
        """Declare the vectors: whole on each rank, their gradients partial over the group."""
        return {"weight": whole("weight", self.weight.shape, partial=(self.group,))}

    def forward(self, positions: Tensor) -> Tensor:
        """Map the positions `[T]` of the tokens of all ranks to `[T/R, D]` of this rank's."""
        rank, ranks = place(self.group)
        return F.embedding(positions.chunk(ranks)[rank], self.weight)
