"""What was measured, for a reader: tables, JSON and a roofline."""

import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from warploom import __version__
from warploom.recipes.errors import UserError

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("triton", "liger-kernel", "transformer-engine", "apex", "bitsandbytes", "numpy")
_METHOD = (
    "contenders in turns in one process, rotated each round; random inputs; on a GPU device events "
    "after an L2 flush, on one CPU thread its processor time; the backward alone after an untimed "
    "forward; ratios of medians"
)
LEGEND = (
    "  ms, quartiles: median time of a pass, and between what half of its times lie",
    "  of roof: share of what the ceilings of this run allow; above 100 % the cache held the data",
    "  x eager: how many times as fast as eager PyTorch; above 1 the row is the faster one",
    "  pass both: forward and backward in one span",
    "  peak MiB: the most memory that this pass held, beyond its inputs",
)
HOST_LEGEND = (
    "  forward us: microseconds of a forward without gradient",
    "  over a launch: the same less an in-place addition, the least that a call into torch costs",
    "  and backward us: microseconds of a forward and its backward",
)
"""What the columns say, a line each."""


def about(device: torch.device) -> dict[str, Any]:
    """Describe the machine, the versions and the day.

    Args:
        device: Where was measured.
    """
    cuda = device.type == "cuda"
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "warploom": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: version for name, version in versions.items() if version},
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def document(
    device: torch.device,
    dtype: torch.dtype,
    found: Mapping[str, float],
    rows: Sequence[Mapping[str, Any]],
    overhead: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Put everything that was measured into one object for JSON."""
    head = about(device) | {"dtype": str(dtype).removeprefix("torch.")}
    head |= {"method": _METHOD, "ceilings": dict(found)}
    return head | {"rows": list(rows), "overhead": list(overhead)}


def write(file: Path, result: Mapping[str, Any]) -> None:
    """Write an object as JSON, and make the folder it goes to."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def setting_line(device: torch.device, dtype: torch.dtype) -> str:
    """Say in one line what was measured where: dtype, threads of the CPU, device."""
    here, threads = about(device), torch.get_num_threads()
    host = f"{threads} {'thread' if threads == 1 else 'threads'} of the CPU"
    where = f"{here['device']} and {host}" if device.type == "cuda" else f"{host}, {here['device']}"
    return f"measured in {str(dtype).removeprefix('torch.')}, on {where}, torch {here['torch']}"


def ceilings_line(found: Mapping[str, float]) -> str:
    """Say the ceilings in one line."""
    parts = [f"copy {found['copy_bytes_per_s'] * 1e-9:.1f} GB/s"]
    parts += [f"matrix product {found['matmul_flops_per_s'] * 1e-12:.3g} TFLOP/s"]
    if fp8 := found.get("fp8_matmul_flops_per_s"):
        parts += [f"fp8 {fp8 * 1e-12:.3g} TFLOP/s"]
    return "ceilings measured in this run: " + ", ".join(parts)


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: drawn on a terminal, plain lines in a pipe."""
    rows = list(rows)
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)  # a word in brackets is a word
    if console.is_terminal:
        table = Table(*header, title=title, title_justify="left")
        for column in table.columns[3:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    print(f"\n{title}")
    print("\n".join(columns([header, *rows])))


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay rows of words out in columns, the first three to the left."""
    whole = len(rows[0])
    widths = [max(len(r[i]) for r in rows if len(r) == whole or i < 3) for i in range(whole)]
    lay = [
        [word.ljust(w) if i < 3 else word.rjust(w) for i, (word, w) in enumerate(zip(row, widths))]  # noqa: B905 - a failed contender's row is short
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in lay]


def tables(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one table an operator."""
    for name in dict.fromkeys(f"{row['op']} {row['variant']}".strip() for row in rows):
        mine = [row for row in rows if f"{row['op']} {row['variant']}".strip() == name]
        peers = list(dict.fromkeys(p for row in mine for p in row.get("times_as_fast_as", ())))
        header = ["size", "pass", "contender", "ms", "quartiles", "GB/s", "of roof"]
        header += [f"x {peer}" for peer in peers]
        cells = [_cells(row, peers) for row in mine]
        if any("peak_mib" in row for row in mine):
            header.append("peak MiB")
            for row, line in zip(mine, cells, strict=True):
                if "failed" not in row:
                    line.append(f"{row['peak_mib']:.1f}" if "peak_mib" in row else "-")
        show(name, header, cells)


def _cells(row: Mapping[str, Any], peers: Sequence[str]) -> list[str]:
    if "failed" in row:
        return [row["size"], "-", row["contender"], row["failed"]]
    ms, ratios = row["ms"], row["times_as_fast_as"]
    rate = f"{row['tflops_per_s']:.3g} TF/s" if row["products"] else f"{row['gb_per_s']:.1f}"
    cells = [row["size"], row["pass"], row["contender"], f"{ms['median']:.4g}"]
    cells += [f"{ms['q1']:.4g} to {ms['q3']:.4g}", rate, f"{row['roof_share']:.0%}"]
    return cells + [f"{ratios[peer]:.2f}" if peer in ratios else "-" for peer in peers]


def overhead_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what the host spends on a call."""
    header = ["operator", "contender", "", "forward us", "over a launch", "and backward us"]

    def cells(row: Mapping[str, Any]) -> list[str]:
        name = f"{row['op']} {row['variant']}".strip()
        if "failed" in row:
            return [name, row["contender"], "", row["failed"]]
        forward, bare = row["forward_us"], row["bare_us"]
        both = f"{row['both_us']:.1f}" if "both_us" in row else "-"
        return [name, row["contender"], "", f"{forward:.1f}", f"{forward - bare:.1f}", both]

    show("the host's time a call, at a tiny size", header, [cells(row) for row in rows])
    print("\n".join(["columns:", *HOST_LEGEND]))


def need_matplotlib() -> None:
    """Check that a plot can be drawn.

    Raises:
        UserError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        msg = "--plot needs matplotlib, which is not installed: pip install 'warploom[plot]'"
        raise UserError(msg)


def plot(file: Path, result: Mapping[str, Any]) -> None:
    """Draw the roofline: what each contender reaches over the flops a byte of its formula.

    Args:
        file: Where to, in the format of its suffix.
        result: What `document` returned.
    """
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row.get("flops") and row["pass"] != "both"]
    found = result["ceilings"]
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    reach = [row["flops"] / row["bytes"] for row in rows] or [1.0]
    at = [min(*reach, 0.1) / 2, found["matmul_flops_per_s"] / found["copy_bytes_per_s"]]
    at += [max(*reach, at[1]) * 2]
    for label, top in (("matmul", "matmul_flops_per_s"), ("fp8 matmul", "fp8_matmul_flops_per_s")):
        if top in found:
            roof = [min(x * found["copy_bytes_per_s"], found[top]) * 1e-12 for x in at]
            axes.plot(at, roof, "k-" if top[0] == "m" else "k:", label=f"roof: copy and {label}")
    for name in dict.fromkeys(row["contender"] for row in rows):
        mine = [row for row in rows if row["contender"] == name]
        x, y = [r["flops"] / r["bytes"] for r in mine], [r["tflops_per_s"] for r in mine]
        axes.plot(x, y, "o", alpha=0.6, label=name)
    best: dict[str, Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda r: r["tflops_per_s"]):
        best[f"{row['op']} {row['variant']} {row['pass']}".replace("  ", " ")] = row
    for number, row in enumerate(best.values(), 1):  # names themselves would cover each other
        axes.annotate(str(number), (row["flops"] / row["bytes"], row["tflops_per_s"]), fontsize=7)
    names = "\n".join(f"{number} {words}" for number, words in enumerate(best, 1))
    size = min(7.0, 320 / max(len(best), 1))  # points: all of them beside the axes
    axes.text(1.01, 1, names, transform=axes.transAxes, fontsize=size, va="top")
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s")
    axes.set_title(f"{result['device']}, {result['date']}")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
