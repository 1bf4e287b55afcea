"""The products of a step of generation on a CPU: ours, oneDNN's and PyTorch's, by number of rows.

    python benchmarks/few_rows.py --threads 1

Every product of one step is run, each weight once, as a step does: the weights do not fit any
cache, so that reading them is the floor (`read`, the sum of each). The sides take turns. Processor
seconds count, over the threads: what other processes take is left out.

Measured: see results/cpu.md.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from warploom.kernels import cpu
from warploom.models.architecture import Architecture
from warploom.models.families import llama

_MODELS = MappingProxyType({"smollm2-135m": llama.smollm2_135m, "tiny": llama.tiny})


def shapes(a: Architecture) -> list[tuple[int, int]]:
    """List outputs and inputs of each product of a step."""
    heads = a.heads * a.head_dim
    qkv = (heads + 2 * a.kv_heads * a.head_dim, a.width)
    block = [qkv, (a.width, heads), (2 * a.hidden, a.width), (a.width, a.hidden)]
    return block * a.layers + [(a.vocabulary, a.width)]


def _one_dnn(x: Tensor, weight: Tensor) -> Any:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


def _sides() -> dict[str, Callable[[Tensor, Tensor], Any]]:
    sides: dict[str, Callable[[Tensor, Tensor], Any]] = {"pytorch": functional.linear}
    if torch.backends.mkldnn.is_available():
        sides["onednn"] = _one_dnn
    if not cpu.missing():
        sides["ours"] = lambda x, weight: cpu.linear(x, weight, None)
    return sides | {"read": lambda x, weight: weight.sum()}


@torch.inference_mode()
def measure(sizes: Sequence[tuple[int, int]], rows: Sequence[int], rounds: int) -> dict[str, Any]:
    """Time all products of a step, for each number of rows and each side.

    Args:
        sizes: Outputs and inputs of each product.
        rows: Numbers of rows.
        rounds: Turns of each side; their median counts.

    Returns:
        Milliseconds of processor time of one thread, by rows and side.
    """
    weights = [torch.randn(size) for size in sizes]
    found: dict[str, Any] = {}
    for count in rows:
        given = {width: torch.randn(count, width) for _, width in sizes}
        spent: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, run in _sides().items():
                start = time.process_time()
                for weight in weights:
                    run(given[weight.shape[1]], weight)
                seconds = (time.process_time() - start) / torch.get_num_threads()
                spent.setdefault(name, []).append(1e3 * seconds)
        found[str(count)] = {name: statistics.median(times) for name, times in spent.items()}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--model", choices=sorted(_MODELS), default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 8, 12, 16, 24, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    found = measure(shapes(_MODELS[asked.model]()), asked.rows, asked.rounds)
    names = list(_sides())
    print(f"ms a step, {asked.threads} threads\nrows" + "".join(f"{name:>10}" for name in names))
    for rows, times in found.items():
        print(f"{rows:>4}" + "".join(f"{times[name]:10.1f}" for name in names))
    if asked.json:
        result = {"ms": found, "threads": asked.threads, "torch": torch.__version__}
        asked.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
