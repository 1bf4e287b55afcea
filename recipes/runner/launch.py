"""From the words of a command line to a run that trains, and from its end to an exit code.

0 when it is done, 2 for a user's mistake, 1 for everything else. What is known to go wrong is told
in one sentence by one rank; the rest keeps its traceback.
"""

import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from warploom.parallel.checkpoint import CheckpointError

from ..errors import StoppedError, UserError, unboxed
from .run import Run, begin_from
from .spike import SpikeError
from .world import LostError

Runs = Mapping[str, Callable[[], Run]]


def main(argv: Sequence[str] | None, runs: Runs, description: str, *, prog: str) -> int:
    """Parse the name of a run and its overrides, train it, and return the exit code.

    Args:
        argv: Words after the program's name; `None` for those of this process.
        runs: Functions that make the runs, by name; their docstrings are the help.
        description: What the help says first.
        prog: The program's name in the help.
    """
    rank = int(os.environ.get("RANK", 0))
    _log(rank)
    try:
        run = parse(sys.argv[1:] if argv is None else argv, runs, description, prog=prog, rank=rank)
        from .train import train

        train(run)
    except UserError as error:
        return _tell(str(error), rank, 2)
    except (SpikeError, StoppedError, CheckpointError) as error:
        return _tell(str(error), rank, 1)
    except LostError as error:
        _last_words(f"warploom: {error}: start the same command again, it goes on")
        return 1
    except KeyboardInterrupt:
        return _tell("interrupted: the same command goes on from the last checkpoint", rank, 1)
    return 0


def parse(argv: Sequence[str], runs: Runs, description: str, *, prog: str, rank: int = 0) -> Run:
    """Choose a run and override its fields.

    Raises:
        SystemExit: For `--help` (0) and for words that cannot be understood (2).
        UserError: If the run that comes out is refused.
    """
    import tyro

    choices, weights = {}, _after(argv, "--weights")
    for name, make in runs.items():
        run = make() if not weights or name not in argv else begin_from(make(), weights)
        choices[name] = (" ".join((make.__doc__ or "").split()), run)
    try:
        with contextlib.redirect_stderr(io.StringIO() if rank else sys.stderr), unboxed():
            return tyro.extras.overridable_config_cli(
                choices,
                prog=prog,
                description=description,
                args=list(argv),
                console_outputs=rank == 0,
            )
    except SystemExit:
        if rank:
            _wait_for_rank_0()
        raise


def _after(argv: Sequence[str], flag: str) -> str:
    """Return the word that follows a flag, or stands behind its equals sign; empty without it."""
    for at, word in enumerate(argv):
        if word == flag or word.startswith(f"{flag}="):
            return word.partition("=")[2] or "".join(argv[at + 1 : at + 2])
    return ""


def _log(rank: int) -> None:
    """What the library has to say goes to standard error, once: from rank 0."""
    logging.basicConfig(
        level=logging.WARNING if rank == 0 else logging.CRITICAL,
        format="%(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("warploom").setLevel(logging.INFO if rank == 0 else logging.CRITICAL)


def _tell(sentence: str, rank: int, code: int) -> int:
    """Print a sentence that all ranks know from rank 0, and return the code."""
    if rank == 0:
        _last_words(f"warploom: {sentence}")
    else:
        _wait_for_rank_0()
    return code


def _last_words(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def _wait_for_rank_0() -> None:
    """Let rank 0 speak: a launcher kills every rank as soon as the first one has left."""
    time.sleep(3)
