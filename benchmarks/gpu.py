"""Everything a GPU has to say, unattended: tests, proofs of kernels, a training step.

    make gpu PYTHON=python3 RESULTS=benchmarks/results/h200

Needs torch with CUDA and nothing to be installed. Each part runs in a process of its own, the most
valuable first, so that a crash or a hang loses that part alone; the whole keeps to `--budget`
seconds. Writes one JSON file a part, and `kernels/proven.json`, which the dispatcher reads.

    part     what                                                              file
    prove    each Triton kernel against float64 and against torch, timed       proofs.json
    train    8 layers of Llama-3-8B, embedding and head, 8,192 tokens          training.json
    tests    pytest -m gpu                                                     tests.json

measured on an H200: nothing yet
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warploom.kernels import backends, timing

_ROOT = Path(__file__).resolve().parents[1]
_LIMIT_S = {"prove": 150, "train": 200, "tests": 240}
_H100_BF16 = 989e12  # dense bfloat16 peak of H100 and H200, FLOP/s (datasheet)


def _cases(device: torch.device) -> dict[str, Callable[[str, torch.dtype], tuple[Tensor, ...]]]:
    """Return, for each operator, a function of (backend, dtype) to its outputs and gradients."""
    from warploom.kernels.activation import swiglu
    from warploom.kernels.loss import linear_cross_entropy
    from warploom.kernels.norm import rms_norm
    from warploom.kernels.rope import rotary, rotary_tables

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator(device).manual_seed(sum(shape))
        x = torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)
        return x * scale

    def run(fn: Callable[..., Any], dtype: torch.dtype, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        found = fn(*leaves)
        outputs = found if isinstance(found, tuple) else (found,)
        upstream = [draw(*y.shape).to(y.dtype) if y.dim() else y.new_tensor(0.7) for y in outputs]
        return *outputs, *torch.autograd.grad(outputs, leaves, upstream)

    x, r, w = draw(8192, 4096), draw(8192, 4096), draw(4096)
    q, k, gates = draw(8192, 32, 128), draw(8192, 8, 128), draw(8192, 2 * 14336)
    cos, sin = rotary_tables(torch.arange(8192, device=device), 128, base=5e5)
    h, head = draw(2048, 1024), draw(32_003, 1024, scale=0.05)
    targets = torch.randint(0, 32_003, (2048,), device=device)
    return {
        "rms_norm": lambda backend, dtype: run(
            lambda a, b, c: rms_norm(a, c, residual=b, backend=backend), dtype, x, r, w
        ),
        "rotary": lambda backend, dtype: run(
            lambda a, b: rotary(a, b, cos, sin, backend=backend), dtype, q, k
        ),
        "swiglu": lambda backend, dtype: run(lambda a: swiglu(a, backend=backend), dtype, gates),
        "linear_cross_entropy": lambda backend, dtype: run(
            lambda a, b: linear_cross_entropy(a, b, targets, backend=backend)[0], dtype, h, head
        ),
    }


def _error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Return the largest error over the tensors, each relative to its own largest value."""
    return max(
        float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-300))
        for a, b in zip(got, want, strict=True)
    )


def prove(device: torch.device) -> dict[str, Any]:
    """Hold each Triton kernel to twice the reference's own bfloat16 error, and record it."""
    result: dict[str, Any] = {"copy_bytes_per_s": timing.copy_ceiling(device), "ops": {}}
    for op, case in _cases(device).items():
        row: dict[str, Any] = {}
        try:
            want = case("reference", torch.float64)
            plain = _error(case("reference", torch.bfloat16), want)
            ours = _error(case("triton", torch.bfloat16), want)
            row = {"error": ours, "reference_error": plain, "passed": ours <= 2 * plain + 1e-7}
            for backend in ("triton", "reference"):
                call = functools.partial(case, backend, torch.bfloat16)
                row[f"{backend}_ms"] = timing.time_ms(call, device)
            row["speed_ratio"] = row["reference_ms"] / row["triton_ms"]
            if row["passed"]:
                backends.record_proof(
                    op, device=device, error=ours / max(plain, 1e-300), time_ms=row["triton_ms"]
                )
        except Exception as error:  # one kernel's failure is that kernel's row
            row["failed"] = f"{type(error).__name__}: {error}"[:400]
        result["ops"][op] = row
        print(op, row, flush=True)
    return result


