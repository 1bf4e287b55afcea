"""Gradients of a step: accumulated over micro-batches, then summed over ranks into shards.

R ranks of `mesh.shard`; a parameter `[n, ...]` is sharded along its dim 0: rank r owns rows
`[r c, (r+1) c)` of it, c = ceil(n / R) (the last ranks may own fewer, or none).

    once a step                          over             parameters
    all-reduce, coalesced                layout.partial   those that see a part of the tokens
    reduce-scatter, in buckets           mesh.shard       all
    all-reduce of the shards             mesh.rep         all

Micro-batches accumulate without communication, in float32 at least: parameters of 16 bits get a
float32 accumulator each, wider ones accumulate where autograd puts them. Sums only: what a sum is
divided by belongs to `step.py`.

Source: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5 (stage 1).
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..collectives import Group, all_reduce_, reduce_scatter_rows
from ..mesh import Mesh
from ..sharding import Layout

_BUCKET_ELEMENTS = 1 << 24  # 64 MiB of float32: bounds the copy that a reduce-scatter needs


def shard_rows(rows: int, group: Group) -> tuple[int, int]:
    """Return the rows `start, stop` of a dim 0 of `rows` that this rank of `group` owns."""
    if group is None:
        return 0, rows
    each = -(-rows // group.size())
    start = min(group.rank() * each, rows)
    return start, min(start + each, rows)


class Gradients:
    """Accumulates the gradients of `parameters` and sums them into this rank's shards.

    Args:
        parameters: Parameters by path.
        layouts: Their layouts, by the same paths.
        mesh: Its `shard` and `rep` groups are reduced over.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout], mesh: Mesh
    ) -> None:
        self.parameters = dict(parameters)
        self.layouts = dict(layouts)
        self.mesh = mesh
        self.wide: dict[str, Tensor] = {}
        self.hooks: list[RemovableHandle] = []
        for path, parameter in self.parameters.items():
            if parameter.dtype.itemsize < 4:
                self.wide[path] = torch.zeros_like(parameter, dtype=torch.float32)
                hook = self._accumulate_into(self.wide[path])
                self.hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    @staticmethod
    def _accumulate_into(wide: Tensor) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            wide.add_(parameter.grad)
            parameter.grad = None

        return hook

    def zero(self) -> None:
        """Forget the gradients of the last step."""
        for parameter in self.parameters.values():
            parameter.grad = None
        for wide in self.wide.values():
            wide.zero_()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self.hooks:
            hook.remove()

    def local(self, path: str) -> Tensor:
        """Return the gradient accumulated on this rank; zeros where no token reached it."""
        if path in self.wide:
            return self.wide[path]
        parameter = self.parameters[path]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def reduce(self) -> dict[str, Tensor]:
        """Sum over all ranks and return this rank's shards by path: rows of dim 0.

        Without a group to shard over, the shards are the gradients themselves, not copies.
        """
        self._sum_partial()
        shards: dict[str, Tensor] = {}
        for bucket in self._buckets():
            shards.update(self._reduce_bucket(bucket))
        if self.mesh.rep is not None:
            for shard in shards.values():
                all_reduce_(shard, self.mesh.rep)
        return shards

    def _sum_partial(self) -> None:
        groups = {group: None for layout in self.layouts.values() for group in layout.partial}
        for group in groups:
            paths = [path for path in self.parameters if group in self.layouts[path].partial]
            grads = [self.local(path) for path in paths]
            flat = torch.cat([grad.flatten() for grad in grads])
            all_reduce_(flat, group)
            for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def _buckets(self) -> Iterator[list[str]]:
        """Group the paths into lists of one dtype and about `_BUCKET_ELEMENTS` elements."""
        bucket: list[str] = []
        size = 0
        for path in self.parameters:
            grad = self.local(path)
            if bucket and (
                size + grad.numel() > _BUCKET_ELEMENTS or grad.dtype != self.local(bucket[0]).dtype
            ):
                yield bucket
                bucket, size = [], 0
            bucket.append(path)
            size += grad.numel()
        if bucket:
            yield bucket

    def _reduce_bucket(self, paths: list[str]) -> dict[str, Tensor]:
        group = self.mesh.shard
        if group is None:
            return {path: self.local(path) for path in paths}
        ranks = group.size()
        grads = [self.local(path) for path in paths]
        sizes = [-(-grad.shape[0] // ranks) * grad[:1].numel() for grad in grads]
        flat = torch.zeros(ranks, sum(sizes), dtype=grads[0].dtype, device=grads[0].device)
        for part, grad in zip(flat.split(sizes, dim=1), grads, strict=True):
            # The rows of rank r, flattened, are row r of `part`; the last rows are padding.
            each = part.shape[1]
            source = grad.reshape(-1)
            for rank in range(ranks):
                own = source[rank * each : (rank + 1) * each]
                part[rank, : own.numel()] = own
        summed = reduce_scatter_rows(flat, group)[0]
        result: dict[str, Tensor] = {}
        for path, grad, part in zip(paths, grads, summed.split(sizes), strict=True):
            start, stop = shard_rows(grad.shape[0], group)
            shape = (stop - start, *grad.shape[1:])
            result[path] = part[: (stop - start) * grad[:1].numel()].view(shape)
        return result
