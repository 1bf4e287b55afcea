"""A rank's file: written by hand, so that its bytes are hashed on the way and failures have words.

The file is a safetensors file: 8 bytes with the header's length, the header in JSON, the tensors
without gaps, wider dtypes first, so that each is aligned.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from .index import DTYPES, FileRecord, blocks

_SYNC_BYTES = 1 << 28  # dirty pages stay few, and the time between two signs of life short


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    described: dict[str, object] = {}
    at = 0
    for key, tensor in tensors.items():
        described[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _put(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return how many bytes the file of `tensors` takes."""
    return len(_header(tensors)) + sum(tensor.nbytes for tensor in tensors.values())


def write_file(
    path: Path, tensors: Mapping[str, Tensor], alive: Callable[[], None], block_bytes: int
) -> tuple[FileRecord, dict[str, tuple[str, ...]]]:
    """Write dense tensors in host memory to the new file `path`, and force them to the disk.

    Args:
        path: File, which must not exist.
        tensors: Tensors by key.
        alive: Called after each block; what it raises ends the writing.
        block_bytes: About how many bytes share a hash.

    Returns:
        What the index says of the file, and the hashes of each tensor's blocks.

    Raises:
        OSError: As the file system says it.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header = _header(ordered)
    hashes: dict[str, tuple[str, ...]] = {}
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _put(handle, memoryview(header))
        pending = 0
        for key, tensor in ordered.items():
            found = []
            for block in blocks(tensor, block_bytes):
                found.append(hashlib.sha256(block).hexdigest())
                _put(handle, block)
                pending += len(block)
                if pending >= _SYNC_BYTES:
                    os.fsync(handle)
                    pending = 0
                alive()
            hashes[key] = tuple(found)
        os.fsync(handle)
        # what is read back next comes from the disk, and the page cache stays the data loader's
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
    total = len(header) + sum(tensor.nbytes for tensor in ordered.values())
    return FileRecord(total, hashlib.sha256(header).hexdigest()), hashes
