"""AdamW with decoupled weight decay.

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    w <- w - lr wd w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Shards of one kind take the step together, in one pass of `kernels/optim` (see there for the roof),
which rounds masters to rows as it goes. Masters in host memory are brought up afterwards.

Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from warploom.kernels.optim import adamw_

from ..mesh import Mesh
from ..sharding import Layout
from .sharded import Shard, ShardedOptimizer, decays


class AdamW(ShardedOptimizer):
    """AdamW over shards.

    Args:
        parameters: Parameters by path.
        layouts: Their layouts, by the same paths.
        mesh: The ranks that hold the same parameter share out its rows.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, times the learning rate.
        decay: Which parameters decay; by default those of two dimensions or more.
        rate: What a parameter's learning rate is multiplied by, and its weight decay divided by,
            given path and parameter; by default 1.
        offload: Whether masters and moments are kept in host memory.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout], mesh: Mesh, *,
        betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.1,
        decay: Callable[[str, Tensor], bool] = decays,
        rate: Callable[[str, Tensor], float] | None = None, offload: bool = False,
    ) -> None:  # fmt: skip
        self.betas = betas
        self.eps = eps
        self.rates = {path: rate(path, p) if rate else 1.0 for path, p in parameters.items()}
        super().__init__(
            parameters, layouts, mesh, weight_decay=weight_decay, decay=decay, offload=offload
        )

    def moments(self) -> Iterable[str]:
        """Return the paths of the parameters that take AdamW's step."""
        return self.shards

    def reset(self) -> None:
        """Make both moments, zero."""
        masters = {path: self.shards[path].master for path in self.moments()}
        self.means = {path: _zeros(master) for path, master in masters.items()}
        self.squares = {path: _zeros(master) for path, master in masters.items()}

    def states(self) -> Iterable[tuple[str, str, Tensor]]:
        """Yield both moments."""
        yield from (("adamw.mean", path, tensor) for path, tensor in self.means.items())
        yield from (("adamw.square", path, tensor) for path, tensor in self.squares.items())

    def update(
        self, shards: Sequence[Shard], gradients: Mapping[str, Tensor], learning_rate: float
    ) -> None:
        """Change masters and rows of `shards` in place."""
        kinds: dict[tuple[bool, float, float, torch.dtype, torch.dtype], list[Shard]] = {}
        for s in shards:
            if s.master.numel():
                apart = s.master is not s.rows and s.master.device == s.rows.device
                rate = self.rates[s.path]
                decay = self.weight_decay / rate if s.decay else 0.0
                kind = (apart, rate, decay, s.rows.dtype, gradients[s.path].dtype)
                kinds.setdefault(kind, []).append(s)
        for (apart, rate, decay, *_), alike in kinds.items():
            masters = [s.master for s in alike]
            adamw_(
                [s.rows for s in alike] if apart else masters, [gradients[s.path] for s in alike],
                [self.means[s.path] for s in alike], [self.squares[s.path] for s in alike],
                masters=masters if apart else None,
                step=torch.tensor(float(self.steps - 1), device=masters[0].device),
                learning_rate=learning_rate * rate, betas=self.betas, eps=self.eps,
                weight_decay=decay,
            )  # fmt: skip
            if not apart:
                self.bring(alike)


def _zeros(master: Tensor) -> Tensor:
    """Return a state of zeros beside `master`, in pinned memory where that is pinned."""
    return torch.zeros_like(master, pin_memory=master.is_pinned())
