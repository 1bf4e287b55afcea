"""The files of a Hugging Face folder: safetensors read in blocks and written tensor by tensor.

    8 bytes, the length of the header | header, JSON by name: dtype, shape, where | data

Neither reading nor writing holds more than a block, or a tensor, beside what the caller has; files
are not mapped, so that what was read does not count as memory of the process.

Source: https://github.com/huggingface/safetensors, section "Format".
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from operator import index as integer
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor

from warploom.parallel.sharding import Slice

from .packed import GROUP, SIDE, decode_fp8, decode_mxfp4

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
_READ = MappingProxyType({**DTYPES, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn})
_BLOCK = 8 << 20  # bytes read at once: fewer would cost calls, more the processor's cache
_AHEAD = 1 << 20  # bytes of neighbours that are worth reading ahead of
_LONGEST = 100_000_000  # bytes of a header, as the format's own library has it


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file.

    Attributes:
        file: Where it is.
        kind: Its dtype, as the file spells it; BF16 where it is packed.
        shape: Its shape.
        begin: Where its bytes begin in the file.
        scales: Of a tensor that is packed, in MXFP4 or FP8: its scales.
    """

    file: Path
    kind: str
    shape: tuple[int, ...]
    begin: int
    scales: "Entry | None" = None


def entries(folder: str | Path) -> dict[str, Entry]:
    """Return the tensors of a folder by name, from the headers alone.

    Raises:
        FileNotFoundError: If there are no safetensors, or the index names a file that is absent.
        ValueError: If a file is not whole or no safetensors, a tensor stands there twice, the index
            names files elsewhere, or a tensor in MXFP4 or FP8 has no scales that fit.
    """
    root = Path(folder)
    if not (root / INDEX).exists():
        if not (root / SINGLE).exists():
            raise FileNotFoundError(f"{root} must hold {SINGLE} or {INDEX}")
        return _joined(read_header(root / SINGLE))
    named = read_json(root / INDEX).get("weight_map")
    if not isinstance(named, dict) or any(Path(str(f)).name != f for f in named.values()):
        raise ValueError(f"{root / INDEX} must have a weight_map to files of its own folder")
    files = sorted(set(named.values()))
    if absent := [file for file in files if not (root / file).exists()]:
        raise FileNotFoundError(f"{root / INDEX} names files that are absent: {listed(absent)}")
    found: dict[str, Entry] = {}
    for header in (read_header(root / file) for file in files):
        if twice := [name for name in header if name in found]:
            raise ValueError(f"{root} must hold each tensor once; twice: {listed(twice)}")
        found |= header
    return _joined(found)


def _joined(found: dict[str, Entry]) -> dict[str, Entry]:
    """Name what is packed as what it stands for."""
    for name, codes in [*found.items()]:
        if codes.kind == "U8" and name.endswith("_blocks"):
            stem, fits = name.removesuffix("_blocks"), codes.shape[3:] == (GROUP // 2,)
            beside, kinds, shape = f"{stem}_scales", ["U8"], codes.shape[:-1]
        elif codes.kind == "F8_E4M3":
            stem, fits = name, len(codes.shape) == 2
            beside, kinds = f"{name}_scale_inv", [*DTYPES]
            shape = tuple(-(-size // SIDE) for size in codes.shape)
        else:
            continue
        scales = found.pop(beside, None)
        if not fits or scales is None or scales.kind not in kinds or scales.shape != shape:
            raise ValueError(
                f"{name} {codes.shape} in {codes.file} must be a matrix, or one of each expert, "
                f"with its scales beside it: {beside} {shape}, of {', '.join(kinds)}"
            )
        if stem != name:
            experts, rows, groups, _ = found.pop(name).shape
            codes = replace(codes, shape=(experts, GROUP * groups, rows))
        found[stem] = replace(codes, kind="BF16", scales=scales)
    return found


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of one file; `ValueError` if it is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST):
            raise ValueError(f"{path} is not a whole safetensors file: {size} bytes")
        header = parsed(file.read(length), path)
    header.pop("__metadata__", None)
    begin, end, found = 8 + length, 0, dict[str, Entry]()
    try:
        for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, (start, stop) = tuple(map(integer, e["shape"])), e["data_offsets"]
            size_of = getattr(_READ.get(e["dtype"]), "itemsize", 0)
            own = math.prod(shape) * size_of or stop - start
            if (start, stop) != (end, end + own) or min((0, own, *shape)) < 0:
                raise ValueError(
                    f"tensors in {path} must lie one after the other, each as large as its shape "
                    f"says; {name} is {e} behind byte {end}"
                )
            found[name], end = Entry(path, e["dtype"], shape, begin + start), stop
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path} must describe its tensors: {type(error).__name__}: {error}"
        ) from None
    if begin + end != size:
        raise ValueError(f"{path} must have {begin + end} bytes, as its header says; it has {size}")
    return found


