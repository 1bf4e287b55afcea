"""Generate text from one model in warploom and in transformers, alternating, from the same prompts.

    warploom bench generate --threads 2 1 --rounds 3

Each side lives in a process of its own; the sides take turns, so that a noisy machine is noisy for
both. Weights are those of `smol/`, or random ones of the same sizes: the speed is the same. All is
float32 and greedy, and no token ends a text. The peer is `generate` with its default cache and SDPA
attention.

    one        one prompt of 128 tokens, 128 out
    equal      16 prompts of 128 tokens, 128 out each
    unequal    16 prompts of 32 to 224 tokens (128 in the mean), 16 to 128 out (72 in the mean)
    queue      64 of these; a batch is 16
    shared     8 samples of a prompt of 128 tokens, one token out; ours alone, against one sample

The peer gets one batch, padded on the left to its longest prompt, and as many new tokens as its
longest text wants; of the queue four batches, in the order of arrival. What counts of both is the
tokens that were asked for: those behind a text's own length, and padding, count for nobody. Seconds
are of the whole call, prompts included. `cpu_s` is processor time, which says with one thread what
the machine would do without others' work.

`--peer batch-invariant` is our own engine in that mode: what the mode costs.

Measured: see results/cpu.md.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from warploom.models import hf
from warploom.models.decoder import Decoder
from warploom.models.families import llama

_BATCH = 16
_MODELS = MappingProxyType({"smollm2-135m": llama.smollm2_135m, "tiny": llama.tiny})


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Prompts, and how many tokens follow each.

    Attributes:
        prompts: Ids.
        lengths: Tokens that are asked for.
        samples: Texts of each prompt.
    """

    prompts: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    samples: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return sum(self.lengths) * self.samples


def works(vocabulary: int, scale: float = 1.0, seed: int = 0) -> Mapping[str, Work]:
    """Draw the prompts of every workload; `scale` shortens prompts and texts."""
    made = random.Random(seed)

    def draw(prompts: Sequence[float], lengths: Sequence[float], samples: int = 1) -> Work:
        sizes = [max(round(n * scale), 1) for n in prompts]
        ids = tuple(tuple(made.randrange(vocabulary) for _ in range(n)) for n in sizes)
        return Work(
            prompts=ids, lengths=tuple(max(round(n * scale), 1) for n in lengths), samples=samples
        )

    def spread(low: int, high: int, count: int) -> list[float]:
        values = [low + (high - low) * n / (count - 1) for n in range(count)]
        made.shuffle(values)
        return values

    return {
        "one": draw([128], [128]),
        "equal": draw([128] * _BATCH, [128] * _BATCH),
        "unequal": draw(spread(32, 224, _BATCH), spread(16, 128, _BATCH)),
        "queue": draw(spread(32, 224, 4 * _BATCH), spread(16, 128, 4 * _BATCH)),
        "shared": draw([128], [1 / scale], 8),
        "alone": draw([128], [1 / scale]),
    }


Texts = list[list[int]]


def ours(folder: Path, *, invariant: bool = False) -> Callable[[Work], Texts]:
    """Build warploom's side: from a workload to the ids of its texts."""
    from warploom.recipes.rollout import Engine, Sampling

    model = hf.load(folder, dtype=torch.float32)
    engine = Engine(model, max_sequences=_BATCH, batch_invariant=invariant)

    def run(work: Work) -> Texts:
        engine.forget()  # what an earlier round has left is not found
        how = [Sampling(temperature=0.0, max_tokens=n, n=work.samples) for n in work.lengths]
        return [[*c.ids] for c in engine.generate(work.prompts, how)]

    return run


def theirs(folder: Path) -> Callable[[Work], Texts]:
    """Build the peer's side: padded batches, as long as their longest text."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def batch(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Texts:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + [*p] for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        most = max(lengths)
        made = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=most)
        return [row[width : width + n].tolist() for row, n in zip(made, lengths, strict=True)]

    def run(work: Work) -> Texts:
        parts = (slice(n, n + _BATCH) for n in range(0, len(work.prompts), _BATCH))
        return [text for p in parts for text in batch(work.prompts[p], work.lengths[p])]

    return run


OURS = "warploom"
SIDES: Mapping[str, Callable[[Path], Callable[[Work], Texts]]] = MappingProxyType(
    {OURS: ours, "transformers": theirs, "batch-invariant": partial(ours, invariant=True)}
)


def _memory(name: str) -> float:
    """Return a line of this process's status in GiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) / 2**20 if found else float("nan")


