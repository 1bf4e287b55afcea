"""The coordinate check of muP: how large activations are after some steps, at several widths.

    warploom bench mup                             a small Llama at widths 64 to 512
    warploom bench mup --parametrisation standard  the same without muP, for comparison

Each model takes the same steps on the same tokens with the same learning rate. Under muP what a
block adds, and the change of the logits since the start, have sizes that do not depend on the
width: the slope of the log of the mean absolute value over the log of the width is near 0. In the
standard parametrisation they grow. Prints a table of slopes; writes the curves as a chart (PNG) and
all values as JSON.

Source: Yang et al. 2022, https://arxiv.org/abs/2203.03466, appendix D.1 (coordinate checking).
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from warploom.models.architecture import Architecture
from warploom.models.batch import Batch
from warploom.models.decoder import Decoder
from warploom.models.mup import learning_rates
from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import AdamW
from warploom.parallel.step import Step

HEAD_DIM = 16
LAYERS = 2
VOCABULARY = 256
SHAPE = 8, 32
Sizes = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """Measure how activations grow with the width."""

    parametrisation: Literal["mup", "standard"] = "mup"
    """Whether the maximal-update parametrisation is on."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Widths of the models; the first is the base of muP. Multiples of 32."""
    steps: int = 4
    """Optimizer steps before the last measurement."""
    learning_rate: float = 1e-3
    """Peak and only learning rate."""
    seeds: int = 3
    """Models of each width, over which values are averaged."""
    folder: Path | None = None
    """Where coordinates.json and coordinates.png go; None writes nothing."""


def architecture(width: int, base: int | None) -> Architecture:
    """Return the small Llama of a width."""
    return Architecture(
        layers=LAYERS,
        width=width,
        heads=width // HEAD_DIM,
        kv_heads=width // HEAD_DIM // 2,
        head_dim=HEAD_DIM,
        hidden=2 * width,
        vocabulary=VOCABULARY,
        max_positions=SHAPE[1],
        mup_base=base,
    )


def sizes(a: Architecture, steps: int, learning_rate: float, seed: int) -> list[Sizes]:
    """Train a model and return the mean absolute activations before each step and after the last.

    Args:
        a: Sizes.
        steps: Optimizer steps.
        learning_rate: Of all steps.
        seed: Of the weights; the tokens are always the same.

    Returns:
        For each of `steps` + 1 moments, by the name of what was measured.
    """
    model, mesh = Decoder.create(a, seed=seed), Mesh.alone()
    seen: Sizes = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        seen[name] = float(first.detach().abs().mean())

    watched: dict[str, nn.Module] = {"embedding": model.embedding, "last norm": model.norm}
    for n, block in model.blocks.items():
        watched |= {f"attention {n}": block.get_submodule("attention"), f"block {n}": block}
    for name, module in watched.items():
        module.register_forward_hook(partial(keep, name))
    parameters = dict(model.named_parameters())
    optimizer = AdamW(parameters, model.layouts(), mesh, weight_decay=0.0, rate=learning_rates(a))
    step = Step(model, model.layouts(), optimizer, mesh, clip=None)
    ids = torch.randint(VOCABULARY, (SHAPE[0], SHAPE[1] + 1), generator=_seeded(0))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    moments, first = [], torch.empty(0)
    for number in range(steps + 1):
        with torch.no_grad():
            logits = model(batch.tokens)
        if number == 0:
            first = logits
        else:
            seen["logits, change"] = float((logits - first).abs().mean())
        moments.append(dict(seen))
        if number < steps:
            step([batch], learning_rate=learning_rate)
    return moments


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slope(values: Mapping[int, float]) -> float:
    """Return the slope of log value over log width by least squares; dimensionless."""
    points = [(math.log(w), math.log(v)) for w, v in values.items()]
    x, y = (sum(side) / len(points) for side in zip(*points, strict=True))
    found: float = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    return found


def measure(asked: Coordinates, *, progress: bool = False) -> dict[str, Any]:
    """Return values `[moment][name][width]`, averaged over the seeds, and their last slopes."""
    base = asked.widths[0] if asked.parametrisation == "mup" else None
    todo = [(w, seed) for w in asked.widths for seed in range(asked.seeds)]
    found: list[dict[str, dict[int, float]]] = [{} for _ in range(asked.steps + 1)]
    for w, seed in track(todo, "widths and seeds", disable=not progress):
        made = architecture(w, base)
        for at, moment in enumerate(sizes(made, asked.steps, asked.learning_rate, seed)):
            for name, value in moment.items():
                row = found[at].setdefault(name, {})
                row[w] = row.get(w, 0.0) + value / asked.seeds
    slopes = {name: slope(values) for name, values in found[-1].items()}
    return {"moments": found, "slopes": slopes}


def _draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    moments = result["moments"]
    shown, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, at in zip(axes, (0, len(moments) - 1), strict=True):
        for name, values in moments[at].items():
            axis.loglog(list(values), list(values.values()), marker="o", label=name)
        axis.set(title=f"after {at} steps", xlabel="width D")
        axis.set_xticks(list(values), [str(w) for w in values], minor=False)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean absolute value")
    axes[1].legend(fontsize=8)
    shown.tight_layout()
    shown.savefig(path, dpi=120)
    pyplot.close(shown)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write; return 0."""
    asked = tyro.cli(Coordinates, args=argv, prog="warploom bench mup", description=__doc__)
    console = Console()
    result = measure(asked, progress=console.is_terminal)
    table = Table("activation", *map(str, asked.widths), "slope", title=asked.parametrisation)
    for name, values in result["moments"][-1].items():
        row = (f"{values[w]:.3g}" for w in asked.widths)
        table.add_row(name, *row, f"{result['slopes'][name]:+.2f}")
    console.print(table)
    if asked.folder is not None:
        asked.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"parametrisation": asked.parametrisation, **result}, indent=1)
        (asked.folder / "coordinates.json").write_text(text + "\n", encoding="utf-8")
        _draw(result, asked.folder / "coordinates.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
