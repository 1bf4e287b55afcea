"""AdamW with decoupled weight decay.

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    w <- w - lr wd w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Bound by memory: 28 bytes a float32 element (reads w, g, m, v; writes w, m, v), in one pass of
torch's fused kernel.

Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

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
        offload: Whether masters and moments are kept in host memory.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layouts: Mapping[str, Layout],
        mesh: Mesh,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay: Callable[[str, Tensor], bool] = decays,
        offload: bool = False,
    ) -> None:
        self.betas = betas
        self.eps = eps
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
        """Change the masters of `shards` in place."""
        for decay in (True, False):
            self._update(
                [s for s in shards if s.decay == decay and s.master.numel()],
                gradients,
                learning_rate,
                self.weight_decay if decay else 0.0,
            )

    def _update(
        self, shards: Sequence[Shard], gradients: Mapping[str, Tensor], rate: float, decay: float
    ) -> None:
        if not shards:
            return
        adamw(
            params=[s.master for s in shards],
            grads=[gradients[s.path].to(s.master.dtype) for s in shards],
            exp_avgs=[self.means[s.path] for s in shards],
            exp_avg_sqs=[self.squares[s.path] for s in shards],
            max_exp_avg_sqs=[],
            state_steps=[
                torch.tensor(float(self.steps - 1), device=s.master.device) for s in shards
            ],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=rate,
            weight_decay=decay,
            eps=self.eps,
            maximize=False,
        )


def _zeros(master: Tensor) -> Tensor:
    """Return a state of zeros beside `master`, in pinned memory where that is pinned."""
    return torch.zeros_like(master, pin_memory=master.is_pinned())
