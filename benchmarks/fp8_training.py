"""Train a small Llama in emulated FP8 beside float32: the same but for the rounding.

    python benchmarks/fp8_training.py --steps 300 --seeds 3

Text is the source of Python's standard library by bytes, and the model a Llama of two layers. Every
recipe begins with the same weights and sees the same batches. Two measures, over the seeds:

    loss        |loss - loss of float32|, both smoothed over 20 steps: its mean and its most from
                step 50 on, and the difference of the mean loss of the last 20 steps, with its sign
    gradient    |g - g of float32| / |g of float32|, over the weights that are multiplied in FP8,
                at the weights of the float32 run and its batch, every 20 steps

Runs that differ in anything drift apart: `noise` is float32 whose first weights differ by 1e-6, and
its loss says what such a difference is worth. The gradient's error is the measure that compares
recipes. bf16 is there to say what a rounding that everybody trains with does. Outliers are those of
trained models, planted: a few channels of each norm are 64 times as large, and the weights behind
them as much smaller, which changes nothing in exact arithmetic.

Measured: see results/cpu.md.
"""

import argparse
import json
import math
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warploom.kernels.gemm import Fp8Recipe
from warploom.models.attention import Attention
from warploom.models.batch import Batch
from warploom.models.block import Block
from warploom.models.decoder import Architecture, Decoder
from warploom.models.feed_forward import FeedForward
from warploom.models.mup import is_hidden
from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import AdamW
from warploom.parallel.step import Step

ARCHITECTURE = Architecture(
    layers=2,
    width=128,
    heads=2,
    kv_heads=1,
    head_dim=64,
    hidden=384,
    vocabulary=256,
    max_positions=128,
)
RECIPES: Mapping[str, Fp8Recipe | None] = {
    "noise": None,
    "bf16": None,
    "tensor": Fp8Recipe(scaling="tensor"),
    "delayed": Fp8Recipe(scaling="tensor", delayed=True),
    "row": Fp8Recipe(scaling="row"),
    "block": Fp8Recipe(scaling="block"),
    "mx": Fp8Recipe(scaling="mx"),
}
SMOOTH, WARM = 20, 50
_ROWS, _LENGTH, _RATE, _OUTLIER = 4, 128, 2e-3, 64.0
_TEXT_BYTES = 1 << 21


