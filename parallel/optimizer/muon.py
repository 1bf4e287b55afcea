"""Muon: momentum whose matrices are made orthogonal, for the hidden matrices of a model.

    b <- mu b + g,   u = g + mu b (Nesterov),   w <- w - lr wd w - lr s(n, m) O(u)

O(u) replaces the singular values of u `[n, m]` by about 1: five Newton-Schulz steps
x <- a x + (b A + c A^2) x, A = x x^T, from x = u / |u|. s(n, m) = 0.2 sqrt(max(n, m)) gives the
update the root mean square of AdamW's, so that one learning rate serves both.

R ranks of `mesh.shard`:

    gather the rows of u                              all-gather
    each logical matrix is made orthogonal by one rank, the costliest by the least busy
    return the rows                                   reduce-scatter (zeros from the others)

Costs 5 (4 n^2 m + 2 n^3) FLOPs a matrix, n <= m, shared by the ranks. Parameters that are no hidden
matrices (embedding, head, norms) take AdamW's step.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ (the method and its
coefficients); Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2 (scale, decay) and
2.3 (sharding).
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..collectives import all_gather_rows, reduce_scatter_rows
from ..mesh import Mesh
from ..sharding import Layout, Piece
from .adamw import AdamW
from .sharded import Shard, decays


def newton_schulz(u: Tensor, *, steps: int = 5) -> Tensor:
    """Return a matrix `[n, m]` with the singular vectors of `u` and singular values of about 1.

    Args:
        u: Matrix `[n, m]`, in the dtype of the computation.
        steps: Iterations.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = u.t() if u.shape[0] > u.shape[1] else u
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if u.shape[0] > u.shape[1] else x


def _whole(piece: Piece) -> bool:
    return piece.logical_sizes == piece.shape


class Muon(AdamW):
    """Muon for hidden matrices, AdamW for the rest, over shards.

    Args:
        parameters: Parameters by path.
        layouts: Their layouts, by the same paths.
        mesh: Its `shard` group holds one shard a rank.
        hidden: Which parameters are hidden matrices, by path and parameter.
        momentum: mu.
        betas: AdamW's, for the rest.
        eps: AdamW's, for the rest.
        weight_decay: Decoupled weight decay, times the learning rate, for both.
        decay: Which parameters decay.
        rest_rate: AdamW's learning rate as a factor on Muon's.

    Raises:
        ValueError: If a hidden matrix is split over ranks (tensor parallel).
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layouts: Mapping[str, Layout],
        mesh: Mesh,
        *,
        hidden: Callable[[str, Tensor], bool],
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay: Callable[[str, Tensor], bool] = decays,
        rest_rate: float = 1.0,
    ) -> None:
        super().__init__(
            parameters,
            layouts,
            mesh,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decay=decay,
        )
        self.momentum = momentum
        self.rest_rate = rest_rate
        self.matrices: dict[str, tuple[Piece, ...]] = {}
        for path, parameter in parameters.items():
            if not hidden(path, parameter):
                continue
            split = [piece.name for piece in layouts[path].pieces if not _whole(piece)]
            if split:
                raise ValueError(
                    f"Muon needs whole matrices, but {split[0]} is split over ranks: use tp1, or "
                    f"AdamW"
                )
            self.matrices[path] = layouts[path].pieces
            del self.means[path], self.squares[path]
        self.momenta = {path: torch.zeros_like(self.shards[path].master) for path in self.matrices}
        self.owner = self._share_out()

    def _share_out(self) -> dict[str, int]:
        """Give each matrix to a rank: the costliest first, to the least busy."""
        ranks = 1 if self.mesh.shard is None else self.mesh.shard.size()
        costs: dict[str, int] = {}
        for pieces in self.matrices.values():
            for piece in pieces:
                small, large = sorted(piece.shape)
                costs[piece.name] = 4 * small * small * large + 2 * small**3
        busy = [0] * ranks
        owner: dict[str, int] = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            owner[name] = busy.index(min(busy))
            busy[owner[name]] += costs[name]
        return owner

    def states(self) -> Iterable[tuple[str, str, Tensor]]:
        """Yield AdamW's moments of the rest, and the momenta."""
        yield from super().states()
        yield from (("muon.momentum", path, tensor) for path, tensor in self.momenta.items())

    def update(self, gradients: Mapping[str, Tensor], learning_rate: float) -> None:
        """Change the masters in place."""
        rest = [s for s in self.shards.values() if s.path not in self.matrices]
        for decay in (True, False):
            self._update(
                [s for s in rest if s.decay == decay and s.master.numel()],
                gradients,
                learning_rate * self.rest_rate,
                self.weight_decay if decay else 0.0,
            )
        for path in self.matrices:
            shard = self.shards[path]
            own = self._orthogonal(shard, gradients[path].to(shard.master.dtype))
            if shard.decay:
                shard.master.mul_(1 - learning_rate * self.weight_decay)
            shard.master.sub_(own, alpha=learning_rate)

    def _orthogonal(self, shard: Shard, gradient: Tensor) -> Tensor:
        """Return this rank's rows of the scaled, orthogonal update."""
        momentum = self.momenta[shard.path].mul_(self.momentum).add_(gradient)
        own = gradient.add(momentum, alpha=self.momentum)
        group = self.mesh.shard
        rows = shard.parameter.shape[0]
        each = rows if group is None else -(-rows // group.size())
        padded = own.new_zeros(each, *own.shape[1:])
        padded[: own.shape[0]] = own
        full = all_gather_rows(padded, group)
        result = torch.zeros_like(full)
        rank = 0 if group is None else group.rank()
        for piece in self.matrices[shard.path]:
            if self.owner[piece.name] != rank:
                continue
            u = piece.of_local(full)
            narrow = torch.bfloat16 if shard.parameter.dtype == torch.bfloat16 else u.dtype
            scale = 0.2 * max(piece.shape) ** 0.5
            piece.of_local(result).copy_(newton_schulz(u.to(narrow)).to(u.dtype).mul_(scale))
        return reduce_scatter_rows(result, group)[: own.shape[0]]
