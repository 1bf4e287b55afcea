"""The common tests again, with the Triton kernels in the interpreter: meaning, without a GPU.

Triton reads TRITON_INTERPRET when a kernel is decorated, so these have processes of their own: few,
because each imports and collects for some seconds.
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
AVAILABLE = backends.available()
SERVED = {
    family: [s for s in line if "triton" in s.backends and "triton" in AVAILABLE[s.op]]
    for family, line in families().items()
}


def _last(line):
    """Keep the last way to call each operator, which has the most to it; before FP8 the first."""
    first, last = ({s.op: s for s in each} for each in (line[::-1], line))
    return [s for s in line if s == last[s.op] or (s == first[s.op] and "fp8" in str(last[s.op]))]


# A minute by itself; its own tests show the kernels at sizes that matter to them.
SLOW = ("attention", "fp8", "moe_block")
# Each part has as much to do, about: the families are dealt out, the largest first.
LARGEST = sorted((f for f, line in SERVED.items() if line), key=lambda f: -len(_last(SERVED[f])))
PARTS = [[f for f in LARGEST if f not in SLOW][n::3] for n in range(3)]
# Files of which the tests over (device, backend) run again, and how these are found: those of the
# slow families and of kernels that no other test runs; and those whose kernels others run too.
FILES = (
    ("test_interpreter", "test_attention_tiles", "test_fp8", "test_moe_block")
    + ("test_attention_triton", "test_paged_triton", "test_clip", "test_loss_triton"),
    pytest.param(("test_moe", "test_optim", "test_grouped"), marks=pytest.mark.slow),
)


@pytest.mark.parametrize(
    ("ways", "families"),
    [
        *((_last, part) for part in PARTS),
        *(pytest.param(list, part, marks=pytest.mark.slow) for part in (*PARTS, SLOW)),
    ],
)
def test_interpreted(ways, families):
    chosen = [f"{s}-cpu-triton" for family in families for s in ways(SERVED[family])]
    _interpret(["test_must"], " or ".join(chosen), least=10 * len(families))


@pytest.mark.parametrize("files", FILES)
def test_files_interpreted(files):
    _interpret(files, "cpu-triton or interpreted", least=10 * len(files))


def _interpret(files, chosen, least):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-x"]
        + ["-p", "tests.kernels.interpreter", "--durations=10"]
        + [*(f"tests/kernels/{file}.py" for file in files), "-k", chosen],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least, done.stdout[-500:]