def _serve(side: str, folder: Path, threads: int, pipe: Connection) -> None:
    """Answer each workload with what it took, until told `None`."""
    torch.set_num_threads(threads)
    run = SIDES[side](folder)
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, cpu, start = _memory("VmRSS"), time.process_time(), time.perf_counter()
        texts = run(work)
        took = {"s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
        pipe.send((texts, took | {"peak_gib": _memory("VmHWM"), "before_gib": before}))


Found = dict[str, dict[str, list[dict[str, float]]]]


def measure(
    folder: Path,
    chosen: Mapping[str, Work],
    *,
    threads: int,
    rounds: int,
    peer: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run each workload `rounds` times on both sides, in turns, behind one that is not counted."""
    sides = (OURS, peer)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    workers = []
    for side in sides:
        pipes[side], end = context.Pipe()
        worker = context.Process(target=_serve, args=(side, folder, threads, end), daemon=True)
        worker.start()
        workers.append(worker)
        pipes[side].recv()
    found: Found = {}
    same: dict[str, int] = {}
    first = next(iter(chosen.values()))
    for name, work in {"warm-up": first, **chosen}.items():
        found[name] = {side: [] for side in sides}
        for number in range(1 if name == "warm-up" else rounds):
            texts = {}
            for side in sides if number % 2 else sides[::-1]:
                if side == peer and name in ("shared", "alone"):
                    continue
                pipes[side].send(work)
                texts[side], took = pipes[side].recv()
                found[name][side].append(took)
                say(f"{name:8} {number}  {side:15}  {took['s']:.2f} s  cpu {took['cpu_s']:.2f} s")
            if len(texts) == len(sides):
                same[name] = sum(a == b for a, b in zip(*texts.values(), strict=True))
    for pipe in pipes.values():
        pipe.send(None)
    for worker in workers:
        worker.join()
    del found["warm-up"]
    return {"threads": threads, "peer": peer, **summarise(chosen, found, same, peer)}


def summarise(
    chosen: Mapping[str, Work], found: Found, same: Mapping[str, int], peer: str
) -> dict[str, Any]:
    """Reduce the rounds to medians and their ratios."""
    result: dict[str, Any] = {}
    for name, sides in found.items():
        work = chosen[name]
        row: dict[str, Any] = {"tokens": work.tokens, "texts": len(work.prompts) * work.samples}
        for side, rounds in sides.items():
            if rounds:
                row[side] = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
                row[side] |= {"tokens_per_s": work.tokens / row[side]["s"], "rounds": rounds}
        if sides[peer]:
            pairs = list(zip(sides[OURS], sides[peer], strict=True))
            for k in ("s", "cpu_s"):
                row[f"times_as_fast_{k}"] = statistics.median(b[k] / a[k] for a, b in pairs)
            row["texts_equal"] = same[name]
        result[name] = row
    if {"shared", "alone"} <= found.keys():
        both = zip(found["shared"][OURS], found["alone"][OURS], strict=True)
        ratios = [{k: a[k] / b[k] for k in ("s", "cpu_s")} for a, b in both]
        result["prefills_of_8"] = {k: statistics.median(r[k] for r in ratios) for k in ratios[0]}
    return {"works": result}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [*works(2)]
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--model", choices=sorted(_MODELS), default="smollm2-135m")
    parser.add_argument("--folder", type=Path, default=Path("smol"), help="weights, if it is there")
    parser.add_argument("--works", nargs="+", choices=names, default=names)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each side")
    peers = [side for side in SIDES if side != OURS]
    parser.add_argument("--peer", choices=peers, default=peers[0], help="who takes the other turn")
    parser.add_argument("--scale", type=float, default=1.0, help="of the lengths")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args(argv)


def _table(result: Mapping[str, Any]) -> list[str]:
    lines = [f"threads {result['threads']}: tokens/s (GiB at most), times as fast, by cpu time"]
    for name, row in result["works"].items():
        sides = [row[s] for s in (OURS, result["peer"]) if s in row]
        shown = "  ".join(f"{s['tokens_per_s']:8.1f} ({s['peak_gib']:.2f})" for s in sides)
        if len(sides) == 2:
            shown += f"  {row['times_as_fast_s']:.2f}x  {row['times_as_fast_cpu_s']:.2f}x"
            shown += f"  {row['texts_equal']} of {row['texts']} texts equal"
        elif not sides:
            shown = f"{row['s']:.2f} prefills, {row['cpu_s']:.2f} by cpu time"
        lines.append(f"{name:14}{shown}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table; return 1 if most texts of a workload differ."""
    asked = _arguments(argv)
    architecture = _MODELS[asked.model]()
    chosen = {
        k: w for k, w in works(architecture.vocabulary, asked.scale).items() if k in asked.works
    }
    result: dict[str, Any] = {"model": asked.model, "torch": torch.__version__, "runs": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder
        if asked.model == "tiny" or not (folder / "config.json").is_file():
            folder = Path(scratch) / "model"
            hf.save(Decoder.create(architecture, seed=0, names=llama.FAMILY.rename), folder)
        result["weights"] = "random" if folder.parent == Path(scratch) else folder.name
        for threads in asked.threads:
            how = {"threads": threads, "rounds": asked.rounds, "peer": asked.peer}
            run = measure(folder, chosen, **how, say=print)
            result["runs"].append(run | {"load": os.getloadavg()})
            print(*_table(run), sep="\n", flush=True)
            if asked.json:
                asked.json.write_text(json.dumps(result, indent=2) + "\n")
    rows = [row for run in result["runs"] for row in run["works"].values() if "texts_equal" in row]
    return int(any(2 * row["texts_equal"] < row["texts"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
