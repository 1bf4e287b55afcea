"""`warploom doctor`: what this machine has, and what each missing piece would enable.

    warploom doctor
    warploom doctor --json

needs nothing but warploom itself; starts no process group and takes no GPU memory
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from warploom.kernels import backends
from warploom.kernels.cpu import lanes, missing
from warploom.recipes import compilers
from warploom.recipes.runner.environment import OPTIONAL, apex_warning, environment


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Print what this machine has, and what each missing piece would enable."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object instead of tables."""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Words after `warploom doctor`; those of the process when None.

    Returns:
        Exit code 0.
    """
    options = tyro.cli(Doctor, prog="warploom doctor", args=argv)
    found = environment() | {"backends": backends.available()}
    warnings = [warning for warning in (apex_warning(), *compilers.warnings()) if warning]
    if options.json:
        print(json.dumps(found | {"warnings": warnings}, indent=2))
        return 0
    console = Console(markup=False, emoji=False)  # warploom[te] is data, and no style
    for table in (_machine(found), _packages(found["packages"]), _kernels(found["backends"])):
        console.print(table)
    for warning in warnings:
        console.print(Text.assemble(("warning", "yellow"), f": {warning}"))
    return 0


def _machine(found: dict[str, Any]) -> Table:
    table = Table("piece", "here", "without it", title="machine", title_justify="left")
    cpu, cuda, ranks = found["cpu"], found["cuda"], found["communication"]
    bf16 = [name for name in cpu["instructions"] if "bf16" in name]
    commit = found["warploom"]["commit"]  # None when installed from a wheel
    table.add_row(
        "warploom", found["warploom"]["version"] + (f" ({commit[:12]})" if commit else "")
    )
    table.add_row("Python", f"{found['python']['version']}, {found['python']['executable']}")
    table.add_row("torch", f"{found['torch']['version']}, {found['torch']['threads']} threads")
    table.add_row("CPU", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads usable")
    table.add_row("memory", f"{cpu['memory_gib']} GiB")
    table.add_row("bf16 on the CPU", *_or(", ".join(bf16), "bf16 is emulated, slower than float32"))
    lost = f"generation in float32 takes the operators that train: {missing()}"
    vectors = None if missing() else f"warploom._cpu, vectors of {lanes()} floats"
    table.add_row("generation on the CPU", *_or(vectors, lost))
    table.add_row(
        "CUDA in torch",
        *_or(
            cuda and f"{cuda['version']}, {'usable' if cuda['available'] else 'no usable device'}",
            "everything runs on the CPU: for GPUs install a CUDA build of torch",
        ),
    )
    table.add_row("cuDNN", *_or(cuda and cuda["cudnn"], "no cuDNN attention as a peer"))
    for tool, lost in (("nvcc", "csrc is not compiled"), ("ptxas", "kernels are not assembled")):
        here = found["tools"][tool]
        table.add_row(tool, *_or(here and f"{here['version']}, {here['path']}", lost))
    table.add_row("NCCL", *_or(ranks["nccl"], "ranks speak over gloo, on CPUs only"))
    table.add_row("gloo", *_or(ranks["gloo"], "no proofs on CPU ranks"))
    for index, gpu in enumerate(found["gpus"]):
        table.add_row(f"GPU {index}", _gpu(gpu))
    if not found["gpus"]:
        table.add_row("GPU", *_or(None, "no speed claims: kernels run as their references"))
    return table


def _gpu(gpu: dict[str, Any]) -> str:
    text = (
        f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB, "
        f"{gpu['multiprocessors']} multiprocessors"
    )
    if "driver" not in gpu:
        return text + "; pip install nvidia-ml-py for its power limit and clocks"
    return (
        f"{text}; driver {gpu['driver']}, power limit {gpu['power_limit_w']} W, "
        f"clock {gpu['clock_mhz']} of {gpu['max_clock_mhz']} MHz, "
        f"memory {gpu['memory_clock_mhz']} MHz, {gpu['temperature_c']} C"
    )


def _none() -> Text:
    return Text("none", style="dim")


def _or(here: object, lost: str) -> tuple[str | Text, str]:
    """Give the cells `here` and `without it` of a row."""
    if isinstance(here, bool):
        here = "yes" if here else None
    return (str(here), "") if here else (_none(), lost)


def _packages(versions: dict[str, str | None]) -> Table:
    table = Table("package", "extra", "here", "enables", title="optional", title_justify="left")
    for optional in OPTIONAL:
        here = versions[optional.package] or _none()
        unused = Text(f"not used yet: {optional.enables}", style="dim")
        enables = optional.enables if optional.used else unused
        table.add_row(optional.package, optional.extra or "-", here, enables)
    return table


def _kernels(available: dict[str, dict[str, str]]) -> Table:
    table = Table("operator", "backend", "state", title="kernels", title_justify="left")
    for op, states in available.items():
        for index, (backend, state) in enumerate(states.items()):
            table.add_row("" if index else op, backend, state)
    return table
