"""The common tests again, with the Triton kernels in the interpreter: meaning, without a GPU.

Triton reads TRITON_INTERPRET when a kernel is decorated, so each folder has a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.kernels.specimen import families

from warploom.kernels import backends

pytest.importorskip("triton", reason="needs the package triton")
ROOT = Path(__file__).parents[2]
SERVED = {
    family: [s for s in line if "triton" in s.backends and "triton" in backends.available()[s.op]]
    for family, line in families().items()
}


def _ends(line):
    """Keep the first and the last way to call each operator."""
    ways = {op: [s for s in line if s.op == op] for op in {s.op for s in line}}
    return [s for s in line if s in (ways[s.op][0], ways[s.op][-1])]


# Files of which the tests over (device, backend) run again, and how these are found.
FILES = {"test_moe": "cpu-triton", "test_optim": "cpu-triton", "test_clip": "cpu-triton"}
FILES |= {"test_grouped": "cpu-triton"}
FILES |= {"test_loss_triton": "interpreted"}


@pytest.mark.parametrize("family", [family for family, line in SERVED.items() if line])
@pytest.mark.parametrize("ways", [_ends, pytest.param(list, marks=pytest.mark.slow)])
def test_interpreted(family, ways):
    chosen = " or ".join(f"{s}-cpu-triton" for s in ways(SERVED[family]))
    _interpret("test_must", chosen)


@pytest.mark.parametrize("file", FILES)
def test_a_file_interpreted(file):
    _interpret(file, FILES[file])


def _interpret(file, chosen):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-x"]
        + [f"tests/kernels/{file}.py", "-k", chosen],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 10, done.stdout[-500:]
