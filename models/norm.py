"""The norm of a decoder block: its weight, and what its gradient is on a tensor-parallel group."""

import torch
from torch import Tensor, nn

from warploom.kernels.norm import rms_norm
from warploom.parallel.collectives import Group
from warploom.parallel.sharding import Layout, whole


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a learned scale.

    Every rank holds the whole scale but sees only its part of the tokens (or, for the norms of
    queries and keys, of the heads): the gradient is partial over the group, and is declared so in
    `declare_layouts`. Nothing is reduced in the backward pass.

    Args:
        width: Size D of the last dimension.
        eps: Added to the mean square; dimensionless.
        group: The tensor-parallel process group; `None` for one rank.
    """

    def __init__(self, width: int, *, eps: float, group: Group) -> None:
        super().__init__()
        self.eps, self.group = eps, group
        self.weight = nn.Parameter(torch.ones(width))

    def declare_layouts(self) -> dict[str, Layout]:
        """Declare the scale: whole on each rank, its gradient partial over the group."""
        return {"weight": whole("weight", self.weight.shape, partial=(self.group,))}

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., D]`."""
        y: Tensor = rms_norm(x, self.weight, eps=self.eps)
        return y

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return `norm(x + residual)` and `x + residual`, both `[..., D]`, from one kernel.

        Without a residual, the sum is `x` itself.
        """
        if residual is None:
            return self(x), x
        y, total = rms_norm(x, self.weight, residual=residual, eps=self.eps)
        return y, total
