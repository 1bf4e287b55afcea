"""The common tests again, with the Triton kernels in the interpreter: meaning, without a GPU.

Triton reads TRITON_INTERPRET when a kernel is decorated, so each folder has a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.kernels.specimen import specimens

from warploom.kernels import backends

pytest.importorskip("triton", reason="needs the package triton")
ROOT = Path(__file__).parents[2]
OPERATORS = sorted({s.op for s in specimens() if "triton" in backends.available()[s.op]})


@pytest.mark.parametrize("op", OPERATORS)
def test_interpreted(op):
    names = [s.name for s in specimens() if s.op == op and "triton" in s.backends]
    chosen = " or ".join(f"{name}-cpu-triton" for name in names)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-x"]
        + ["tests/kernels/test_must.py", "-k", chosen],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
