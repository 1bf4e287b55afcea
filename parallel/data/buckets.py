"""Buckets: tensors whose rows travel together, in one collective.

R ranks of a group share out dim 0 of each tensor `[n, ...]`: rank r owns rows `[r c, (r+1) c)` of
it, c = ceil(n / R) (the last ranks may own fewer, or none). A bucket of two tensors, on 3 ranks:

    rank 0   a[0:2] b[0:1]        the flat form [R, c_a + c_b]: row r is what rank r owns, padded
    rank 1   a[2:4] b[1:2]        with zeros; a reduce-scatter turns it into one row, an all-gather
    rank 2   a[4:5] b[2:3]        makes it from the ranks' rows

Source: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ..collectives import Group, place

BUCKET_ELEMENTS = 1 << 24  # 64 MiB of float32: bounds the copy that a collective needs


def shard_rows(rows: int, group: Group) -> tuple[int, int]:
    """Return the rows `start, stop` of a dim 0 of `rows` that this rank of `group` owns."""
    rank, ranks = place(group)
    each = -(-rows // ranks)
    start = min(rank * each, rows)
    return start, min(start + each, rows)


@dataclass(frozen=True, eq=False)
class Bucket:
    """Tensors that travel together.

    Attributes:
        paths: Their paths.
        shapes: Their shapes.
        group: The ranks that share out their rows; `None` where one rank has them all.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    group: Group

    @cached_property
    def ranks(self) -> int:
        """Ranks that share out the rows."""
        return place(self.group)[1]

    @cached_property
    def sizes(self) -> list[int]:
        """Elements that a rank owns of each tensor, with padding."""
        return [-(-shape[0] // self.ranks) * prod(shape[1:]) for shape in self.shapes]

    def pack(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Copy whole tensors into the flat form `[R, sum(sizes)]`."""
        flat = tensors[0].new_zeros(self.ranks, sum(self.sizes), dtype=dtype)
        for tensor, part in self._places(tensors, flat):
            part.copy_(tensor)
        return flat

    def spill(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        """Overwrite contiguous whole tensors with the flat form."""
        for tensor, part in self._places(tensors, flat):
            tensor.copy_(part)

    def _places(self, tensors: Sequence[Tensor], flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pair the parts of each tensor with their places in the flat form."""
        for tensor, part in zip(tensors, flat.split(self.sizes, dim=1), strict=True):
            line, each = tensor.reshape(-1), part.shape[1]
            if not each:
                continue
            full, rest = divmod(line.numel(), each)
            yield line[: full * each].view(full, each), part[:full]
            if rest:
                yield line[full * each :], part[full, :rest]

    def own(self, rows: Sequence[Tensor]) -> Tensor:
        """Copy this rank's rows of each tensor into a row of the flat form, `[1, sum(sizes)]`."""
        flat = rows[0].new_zeros(1, sum(self.sizes))
        for row, part in zip(rows, flat[0].split(self.sizes), strict=True):
            part[: row.numel()] = row.reshape(-1)
        return flat

    def views(self, own: Tensor) -> dict[str, Tensor]:
        """View a row of the flat form, `[1, sum(sizes)]`, as this rank's rows of each tensor."""
        result: dict[str, Tensor] = {}
        for path, shape, part in zip(
            self.paths, self.shapes, own[0].split(self.sizes), strict=True
        ):
            start, stop = shard_rows(shape[0], self.group)
            size = (stop - start, *shape[1:])
            result[path] = part[: prod(size)].view(size)
        return result


def make_buckets(
    tensors: Mapping[str, Tensor], group: Callable[[str], Group],
    kind: Callable[[str], Hashable] = lambda path: None, *, elements: int = BUCKET_ELEMENTS,
) -> list[Bucket]:  # fmt: skip
    """Put tensors of one group, dtype, device and kind into buckets, in the order they fill.

    Args:
        tensors: Tensors by path.
        group: The ranks that share out the rows of each.
        kind: What else must be equal within a bucket.
        elements: Most elements of a bucket, unless one tensor has more.
    """
    open_: dict[Hashable, list[str]] = {}
    closed: list[list[str]] = []
    for path, tensor in tensors.items():
        key = (group(path), tensor.dtype, tensor.device, kind(path))
        held = open_.setdefault(key, [])
        if held and sum(tensors[p].numel() for p in held) + tensor.numel() > elements:
            closed.append(open_.pop(key))
            held = open_.setdefault(key, [])
        held.append(path)
    order = {path: at for at, path in enumerate(tensors)}
    return [
        Bucket(tuple(paths), tuple(tuple(tensors[p].shape) for p in paths), group(paths[0]))
        for paths in sorted((*closed, *open_.values()), key=lambda paths: order[paths[-1]])
    ]
