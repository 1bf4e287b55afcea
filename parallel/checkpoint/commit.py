"""Turn the files of all ranks into one checkpoint, or into none. Runs in the saver's thread.

Files in the temporary folder besides those of the checkpoint; all but a failed save's are gone
before the rename:

    rank-00003.json     rank 3 has written and checked its file; says what is in it
    failed-00003.json   rank 3 could not, and why
    left-00003          rank 3 has seen the failure and touches the folder no more
"""

import errno
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..sharding import Piece
from .boxes import uncovered
from .folders import INDEX, latest, prune, sync_folder, write_text
from .index import Chunk, FileRecord, Index, Record, chunk_from_json, dtype_name
from .reader import check_file, shown
from .writer import file_bytes, write_file

_GRACE_S = 10.0  # for the others to see a failure
_ABANDONED = "another rank failed and removed the temporary folder before it could be asked why"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(eq=False)
class Job:
    """One save of one rank.

    Attributes:
        temporary: Folder that is written.
        final: Name that it gets.
        rank: This rank.
        world: How many write.
        state: JSON values; those of rank 0 are saved.
        keep: How many checkpoints stay.
        patience_s: Seconds without a sign of life after which waiting ends.
        read_back: Whether the file is read again.
        block_bytes: About how many bytes share a hash.
        pieces: Pieces that this rank writes, by key.
        tensors: Their values, dense in host memory.
        error: Why it failed.
    """

    temporary: Path
    final: Path
    rank: int
    world: int
    state: dict[str, Any]
    keep: int | None
    patience_s: float
    read_back: bool
    block_bytes: int
    pieces: dict[str, Piece] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    error: Exception | None = None
    looked: float = 0.0

    @property
    def file(self) -> str:
        """Name of this rank's file."""
        return f"rank-{self.rank:05d}.safetensors"

    def alive(self) -> None:
        """Show the others that this rank is writing, and see whether one of them failed.

        Raises:
            RuntimeError: If one did.
        """
        if time.monotonic() - self.looked > 1.0:
            os.utime(self.temporary / self.file)
            _raise_failure(self)
            self.looked = time.monotonic()


class _Elsewhere(RuntimeError):
    """Another rank failed; it has said so itself."""


def write_part(job: Job) -> None:
    """Write, check and announce this rank's file."""
    record = Index(job.world, {}, {}, {}, job.block_bytes)
    if job.tensors:
        path = job.temporary / job.file
        written, hashes = write_file(path, job.tensors, job.alive, job.block_bytes)
        record.files[job.file] = written
        for key, piece in job.pieces.items():
            chunk = Chunk(job.file, key, piece.slices, hashes[key])
            name = dtype_name(job.tensors[key].dtype)
            chunks = record.tensors[piece.name].chunks if piece.name in record.tensors else ()
            record.tensors[piece.name] = Record(piece.shape, name, (*chunks, chunk))
        if job.read_back:
            check_file(job.temporary, record, job.file, job.alive)
    write_text(job.temporary / f"rank-{job.rank:05d}.json", json.dumps(asdict(record)))


def commit(job: Job) -> None:
    """Make the checkpoint complete on rank 0; wait for that on the others.

    Raises:
        RuntimeError: If another rank failed or shows no sign of life, or the parts do not fit.
    """
    if job.rank:
        _await_final(job)
        return
    _await_parts(job)
    index = _merge(job)
    write_text(job.temporary / INDEX, index.to_text())
    for rank in range(job.world):
        (job.temporary / f"rank-{rank:05d}.json").unlink()
    sync_folder(job.temporary)
    job.temporary.rename(job.final)
    sync_folder(job.final.parent)


def clean(job: Job) -> None:
    """Delete on rank 0 the checkpoints that are older than the newest `keep`.

    Raises:
        RuntimeError: If one cannot be deleted.
    """
    if job.rank == 0 and job.keep is not None:
        try:
            prune(job.final.parent, job.keep)
        except OSError as error:
            raise RuntimeError(
                f"{job.final} is complete, but an older checkpoint could not be deleted: {error}"
            ) from error


def _merge(job: Job) -> Index:
    merged = Index(job.world, job.state, {}, {}, job.block_bytes)
    for rank in range(job.world):
        part = json.loads((job.temporary / f"rank-{rank:05d}.json").read_bytes())
        for file, told in part["files"].items():
            size = (job.temporary / file).stat().st_size
            if size != told["bytes"]:
                raise RuntimeError(
                    f"{file} has {size:,} bytes, rank {rank} wrote {told['bytes']:,}"
                )
            merged.files[file] = FileRecord(**told)
        for name, item in part["tensors"].items():
            shape, dtype = tuple(item["shape"]), item["dtype"]
            there = merged.tensors.get(name, Record(shape, dtype, ()))
            if (there.shape, there.dtype) != (shape, dtype):
                raise ValueError(
                    f"{name} is {dtype} {shape} on rank {rank}, {there.dtype} {there.shape} on a "
                    "lower one: all ranks must hold slices of the same logical tensor"
                )
            chunks = tuple(chunk_from_json(chunk) for chunk in item["chunks"])
            merged.tensors[name] = Record(shape, dtype, (*there.chunks, *chunks))
    for name, record in merged.tensors.items():
        box = tuple((0, n, 1) for n in record.shape)
        if missing := uncovered(box, [chunk.slices for chunk in record.chunks]):
            raise ValueError(f"{name} {record.shape}: {missing:,} elements are on no rank")
    return merged


