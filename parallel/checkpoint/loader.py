"""Read a checkpoint into any topology: whichever chunks meet a local piece are copied into it.

What is checked before a tensor is touched: the index against its own hash; names, shapes and dtypes
against the entries; that the chunks cover every local piece. What is read is hashed on the way
(see `reader`). An error of one rank is an error of all.

Cost: a rank reads and hashes the blocks of rows that meet its pieces, about 1.8 GB/s a core where
the processor has SHA instructions. A rank that needs columns of a chunk reads all its rows.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..collectives import all_reduce_, device_of
from ..mesh import Mesh
from ..sharding import Piece
from .agreement import agree
from .boxes import Box, meet, sizes, uncovered, within
from .folders import CheckpointError, complete, step_of
from .index import Chunk, Entry, Index, dtype_name, read_index
from .reader import Reader, check_file, shown

_LOG = logging.getLogger(__name__)


def read_state(path: str | Path) -> dict[str, Any]:
    """Return the JSON state of a checkpoint; reads no tensor.

    Raises:
        CheckpointError: If the index is missing or damaged.
    """
    return read_index(Path(path)).state


def verify(path: str | Path, mesh: Mesh | None = None) -> None:
    """Hash every byte of a checkpoint; over a mesh the ranks share the files, a collective call.

    Args:
        path: A checkpoint.
        mesh: The ranks that share the work; `None` for this process alone.

    Raises:
        CheckpointError: If a file is missing, truncated or altered; names it and the tensor.
    """
    path = Path(path)
    error: Exception | None = None
    try:
        index = read_index(path)
        rank, ranks = (0, 1) if mesh is None else (mesh.rank, mesh.size)
        for name in sorted(index.files)[rank::ranks]:
            check_file(path, index, name, lambda: None)
    except CheckpointError as caught:
        error = caught
    agree(mesh, error)


def latest_good(
    folder: str | Path, mesh: Mesh | None = None, *, before: str | Path | None = None
) -> Path | None:
    """Return the newest checkpoint of `folder` that `verify` passes, or `None`.

    Args:
        folder: Folder of checkpoints.
        mesh: The ranks that share the work, a collective call; `None` for this process alone.
        before: Look only at checkpoints older than this one.
    """
    return _newest_good(Path(folder), mesh, before)[0]


def _newest_good(
    folder: Path, mesh: Mesh | None, before: str | Path | None
) -> tuple[Path | None, list[Path]]:
    """Return what `latest_good` does, and the damaged ones that are newer than it."""
    limit = None if before is None else step_of(Path(before))
    damaged = []
    found = {s: p for s, p in complete(folder).items() if limit is None or s < limit}
    for path in agree(mesh, None, [str(path) for path in reversed(found.values())])[0]:
        try:
            verify(path, mesh)
        except CheckpointError as error:
            _LOG.warning("%s", error)
            damaged.append(Path(path))
        else:
            return Path(path), damaged
    return None, damaged


def load(
    path: str | Path, entries: Sequence[Entry], mesh: Mesh | None = None, *,
    allow_unexpected: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Fill the local tensors of `entries` in place and return the state.

    With a mesh it is a collective call: all ranks return, or all raise. Where it raises because
    the checkpoint is damaged, the tensors may be filled in part.

    Args:
        path: A checkpoint, such as `latest(folder)`.
        entries: Local tensors; any layout, whatever the checkpoint's was.
        mesh: The ranks that load; `None` for this process alone.
        allow_unexpected: Whether the checkpoint may hold tensors that no rank asks for, such as an
            optimizer's when the weights alone are read.

    Raises:
        ValueError: If tensors are missing from the checkpoint or unexpected in it, or a shape or
            dtype differs.
        CheckpointError: If the checkpoint is damaged or does not cover a tensor; names the file,
            the tensor, the older checkpoints that are damaged too, and the newest that is whole;
            its `damaged` lists all that are in the way of that.
    """
    path = Path(path)
    error: Exception | None = None
    index = Index(0, {}, {}, {})
    try:
        index = read_index(path)
    except CheckpointError as caught:
        error = caught
    _agree_or_offer(path, mesh, error)
    wanted = [(entry, piece) for entry in entries for piece in entry.pieces]
    asked = _asked([piece.name for _, piece in wanted], index, mesh)
    plan: list[tuple[Entry, Piece, list[tuple[Chunk, Box]]]] = []
    try:
        _check_fit(path, wanted, index, () if allow_unexpected else asked)
        plan = [(entry, piece, _meeting(path, piece, index)) for entry, piece in wanted]
    except (CheckpointError, ValueError) as caught:
        error = caught
    _agree_or_offer(path, mesh, error)
    try:
        with Reader(path, index) as reader:
            for entry, piece, chunks in plan:
                _fill(reader, entry, piece, chunks)
    except CheckpointError as caught:
        error = caught
    _agree_or_offer(path, mesh, error)
    return index.state


