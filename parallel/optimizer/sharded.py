"""Optimizer state sharded over the replicas, and float32 master weights, which live here alone.

Each rank holds rows of dim 0 of every local parameter (see `data/buckets.py`), never ranges of a
flat buffer, so that a shard is made of pieces of logical tensors as the parameter is. The replicas
are `mesh.shard`, or `mesh.edp` for the parameters of experts; ZeRO stage 0 shards nothing.

    parameter      master                          bytes a parameter over R ranks, AdamW
    16 bits        float32 copy of own rows        2 + 4 (accumulator) + 12 / R
    32, 64 bits    view of own rows                4 + 4 (gradient) + 8 / R

Stages 2 and 3 divide the gradient (4 bytes) by R too, stage 3 the parameter. With `offload` masters
and states are in host memory (pinned where there is a GPU): gradients go down and rows come up,
bucket by bucket, while other buckets are updated.

Source: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5; Ren et al. 2021,
https://arxiv.org/abs/2101.06840, section 4 (offload); Micikevicius et al. 2018,
https://arxiv.org/abs/1710.03740, section 3.1 (master weights).
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoint import Entry
from ..collectives import Group, Pending, all_gather_rows_begin
from ..data import Bucket, make_buckets, shard_rows
from ..mesh import Mesh
from ..sharding import Layout, narrow

_FLYING = 2  # buckets under way at a time
_HELD = ("everything", "own states", "own states", "own states and rows")  # of each stage


@dataclass(frozen=True, eq=False)
class Shard:
    """What this rank holds of one parameter.

    Attributes:
        path: The parameter's path in the model.
        parameter: The local parameter `[n, ...]`.
        start: First own row of dim 0.
        stop: One past the last own row.
        layout: Pieces of the own rows.
        rows: Own rows in the parameter's dtype: a view of it, or under ZeRO-3 all that is held.
        master: Own rows, float32 at least; the same tensor as `rows` where nothing differs.
        decay: Whether weight decay applies.
    """

    path: str
    parameter: nn.Parameter
    start: int
    stop: int
    layout: Layout
    rows: Tensor
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
        mesh: The ranks that hold the same parameter share out its rows.
        weight_decay: Decoupled: each step takes `learning_rate * weight_decay` of the weight.
        decay: Which parameters decay, given the path and the parameter.
        offload: Whether masters and states are kept in host memory.

    A parameter that requires no gradient at a step is left as it is, decay included.

    Raises:
        ValueError: If a parameter is 0-dim.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout], mesh: Mesh, *,
        weight_decay: float, decay: Callable[[str, Tensor], bool] = decays, offload: bool = False,
    ) -> None:  # fmt: skip
        for path, parameter in parameters.items():
            if not parameter.dim():
                raise ValueError(
                    f"parameters are shared out by rows, and {path} is 0-dim: make it [1]"
                )
        self.parameters = dict(parameters)
        self.layouts = dict(layouts)
        self.mesh = mesh
        self.weight_decay = weight_decay
        self.decay = decay
        self.offload = offload
        self.steps = 0
        self.zero = 1
        self._shard(1)

    def place(self, zero: int) -> None:
        """Lay parameters and states out for a ZeRO stage; `Step` calls it.

        Raises:
            RuntimeError: If steps were taken under another layout.
        """
        if _HELD[zero] == _HELD[self.zero]:
            self.zero = zero
            return
        if self.steps:
            raise RuntimeError(
                f"an optimizer that has taken {self.steps} steps under zero={self.zero} cannot go "
                f"on under zero={zero}: save a checkpoint and load it into a new one"
            )
        self._shard(zero)

    def replicas(self, path: str) -> Group:
        """Return the ranks that share out the rows of a parameter."""
        return None if self.zero == 0 else self.layouts[path].replicas(self.mesh)

    def _shard(self, zero: int) -> None:
        self.zero = zero
        self.shards = {path: self._make(path) for path in self.parameters}
        self.buckets = make_buckets(self.parameters, self.replicas)
        self.written = self._versions()
        self.reset()

    def _make(self, path: str) -> Shard:
        parameter, group = self.parameters[path], self.replicas(path)
        start, stop = shard_rows(parameter.shape[0], group)
        rows = parameter.detach()[start:stop]
        if self.zero == 3 and group is not None:
            rows = rows.clone()
        wide = torch.promote_types(rows.dtype, torch.float32)
        return Shard(
            path=path, parameter=parameter, start=start, stop=stop,
            layout=narrow(self.layouts[path], start, stop), rows=rows,
            master=_host(rows, wide) if self.offload else rows.to(wide),
            decay=self.decay(path, parameter),
        )  # fmt: skip

    @abstractmethod
    def reset(self) -> None:
        """Make the states anew, as they are before the first step."""

    @abstractmethod
    def update(
        self, shards: Sequence[Shard], gradients: Mapping[str, Tensor], learning_rate: float
    ) -> None:
        """Change masters and rows of `shards` in place; `self.steps` already counts this step."""

    @abstractmethod
    def states(self) -> Iterable[tuple[str, str, Tensor]]:
        """Yield `(prefix, path, tensor)` for each state tensor, in the layout of its shard."""

    def prepare(self, gradients: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Do what needs the gradients of all parameters, before the updates of the buckets."""

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], learning_rate: float) -> None:
        """Take one step.

        Args:
            gradients: This rank's shards by path, summed over ranks and normalised.
            learning_rate: This step's rate.

        Raises:
            RuntimeError: If someone else wrote parameters whose masters are apart.
        """
        now = self._versions()
        if changed := [path for path, version in self.written.items() if now[path] != version]:
            raise RuntimeError(
                f"{len(changed)} parameters, {changed[0]} first, were written since the last step, "
                f"and their float32 masters were not: call adopt() of the optimizer after "
                f"load_state_dict and the like"
            )
        self.steps += 1
        arrived: list[Callable[[], None]] = [lambda: None for _ in self.buckets]
        if self.offload:
            gradients, arrived = self._down(gradients)
        self.prepare(gradients)
        flying: deque[tuple[Bucket, Pending]] = deque()
        for bucket, wait in zip(self.buckets, arrived, strict=True):
            wait()
            trained = [self.shards[p] for p in bucket.paths if self.parameters[p].requires_grad]
            self.update(trained, gradients, learning_rate)
            self._gather(bucket, flying)
        self._land(flying, 0)
        self.written = self._versions()

    def _down(
        self, gradients: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[Callable[[], None]]]:
        """Begin to copy gradients to host memory; return them, and a wait for each bucket."""
        below: dict[str, Tensor] = {}
        waits: list[Callable[[], None]] = []
        for bucket in self.buckets:
            for path in bucket.paths:
                below[path] = _host(gradients[path], gradients[path].dtype)
            if gradients[bucket.paths[0]].is_cuda:
                event = torch.cuda.Event()
                event.record()
                waits.append(event.synchronize)
            else:
                waits.append(lambda: None)
        return below, waits

    @torch.no_grad()
    def publish(self) -> None:
        """Give the ranks the parameters that the masters hold."""
        flying: deque[tuple[Bucket, Pending]] = deque()
        for bucket in self.buckets:
            self.bring([self.shards[path] for path in bucket.paths])
            self._gather(bucket, flying)
        self._land(flying, 0)
        self.written = self._versions()

    @torch.no_grad()
    def adopt(self) -> None:
        """Take the parameters' values as masters, after others wrote them; states stay."""
        for shard in self.shards.values():
            shard.master.copy_(shard.rows)
        self.written = self._versions()

    def _versions(self) -> dict[str, int]:
        """Count the writes to each parameter whose master is apart; under ZeRO-3 none is whole."""
        apart = [s for s in self.shards.values() if s.master is not s.rows and self.zero < 3]
        return {shard.path: shard.parameter._version for shard in apart}

    @staticmethod
    def bring(shards: Iterable[Shard]) -> None:
        """Round masters to own rows, where these are apart."""
        for shard in shards:
            if shard.master is not shard.rows:
                shard.rows.copy_(shard.master, non_blocking=True)

    def _gather(self, bucket: Bucket, flying: deque[tuple[Bucket, Pending]]) -> None:
        """Begin to gather own rows where every rank has all."""
        if bucket.group is None or self.zero == 3:
            return
        self._land(flying, _FLYING - 1)
        own = bucket.own([self.shards[path].rows for path in bucket.paths])
        flying.append((bucket, all_gather_rows_begin(own, bucket.group)))

    def _land(self, flying: deque[tuple[Bucket, Pending]], left: int) -> None:
        while len(flying) > left:
            bucket, pending = flying.popleft()
            bucket.spill(pending.wait(), [self.parameters[path] for path in bucket.paths])

    def entries(self) -> list[Entry]:
        """List what a checkpoint keeps: masters and states, as pieces, whatever the stage.

        After a load into these tensors, call `publish`, and set `steps`.
        """
        masters = [Entry("master", s.master, s.layout) for s in self.shards.values()]
        states = [
            Entry(prefix, tensor, self.shards[path].layout)
            for prefix, path, tensor in self.states()
        ]
        return masters + states


def _host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Begin to copy a tensor to host memory, pinned if it comes from a GPU."""
    below = torch.empty(tensor.shape, dtype=dtype, pin_memory=tensor.is_cuda)
    return below.copy_(tensor, non_blocking=True)
