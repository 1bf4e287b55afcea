"""What a user did wrong, as opposed to what broke."""

import contextlib
import io
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake of the user, said in one sentence: what must hold, what was found, what to do.

    The command line prints the sentence and exits with code 2; every other exception keeps its
    traceback, because it is a fault of the library or of the machine.
    """


class StoppedError(RuntimeError):
    """The work stopped for a reason outside the code, such as a full disk; one sentence.

    The command line prints it and exits with code 1.
    """


@contextlib.contextmanager
def unboxed() -> Iterator[None]:
    """Let a `UserError` of a config's own checks out of the tyro call in the `with` block.

    tyro takes it for a word that it could not parse: it prints the sentence in a box, under an
    inner name of its own, and exits. What tyro says about words of the command line itself is left
    as it is.

    Raises:
        UserError: The one that tyro caught.
    """
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            yield
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(shown.getvalue())
        raise
