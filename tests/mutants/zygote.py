"""A process that has imported what is slow to import, and forks one pytest after the other.

    python -m tests.mutants.zygote MODULE...

Started in a copy of the tree. Each line of its input is a job, `{"arguments", "environment",
"limit"}`; each line of its output says how that ended, `{"code", "output"}`, where the code of what
ran beyond its limit is null. Nothing of the tree is imported before the fork.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import time

TAIL = 4000  # characters of output that are told


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    assert not any(name.split(".")[0] == "warploom" for name in sys.modules)
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), flush=True)


def _run(arguments, environment, limit):
    with tempfile.TemporaryFile("w+") as output:
        if (pid := os.fork()) == 0:
            _child(arguments, environment, output)
        code = _wait(pid, limit)
        output.seek(0)
        return {"code": code, "output": output.read()[-TAIL:]}


def _child(arguments, environment, output):
    code = 3
    try:
        os.setsid()
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.dont_write_bytecode = True
        import pytest

        code = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid, limit):
    """Return the exit code, or None; whatever the child has started ends with it."""
    end, code = time.monotonic() + limit, None
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if code is None:
        os.waitpid(pid, 0)
    return code


if __name__ == "__main__":
    main()
