"""Write a checkpoint: what the ranks agree on the main thread, and what a thread then does.

    main thread   check, agree on the temporary folder, find out who saves what (collectives),
                  copy the tensors to host memory
    thread        write the rank's file, force it to the disk, read it back, leave `rank-00003.json`
      rank 0      wait for every rank's JSON, check sizes and coverage, write index.json, rename the
                  folder to its final name, delete checkpoints that are too old
      others      wait for the final name

The threads talk through files alone. A rank that fails leaves `failed-00003.json`; the others find
it within a second, leave `left-00001`, and rank 0 removes the folder. A rank that dies leaves
nothing: when no file in the folder has changed for `patience_s`, the ones that wait give up and
name it. Killed at any moment, a process leaves complete checkpoints and at most one folder of
another name, which the next save removes.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..mesh import Mesh
from ..sharding import Layout, Piece, owned
from .agreement import agree
from .commit import Job, clean, commit, give_up, write_part
from .folders import new_temporary, step_name
from .index import BLOCK_BYTES, Entry, chunk_key


class AsyncSaver:
    """Saves in the background, one checkpoint at a time.

    Host memory of the size of what this rank saves is kept from one save to the next (pinned where
    the tensors are on a GPU).

    Args:
        keep: How many of the newest checkpoints stay; `None` for all.
        patience_s: How long nothing may change in the folder before a waiting rank gives up,
            seconds.
        read_back: Whether each rank reads its file again and compares the hashes before the
            checkpoint counts as complete.
        block_bytes: About how many bytes share a hash. Smaller blocks make the index longer, and
            let a rank that needs a few rows read little more than these.

    Raises:
        ValueError: If `keep` or `block_bytes` is below 1.
    """

    def __init__(
        self, *, keep: int | None = None, patience_s: float = 120.0, read_back: bool = True,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:  # fmt: skip
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, or None for all; got {keep}")
        if block_bytes < 1:
            raise ValueError(f"block_bytes must be at least 1; got {block_bytes}")
        self.block_bytes = block_bytes
        self.keep = keep
        self.patience_s = patience_s
        self.read_back = read_back
        self._thread: threading.Thread | None = None
        self._job: Job | None = None
        self._buffers: dict[str, Tensor] = {}

    def start(
        self, folder: str | Path, entries: Sequence[Entry], state: Mapping[str, Any], mesh: Mesh
    ) -> Path:
        """Copy the entries to host memory and begin to write them; a collective call.

        The tensors may change as soon as it returns. A save that is still being written is waited
        for, and its error raised, on every rank.

        Args:
            folder: Folder of checkpoints; the same for every rank, on a file system they share.
            entries: Local tensors. A piece that several ranks hold is saved by the lowest.
            state: JSON values, with `step` an integer of at least 0; those of rank 0 are saved.
            mesh: The ranks that save.

        Returns:
            The path that the checkpoint will have when it is complete.

        Raises:
            ValueError: If a checkpoint of this step or a newer one exists, `state` is not JSON or
                has no step or not the same on all ranks, or two entries lay different slices at
                the same place.
            RuntimeError: If the previous save failed, or the folder cannot be written.
        """
        return self._start(Path(folder), entries, state, mesh, copy=True)

    def finish(self) -> Path | None:
        """Wait for the save that is being written and return its path; `None` if there is none.

        Raises:
            RuntimeError: If it failed: which file, how many bytes it needs and are free, which
                checkpoint is the last complete one.
        """
        if self._thread is None or self._job is None:
            return None
        self._thread.join()
        job, self._thread, self._job = self._job, None, None
        if job.error is not None:
            raise job.error
        return job.final

    def _start(
        self, folder: Path, entries: Sequence[Entry], state: Mapping[str, Any], mesh: Mesh, *,
        copy: bool,
    ) -> Path:  # fmt: skip
        error: Exception | None = None
        try:
            self.finish()
            text = _state_text(state)
        except (RuntimeError, ValueError, TypeError) as caught:
            error = caught
        steps = set(agree(mesh, error, state.get("step")))
        if len(steps) > 1:
            raise ValueError(f"all ranks must save the same step; they are at {sorted(steps)}")
        name = ""
        if mesh.rank == 0:
            try:
                name = new_temporary(folder, state["step"]).name
            except ValueError as caught:
                error = caught
            except OSError as caught:
                error = RuntimeError(f"{folder} must be a folder to write in: {caught}")
        temporary = folder / agree(mesh, error, name)[0]
        job = Job(
            temporary=temporary, final=folder / step_name(state["step"]), rank=mesh.rank,
            world=mesh.size, state=json.loads(text), keep=self.keep, patience_s=self.patience_s,
            read_back=self.read_back, block_bytes=self.block_bytes,
        )  # fmt: skip
        try:
            mine = _owned_pieces(entries, mesh)
            self._stage(job, entries, mine, copy=copy)
        except Exception as caught:
            raise give_up(job, caught) from caught
        self._job = job
        self._thread = threading.Thread(target=_run, args=(job,), name="checkpoint")
        self._thread.start()
        return job.final

    def _stage(
        self, job: Job, entries: Sequence[Entry], mine: Mapping[int, tuple[Piece, ...]], *,
        copy: bool,
    ) -> None:  # fmt: skip
        """Bring the owned pieces to dense tensors in host memory."""
        devices: set[torch.device] = set()
        for at, entry in enumerate(entries):
            for piece in mine[at]:
                key = chunk_key(piece)
                if (same := job.pieces.get(key)) is not None:
                    if (same.shape, same.slices) != (piece.shape, piece.slices):
                        raise ValueError(
                            f"two entries hold different slices of {piece.name} that begin at the "
                            f"same place: {same.slices} and {piece.slices}"
                        )
                    continue  # tied: one of the two is enough
                view = piece.of_local(entry.tensor.detach())
                if copy or not view.is_cpu:
                    host = self._buffer(key, view)
                    host.copy_(view, non_blocking=True)
                    devices.add(view.device)
                else:
                    host = view.contiguous()
                job.pieces[key] = piece
                job.tensors[key] = host
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def _buffer(self, key: str, like: Tensor) -> Tensor:
        old = self._buffers.get(key)
        if old is None or old.shape != like.shape or old.dtype != like.dtype:
            old = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[key] = old
        return old


def save(
    folder: str | Path, entries: Sequence[Entry], state: Mapping[str, Any], mesh: Mesh, *,
    keep: int | None = None, patience_s: float = 120.0, read_back: bool = True,
    block_bytes: int = BLOCK_BYTES,
) -> Path:  # fmt: skip
    """Write a checkpoint and return when it is complete on every rank; a collective call.

    As `AsyncSaver.start` and `finish`, with their arguments and errors; dense tensors in host
    memory are written from where they are.
    """
    saver = AsyncSaver(
        keep=keep, patience_s=patience_s, read_back=read_back, block_bytes=block_bytes
    )
    final = saver._start(Path(folder), entries, state, mesh, copy=False)
    saver.finish()
    return final


def _run(job: Job) -> None:
    """Write in the thread; the error waits in `job.error` for the main thread."""
    try:
        write_part(job)
        commit(job)
    except Exception as error:
        job.error = give_up(job, error)
        return
    try:
        clean(job)
    except RuntimeError as error:
        job.error = error


def _state_text(state: Mapping[str, Any]) -> str:
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"state must have a `step`, an integer of at least 0; got {step!r}")
    try:
        return json.dumps(dict(state), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"state must be JSON values without NaN or infinity: {error}") from error


def _owned_pieces(entries: Sequence[Entry], mesh: Mesh) -> dict[int, tuple[Piece, ...]]:
    layouts = {str(at): Layout(e.layout.shape, e.pieces) for at, e in enumerate(entries)}
    return {int(at): pieces for at, pieces in owned(layouts, mesh).items()}
