"""Train one model step by step in warploom and in transformers, alternating, on the same batches.

    python benchmarks/end_to_end.py --rounds 5

Each side lives in a process of its own, so that its peak resident memory is its own; the sides take
turns step by step, so that a noisy machine is noisy for both. Weights, batches, learning rate, clip
and weight decay are the same, and so must be the losses. No activations are recomputed on either
side. The peer is `LlamaForCausalLM` (SDPA attention) with `torch.optim.AdamW` as it comes, or with
its fused kernel (`--fused`).

Measured: see results/cpu.md.
"""

import argparse
import dataclasses
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warploom.models import hf
from warploom.models.decoder import Architecture, Decoder
from warploom.models.families import llama

_RATE, _DECAY, _BETAS, _EPS, _CLIP = 3e-4, 0.1, (0.9, 0.95), 1e-8, 1.0
_MODELS: dict[str, Callable[[], Architecture]] = {
    "smollm2-135m": llama.smollm2_135m,
    "tiny": llama.tiny,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What both sides train.

    Attributes:
        model: A name of `_MODELS`.
        batch: Sequences a step.
        sequence: Tokens a sequence.
        fused: Whether the peer's AdamW is torch's fused one.
        threads: Of each side.
        profile: Whether our side takes one more step in the end and prints where its time went.
    """

    model: str
    batch: int
    sequence: int
    fused: bool
    threads: int
    profile: bool = False


def tokens_of(setting: Setting, step: int) -> Tensor:
    """Return the ids `[B, S]` of a step, the same in both processes."""
    generator = torch.Generator().manual_seed(step)
    vocabulary = _MODELS[setting.model]().vocabulary
    return torch.randint(0, vocabulary, (setting.batch, setting.sequence), generator=generator)


def ours(setting: Setting, folder: Path) -> Callable[[int], float]:
    """Build warploom's step: a function from the step's number to its loss."""
    from warploom.models.batch import Batch
    from warploom.parallel.mesh import Mesh
    from warploom.parallel.optimizer import AdamW
    from warploom.parallel.step import Step

    model = hf.load(folder, dtype=torch.float32)
    layouts, mesh = model.layouts(), Mesh.build()
    parameters = dict(model.named_parameters())
    optimizer = AdamW(
        parameters,
        layouts,
        mesh,
        betas=_BETAS,
        eps=_EPS,
        weight_decay=_DECAY,
        decay=lambda path, p: True,
    )
    step = Step(model, layouts, optimizer, mesh, clip=_CLIP)

    def run(number: int) -> float:
        tokens = tokens_of(setting, number)
        targets = torch.full_like(tokens, -100)
        targets[:, :-1] = tokens[:, 1:]
        batch = Batch(tokens=tokens, targets=targets, document_lengths=None)
        return step([batch], learning_rate=_RATE).losses["language_model"]

    return run


def theirs(setting: Setting, folder: Path) -> Callable[[int], float]:
    """Build the peer's step: a function from the step's number to its loss."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=_RATE,
        betas=_BETAS,
        eps=_EPS,
        weight_decay=_DECAY,
        fused=True if setting.fused else None,
    )

    def run(number: int) -> float:
        tokens = tokens_of(setting, number)
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        return float(loss.detach())

    return run


SIDES = {"warploom": ours, "transformers": theirs}


def _serve(side: str, setting: Setting, folder: Path, pipe: Connection) -> None:
    """Answer each step number with seconds, loss and peak memory, until told `None`."""
    torch.set_num_threads(setting.threads)
    run = SIDES[side](setting, folder)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        start = time.perf_counter()
        loss = run(number)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        pipe.send({"seconds": seconds, "loss": loss, "peak_gib": peak})
    if setting.profile and side == "warploom":
        print(_profiled(run, 0), file=sys.stderr)


def _profiled(run: Callable[[int], float], number: int) -> str:
    with torch.profiler.profile() as profile:
        run(number)
    table: str = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
    return table


def measure(setting: Setting, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run one warm-up step and `rounds` counted ones on both sides, in turns."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        hf.save(Decoder.create(_MODELS[setting.model](), seed=0, names=llama.FAMILY.rename), folder)
        pipes: dict[str, Connection] = {}
        workers = []
        for side in SIDES:
            pipes[side], end = context.Pipe()
            worker = context.Process(target=_serve, args=(side, setting, folder, end), daemon=True)
            worker.start()
            workers.append(worker)
            pipes[side].recv()
        for number in range(rounds + 1):
            for side in sorted(SIDES, reverse=bool(number % 2)):
                pipes[side].send(number)
                found[side].append(pipes[side].recv())
                last = found[side][-1]
                say(f"step {number}  {side:12}  {last['seconds']:.2f} s  loss {last['loss']:.6f}")
        for pipe in pipes.values():
            pipe.send(None)
        for worker in workers:
            worker.join()
    return summarise(setting, found)


def summarise(setting: Setting, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Reduce the steps to medians, ratios and the largest difference in loss."""
    tokens = setting.batch * setting.sequence
    sides = {
        side: {
            "step_time_s": statistics.median(s["seconds"] for s in steps[1:]),
            "step_time_min_s": min(s["seconds"] for s in steps[1:]),
            "step_time_max_s": max(s["seconds"] for s in steps[1:]),
            "tokens_per_s": tokens / statistics.median(s["seconds"] for s in steps[1:]),
            "peak_memory_gib": max(s["peak_gib"] for s in steps),
        }
        for side, steps in found.items()
    }
    pairs = list(zip(found["warploom"], found["transformers"], strict=True))
    return {
        "setting": dataclasses.asdict(setting),
        "sides": sides,
        "speed_ratio": statistics.median(b["seconds"] / a["seconds"] for a, b in pairs[1:]),
        "memory_ratio": sides["warploom"]["peak_memory_gib"]
        / sides["transformers"]["peak_memory_gib"],
        "largest_loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--model", choices=sorted(_MODELS), default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--sequence", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fused", action="store_true", help="the peer's AdamW is torch's fused")
    parser.add_argument("--profile", action="store_true", help="print where our time goes")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table; return 1 if the losses differ by more than 1e-4."""
    asked = _arguments(argv)
    setting = Setting(
        model=asked.model,
        batch=asked.batch,
        sequence=asked.sequence,
        fused=asked.fused,
        threads=asked.threads,
        profile=asked.profile,
    )
    result = measure(setting, asked.rounds, print)
    print(f"\n{'':14}{'tokens/s':>10}{'step s':>9}{'min':>8}{'max':>8}{'peak GiB':>10}")
    for side, row in result["sides"].items():
        print(
            f"{side:14}{row['tokens_per_s']:>10.1f}{row['step_time_s']:>9.2f}"
            f"{row['step_time_min_s']:>8.2f}{row['step_time_max_s']:>8.2f}"
            f"{row['peak_memory_gib']:>10.2f}"
        )
    print(
        f"speed {result['speed_ratio']:.2f}x, memory {result['memory_ratio']:.2f}x, "
        f"largest difference of the losses {result['largest_loss_difference']:.1e}"
    )
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(result["largest_loss_difference"] > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
