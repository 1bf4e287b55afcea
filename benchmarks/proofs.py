"""Proof that a device kernel computes what it should, by the specimens of the tests, and its time.

A row is `specimen:backend`. `check` holds it to float64 at the shapes of the tests in every dtype;
`training` does so at those of real models in bfloat16 and times forward and backward beside plain
PyTorch. An operator's backend is proven when all rows of all its specimens have passed.
"""

import functools
import importlib
import importlib.metadata
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warploom.benchmarks.kernels.cases import Case, Draw, Work
from warploom.benchmarks.kernels.measure import Runner
from warploom.kernels import backends
from warploom.kernels.launch import has_triton
from warploom.recipes.plan import timing

_SMALL = ((64, 128),)  # in the place of the training shapes, to try the harness


def _specimen() -> Any:
    return importlib.import_module("tests.kernels.specimen")


def rows(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """List the rows.

    Args:
        names: Backends.
        only: Operators; all when empty.
    """
    found = [s for s in _specimen().specimens() if not only or s.op in only]
    served = backends.available()
    return [
        f"{s.name}:{backend}"
        for s in found
        for backend in names
        if backend in ("reference", *s.backends) and backend in served[s.op]
    ]


def _find(row: str) -> tuple[Any, str]:
    name, _, backend = row.rpartition(":")
    return next(s for s in _specimen().specimens() if s.name == name), backend


def operator(row: str) -> tuple[str, str]:
    """Return operator and backend of a row."""
    specimen, backend = _find(row)
    return specimen.op, backend


def check(row: str, device: torch.device) -> dict[str, Any]:
    """Hold a kernel to the rules of the tests; the largest error over plain PyTorch's.

    Args:
        row: `specimen:backend`.
        device: Where.
    """
    s, backend = _find(row)
    wide = torch.float64 if backend != "reference" else None
    dtypes = [dtype for dtype in s.dtypes if dtype != wide]
    errors = [
        _specimen().check(s, tokens, width, dtype, backend, device.type)
        for tokens, width in s.shapes
        for dtype in dtypes
    ]
    return {"error": max(errors), "shapes": len(s.shapes), "dtypes": len(dtypes)}


def training(row: str, device: torch.device, *, small: bool = False) -> dict[str, Any]:
    """Hold a kernel to the rules at training shapes, and time it and plain PyTorch there.

    Args:
        row: `specimen:backend`.
        device: Where.
        small: Whether to take a tiny shape, to try the harness.
    """
    s, backend = _find(row)
    dtype = torch.bfloat16 if torch.bfloat16 in s.dtypes else s.dtypes[0]
    if device.type == "cuda":
        _specimen().Draw = _on_device()  # some 10 s a tensor of 8192 x 128256 on the CPU
    errors: list[float] = []
    times: list[float] = []
    plain: list[float] = []
    for tokens, width in _SMALL if small else s.training:
        errors.append(_specimen().check(s, tokens, width, dtype, backend, device.type))
        inputs, fixed = s.draw(_specimen().Draw(dtype, device.type), tokens, width)
        case = Case(
            op=s.op,
            size=f"{tokens}x{width}",
            draw=lambda d: ((), {}),  # they are drawn
            ours=s.run,
            eager=s.plain,
            forward=Work(0, 0),
            backward=Work(0, 0),
        )
        for run, column, extra in ((s.run, times, {"backend": backend}), (s.plain, plain, {})):
            drawn = inputs, {**fixed, **extra}
            runner = Runner(case, run, drawn, Draw(dtype, device))
            span = "both" if runner.upstream else "forward"
            prepare = functools.partial(runner.prepare, span)
            column.append(statistics.median(timing.samples_ms(prepare, device, repeats=10)))
    ratio = statistics.geometric_mean([b / a for a, b in zip(times, plain, strict=True)])
    found = {"shapes": s.training, "ms": times, "plain_ms": plain, "times_as_fast": ratio}
    return {"error": max(errors), **found}


def _on_device() -> type:
    """Return a `Draw` whose large tensors, upstream gradients too, are made on the GPU."""
    base: Any = _specimen().Draw

    class OnDevice(base):
        def __call__(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
            generator = torch.Generator("cuda").manual_seed(seed)
            x = torch.randn(shape, device="cuda", generator=generator)
            return (x * scale).to(self.dtype)

    return OnDevice


def verdicts(
    checked: Mapping[str, Mapping[str, Any]], timed: Mapping[str, Mapping[str, Any]]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Say of each operator's backend whether all its rows passed.

    Args:
        checked: Rows of `check`.
        timed: Rows of `training`.

    Returns:
        (operator, backend) to `failed`, the reasons by row, or `error` and `time_ms`: that of its
        first specimen's last shape, which all backends of an operator serve.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row, first in checked.items():
        verdict = found.setdefault(operator(row), {"failed": {}, "error": 0.0})
        for part in (first, timed.get(row, {"failed": "was not timed"})):
            if "failed" in part:
                verdict["failed"].setdefault(row, part["failed"])
            else:
                verdict["error"] = max(verdict["error"], part["error"])
        if "ms" in timed.get(row, {}):
            verdict.setdefault("time_ms", timed[row]["ms"][-1])
    return found


def record_proof(
    op: str,
    *,
    device: torch.device,
    error: float,
    time_ms: float,
    backend: str = "triton",
    file: Path = backends.PROVEN,
) -> None:
    """Write down that a kernel of `op` passed its tests on `device`; called by `make gpu`.

    Args:
        op: Operator.
        device: The CUDA device on which it passed.
        error: Largest error against the float64 reference, relative to that of PyTorch in the
            same dtype; dimensionless.
        time_ms: Median time of forward and backward, in milliseconds.
        backend: `triton` or `cuda`.
        file: The record; replaced atomically.

    Raises:
        ValueError: If there is no such operator.
        RuntimeError: If the operator has no such code, or `device` is not a CUDA device.
    """
    if device.type != "cuda":
        raise RuntimeError(f"{op}: a proof needs a CUDA device, got {device}")
    entry = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if has_triton() else None,
        "cuda": torch.version.cuda,
        "error": error,
        "time_ms": time_ms,
        "source": backends.source_hash(op, backend),
    }
    found = json.loads(file.read_text()) if file.exists() else {}
    major, minor = torch.cuda.get_device_capability(device)
    found.setdefault(op, {}).setdefault(backend, {})[f"{major}.{minor}"] = entry
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".json")
    with os.fdopen(handle, "w") as stream:
        stream.write(json.dumps(found, indent=2, sort_keys=True) + "\n")
    os.chmod(name, 0o644)
    os.replace(name, file)
    backends.forget()
