"""Names in a folder of checkpoints, and what each means.

step-00000120                  complete: it was renamed to this after all of it was on the disk
step-00000120.tmp-1f2e3d4c     being written, or left by a process that was killed
step-00000090.trash-1f2e3d4c   being deleted
step-00000120.aside-1f2e3d4c   set aside by `set_aside`; nothing here touches it again
step-00000120.damaged-1f2e3d4c had no index where a save needed its name; never touched again
"""

import logging
import os
import re
import secrets
import shutil
from pathlib import Path

_LOG = logging.getLogger(__name__)

INDEX = "index.json"
_COMPLETE = re.compile(r"step-(\d{8,})")
_LEFT_OVER = re.compile(r"step-\d{8,}\.(tmp|trash)-[0-9a-f]+")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged; the sentence names the file and the tensor.

    Attributes:
        damaged: From `load`, the damaged checkpoints down to the newest good one, newest first:
            those to remove or set aside before `latest` is one that loads.
    """

    damaged: tuple[Path, ...] = ()


def step_name(step: int) -> str:
    """Name the folder of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step that a path names, or `None` if it is not a checkpoint's."""
    match = _COMPLETE.fullmatch(path.name)
    return int(match[1]) if match else None


def complete(folder: Path) -> dict[int, Path]:
    """Return the complete checkpoints in `folder` by step, ascending."""
    if not folder.is_dir():
        return {}
    found = {
        step: path
        for path in folder.iterdir()
        if (step := step_of(path)) is not None and (path / INDEX).is_file()
    }
    return dict(sorted(found.items()))


def latest(folder: str | Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`, or `None`. Reads names only."""
    return next(reversed(complete(Path(folder)).values()), None)


def set_aside(folder: str | Path, *, after: int) -> list[Path]:
    """Rename the checkpoints of `folder` that are newer than step `after`, and return them.

    For a run that goes back: a damaged checkpoint, or steps after a loss spike. One rank calls it,
    before the others look.

    Args:
        folder: Folder of checkpoints.
        after: Last step that stays.
    """
    moved = []
    for step, path in complete(Path(folder)).items():
        if step > after:
            moved.append(path.rename(path.with_name(f"{path.name}.aside-{secrets.token_hex(4)}")))
    return moved


def new_temporary(folder: Path, step: int) -> Path:
    """Make the folder in which step `step` will be written; remove what a killed process left.

    A folder that has the step's name but no index is damaged: it is moved aside, with a warning.

    Raises:
        ValueError: If a checkpoint of this step or a newer one exists.
    """
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(complete(folder), default=-1)
    if newest >= step:
        raise ValueError(
            f"a checkpoint of step {step} must be the newest of {folder}, which holds "
            f"{step_name(newest)}: resume from that, or call set_aside(folder, after={step - 1})"
        )
    for path in folder.iterdir():
        if _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path)
    _free_name(folder / step_name(step))
    temporary = folder / f"{step_name(step)}.tmp-{secrets.token_hex(4)}"
    temporary.mkdir()
    return temporary


def _free_name(final: Path) -> None:
    """Move aside what has the name of a checkpoint that is not complete."""
    if os.path.lexists(final):
        aside = final.rename(final.with_name(f"{final.name}.damaged-{secrets.token_hex(4)}"))
        _LOG.warning(
            "%s must hold %s to be a checkpoint, and has none: it is now %s, to look at or delete; "
            "its step is saved again",
            final,
            INDEX,
            aside,
        )


def prune(folder: Path, keep: int) -> None:
    """Delete all complete checkpoints but the newest `keep`; each is renamed first."""
    for path in list(complete(folder).values())[:-keep]:
        trash = path.with_name(f"{path.name}.trash-{secrets.token_hex(4)}")
        path.rename(trash)
        shutil.rmtree(trash)


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is whole whenever it is there.

    Raises:
        OSError: As the file system says it, with the file's name.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
