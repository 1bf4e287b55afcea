"""Optimizer state sharded over `mesh.shard`, and float32 master weights, which live here alone.

Each rank holds rows of dim 0 of every local parameter (see `data/gradients.py`), never ranges of a
flat buffer, so that a shard is made of pieces of logical tensors as the parameter is.

    parameter      master                          bytes a parameter over R ranks, AdamW
    16 bits        float32 copy of own rows        2 + 4 (accumulator) + 12 / R
    32, 64 bits    view of own rows                4 + 4 (gradient) + 8 / R

Source: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5; Micikevicius et al.
2018, https://arxiv.org/abs/1710.03740, section 3.1 (master weights).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoint import Entry
from ..collectives import all_gather_rows
from ..data.gradients import shard_rows
from ..mesh import Mesh
from ..sharding import Layout, narrow

_BUCKET_ELEMENTS = 1 << 24


@dataclass(frozen=True, eq=False)
class Shard:
    """What this rank holds of one parameter.

    Attributes:
        path: The parameter's path in the model.
        parameter: The local parameter `[n, ...]`.
        start: First own row of dim 0.
        stop: One past the last own row.
        layout: Pieces of the own rows.
        master: Own rows, float32 at least.
        decay: Whether weight decay applies.
    """

    path: str
    parameter: nn.Parameter
    start: int
    stop: int
    layout: Layout
    master: Tensor
    decay: bool


def decays(path: str, parameter: Tensor) -> bool:
    """Decay matrices only: norms and biases, of one dimension, are left alone."""
    return parameter.dim() > 1


class ShardedOptimizer(ABC):
    """Steps over this rank's shards, then gives every rank the new parameters.

    Args:
        parameters: Parameters by path.
        layouts: Their layouts, by the same paths.
        mesh: Its `shard` group holds one shard a rank.
        weight_decay: Decoupled: each step takes `learning_rate * weight_decay` of the weight.
        decay: Which parameters decay, given the path and the parameter.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layouts: Mapping[str, Layout],
        mesh: Mesh,
        *,
        weight_decay: float,
        decay: Callable[[str, Tensor], bool] = decays,
    ) -> None:
        self.mesh = mesh
        self.weight_decay = weight_decay
        self.steps = 0
        self.shards: dict[str, Shard] = {}
        for path, parameter in parameters.items():
            start, stop = shard_rows(parameter.shape[0], mesh.shard)
            own = parameter.detach()[start:stop]
            wide = torch.promote_types(parameter.dtype, torch.float32)
            self.shards[path] = Shard(
                path=path,
                parameter=parameter,
                start=start,
                stop=stop,
                layout=narrow(layouts[path], start, stop),
                master=own if own.dtype == wide else own.to(wide),
                decay=decay(path, parameter),
            )

    @abstractmethod
    def update(self, gradients: Mapping[str, Tensor], learning_rate: float) -> None:
        """Change the masters in place; `self.steps` already counts this step."""

    @abstractmethod
    def states(self) -> Iterable[tuple[str, str, Tensor]]:
        """Yield `(prefix, path, tensor)` for each state tensor, in the layout of its shard."""

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float) -> None:
        """Take one step.

        Args:
            gradients: This rank's shards by path, summed over ranks and normalised.
            learning_rate: This step's rate.
        """
        self.steps += 1
        with torch.no_grad():
            self.update(gradients, learning_rate)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Give every rank of `mesh.shard` the parameters that the masters hold."""
        bucket: list[Shard] = []
        size = 0
        for shard in self.shards.values():
            if self.mesh.shard is None:
                if shard.master.dtype != shard.parameter.dtype:
                    shard.parameter.copy_(shard.master)
                continue
            if bucket and (
                size + shard.parameter.numel() > _BUCKET_ELEMENTS
                or shard.parameter.dtype != bucket[0].parameter.dtype
            ):
                self._publish_bucket(bucket)
                bucket, size = [], 0
            bucket.append(shard)
            size += shard.parameter.numel()
        if bucket:
            self._publish_bucket(bucket)

    def _publish_bucket(self, bucket: list[Shard]) -> None:
        group = self.mesh.shard
        assert group is not None
        first = bucket[0].parameter
        sizes = [-(-s.parameter.shape[0] // group.size()) * s.parameter[:1].numel() for s in bucket]
        own = torch.zeros(1, sum(sizes), dtype=first.dtype, device=first.device)
        for shard, part in zip(bucket, own[0].split(sizes), strict=True):
            part[: shard.master.numel()] = shard.master.reshape(-1)
        full = all_gather_rows(own, group)
        for shard, part in zip(bucket, full.split(sizes, dim=1), strict=True):
            flat = part.reshape(-1)[: shard.parameter.numel()]
            shard.parameter.copy_(flat.view_as(shard.parameter))

    def entries(self) -> list[Entry]:
        """List what a checkpoint keeps: masters and states, as pieces.

        After a load into these tensors, call `publish`, and set `steps`.
        """
        masters = [Entry("master", s.master, s.layout) for s in self.shards.values()]
        states = [
            Entry(prefix, tensor, self.shards[path].layout)
            for prefix, path, tensor in self.states()
        ]
        return masters + states
