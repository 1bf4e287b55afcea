"""Muon: momentum whose matrices are made orthogonal, for the hidden matrices of a model.

    b <- mu b + g,   u = g + mu b (Nesterov),   w <- w - lr wd w - lr s(n, m) O(u)

O(u) replaces the singular values of u `[n, m]` by about 1, in five Newton-Schulz steps (see
`kernels/optim`). s(n, m) = 0.2 sqrt(max(n, m)) gives the update the root mean square of AdamW's, so
that one learning rate serves both.

The shards of u go to the ranks that make whole matrices of them (see `matrices.py`), and the rows
come back. Parameters that are no hidden matrices (embedding, head, norms) take AdamW's step.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ (the method); Liu et al.
2025, https://arxiv.org/abs/2502.16982, section 2.2 (scale, decay) and 2.3 (sharding).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from warploom.kernels.optim import newton_schulz

from ..mesh import Mesh
from ..sharding import Layout
from .adamw import AdamW
from .matrices import Matrices
from .sharded import Shard, decays


class Muon(AdamW):
    """Muon for hidden matrices, AdamW for the rest, over shards.

    Args:
        parameters: Parameters by path.
        layouts: Their layouts, by the same paths.
        mesh: The ranks that hold the same parameter share out its rows; those of `mesh.stage`
            share out the matrices.
        hidden: Which parameters are hidden matrices, by path and parameter: the last two
            dimensions of each of their logical tensors are a matrix, the others count matrices.
        momentum: mu.
        betas: AdamW's, for the rest.
        eps: AdamW's, for the rest.
        weight_decay: Decoupled weight decay, times the learning rate, for both.
        decay: Which parameters decay.
        rest_rate: AdamW's learning rate as a factor on Muon's.
        offload: Whether masters and states are kept in host memory; matrices are made orthogonal
            where the parameters are.

    Raises:
        ValueError: If a hidden parameter has a logical tensor of fewer than two dimensions.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout], mesh: Mesh, *,
        hidden: Callable[[str, Tensor], bool], momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.1,
        decay: Callable[[str, Tensor], bool] = decays, rest_rate: float = 1.0,
        offload: bool = False,
    ) -> None:  # fmt: skip
        self.momentum = momentum
        self.rest_rate = rest_rate
        self.hidden = [path for path, p in parameters.items() if hidden(path, p)]
        for path in self.hidden:
            for piece in layouts[path].pieces:
                if len(piece.shape) < 2:
                    raise ValueError(
                        f"a hidden parameter must be made of matrices, but {piece.name} of {path} "
                        f"has the shape {piece.shape}: leave it to AdamW"
                    )
        super().__init__(
            parameters, layouts, mesh, betas=betas, eps=eps, weight_decay=weight_decay, decay=decay,
            offload=offload,
        )  # fmt: skip

    def moments(self) -> Iterable[str]:
        """Return the paths of the parameters that take AdamW's step."""
        hidden = set(self.hidden)
        return [path for path in self.shards if path not in hidden]

    def reset(self) -> None:
        """Make the momenta, and the moments of the rest, zero."""
        super().reset()
        self.momenta = {path: torch.zeros_like(self.shards[path].master) for path in self.hidden}
        self.matrices: Matrices | None = None
        self.orthogonal: dict[str, Tensor] = {}

    def states(self) -> Iterable[tuple[str, str, Tensor]]:
        """Yield AdamW's moments of the rest, and the momenta."""
        yield from super().states()
        yield from (("muon.momentum", path, tensor) for path, tensor in self.momenta.items())

    def prepare(self, gradients: Mapping[str, Tensor]) -> None:
        """Advance the momenta and make this step's matrices orthogonal; a collective call."""
        if self.offload and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the gradients are down
        trained = [path for path in self.hidden if self.parameters[path].requires_grad]
        shards = {path: self.shards[path] for path in trained}
        if self.matrices is None or self.matrices.paths != trained:
            self.matrices = Matrices(shards, self.mesh.stage)
        moved: dict[str, Tensor] = {}
        for path, shard in shards.items():
            gradient = gradients[path].to(shard.master.dtype)
            momentum = self.momenta[path].mul_(self.momentum).add_(gradient)
            u = gradient.add(momentum, alpha=self.momentum)
            moved[path] = u.to(shard.rows.device)
        made = self.matrices.exchange(moved, _orthogonal)
        self.orthogonal = {path: x.to(shards[path].master.device) for path, x in made.items()}

    def update(
        self, shards: Sequence[Shard], gradients: Mapping[str, Tensor], learning_rate: float
    ) -> None:
        """Change masters and rows of `shards` in place."""
        rest = [shard for shard in shards if shard.path not in self.momenta]
        super().update(rest, gradients, learning_rate * self.rest_rate)
        hidden = [shard for shard in shards if shard.path in self.momenta]
        for shard in hidden:
            if shard.decay:
                shard.master.mul_(1 - learning_rate * self.weight_decay)
            shard.master.sub_(self.orthogonal.pop(shard.path), alpha=learning_rate)
        self.bring(hidden)


def _orthogonal(u: Tensor, narrow: torch.dtype) -> Tensor:
    """Return the scaled, orthogonal update, computed in bfloat16 where parameters are."""
    dtype = torch.bfloat16 if narrow == torch.bfloat16 else u.dtype
    return newton_schulz(u.to(dtype)).to(u.dtype).mul_(0.2 * max(u.shape) ** 0.5)
