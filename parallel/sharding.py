"""Sharding as data: which slice of which logical tensor lies where in a local one.

A *logical tensor* is a tensor of the unsharded model, by its name there. A local parameter is made
of *pieces*, each a slice of one logical tensor:

    ColumnLinear on rank 1 of 2, parts q (8 rows) and k (4 rows), width 6; local shape [6, 6]

    local rows 0..3   q[4:8, 0:6]     Piece("q.weight", (8, 6), ((4, 8, 1), (0, 6, 1)), (0, 0))
    local rows 4..5   k[2:4, 0:6]     Piece("k.weight", (4, 6), ((2, 4, 1), (0, 6, 1)), (4, 0))

Padding has no piece. Initialisation, checkpoints, the gradient norm, the optimizer's shards and the
export of weights read the pieces and nothing else.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .collectives import Group, all_gather_rows, device_of, gather_json
from .mesh import Mesh

Slice = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A slice of a logical tensor, and its place in the local one.

    Attributes:
        name: Logical name, such as `model.layers.0.self_attn.q_proj.weight`.
        shape: Logical shape.
        slices: `(start, stop, step)` for each logical dimension.
        offset: Where the piece begins, for each local dimension.
        transposed: Whether the two dimensions are swapped in the local tensor.
    """

    name: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    offset: tuple[int, ...]
    transposed: bool = False

    @property
    def logical_sizes(self) -> tuple[int, ...]:
        """Sizes of the slice, in the order of the logical dimensions."""
        return tuple(len(range(*s)) for s in self.slices)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the slice, in the order of the local dimensions."""
        return self.logical_sizes[::-1] if self.transposed else self.logical_sizes

    def of_local(self, local: Tensor) -> Tensor:
        """View this piece in the local tensor, with the logical order of dimensions."""
        for dim, (start, size) in enumerate(zip(self.offset, self.sizes, strict=True)):
            local = local.narrow(dim, start, size)
        return local.t() if self.transposed else local

    def of_logical(self, whole: Tensor) -> Tensor:
        """View this piece in the logical tensor."""
        return whole[tuple(slice(*s) for s in self.slices)]

    @property
    def key(self) -> int:
        """Identify the slice by 63 bits that are the same on every rank."""
        text = f"{self.name}|{self.shape}|{self.slices}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True, slots=True)
class Layout:
    """How a local tensor is made.

    Attributes:
        shape: Local shape.
        pieces: Its pieces; what no piece covers is padding.
        partial: Groups whose ranks each see only a part of the tokens that this parameter serves
            although they hold the same values: its gradient must be summed over them.
        spread: Groups over which some logical tensors are held several times though not by every
            rank (key heads that are fewer than the ranks), with the names of these tensors: their
            gradients must be summed over the group, slice by slice.
        expert: Whether its replicas are the ranks of `mesh.edp`, not those of `mesh.shard`.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    partial: tuple[Group, ...] = ()
    spread: tuple[tuple[Group, tuple[str, ...]], ...] = ()
    expert: bool = False

    def replicas(self, mesh: Mesh) -> Group:
        """Return the ranks that hold the same tensor, within one replica of the model."""
        return mesh.edp if self.expert else mesh.shard


@runtime_checkable
class Declares(Protocol):
    """A module that says how its own parameters (not its children's) are sharded."""

    def declare_layouts(self) -> dict[str, Layout]:
        """Return the layout of each own parameter; logical names are relative to the module."""
        ...


def whole(name: str, shape: Sequence[int], *, partial: tuple[Group, ...] = ()) -> Layout:
    """Lay out a tensor that each rank holds in full."""
    sizes = tuple(shape)
    piece = Piece(name, sizes, tuple((0, n, 1) for n in sizes), (0,) * len(sizes))
    return Layout(sizes, (piece,), tuple(g for g in partial if g is not None))


def rows(name: str, shape: Sequence[int], start: int, stop: int, offset: int = 0) -> Piece:
    """Return the piece of rows `start:stop` that lies at row `offset` of the local tensor."""
    rest = tuple(shape[1:])
    slices = ((start, stop, 1), *((0, n, 1) for n in rest))
    return Piece(name, tuple(shape), slices, (offset, *(0 for _ in rest)))


def layouts(model: nn.Module, rename: Callable[[str], str] | None = None) -> dict[str, Layout]:
    """Collect the layout of every parameter of `model`, keyed by its path.

    A module of this library declares its own parameters in `declare_layouts()`, by logical names
    relative to the module; any other parameter is taken to be held in full by every rank. A
    parameter that is tied appears once, where it is first registered.

    Args:
        model: Any module.
        rename: From the logical name by module path to the name in the unsharded model.
    """
    rename = rename or (lambda name: name)
    found: dict[str, Layout] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        declared = module.declare_layouts() if isinstance(module, Declares) else {}
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            layout = declared.get(name) or whole(name, parameter.shape)
            prefix = f"{path}." if path else ""
            pieces = tuple(replace(p, name=rename(prefix + p.name)) for p in layout.pieces)
            spread = tuple(
                (group, tuple(rename(prefix + n) for n in names)) for group, names in layout.spread
            )
            found[prefix + name] = replace(layout, pieces=pieces, spread=spread)
    return found


def _cut(piece: Piece, start: int, stop: int) -> Piece | None:
    """Keep the part of `piece` that lies in local rows `start:stop`, counted from `start`."""
    low = max(piece.offset[0], start)
    high = min(piece.offset[0] + piece.sizes[0], stop)
    if low >= high:
        return None
    dim = 1 if piece.transposed else 0
    first, _, step = piece.slices[dim]
    begin = first + (low - piece.offset[0]) * step
    end = first + (high - 1 - piece.offset[0]) * step + 1
    slices = (*piece.slices[:dim], (begin, end, step), *piece.slices[dim + 1 :])
    return replace(piece, slices=slices, offset=(low - start, *piece.offset[1:]))


