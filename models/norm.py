"""The norms of a decoder block: their weights, and what a gradient is on a tensor-parallel group.

    RMSNorm           x / rms(x) * weight, or * (1 + weight)
    LayerNorm         (x - mean(x)) / std(x) * weight + bias
    ShardedRMSNorm    the first, of features that are sharded: the sum of squares crosses the group

Every rank holds the whole scale but sees only its part of the tokens (or, for the norms of queries
and keys, of the heads): the gradient is partial over the group, and declared so. A sharded norm
holds the scale of its own features instead.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; Gemma Team 2024,
https://arxiv.org/abs/2403.08295 (1 + weight); Ba et al. 2016, https://arxiv.org/abs/1607.06450;
OLMo Team 2025, https://arxiv.org/abs/2501.00656, section 2.1 (a norm of all heads together).
"""

import torch
from torch import Tensor, nn

from warploom.kernels.library import wide
from warploom.kernels.norm import layer_norm, rms_norm
from warploom.parallel.collectives import Group, copy, place, reduce
from warploom.parallel.sharding import Layout, rows, whole

from .architecture import Architecture


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a learned scale.

    Args:
        width: Size D of the last dimension.
        eps: Added to the mean square; dimensionless.
        group: The tensor-parallel process group; `None` for one rank.
        plus_one: Whether the scale is 1 + weight.
    """

    def __init__(self, width: int, *, eps: float, group: Group, plus_one: bool = False) -> None:
        super().__init__()
        self.eps, self.group, self.plus_one = eps, group, plus_one
        self.weight = nn.Parameter(torch.full((width,), self.initial("weight")))

    def initial(self, name: str) -> float:
        """Return what a parameter starts as."""
        return 0.0 if self.plus_one or name == "bias" else 1.0

    def declare_layouts(self) -> dict[str, Layout]:
        """Declare the parameters: whole on each rank, their gradients partial over the group."""
        parameters = self.named_parameters(recurse=False)
        return {name: whole(name, p.shape, partial=(self.group,)) for name, p in parameters}

    @property
    def scale(self) -> Tensor:
        """The scale; 1 + weight in float32 at least."""
        return self.weight.to(wide(self.weight.dtype)) + 1 if self.plus_one else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., D]`."""
        y: Tensor = rms_norm(x, self.scale, eps=self.eps)
        return y

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return `norm(x + residual)` and `x + residual`, both `[..., D]`, from one kernel.

        Without a residual, the sum is `x` itself.
        """
        if residual is None:
            return self(x), x
        y, total = rms_norm(x, self.scale, residual=residual, eps=self.eps)
        return y, total


class LayerNorm(RMSNorm):
    """Layer norm with a scale and a bias; `add` as `RMSNorm`."""

    def __init__(self, width: int, *, eps: float, group: Group) -> None:
        super().__init__(width, eps=eps, group=group)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., D]`."""
        y: Tensor = layer_norm(x, self.weight, self.bias, eps=self.eps)
        return y

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return `norm(x + residual)` and `x + residual`."""
        if residual is None:
            return self(x), x
        y, total = layer_norm(x, self.weight, self.bias, residual=residual, eps=self.eps)
        return y, total


class ShardedRMSNorm(RMSNorm):
    """Root-mean-square norm of features of which each rank of the group holds some.

    Args:
        width: Features over all ranks.
        heads: Into how many heads they fall; where these are fewer than the ranks, several ranks
            hold the same one.
        eps: Added to the mean square; dimensionless.
        group: The tensor-parallel process group; `None` for one rank.
        plus_one: Whether the scale is 1 + weight.
    """

    def __init__(
        self, width: int, heads: int, *, eps: float, group: Group, plus_one: bool = False
    ) -> None:
        rank, ranks = place(group)
        self.width, self.copies = width, max(ranks // heads, 1)
        held = width // min(ranks, heads)
        self.first = rank // self.copies * held
        super().__init__(held, eps=eps, group=group, plus_one=plus_one)

    def declare_layouts(self) -> dict[str, Layout]:
        """Declare the scale of this rank's features."""
        held = len(self.weight)
        piece = rows("weight", (self.width,), self.first, self.first + held)
        spread = ((self.group, ("weight",)),) if self.copies > 1 else ()
        return {"weight": Layout((held,), (piece,), spread=spread)}

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., D/R]`; a collective call."""
        if self.group is None:
            return super().forward(x)
        h = x.to(wide(x.dtype))
        total = copy(reduce(h.square().sum(-1, keepdim=True), self.group), self.group)
        y = h * torch.rsqrt(total / (self.copies * self.width) + self.eps) * self.scale
        return y.to(x.dtype)


def block_norm(a: Architecture, *, group: Group) -> RMSNorm:
    """Build the norm of a block, or the last one, of an architecture."""
    if a.norm == "layer":
        return LayerNorm(a.width, eps=a.norm_eps, group=group)
    return RMSNorm(a.width, eps=a.norm_eps, group=group, plus_one=a.norm == "rms_plus_one")
