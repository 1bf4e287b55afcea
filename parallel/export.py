"""Logical tensors put together on rank 0, one at a time: how weights leave a mesh of any shape.

Each rank that is the lowest to hold a piece sends it to rank 0, which holds one whole tensor at a
time; no other rank holds more than it did. A tensor of n bytes costs n bytes received, however many
ranks there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .collectives import exchange_begin, gather_json
from .mesh import Mesh
from .sharding import Layout, Piece, owned, piece_from_json


def export(
    tensors: Mapping[str, Tensor], made: Mapping[str, Layout], names: Sequence[str], mesh: Mesh
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield each logical tensor, in the order of `names`; a collective call over the world.

    Every rank must take all of them, or all that rank 0 takes.

    Args:
        tensors: Local tensors by path.
        made: Their layouts, by the same paths.
        names: Logical names, the same on every rank.
        mesh: The groups.

    Yields:
        Name, and on rank 0 the whole tensor on the CPU; `None` on the others.

    Raises:
        ValueError: On every rank, before anything is sent, if an element of a tensor is held by no
            rank.
    """
    own = [(path, piece) for path, pieces in owned(made, mesh).items() for piece in pieces]
    lines = gather_json([_describe(piece, tensors[path]) for path, piece in own], mesh.world)
    pieces = [[(piece_from_json(item["piece"]), item["dtype"]) for item in line] for line in lines]
    _check(names, pieces)
    for name in names:
        if mesh.rank:
            parts = [p.of_local(tensors[path].detach()) for path, p in own if p.name == name]
            exchange_begin([(part, 0) for part in parts], [], mesh.world).wait()
            yield name, None
        else:
            mine = [(p, tensors[path].detach()) for path, p in own if p.name == name]
            yield name, _receive(name, mine, pieces, mesh)


def _receive(
    name: str, mine: list[tuple[Piece, Tensor]], pieces: list[list[tuple[Piece, str]]], mesh: Mesh
) -> Tensor:
    coming = [
        (rank, piece, torch.empty(piece.logical_sizes, dtype=getattr(torch, dtype)))
        for rank, line in enumerate(pieces)
        for piece, dtype in line
        if rank and piece.name == name
    ]
    if mine:
        coming = [(r, p, x.to(mine[0][1].device)) for r, p, x in coming]
    exchange_begin([], [(part, rank) for rank, _, part in coming], mesh.world).wait()
    placed = [(piece, part) for _, piece, part in coming]
    placed += [(piece, piece.of_local(local)) for piece, local in mine]
    whole = torch.empty(placed[0][0].shape, dtype=placed[0][1].dtype)
    for piece, part in placed:
        piece.of_logical(whole).copy_(part)
    return whole


def _describe(piece: Piece, local: Tensor) -> dict[str, Any]:
    return {"piece": asdict(piece), "dtype": str(local.dtype).removeprefix("torch.")}


def _check(names: Sequence[str], pieces: list[list[tuple[Piece, str]]]) -> None:
    held = dict.fromkeys(names, 0)
    sizes = dict.fromkeys(names, -1)
    for piece, _ in (item for line in pieces for item in line):
        if piece.name in held:
            held[piece.name] += torch.Size(piece.logical_sizes).numel()
            sizes[piece.name] = torch.Size(piece.shape).numel()
    for name in names:
        if held[name] != sizes[name]:
            raise ValueError(
                f"{name} must be held by the ranks in full to be exported; {held[name]} of "
                f"{max(sizes[name], 0)} elements are"
            )