def narrow(layout: Layout, start: int, stop: int) -> Layout:
    """Lay out rows `start:stop` of the local dimension 0: what a shard of an optimizer holds."""
    shape = (stop - start, *layout.shape[1:])
    cut = (_cut(piece, start, stop) for piece in layout.pieces)
    return replace(layout, shape=shape, pieces=tuple(p for p in cut if p is not None))


def owned(tensors: Mapping[str, Layout], mesh: Mesh) -> dict[str, tuple[Piece, ...]]:
    """Return the pieces that this rank counts and saves: it is the lowest that holds them.

    A collective call over the world. Ranks exchange 8 bytes a piece.
    """
    mine = [(path, piece) for path, layout in tensors.items() for piece in layout.pieces]
    result: dict[str, tuple[Piece, ...]] = dict.fromkeys(tensors, ())
    if mesh.world is None:
        return {path: layout.pieces for path, layout in tensors.items()}
    device = device_of(mesh.world)
    counts = all_gather_rows(torch.tensor([len(mine)], device=device), mesh.world)
    keys = torch.zeros(1, int(counts.max()), dtype=torch.int64, device=device)
    keys[0, : len(mine)] = torch.tensor([piece.key for _, piece in mine], dtype=torch.int64)
    below = all_gather_rows(keys, mesh.world)[: mesh.rank]
    taken = {
        key
        for line, count in zip(below.tolist(), counts.tolist(), strict=False)
        for key in line[:count]
    }
    for path, piece in mine:
        if piece.key not in taken:
            result[path] = (*result[path], piece)
    return result


@torch.no_grad()
def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy this rank's slices of a whole state dict into the parameters of a model.

    Args:
        model: Of any layers; names are those of `layouts(model)`.
        state: The logical tensors; of others nothing is read.

    Raises:
        ValueError: If one is missing or has another shape; nothing is changed.
    """
    made = layouts(model)
    pieces = [piece for layout in made.values() for piece in layout.pieces]
    wanted = {piece.name: piece.shape for piece in pieces}
    found = {name: tuple(state[name].shape) if name in state else None for name in wanted}
    if wrong := [f"{n} {s}, got {found[n] or 'none'}" for n, s in wanted.items() if found[n] != s]:
        raise ValueError(f"the state must hold {'; '.join(wrong)}")
    for path, layout in made.items():
        for piece in layout.pieces:
            own = piece.of_local(model.get_parameter(path).detach())
            own.copy_(piece.of_logical(state[piece.name]))


def assemble(
    tensors: Mapping[str, Tensor], made: Mapping[str, Layout], group: Group
) -> dict[str, Tensor]:
    """Gather the logical tensors on every rank of `group`: for tests and small exports.

    Ranks may hold different pieces. Pieces that several hold must be equal; any one is taken.

    Args:
        tensors: Local tensors by path.
        made: Their layouts, by the same paths.
        group: Ranks that together hold every element.

    Raises:
        ValueError: If an element of a logical tensor is held by no rank.
    """
    own = [
        (piece, piece.of_local(tensors[path].detach()).contiguous())
        for path, layout in made.items()
        for piece in layout.pieces
    ]
    result: dict[str, Tensor] = {}
    covered: dict[str, Tensor] = {}
    for piece, part in _exchange(own, group):
        if piece.name not in result:
            result[piece.name] = part.new_zeros(piece.shape)
            covered[piece.name] = torch.zeros(piece.shape, dtype=torch.bool)
        piece.of_logical(result[piece.name]).copy_(part)
        piece.of_logical(covered[piece.name]).fill_(True)
    for name, mask in covered.items():
        if not mask.all():
            missing = int((~mask).sum())
            raise ValueError(f"{name}: {missing} of {mask.numel()} elements are on no rank")
    return result


def _exchange(own: list[tuple[Piece, Tensor]], group: Group) -> Iterator[tuple[Piece, Tensor]]:
    """Yield the pieces of every rank, one dtype of float or integer after the other."""
    if group is None:
        yield from own
        return
    device = device_of(group)
    data = [part.to(device).flatten().view(torch.uint8) for _, part in own]
    lines = gather_json(
        [{**asdict(piece), "dtype": str(part.dtype).removeprefix("torch.")} for piece, part in own],
        group,
    )
    total = torch.tensor([sum(d.numel() for d in data)], device=device)
    longest = int(all_gather_rows(total, group).max())
    flat = torch.zeros(1, longest, dtype=torch.uint8, device=device)
    if data:
        flat[0, : int(total)] = torch.cat(data)
    for line, raw in zip(lines, all_gather_rows(flat, group), strict=True):
        at = 0
        for item in line:
            dtype = getattr(torch, item.pop("dtype"))
            piece = piece_from_json(item)
            size = math.prod(piece.logical_sizes) * dtype.itemsize
            part = raw[at : at + size].clone().view(dtype).view(piece.logical_sizes)
            yield piece, part
            at += size


def piece_from_json(item: Mapping[str, Any]) -> Piece:
    """Rebuild a piece from `dataclasses.asdict` after a trip through JSON."""
    return Piece(
        name=item["name"], shape=tuple(item["shape"]),
        slices=tuple((a, b, c) for a, b, c in item["slices"]), offset=tuple(item["offset"]),
        transposed=item["transposed"],
    )  # fmt: skip
