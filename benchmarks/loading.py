"""Load a Hugging Face folder: seconds, memory beside the weights, and the disk's own speed.

    python benchmarks/loading.py smol                 # as it lies there, warm and cold
    python benchmarks/loading.py --parameters 1e9     # a Llama that is made for it, in bf16

Each load is in a fresh process, which first imports what a load imports: its peak resident memory
above that, over the bytes of the weights, is what loading takes. Cold means that the pages of the
files were given back to the kernel before (posix_fadvise; what lies below this machine's disk may
still hold them). The disk's speed is that of reading the same files, cold too, in blocks of 8 MiB
into one buffer; loads and reads take turns.

Measured: see results/cpu.md.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warploom.models import hf
from warploom.models.decoder import Decoder
from warploom.models.families import llama, of_architecture
from warploom.models.hf.files import Writer, write_json
from warploom.models.hf.tensors import stored_tensors_of

_BLOCK = 8 << 20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _load_once(folder: Path) -> dict[str, float]:
    """Load in this process; the first meta model imports what torch imports late."""
    Decoder(llama.tiny(), device="meta")
    before = _resident()
    start, busy = time.perf_counter(), time.process_time()
    model = hf.load(folder)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "seconds": seconds,
        "cpu_seconds": busy,
        "weights_bytes": weights,
        "memory_over_weights": (peak - before) / weights,
    }


def _fresh(folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--once", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _forget(folder: Path) -> None:
    """Give the pages of the files back to the kernel."""
    for path in _files(folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _read(folder: Path) -> float:
    """Return the bytes a second of reading all files."""
    buffer, total, start = bytearray(_BLOCK), 0, time.perf_counter()
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                total += got
    return total / (time.perf_counter() - start)


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Load a folder warm and cold, in turns with reading it cold.

    Args:
        folder: A Hugging Face folder.
        rounds: Of each.

    Returns:
        Medians, and all rounds.
    """
    warm, cold, disk = [], [], []
    _read(folder)
    for _ in range(rounds):
        warm.append(_fresh(folder))
        _forget(folder)
        cold.append(_fresh(folder))
        _forget(folder)
        disk.append(_read(folder))
    size = sum(path.stat().st_size for path in _files(folder))
    speeds = [size / one["seconds"] for one in cold]
    return {
        "bytes": size,
        "warm_s": statistics.median(one["seconds"] for one in warm),
        "warm_cpu_s": statistics.median(one["cpu_seconds"] for one in warm),
        "cold_s": statistics.median(one["seconds"] for one in cold),
        "disk_bytes_per_s": statistics.median(disk),
        "cold_bytes_per_s": statistics.median(speeds),
        "share_of_disk": statistics.median(a / b for a, b in zip(speeds, disk, strict=True)),
        "memory_over_weights": max(one["memory_over_weights"] for one in warm + cold),
        "rounds": {"warm": warm, "cold": cold, "disk_bytes_per_s": disk},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def make(folder: Path, parameters: float) -> None:
    """Write a Llama of about so many parameters, in bf16 and files of at most 1 GB."""
    base = replace(llama.llama3_8b(), vocabulary=32_000, width=2048, heads=16, kv_heads=4)
    layer = 2048 * 2048 * 2 + 2048 * 1024 + 3 * 2048 * 8192
    layers = max(1, round((parameters - 2 * 32_000 * 2048) / layer))
    made = replace(base, layers=layers, hidden=8192)
    family = of_architecture(made)
    stored = stored_tensors_of(made, family)
    write_json(folder / "config.json", family.config(made) | {"torch_dtype": "bfloat16"})
    shapes = {name: (torch.bfloat16, one.shape) for name, one in stored.items()}
    writer = Writer(folder, shapes, 1_000_000_000)
    noise = torch.randn(1 << 22).bfloat16()

    def blocks(count: int) -> Iterator[Tensor]:
        while count:
            yield noise[: min(count, len(noise))]
            count -= min(count, len(noise))

    for name, one in stored.items():
        writer.write(name, blocks(torch.Size(one.shape).numel()))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="a Hugging Face folder")
    parser.add_argument("--parameters", type=float, default=1e9, help="of the one that is made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.once:
        print(json.dumps(_load_once(asked.once)))
        return 0
    with tempfile.TemporaryDirectory(dir=".") as made:
        folder = asked.folder or Path(made)
        if asked.folder is None:
            make(folder, asked.parameters)
        result = measure(folder, asked.rounds)
    print(
        f"{result['bytes'] / 1e9:.2f} GB: warm {result['warm_s']:.2f} s "
        f"({result['warm_cpu_s']:.2f} s of a core), cold {result['cold_s']:.2f} s = "
        f"{result['cold_bytes_per_s'] / 1e9:.2f} GB/s, {result['share_of_disk']:.0%} of the disk's "
        f"{result['disk_bytes_per_s'] / 1e9:.2f} GB/s; memory {result['memory_over_weights']:.2f} "
        "times the weights"
    )
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