def _signs(folder: Path) -> frozenset[tuple[str, int, int]]:
    """Return name, size and time of change of the files in a folder; nothing if it is gone."""
    found = set()
    try:
        for item in os.scandir(folder):
            stat = item.stat()
            found.add((item.name, stat.st_size, stat.st_mtime_ns))
    except FileNotFoundError:  # one went away between the listing and the look: a sign of life too
        return frozenset(found)
    return frozenset(found)


def _ranks(names: set[str], pattern: str) -> set[int]:
    return {int(match[1]) for name in names if (match := re.fullmatch(pattern, name))}


def _raise_failure(job: Job) -> None:
    # not by glob: the folder may be renamed, complete, at any moment
    names = {name for name, _, _ in _signs(job.temporary)}
    for rank in sorted(_ranks(names, r"failed-(\d+)\.json")):
        try:
            told = json.loads((job.temporary / f"failed-{rank:05d}.json").read_bytes())
        except FileNotFoundError as error:
            raise _Elsewhere(_ABANDONED) from error
        if told["rank"] != job.rank:
            raise _Elsewhere(f"rank {told['rank']}: {told['text']}")


def _await_parts(job: Job) -> None:
    signs, since, pause = frozenset[tuple[str, int, int]](), time.monotonic(), 0.002
    while True:
        _raise_failure(job)
        seen = _signs(job.temporary)
        here = _ranks({name for name, _, _ in seen}, r"rank-(\d+)\.json")
        if len(here) == job.world:
            return
        if not job.temporary.is_dir():
            raise _Elsewhere(_ABANDONED)
        if seen != signs:
            signs, since = seen, time.monotonic()
        elif time.monotonic() - since > job.patience_s:
            late = sorted(set(range(job.world)) - here)
            raise RuntimeError(
                f"{_which(late)} showed no sign of life for {job.patience_s:g} s while writing"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _which(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {shown([str(r) for r in ranks])}"


def _await_final(job: Job) -> None:
    signs, since, pause, gone = frozenset[tuple[str, int, int]](), time.monotonic(), 0.002, 0
    while not (job.final / INDEX).is_file():
        _raise_failure(job)
        seen = _signs(job.temporary)
        gone = 0 if job.temporary.is_dir() else gone + 1
        if gone > 5:  # the new name may be late on a network's file system
            raise _Elsewhere(_ABANDONED)
        if seen != signs:
            signs, since = seen, time.monotonic()
        elif time.monotonic() - since > job.patience_s:
            raise RuntimeError(f"rank 0 did not complete it within {job.patience_s:g} s")
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def give_up(job: Job, error: Exception) -> Exception:
    """Tell the other ranks, remove what was written, and return the error as a sentence."""
    (job.temporary / job.file).unlink(missing_ok=True)
    text = _sentence(job, error)
    if job.temporary.is_dir():
        _tell(job, error, text)
        if job.rank == 0:
            _await_left(job)
            shutil.rmtree(job.temporary, ignore_errors=True)
    kind = ValueError if isinstance(error, ValueError) else RuntimeError
    told = kind(
        f"checkpoint {job.final.name} was not saved: {text}; the last complete checkpoint is "
        f"{latest(job.final.parent) or 'none'}"
    )
    told.__cause__ = error
    return told


def _sentence(job: Job, error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError) and not job.temporary.is_dir():
        return _ABANDONED
    free = shutil.disk_usage(job.final.parent).free
    advice = ": free some space, or keep fewer checkpoints" if error.errno in _FULL else ""
    if error.filename is None or Path(error.filename).name == job.file:
        what = f"{job.file} needs {file_bytes(job.tensors):,} bytes"
    else:
        what = f"{Path(error.filename).name} could not be written"
    return f"{what}, {free:,} are free in {job.final.parent} ({error.strerror}){advice}"


def _tell(job: Job, error: Exception, text: str) -> None:
    """Leave a mark for the others; where not even that can be written, take the folder away."""
    try:
        if isinstance(error, _Elsewhere):
            (job.temporary / f"left-{job.rank:05d}").touch()
        else:
            told = json.dumps({"rank": job.rank, "text": text})
            write_text(job.temporary / f"failed-{job.rank:05d}.json", told)
    except OSError:
        shutil.rmtree(job.temporary, ignore_errors=True)


def _await_left(job: Job) -> None:
    """Wait until every other rank has seen the failure, or for the grace."""
    end = time.monotonic() + min(_GRACE_S, job.patience_s)
    while time.monotonic() < end:
        names = {name for name, _, _ in _signs(job.temporary)}
        if len(_ranks(names, r"(?:left-|failed-)(\d+)(?:\.json)?") | {0}) == job.world:
            return
        time.sleep(0.02)
