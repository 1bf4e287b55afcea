"""Read checkpoints of torch.distributed.checkpoint, the `torch_dist` format of Megatron-Core.

    .metadata        a pickle: each tensor's shape and chunks, and where the chunks lie
    __0_0.distcp     chunks one after the other, each a file of `torch.save`: a zip with a pickle
                     that says what the bytes beside it are

Both pickles are read by `pickled`, which runs nothing. Chunks are boxes of the whole tensor; what a
piece needs is met with them, so that any mesh reads what any other wrote.
"""

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warploom.parallel.checkpoint.boxes import Box, meet, within

from .pickled import Record, plain, read

_META = "torch.distributed.checkpoint.metadata"
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_REBUILD = "torch._utils._rebuild_tensor_v2"
_OF_CHUNK = {f"torch.{name}" for name in _DTYPES} | {_REBUILD, "collections.OrderedDict"}
_OF_METADATA = {
    *(f"{_META}.{name}" for name in ("Metadata", "TensorStorageMetadata", "TensorProperties")),
    *(f"{_META}.{name}" for name in ("ChunkStorageMetadata", "BytesStorageMetadata")),
    *(f"{_META}.{name}" for name in ("MetadataIndex", "_MEM_FORMAT_ENCODING", "StorageMeta")),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    *("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict"),
    *("pathlib.PosixPath", "pathlib._local.PosixPath", "pathlib.Path", "builtins.getattr"),
    *(f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16", "bool", "uint8")),
    *(f"torch.{name}" for name in ("int64", "int32", "int16", "int8", "strided")),
    *("torch.float8_e4m3fn", "torch.float8_e5m2"),
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor, and where its bytes lie."""

    box: Box
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint: its whole shape and its chunks."""

    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def _numbers(size: Any) -> tuple[int, ...]:
    """Return the numbers of a `torch.Size`."""
    return tuple(size.args[0]) if isinstance(size, Record) and size.args else tuple(size)


def _box(starts: tuple[int, ...], sizes: tuple[int, ...]) -> Box:
    return tuple((a, a + n, 1) for a, n in zip(starts, sizes, strict=True))


def index(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a checkpoint by name; what is no tensor is left out.

    Raises:
        ValueError: If the folder has no `.metadata`, it is damaged, or chunks are transformed.
    """
    path = folder / ".metadata"
    if not path.is_file():
        raise ValueError(f"a torch_dist checkpoint must have a file .metadata; {folder} has none")
    found = read(path.read_bytes(), _OF_METADATA, str(path))
    if not isinstance(found, Record) or not isinstance(found.state, dict):
        raise ValueError(f"{path} must describe a checkpoint; it is damaged")
    top = plain(found.state)
    places: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for key, info in top["storage_data"].values():
        at = plain(key.state)
        if at.get("offset") is not None:
            places[at["fqn"], _numbers(at["offset"])] = plain(info.state)
    tensors = {}
    for name, meta in plain(top["state_dict_metadata"]).items():
        if not meta.name.endswith("TensorStorageMetadata"):
            continue
        values = plain(meta.state)
        chunks = []
        for chunk in values["chunks"]:
            said = plain(chunk.state)
            starts, sizes = _numbers(said["offsets"]), _numbers(said["sizes"])
            place = places[name, starts]
            if place.get("transform_descriptors"):
                raise ValueError(
                    f"{name} in {folder} is stored through {place['transform_descriptors']}: save "
                    f"it without a transform"
                )
            file, start, length = place["relative_path"], place["offset"], place["length"]
            chunks.append(Chunk(_box(starts, sizes), file, start, length))
        tensors[name] = Stored(_numbers(values["size"]), tuple(chunks))
    return tensors


def chunk_tensor(folder: Path, chunk: Chunk) -> Tensor:
    """Read the tensor of one chunk.

    Raises:
        ValueError: If its bytes are not those of a plain, dense tensor.
    """
    what = f"{folder / chunk.file} at byte {chunk.start}"
    with (folder / chunk.file).open("rb") as file:
        file.seek(chunk.start)
        data = file.read(chunk.length)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            root = archive.namelist()[0].split("/")[0]
            if f"{root}/byteorder" in archive.namelist():
                order = archive.read(f"{root}/byteorder")
                if order != b"little":
                    raise ValueError(f"{what} must be little-endian; it is {order!r}")
            found = read(archive.read(f"{root}/data.pkl"), _OF_CHUNK, what)
            if not isinstance(found, Record) or found.name != _REBUILD or not found.args:
                raise ValueError(f"{what} must be one dense tensor; it is {found}")
            storage, start, size, stride = found.args[:4]
            _, kind, key, _, count = storage.args if storage.args else storage.state
            dtype = _DTYPES[kind.name.removeprefix("torch.")]
            raw = archive.read(f"{root}/data/{key}")
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{what} is damaged: {error}") from error
    if len(raw) != count * dtype.itemsize:
        raise ValueError(f"{what} must hold {count * dtype.itemsize} bytes; it holds {len(raw)}")
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.as_strided(_numbers(size), _numbers(stride), start)


def pieces(folder: Path, stored: Stored, wanted: list[Box]) -> Iterator[tuple[int, Box, Tensor]]:
    """Yield `(number of the box asked for, the part of it that a chunk holds, values)`.

    Every chunk is read once at most, and one at a time.

    Args:
        folder: The checkpoint.
        stored: The tensor, from `index`.
        wanted: Boxes of it.
    """
    for chunk in stored.chunks:
        found = ((number, meet(box, chunk.box)) for number, box in enumerate(wanted))
        met = [(number, both) for number, both in found if both is not None]
        if met:
            whole = chunk_tensor(folder, chunk)
            for number, both in met:
                yield number, both, whole[within(both, chunk.box)]