def text() -> Tensor:
    """Return the bytes of the standard library's own modules, `[N]` uint8, in order of name."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    joined = b"\n".join(path.read_bytes() for path in files)[:_TEXT_BYTES]
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)


def batches(source: Tensor, seed: int, steps: int) -> list[Batch]:
    """Draw the batches of a run: `[4, 128]` bytes and those that follow."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        at = torch.randint(len(source) - _LENGTH - 1, (_ROWS, 1), generator=g)
        ids = source[at + torch.arange(_LENGTH + 1)].long()
        found.append(Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    return found


@torch.no_grad()
def plant_outliers(model: Decoder, seed: int) -> None:
    """Make four channels of each norm in a block 64 times as large, and what reads them smaller."""
    g = torch.Generator().manual_seed(seed)
    for block in model.modules():
        if not isinstance(block, Block):
            continue
        assert isinstance(block.feed_forward, FeedForward)
        assert isinstance(block.attention, Attention)
        for norm, layer in (
            (block.attention_norm, block.attention.qkv),
            (block.feed_forward_norm, block.feed_forward.gate_up),
        ):
            chosen = torch.randperm(model.architecture.width, generator=g)[:4]
            assert norm is not None
            norm.weight[chosen] *= _OUTLIER
            layer.weight[:, chosen] /= _OUTLIER


class Trainer:
    """A model that trains, and its gradient of any batch.

    Args:
        name: One of `RECIPES`, or `float32`.
        seed: Of the weights and the outliers.
        outliers: Whether these are planted.
    """

    def __init__(self, name: str, seed: int, *, outliers: bool = False) -> None:
        self.mesh, self.bf16 = Mesh.alone(), name == "bf16"
        self.model = Decoder.create(ARCHITECTURE, seed=seed, fp8=RECIPES.get(name))
        if name == "noise":
            g = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=g))
        if outliers:
            plant_outliers(self.model, seed)
        parameters, layouts = dict(self.model.named_parameters()), self.model.layouts()
        self.step = Step(self.model, layouts, AdamW(parameters, layouts, self.mesh), self.mesh)

    def train(self, batch: Batch, number: int) -> float:
        """Take a step with a short warm-up, and return the loss."""
        rate = _RATE * min(1.0, (number + 1) / 20)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.step([batch], learning_rate=rate).losses["language_model"]

    def gradient(self, batch: Batch, names: Sequence[str]) -> Tensor:
        """Return the gradient of a batch over some weights; nothing is kept."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            total = self.model.loss(batch)[0].sum
        parameters = dict(self.model.named_parameters())
        found = torch.autograd.grad(total, [parameters[name] for name in names])
        return torch.cat([gradient.flatten().float() for gradient in found])


def smoothed(losses: Sequence[float]) -> Tensor:
    """Return the means of each run of 20 losses."""
    return torch.tensor(losses, dtype=torch.float64).unfold(0, SMOOTH, 1).mean(1)


def compare(
    names: Sequence[str],
    seed: int,
    steps: int,
    *,
    outliers: bool,
    warm: int = WARM,
    every: int = 20,
) -> dict[str, dict[str, Any]]:
    """Train float32 and every recipe named, and return the measures of each.

    Args:
        names: Some of `RECIPES`.
        seed: Of weights, batches and outliers.
        steps: Steps of each run, more than `warm`.
        outliers: Whether they are planted.
        warm: The first step that is compared, at least 20.
        every: Steps from one comparison of gradients to the next.
    """
    source = text()
    drawn = batches(source, seed, steps)
    sides = {name: Trainer(name, seed, outliers=outliers) for name in names}
    probes = {name: Trainer(name, seed, outliers=outliers) for name in names}
    exact = Trainer("float32", seed, outliers=outliers)
    rounded = [
        name for name, parameter in exact.model.named_parameters() if is_hidden(name, parameter)
    ]
    losses: dict[str, list[float]] = {name: [] for name in (*names, "float32")}
    errors: dict[str, list[float]] = {name: [] for name in names}
    for number, batch in enumerate(drawn):
        if number % every == 0 and number:
            wanted = exact.gradient(batch, rounded)
            for name, probe in probes.items():
                _follow(probe, exact, drawn[number - 1])
                apart = probe.gradient(batch, rounded) - wanted
                errors[name].append(float(apart.norm() / wanted.norm()))
        losses["float32"].append(exact.train(batch, number))
        for name, side in sides.items():
            losses[name].append(side.train(batch, number))
    base = smoothed(losses["float32"])
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        apart = (smoothed(losses[name]) - base)[warm - SMOOTH + 1 :]
        found[name] = {
            "mean": float(apart.abs().mean()),
            "most": float(apart.abs().max()),
            "end": float(apart[-1]),
            "gradient": sum(errors[name]) / max(len(errors[name]), 1),
            "loss": float(smoothed(losses[name])[-1]),
            "losses": losses[name],
        }
    return found | {"float32": {"loss": float(base[-1]), "losses": losses["float32"]}}


def _follow(probe: Trainer, exact: Trainer, before: Batch) -> None:
    """Give a probe the weights of the float32 run, and delayed scales of the step before."""
    probe.model.load_state_dict(exact.model.state_dict(), strict=False)
    probe.model.loss(before)[0].sum.backward()
    probe.model.after_step(probe.mesh)
    probe.model.zero_grad()


def summary(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return mean and, of `most`, the largest over the seeds."""
    names = [name for name in found[0] if name != "float32"]
    table: dict[str, dict[str, float]] = {}
    for name in names:
        rows = [one[name] for one in found]
        table[name] = {
            key: math.fsum(row[key] for row in rows) / len(rows)
            for key in ("mean", "end", "gradient", "loss")
        }
        table[name]["most"] = max(row["most"] for row in rows)
    return table


def main(argv: list[str] | None = None) -> int:
    """Compare, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--json", type=Path)
    words = parser.parse_args(argv)
    names = words.recipes.split(",")
    began, found = time.perf_counter(), []
    for seed in range(words.seeds):
        found.append(compare(names, seed, words.steps, outliers=words.outliers))
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    table = summary(found)
    print("| recipe | mean | most | end | gradient | loss |\n|---|---|---|---|---|---|")
    for name, row in table.items():
        cells = [f"{row[key]:.4f}" for key in ("mean", "most", "end", "gradient", "loss")]
        print(f"| {name} | {' | '.join(cells)} |")
    if words.json is not None:
        words.json.write_text(json.dumps({"summary": table, "seeds": found}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