class Reader:
    """Reads slices of tensors in blocks; a context that closes the files."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        at: TracebackType | None,
    ) -> None:  # fmt: skip
        self._stack.close()

    def blocks(
        self, entry: Entry, slices: Sequence[Slice] | None = None, into: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield a slice of a tensor in blocks of its first dimension.

        Args:
            entry: The tensor.
            slices: `(start, stop, step)` of each dimension; `None` for all of it.
            into: Contiguous, on the CPU, of the file's dtype and the slice's shape, with steps of
                1: what is read is written there, and the blocks are views of it. Not for what is
                packed.

        Yields:
            Which rows of the slice, and these; a block that is not of `into` is overwritten by the
            next.
        """
        shape = entry.shape or (1,)
        slices = slices or [(0, size, 1) for size in shape]
        if entry.scales is not None:
            decoded = self._experts if entry.scales.kind == "U8" else self._scaled
            yield from decoded(entry, entry.scales, slices)
            return
        dtype = _READ[entry.kind]
        (first, last, step), *inner = slices
        hull = [(start, stop) for start, stop, _ in inner]
        width = math.prod(stop - start for start, stop in hull)
        rows = max(1, _BLOCK // max(1, width * dtype.itemsize * step))
        count = len(range(first, last, step))
        steps = tuple(slice(None, None, s[2]) for s in slices)
        own = None if into is None else into.view(count, -1)
        spare = torch.empty(0 if into is not None else min(rows, count) * step * width, dtype=dtype)
        for at in range(0, count, rows):
            taken = slice(at, min(at + rows, count))
            begin, end = first + at * step, min(first + taken.stop * step, last)
            space = spare[: (end - begin) * width] if own is None else own[taken].view(-1)
            self._fill(space, entry, [(begin, end), *hull])
            block = space.view(end - begin, *(stop - start for start, stop in hull))[steps]
            yield taken, block if entry.shape else block.view(())

    def _experts(
        self, entry: Entry, scales: Entry, slices: Sequence[Slice]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield a slice of a tensor in MXFP4, one expert at a time."""
        packed = Entry(entry.file, "U8", (*scales.shape, GROUP // 2), entry.begin)
        experts, (start, stop, step), rows = slices
        first, last = start // GROUP, -(-stop // GROUP)
        for at, expert in enumerate(range(*experts)):
            held = (expert, expert + 1, 1), rows, (first, last, 1)
            ((_, blocks),) = self.blocks(packed, (*held, (0, GROUP // 2, 1)))
            ((_, exponents),) = self.blocks(scales, held)
            whole = decode_mxfp4(blocks, exponents)[
                ..., start - GROUP * first : stop - GROUP * first
            ]
            yield slice(at, at + 1), whole[..., ::step].mT

    def _scaled(
        self, entry: Entry, scales: Entry, slices: Sequence[Slice]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield a slice of a matrix in FP8, in float32."""
        factors = torch.cat([block.clone() for _, block in self.blocks(scales)])
        rows, columns = (torch.arange(*own) for own in slices)
        codes = Entry(entry.file, "F8_E4M3", entry.shape, entry.begin)
        for at, block in self.blocks(codes, slices):
            yield at, decode_fp8(block, factors, rows[at], columns)

    def _fill(self, space: Tensor, entry: Entry, hull: list[tuple[int, int]]) -> None:
        """Read a box of a tensor, one stretch of neighbours in the file after the other."""
        if entry.file not in self._open:
            handle = os.open(entry.file, os.O_RDONLY)  # of threads, several may: all are closed
            self._stack.callback(os.close, handle)
            self._open[entry.file] = handle
        file, raw = self._open[entry.file], space.view(torch.uint8).numpy().data
        size, done = space.element_size(), 0
        for start, length in _stretches(entry.shape or (1,), hull):
            part, at = raw[done : done + length * size], entry.begin + start * size
            if length * size >= _AHEAD:  # the disk goes on while these are converted
                os.posix_fadvise(file, at, 2 * length * size, os.POSIX_FADV_WILLNEED)
            while part:
                if not (got := os.preadv(file, [part], at)):
                    raise OSError(f"{entry.file} ended while it was read: it has been changed")
                part, at = part[got:], at + got
            done += length * size


def _stretches(shape: tuple[int, ...], hull: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield begin and length, in elements, of what a box of a tensor is in the file."""
    cut = max((d for d, box in enumerate(hull) if box != (0, shape[d])), default=0)
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    start, stop = hull[cut]
    for index in product(*(range(*box) for box in hull[:cut])):
        outer = sum(i * stride for i, stride in zip(index, strides, strict=False))
        yield outer + start * strides[cut], (stop - start) * strides[cut]


class Writer:
    """Writes tensors, one at a time, into one file or several with their index.

    Args:
        folder: Exists; the files do not.
        tensors: Dtype and shape of each, in the order in which they go to files.
        shard_bytes: Most bytes of tensors in a file that has more than one.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        shard_bytes: int,
    ) -> None:  # fmt: skip
        self.folder = folder
        sizes = {
            name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in tensors.items()
        }
        self._where: dict[str, tuple[Path, int]] = {}
        self._index: dict[str, str] = {}
        plan = _plan(sizes, shard_bytes)
        for number, names in enumerate(plan, 1):
            file = SINGLE if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"
            self._begin(folder / file, {name: tensors[name] for name in names}, sizes)
            self._index |= dict.fromkeys(names, file)
        if len(plan) > 1:
            total = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": self._index}
            write_json(folder / INDEX, total)

    def _begin(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        sizes: Mapping[str, int],
    ) -> None:  # fmt: skip
        """Write a file's header; wide elements come first, so that all lie at their multiples."""
        kinds = {dtype: kind for kind, dtype in DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in sorted(tensors, key=lambda name: -tensors[name][0].itemsize):
            dtype, shape = tensors[name]
            place = [at, at + sizes[name]]
            header[name] = {"dtype": kinds[dtype], "shape": shape, "data_offsets": place}
            at = place[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + at)
        begin = 8 + len(text)
        self._where |= {n: (path, begin + header[n]["data_offsets"][0]) for n in tensors}

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Write a tensor, in blocks that follow each other; in any order of names."""
        path, at = self._where[name]
        with path.open("r+b", buffering=0) as file:
            file.seek(at)
            for block in blocks:
                flat = block.detach().contiguous().cpu().view(-1).view(torch.uint8)
                raw = flat.numpy().data
                while raw:
                    raw = raw[file.write(raw) :]


def _plan(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Deal names to files in order, each of at most `most` bytes or one tensor."""
    files: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not files or size > room:
            files.append([])
            room = most
        files[-1].append(name)
        room -= size
    return files


def flush(folder: Path) -> None:
    """Have the disk hold what was written, before its name says so."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file; `FileNotFoundError` says what the folder must hold."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} must be a folder on this machine: fetch it first")
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} must hold {path.name}")
    return parsed(path.read_bytes(), path)


def parsed(text: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; `ValueError` if it is none, or says a name twice."""
    try:
        read = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold a JSON object: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(read).__name__}")
    return read


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        twice = next(n for n, _ in pairs if sum(n == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return read


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file that people can read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def listed(names: Sequence[str], most: int = 8) -> str:
    """Name the first of many in a sentence."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
