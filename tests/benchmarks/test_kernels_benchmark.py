"""The cases of `warploom bench kernels` under pytest-benchmark.

    .venv/bin/python -m pytest tests/benchmarks/test_kernels_benchmark.py --benchmark-only -m ''

Forward, and forward and backward, of each case at the sizes of SmolLM2-135M, ours and eager PyTorch
in one group; on a CUDA device the call waits for it. `make test` runs the first case once.
"""

import pytest
import torch

from warploom.benchmarks.kernels import measure
from warploom.benchmarks.kernels.cases import MODELS, Draw
from warploom.benchmarks.kernels.operators import OPERATORS

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    case
    for build in OPERATORS.values()
    for case in [*build(MODELS["smollm2-135m"], 2048, 4)] or build(MODELS["tiny"], 2048, 4)
]
OURS = {"cpu": ("reference",), "cuda": ("triton", "cuda")}[DEVICE.type]
PLAN = measure.Plan(device=DEVICE, dtype=torch.float32, ours=OURS, peers=("eager",))


@pytest.mark.parametrize("span", ["forward", "both"])
@pytest.mark.parametrize("name", [*OURS, "eager"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            c, id=f"{c.name}-{c.size}".replace(" ", "_"), marks=[pytest.mark.slow] * (i > 0)
        )
        for i, c in enumerate(CASES)
    ],
)
def test_kernel(benchmark, case, name, span):
    run = measure.contenders(case, PLAN).get(name)
    if run is None or (span == "both" and case.backward is None):
        pytest.skip("has no such backend or no backward")
    benchmark.group = f"{case.name} {case.size} {span}"
    draw = Draw(PLAN.dtype, DEVICE)
    runner = measure.Runner(case, run, case.draw(draw), draw)

    def call(fn):
        fn()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(
        call, setup=lambda: ((runner.prepare(span),), {}), rounds=20, warmup_rounds=2
    )