def _agree_or_offer(path: Path, mesh: Mesh | None, error: Exception | None) -> None:
    """Raise on all ranks if one has an error; a damaged checkpoint's names the last good one."""
    try:
        agree(mesh, error)
    except CheckpointError as caught:
        good, more = _newest_good(path.parent, mesh, path)
        offer = f"the last good checkpoint is {good}" if good else "no older checkpoint is good"
        if more:
            verb = "is" if len(more) == 1 else "are"
            offer = f"{', '.join(map(str, more))} {verb} damaged too; {offer}"
        told = CheckpointError(f"{caught}; {offer}")
        told.damaged = (path, *more)
        raise told from caught


def _asked(names: Sequence[str], index: Index, mesh: Mesh | None) -> list[str]:
    """Return the tensors of the index that no rank asks for; a collective call."""
    group = None if mesh is None else mesh.world
    own = set(names)
    told = list(index.tensors)
    seen = torch.tensor([name in own for name in told], dtype=torch.int32, device=device_of(group))
    all_reduce_(seen, group, op="max")
    return [name for name, there in zip(told, seen.tolist(), strict=True) if not there]


def _check_fit(
    path: Path, wanted: Sequence[tuple[Entry, Piece]], index: Index, unexpected: Sequence[str]
) -> None:
    """Compare names, shapes and dtypes, and tell all that differ in one sentence."""
    names = dict.fromkeys(piece.name for _, piece in wanted)
    parts = []
    if missing := [name for name in names if name not in index.tensors]:
        parts.append(f"lacks {len(missing)} tensors that are asked for: {shown(missing)}")
    if unexpected:
        parts.append(f"holds {len(unexpected)} that are not: {shown(unexpected)}")
    if wrong := list(dict.fromkeys(_wrong_kinds(wanted, index))):
        parts.append(f"differs in {len(wrong)}: {shown(wrong)}")
    if parts:
        raise ValueError(f"{path} {', and '.join(parts)}")


def _wrong_kinds(wanted: Sequence[tuple[Entry, Piece]], index: Index) -> Iterator[str]:
    for entry, piece in wanted:
        if (record := index.tensors.get(piece.name)) is None:
            continue
        if record.shape != tuple(piece.shape):
            yield f"{piece.name} has shape {record.shape}, {tuple(piece.shape)} is asked for"
        dtype = dtype_name(entry.tensor.dtype)
        if record.dtype != dtype:
            yield f"{piece.name} is {record.dtype}, {dtype} is asked for"


def _meeting(path: Path, piece: Piece, index: Index) -> list[tuple[Chunk, Box]]:
    """Find the chunks that meet a piece, and check that they cover it."""
    record = index.tensors[piece.name]
    if math.prod(sizes(piece.slices)) == 0:
        return []
    both = [(chunk, meet(chunk.slices, piece.slices)) for chunk in record.chunks]
    found = [(chunk, box) for chunk, box in both if box is not None]
    if missing := uncovered(piece.slices, [box for _, box in found]):
        raise CheckpointError(
            f"{path} does not cover {piece.name} {piece.shape}: {missing:,} elements of "
            f"{piece.slices} are in no file"
        )
    return found


def _fill(reader: Reader, entry: Entry, piece: Piece, chunks: Sequence[tuple[Chunk, Box]]) -> None:
    """Copy what `chunks` hold of a piece into the local tensor."""
    target = piece.of_local(entry.tensor.detach())
    for chunk, box in chunks:
        source = within(box, chunk.slices)
        place = within(box, piece.slices)
        if not box:
            for _, _, data in reader.rows(piece.name, chunk, 0, 1):
                target.copy_(data)
            continue
        for first, end, data in reader.rows(piece.name, chunk, source[0].start, source[0].stop):
            _copy_rows(target, data, source, place, (first, end))


def _copy_rows(
    target: Tensor, data: Tensor, source: tuple[slice, ...], place: tuple[slice, ...],
    block: tuple[int, int],
) -> None:  # fmt: skip
    """Copy the rows `block` of a chunk, `data`, from `source` (in the chunk) to `place`."""
    first, end = block
    rows: range = range(source[0].start, source[0].stop, source[0].step)
    low = max(0, -((rows.start - first) // rows.step))  # turns until the first row in the block
    high = min(len(rows), -((rows.start - end) // rows.step))
    if low >= high:
        return
    taken = slice(rows[low] - first, rows[high - 1] - first + 1, rows.step)
    put = range(place[0].start, place[0].stop, place[0].step)
    there = slice(put[low], put[high - 1] + 1, put.step)
    target[(there, *place[1:])].copy_(data[(taken, *source[1:])])
