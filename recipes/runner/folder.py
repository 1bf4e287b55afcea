"""The run folder: whose it is, what lies where, and that one process group at a time writes in it.

config.json           the run, resolved, and the fingerprint of what decides its loss trace
environment.json      machine and versions of the newest start
starts.jsonl          one line a start: when, from which step, on how many ranks, at which commit
metrics.jsonl         one line a step
tokens/               the token store and its tokenizer
checkpoints/          the newest few
model/                weights, config and tokenizer as Hugging Face has them, and a model card
report.html .json     the report, with loss.png; their presence says that the run is finished
"""

import errno
import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import UserError
from ..files import read_json
from .run import FREE, LAYOUT, Run, describe, fingerprint, flatten
from .world import LostError

FULL = (errno.ENOSPC, errno.EDQUOT)
_CLAIM_S = 45.0


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths in a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved run."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The exported weights."""
        return self.path / "model"

    @property
    def report(self) -> Path:
        """The report as data; the last file to be written."""
        return self.path / "report.json"

    def finished(self) -> dict[str, Any] | None:
        """Return the report of a finished run, `None` before."""
        if not self.report.exists():
            return None
        return read_json(
            self.report, "remove it and start the same command again, which writes it anew"
        )

    def gone(self) -> Path | None:
        """Return what a finished run wrote and is not there any more, `None` if all is."""
        if not any(self.model.glob("*.safetensors")):
            return self.model
        page = self.path / "report.html"
        return None if page.exists() else page

    def begun(self) -> bool:
        """Say whether a run has left more here than its claim: tokens, steps, or a report."""
        tokens = self.path / "tokens" / "manifest.json"
        kept = (tokens, self.metrics, self.checkpoints, self.report)
        return any(path.exists() for path in kept)

    def check(self, run: Run) -> None:
        """Refuse a folder that belongs to another run; reads only.

        Raises:
            UserError: If the folder's run differs in what decides the trace, unless it has left
                nothing but its claim; if the folder's name cannot be one, or its config.json is
                damaged.
        """
        try:
            if not self.config.exists() or not self.begun():
                return
        except OSError as error:
            raise self._unfit(error) from None
        found = self._claimed()
        wanted = describe(run)
        if fingerprint(found) == fingerprint(wanted):
            return
        old, new = flatten(found), flatten(wanted)
        names = [
            name
            for name in {**old, **new}
            if name.partition(".")[0] not in FREE + LAYOUT and old.get(name) != new.get(name)
        ]
        shown = ", ".join(f"{n} is {old.get(n)!r} there, {new.get(n)!r} here" for n in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(
            f"run folder {self.path} must belong to this run, but {shown}{more}: choose another "
            f"--folder, or remove that one"
        )

    def claim(self, run: Run) -> IO[str]:
        """Make the folder this run's, on rank 0; returns the lock, which the process's end frees.

        Raises:
            UserError: If it belongs to another run, holds something else, cannot be written in, or
                another process trains in it.
        """
        self.check(run)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.config.exists() and any(
                p.name != "config.json.part" and p.name != ".lock" for p in self.path.iterdir()
            ):
                raise UserError(
                    f"run folder {self.path} must be empty or hold a run's config.json; it holds "
                    f"other files: choose another --folder"
                )
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise self._unfit(error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run folder {self.path} is in use by another process that trains in it: wait for "
                f"it, or choose another --folder"
            ) from None
        self.check(run)  # another process may have left more since
        described = describe(run)
        write_json(self.config, {"fingerprint": fingerprint(described), "run": described})
        return lock

    def wait_for_claim(self, run: Run) -> None:
        """Wait on another rank until rank 0 has claimed the folder for this run.

        Raises:
            LostError: If it has not within 45 s.
            UserError: If the folder belongs to another run.
        """
        end = time.monotonic() + _CLAIM_S
        while not self._is_claimed(run):
            if time.monotonic() > end:
                raise LostError(
                    f"{self.config} must have been written by rank 0 within {_CLAIM_S:.0f} s, but "
                    f"rank 0 died, or does not share this folder with all ranks"
                )
            time.sleep(0.05)

    def _is_claimed(self, run: Run) -> bool:
        self.check(run)
        try:
            found = self._claimed() if self.config.exists() else {}
        except UserError:
            return False  # rank 0 is about to replace it: no run has begun here
        return fingerprint(found) == fingerprint(describe(run))

    def _claimed(self) -> dict[str, Any]:
        """Return the run that config.json describes."""
        remedy = "bring back what the run wrote, or choose another --folder"
        found = read_json(self.config, remedy).get("run")
        if not isinstance(found, dict):
            raise UserError(f"{self.config} must hold a run, it holds {found!r:.40}: {remedy}")
        return found

    def _unfit(self, error: OSError) -> UserError:
        return UserError(
            f"run folder {self.path} must be a folder to write in ({error.strerror}): choose "
            f"another --folder"
        )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file so that it is whole whenever it is there."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is whole whenever it is there."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
