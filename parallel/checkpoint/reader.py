"""Read a rank's file: every byte that is used is hashed first.

A chunk is hashed in blocks of whole rows (`index.row_blocks`): reading rows 0 to 9 of it reads and
hashes the blocks that hold them, reading columns of it reads and hashes all its rows. A block that
serves several pieces is hashed once.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .boxes import sizes
from .folders import CheckpointError
from .index import Chunk, Index, dtype_name, raw, row_blocks

_SHOWN = 5


def shown(names: Sequence[str]) -> str:
    """List names in a sentence, a long list by its beginning."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


class Reader(AbstractContextManager["Reader"]):
    """Reads the chunks of the checkpoint `path`; close it, or use it in a `with`."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path = path
        self.index = index
        self._open: dict[str, Any] = {}
        self._checked: set[tuple[str, str, int]] = set()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()
        self._stack.close()

    def _file(self, name: str) -> Any:
        if name not in self._open:
            check_size(self.path, self.index, name)
            try:
                self._open[name] = self._stack.enter_context(safe_open(self.path / name, "pt"))
            except SafetensorError as error:
                raise CheckpointError(f"{self.path / name} is damaged: {error}") from error
        return self._open[name]

    def rows(
        self, name: str, chunk: Chunk, start: int, stop: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield `(first, last + 1, rows)` of each block of `chunk` that meets rows `start:stop`.

        A scalar is yielded as itself, as row 0.

        Raises:
            CheckpointError: If a block does not match its hash, or the file its index.
        """
        record = self.index.tensors[name]
        shape = sizes(chunk.slices)
        file = self._file(chunk.file)
        try:
            part = file.get_slice(chunk.key)
            seen = tuple(part.get_shape())
            whole = None if shape else file.get_tensor(chunk.key)
        except SafetensorError as error:
            raise self._damaged(name, chunk, str(error)) from error
        if seen != shape:
            raise self._damaged(name, chunk, f"its shape is {seen}, the index says {shape}")
        itemsize = _itemsize(record.dtype)
        for block, (first, end) in enumerate(row_blocks(shape, itemsize, self.index.block_bytes)):
            if end <= start or first >= stop:
                continue
            data = part[first:end] if whole is None else whole
            if dtype_name(data.dtype) != record.dtype:
                raise self._damaged(name, chunk, f"its dtype is {data.dtype}")
            if (chunk.file, chunk.key, block) not in self._checked:
                if hashlib.sha256(raw(data)).hexdigest() != chunk.sha256[block]:
                    raise self._damaged(
                        name, chunk, f"rows {first}:{end} of the chunk do not match their hash"
                    )
                self._checked.add((chunk.file, chunk.key, block))
            yield first, end, data

    def _damaged(self, name: str, chunk: Chunk, how: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path / chunk.file} is damaged in tensor {name} (chunk {chunk.key}): {how}"
        )


def _itemsize(dtype: str) -> int:
    found: torch.dtype = getattr(torch, dtype)
    return found.itemsize


def check_size(path: Path, index: Index, name: str) -> None:
    """Compare the size of a rank's file with the index.

    Raises:
        CheckpointError: If the file is missing or of another size; names the tensors it lost.
    """
    file = path / name
    told = index.files[name].bytes
    size = file.stat().st_size if file.is_file() else None
    if size == told:
        return
    held = _chunks_of(index, name)
    held.sort(key=lambda item: (-_itemsize(index.tensors[item[0]].dtype), item[1].key))
    at = told
    lost: list[str] = []
    for tensor, chunk in reversed(held):  # the order of the writer, from the end of the file
        if size is None or at > size:
            lost.append(tensor)
        at -= math.prod(sizes(chunk.slices)) * _itemsize(index.tensors[tensor].dtype)
    if size is None:
        how = "is missing"
    else:
        kind = "is truncated" if size < told else "is longer than it was"
        how = f"{kind}: it has {size:,} bytes, the index says {told:,}"
    which = f"; with it {len(lost)} tensors: {shown(lost[::-1])}" if lost else ""
    raise CheckpointError(f"{file} {how}{which}")


def _chunks_of(index: Index, file: str) -> list[tuple[str, Chunk]]:
    return [(n, c) for n, record in index.tensors.items() for c in record.chunks if c.file == file]


def check_file(path: Path, index: Index, name: str, alive: Callable[[], None]) -> None:
    """Hash every byte of a rank's file.

    Args:
        path: Folder of the file.
        index: What the checkpoint says of itself.
        name: The file.
        alive: Called after each block.

    Raises:
        CheckpointError: If the file is missing, truncated or altered.
    """
    check_size(path, index, name)
    with Reader(path, index) as reader:
        for tensor, chunk in _chunks_of(index, name):
            for _ in reader.rows(tensor, chunk, 0, (*sizes(chunk.slices), 1)[0]):
                alive()
    if _header_hash(path / name) != index.files[name].header_sha256:
        raise CheckpointError(f"{path / name} is damaged: its header was altered")


def _header_hash(file: Path) -> str:
    with file.open("rb") as stream:
        first = stream.read(8)
        rest = stream.read(min(int.from_bytes(first, "little"), file.stat().st_size))
    return hashlib.sha256(first + rest).hexdigest()
