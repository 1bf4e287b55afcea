"""Whole matrices out of shards: which rank works on which matrix, and the slices that travel.

The ranks of a group hold slices of matrices: rows of optimizer shards, cut by tensor, expert and
data parallelism as their pieces say.

    each slice goes to its matrix's owner                     all-to-all
    the owner works on the whole matrix, once
    each slice goes back to every rank that holds it          all-to-all

Each matrix has one owner in the group: the costliest goes first, to the least busy. The cost is
that of Newton-Schulz, 5 (4 n^2 m + 2 n^3) FLOPs, n <= m. Over the whole group each element travels
once forth (from the lowest rank that holds it) and once back to each rank that holds it: with
unsplit states of P elements over R ranks, a rank moves about P / R each way.

A logical tensor of three dimensions or more is a stack: its last two are a matrix.

Source: Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.3 (sharded Muon).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..collectives import Group, all_to_all_rows, gather_json, place
from ..sharding import Piece
from .sharded import Shard

Cut = tuple[int, int, int]


class _Matrix(NamedTuple):
    """A matrix: its logical tensor, its place in the stack, its shape and its parameter's dtype."""

    name: str
    at: tuple[int, ...]
    shape: tuple[int, int]
    dtype: str

    @property
    def cost(self) -> int:
        small, large = sorted(self.shape)
        return 4 * small * small * large + 2 * small**3


class _Part(NamedTuple):
    """A slice of a matrix."""

    matrix: _Matrix
    rows: Cut
    columns: Cut

    @property
    def sizes(self) -> tuple[int, int]:
        return len(range(*self.rows)), len(range(*self.columns))

    def of(self, whole: Tensor) -> Tensor:
        """View the slice in the whole matrix."""
        return whole[slice(*self.rows), slice(*self.columns)]


class _Route(NamedTuple):
    """A slice on its way between two ranks."""

    part: _Part
    source: int
    target: int


class Matrices:
    """The matrices of one group of ranks; a collective call.

    Args:
        shards: This rank's shards by path.
        group: The ranks that together hold every matrix.
    """

    def __init__(self, shards: Mapping[str, Shard], group: Group) -> None:
        self.group, self.paths = group, list(shards)
        self.rank, self.ranks = place(group)
        self.own: dict[_Part, tuple[str, Piece, tuple[int, ...]]] = {
            part: (path, piece, index)
            for path, shard in shards.items()
            for piece in shard.layout.pieces
            for part, index in _parts(piece, shard.parameter.dtype)
        }
        holders: dict[_Part, list[int]] = {}
        for rank, line in enumerate(gather_json(list(self.own), group)):
            for matrix, rows, columns in line:
                part = _Part(_matrix(matrix), tuple(rows), tuple(columns))
                holders.setdefault(part, []).append(rank)
        self.owner = _share_out({part.matrix for part in holders}, self.ranks)
        parts = sorted(holders)
        self.forth = [_Route(p, holders[p][0], self.owner[p.matrix]) for p in parts]
        self.back = [_Route(p, self.owner[p.matrix], r) for p in parts for r in holders[p]]

    def exchange(
        self, local: Mapping[str, Tensor], work: Callable[[Tensor, torch.dtype], Tensor]
    ) -> dict[str, Tensor]:
        """Apply `work` to every whole matrix, and return the slices that this rank holds.

        Args:
            local: This rank's shards by path, in the shapes of the constructor's.
            work: From a matrix and its parameter's dtype to one of the same shape.
        """
        if not self.owner:
            return {}
        like = next(iter(local.values()), torch.empty(0))
        mine = {part: _view(local, at) for part, at in self.own.items()}
        wholes = {
            matrix: like.new_zeros(matrix.shape)
            for matrix, owner in self.owner.items()
            if owner == self.rank
        }
        for part, came in self._travel(self.forth, mine.__getitem__, like):
            part.of(wholes[part.matrix]).copy_(came)
        made = {m: work(whole, getattr(torch, m.dtype)) for m, whole in wholes.items()}
        result = {path: torch.zeros_like(tensor) for path, tensor in local.items()}
        for part, came in self._travel(self.back, lambda p: p.of(made[p.matrix]), like):
            _view(result, self.own[part]).copy_(came)
        return result

    def _travel(
        self, routes: Sequence[_Route], take: Callable[[_Part], Tensor], like: Tensor
    ) -> Iterator[tuple[_Part, Tensor]]:
        """Send the slices that begin here and yield those that end here."""
        ranks = range(self.ranks)
        leaving = [[r for r in routes if r.source == self.rank and r.target == to] for to in ranks]
        coming = [[r for r in routes if r.target == self.rank and r.source == at] for at in ranks]
        sent, got = (
            [sum(prod(r.part.sizes) for r in line) for line in lines] for lines in (leaving, coming)
        )
        flat = [take(r.part).reshape(-1) for line in leaving for r in line]
        packed = torch.cat(flat) if flat else like.new_empty(0)
        received = all_to_all_rows(packed, self.group, sent, got)
        parts = [r.part for line in coming for r in line]
        pieces = received.split([prod(part.sizes) for part in parts])
        for part, piece in zip(parts, pieces, strict=True):
            yield part, piece.view(part.sizes)


def _parts(piece: Piece, dtype: torch.dtype) -> Iterator[tuple[_Part, tuple[int, ...]]]:
    """Yield the slices of matrices in a piece, each with its index in the leading dimensions."""
    stack = [range(*cut) for cut in piece.slices[:-2]]
    shape = (piece.shape[-2], piece.shape[-1])
    rows, columns = piece.slices[-2:]
    for index in product(*(range(len(along)) for along in stack)):
        at = tuple(along[i] for along, i in zip(stack, index, strict=True))
        matrix = _Matrix(piece.name, at, shape, str(dtype).removeprefix("torch."))
        yield _Part(matrix, rows, columns), index


def _matrix(line: Sequence[Any]) -> _Matrix:
    """Rebuild a matrix after a trip through JSON."""
    name, at, shape, dtype = line
    return _Matrix(name, tuple(at), tuple(shape), dtype)


def _share_out(matrices: set[_Matrix], ranks: int) -> dict[_Matrix, int]:
    """Give each matrix to a rank: the costliest first, to the least busy."""
    busy = [0] * ranks
    owner: dict[_Matrix, int] = {}
    for matrix in sorted(matrices, key=lambda m: (-m.cost, m)):
        owner[matrix] = busy.index(min(busy))
        busy[owner[matrix]] += matrix.cost
    return owner


def _view(tensors: Mapping[str, Tensor], place: tuple[str, Piece, tuple[int, ...]]) -> Tensor:
    """View a slice of a matrix in the shard that holds it."""
    path, piece, index = place
    return piece.of_local(tensors[path])[index]