def train(device: torch.device, *, steps: int = 30, small: bool = False) -> dict[str, Any]:
    """Time whole steps (forward, backward, clip, AdamW) of a slice of Llama-3-8B on one device."""
    from warploom.models import cost
    from warploom.models.batch import Batch
    from warploom.models.decoder import Decoder
    from warploom.models.families import llama
    from warploom.parallel.mesh import Mesh
    from warploom.parallel.optimizer import AdamW
    from warploom.parallel.step import Step

    sizes = llama.tiny() if small else replace(llama.llama3_8b(), layers=8)
    length = min(sizes.max_positions, 64) if small else 8192
    mesh = Mesh.build()
    model = Decoder.create(sizes, seed=0, dtype=torch.bfloat16, device=device)
    layouts = model.layouts()
    step = Step(model, layouts, AdamW(dict(model.named_parameters()), layouts, mesh), mesh)
    seconds, losses = [], []
    for number in range(steps + 3):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, sizes.vocabulary, (1, length + 1), generator=generator).to(device)
        batch = Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], document_lengths=None)
        start = time.perf_counter()
        losses.append(step([batch], learning_rate=1e-4).losses["language_model"])
        seconds.append(time.perf_counter() - start)  # the step reads the loss: it has ended
    middle = statistics.median(seconds[3:])
    flops = cost.flops_per_token(sizes, length).training
    found = {
        "step_time_s": middle,
        "step_time_min_s": min(seconds[3:]),
        "step_time_max_s": max(seconds[3:]),
        "tokens_per_s": length / middle,
        "flops_per_token": flops,
        "tflops_per_s": flops * length / middle / 1e12,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "layers": sizes.layers,
        "sequence": length,
    }
    if device.type == "cuda":
        found["mfu"] = flops * length / middle / _H100_BF16
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def tests(results: Path) -> dict[str, Any]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(
        command, cwd=_ROOT, capture_output=True, text=True, timeout=_LIMIT_S["tests"], check=False
    )
    (results / "tests.log").write_text(done.stdout + done.stderr)
    return {"exit_code": done.returncode, "last_lines": done.stdout.splitlines()[-12:]}


def _part(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(asked.device)
    if name == "prove":
        return prove(device)
    if name == "train":
        return train(device, steps=asked.steps, small=asked.small)
    return tests(asked.results)


_FILES = {"prove": "proofs.json", "train": "training.json", "tests": "tests.json"}


def _about(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _run_parts(asked: argparse.Namespace) -> int:
    """Run each part in a process of its own; return how many failed."""
    end = time.monotonic() + asked.budget
    failed = 0
    for name in asked.parts.split(","):
        limit = min(_LIMIT_S[name], end - time.monotonic())
        if limit < 5:
            print(f"{name}: left out, the budget of {asked.budget} s is used up", flush=True)
            failed += 1
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--part", name]
        command += ["--results", str(asked.results)]
        print(f"--- {name} (at most {limit:.0f} s)", flush=True)
        try:
            code = subprocess.run(command, timeout=limit, check=False, env=os.environ).returncode
        except subprocess.TimeoutExpired:
            code = 124
        print(f"--- {name}: {'done' if code == 0 else f'failed with {code}'}", flush=True)
        failed += code != 0
    return failed


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=_ROOT / "benchmarks/results/h200")
    parser.add_argument("--budget", type=float, default=570, help="seconds for all parts")
    parser.add_argument("--parts", default="prove,train,tests", help="in this order")
    parser.add_argument("--steps", type=int, default=30, help="timed training steps")
    parser.add_argument("--device", default="cuda", help="cpu only for `--parts train --small`")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the harness")
    parser.add_argument("--part", choices=sorted(_FILES), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for; 0 if all of them ended well, 2 without a CUDA device."""
    asked = _arguments(argv)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    asked.results = asked.results.resolve()
    asked.results.mkdir(parents=True, exist_ok=True)
    if asked.part is None:
        return int(_run_parts(asked) > 0)
    result = {**_about(torch.device(asked.device)), **_part(asked.part, asked)}
    (asked.results / _FILES[asked.part]).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
