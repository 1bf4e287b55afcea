"""The format: what `index.json` says of a checkpoint, and the entries that go in and out.

    step-00000120/
        rank-00003.safetensors   one key `name@offset` a chunk (offset: logical start a dimension)
        index.json               this file's `Index`, its own hash in the last field

A chunk is a box of a logical tensor, stored densely in the logical order of dimensions. Its bytes
are hashed in blocks of whole rows of about `BLOCK_BYTES`, so that a reader verifies the rows that
it reads and no others. Together the chunks of a tensor cover it; they may overlap.

JSON only: no pickle, no bytes that are not a tensor's.

Source: https://github.com/huggingface/safetensors (the format of a rank's file).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sharding import Layout, Piece
from .boxes import Box
from .folders import INDEX, CheckpointError

VERSION = 1
BLOCK_BYTES = 1 << 24

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, eq=False)
class Entry:
    """A local tensor that is saved, or filled by a load.

    Attributes:
        prefix: Kind of value, such as `master` or `adamw.exp_avg`; the logical tensors are
            `prefix/name`.
        tensor: Local tensor; padding is neither saved nor filled.
        layout: Its pieces.

    Raises:
        ValueError: If the tensor's shape is not the layout's.
        TypeError: If safetensors has no name for the tensor's dtype.
    """

    prefix: str
    tensor: Tensor
    layout: Layout

    def __post_init__(self) -> None:
        if tuple(self.tensor.shape) != tuple(self.layout.shape):
            raise ValueError(
                f"entry {self.prefix}: the tensor has shape {tuple(self.tensor.shape)}, its "
                f"layout says {tuple(self.layout.shape)}"
            )
        if self.tensor.dtype not in DTYPES:
            raise TypeError(
                f"entry {self.prefix}: dtype {self.tensor.dtype} cannot be saved; it must be one "
                f"of {', '.join(map(dtype_name, DTYPES))}"
            )

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces, under their names in the checkpoint."""
        return tuple(replace(p, name=f"{self.prefix}/{p.name}") for p in self.layout.pieces)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stored box: its file, its key there, and the SHA-256 of each block of its rows."""

    file: str
    key: str
    slices: Box
    sha256: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """A logical tensor: shape, dtype (torch's name) and chunks."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A rank's file: its size, and the SHA-256 of what stands before the first tensor."""

    bytes: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class Index:
    """All that a checkpoint says of itself."""

    world: int
    state: dict[str, Any]
    files: dict[str, FileRecord]
    tensors: dict[str, Record]
    block_bytes: int = BLOCK_BYTES
    version: int = VERSION

    def to_text(self) -> str:
        """Write as JSON, closed by its own hash."""
        values = asdict(self)
        return json.dumps({**values, "sha256": _digest(values)}, separators=(",", ":"))


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def chunk_from_json(item: Mapping[str, Any]) -> Chunk:
    """Rebuild a chunk from `dataclasses.asdict` after a trip through JSON."""
    cuts = tuple((a, b, c) for a, b, c in item["slices"])
    return Chunk(item["file"], item["key"], cuts, tuple(item["sha256"]))


def read_index(path: Path) -> Index:
    """Read and check the index of the checkpoint `path`.

    Raises:
        CheckpointError: If it is not there, not whole, or of another format version.
    """
    file = path / INDEX
    if not file.is_file():
        raise CheckpointError(
            f"{path} must be a checkpoint, a folder with {INDEX}; there is none (latest(folder) "
            "finds the newest checkpoint in a folder of them)"
        )
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: it is not the JSON of an index") from error
    if not isinstance(values, dict) or "sha256" not in values:
        raise CheckpointError(f"{file} is damaged: it is not the JSON of an index")
    told = values.pop("sha256")
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"{file} has format version {values.get('version')}; this release reads {VERSION}"
        )
    if _digest(values) != told:
        raise CheckpointError(f"{file} is damaged: its content does not match its own hash")
    try:
        return _from_json(values)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: it is not the JSON of an index") from error


def _from_json(values: Mapping[str, Any]) -> Index:
    return Index(
        world=values["world"],
        state=values["state"],
        files={name: FileRecord(**item) for name, item in values["files"].items()},
        tensors={
            name: Record(
                tuple(item["shape"]),
                item["dtype"],
                tuple(chunk_from_json(chunk) for chunk in item["chunks"]),
            )
            for name, item in values["tensors"].items()
        },
        block_bytes=values["block_bytes"],
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def chunk_key(piece: Piece) -> str:
    """Name a piece in a rank's file."""
    return f"{piece.name}@{','.join(str(start) for start, _, _ in piece.slices)}"


def row_blocks(shape: Sequence[int], itemsize: int, block_bytes: int) -> list[tuple[int, int]]:
    """Cut the rows of a chunk into blocks `start, stop` of about `block_bytes`, at least a row."""
    if not shape:
        return [(0, 1)]
    row = itemsize
    for size in shape[1:]:
        row *= size
    each = max(1, block_bytes // max(row, 1))
    return [(at, min(at + each, shape[0])) for at in range(0, shape[0], each)] if row else []


def raw(tensor: Tensor) -> memoryview:
    """View the bytes of a dense tensor in host memory."""
    # strides of dimensions of size 1 may be anything, and view(uint8) would mind them
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def blocks(tensor: Tensor, block_bytes: int) -> Iterator[memoryview]:
    """Yield the bytes of a dense tensor, a block of rows after the other."""
    lines = tensor.reshape(1) if tensor.dim() == 0 else tensor
    for start, stop in row_blocks(tensor.shape, tensor.element_size(), block_bytes):
        yield raw(lines[start:stop])
