"""`warploom bench kernels`: every operator beside its peers, at the sizes of real models.

    warploom bench kernels --op rms_norm,swiglu --shapes llama3-8b --json kernels.json
    warploom bench kernels --suite attention,fp8    what the matrix units carry, in its own sizes
    warploom bench kernels --quick                  the least that shows something

On a CUDA device, where there is one, our device kernels against eager PyTorch, torch.compile and
the libraries that are installed; on the CPU the reference. Measured: results/cpu.md.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from warploom.kernels import backends, peers
from warploom.recipes.errors import UserError

from . import measure, report, search
from .cases import MODELS, Case, Scale
from .operators import OPERATORS
from .products import SUITES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TOKENS = {"cuda": 8192, "cpu": 2048}


def _chosen(
    what: str, asked: str | None, known: Sequence[str], default: Sequence[str]
) -> list[str]:
    """Split a list of names, each of which must be known."""
    names = [name.strip() for name in asked.split(",")] if asked else list(default)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"--{what} must be among {', '.join(known)}, got {name!r}{hint}")
    return list(dict.fromkeys(names))


def _device(asked: str | None) -> torch.device:
    there = torch.cuda.is_available()
    name = asked or ("cuda" if there else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not there:
        msg = "--device cuda needs a CUDA device, and torch sees none here: leave it out for cpu"
        raise UserError(msg)
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def _peers(asked: str | None, device: torch.device) -> list[str]:
    """Return the peers: those asked for, each of which must run here, else all that do."""
    known = [*measure.PEERS, *peers.PEERS, *measure.PACKAGES]
    if not asked:
        return [name for name in known if not measure.lacking(name, device)]
    named = _chosen("peers", asked, known, ())
    for name in named:
        if lack := measure.lacking(name, device):
            raise UserError(f"--peers {name} {lack}; or leave it out")
    return named


def plan_of(asked: argparse.Namespace) -> measure.Plan:
    """Check what was asked for, and say how it is measured.

    Args:
        asked: The parsed words.

    Raises:
        UserError: If a name is unknown, or what it names is not here.
    """
    device = _device(asked.device)
    cuda = device.type == "cuda"
    usual = ("triton", "cuda", "torch", "cudnn") if cuda else ("reference", "torch")
    ours = _chosen("backends", asked.backends, measure.OURS, usual)
    if not cuda and not backends.interpreted() and not {*ours} <= {"reference", "torch"}:
        raise UserError(f"--backends {asked.backends} needs a CUDA device: here is reference")
    if asked.tune and (not cuda or "triton" not in ours):
        here = f"here is {device.type}" if not cuda else f"--backends is {','.join(ours)}"
        msg = f"--tune needs a CUDA device and backend triton, whose launches it searches: {here}"
        raise UserError(msg)
    if asked.rounds is not None and asked.rounds < 3:
        raise UserError(f"--rounds must be at least 3 for a spread, got {asked.rounds}")
    if asked.tokens is not None and asked.tokens < 1:
        raise UserError(f"--tokens must be at least 1, got {asked.tokens}")
    dtype = _chosen("dtype", asked.dtype, list(DTYPES), ("bf16",) if cuda else ("fp32",))
    if len(dtype) > 1:
        raise UserError(f"--dtype takes one of {', '.join(DTYPES)}, got {asked.dtype!r}")
    return measure.Plan(
        device=device,
        dtype=DTYPES[dtype[0]],
        ours=ours,
        peers=_peers(asked.peers, device),
        rounds=asked.rounds or (3 if asked.quick or asked.suite else 5),
        repeats=3 if asked.quick else 5 if asked.suite else 20,
        clock=time.thread_time if torch.get_num_threads() == 1 else time.perf_counter,
    )


def cases_of(asked: argparse.Namespace, plan: measure.Plan) -> list[Case]:
    """Return the cases asked for, the same size of two models once.

    Args:
        asked: The parsed words.
        plan: How they are measured.

    Raises:
        UserError: If a name is unknown or of a suite, no operator asked for runs in a model asked
            for, a peer or backend asked for has none of them, or sizes are given beside a suite.
    """
    cases = _of_suites(asked, plan) if asked.suite else _of_models(asked, plan)
    ops = ", ".join(dict.fromkeys(case.op for case in cases))
    for flag, names in (("peers", plan.peers), ("backends", plan.ours)):
        for name in names if getattr(asked, flag) else ():
            if not any(name in measure.contenders(case, plan) for case in cases):
                raise UserError(f"--{flag} {name} has none of the operators asked for: {ops}")
    return cases


def _of_models(asked: argparse.Namespace, plan: measure.Plan) -> list[Case]:
    """Return the cases of the operators asked for at the sizes of models."""
    usual = ("llama3-8b", "deepseek-v3", "qwen3-30b-a3b")
    cuda = plan.device.type == "cuda"
    for name in (asked.op or "").split(","):
        if home := _suite_of(name.strip()):
            raise UserError(f"--op {name.strip()} is timed in a suite: add --suite {home}")
    models = _chosen("shapes", asked.shapes, list(MODELS), usual if cuda else ("smollm2-135m",))
    ops = _chosen("op", asked.op, list(OPERATORS), list(OPERATORS))
    tokens = asked.tokens or (256 if asked.quick else _TOKENS[plan.device.type])
    found: dict[tuple[str, str], Case] = {}
    for op in ops:
        for model in models:
            for case in OPERATORS[op](MODELS[model], tokens, plan.dtype.itemsize):
                found.setdefault((case.name, case.size), case)
    if not found:
        raise UserError(f"{', '.join(ops)} needs a model with experts, got {', '.join(models)}")
    return list(found.values())


def _suite_of(op: str) -> str | None:
    """Name the suite of an operator that is timed nowhere else."""
    found = (
        name for name, build in SUITES.items() if any(case.op == op for case in build("tiny", 4))
    )
    return None if op in OPERATORS else next(found, None)


def _of_suites(asked: argparse.Namespace, plan: measure.Plan) -> list[Case]:
    """Return the cases of the suites and operators asked for; refuse sizes beside them."""
    for flag in ("shapes", "tokens"):
        if (given := getattr(asked, flag)) is not None:
            raise UserError(
                f"--{flag} does not go with --suite, whose sizes are its own, got {given}: leave "
                f"one of them out"
            )
    names = _chosen("suite", asked.suite, list(SUITES), ())
    scale: Scale = "cuda" if plan.device.type == "cuda" else "tiny" if asked.quick else "cpu"
    cases = [case for name in names for case in SUITES[name](scale, plan.dtype.itemsize)]
    known = list(dict.fromkeys(case.op for case in cases))
    ops = _chosen("op", asked.op, known, known)
    return [case for case in cases if case.op in ops]


def overhead(cases: Sequence[Case], plan: measure.Plan) -> list[dict[str, Any]]:
    """Measure the host's time a call of the operators of some cases, at a tiny size.

    Args:
        cases: Of the operators.
        plan: How; torch.compile, whose calls are not eager, is left out.
    """
    eager = dataclasses.replace(plan, peers=[peer for peer in plan.peers if peer != "compile"])
    tiny = [
        case
        for op in dict.fromkeys(case.op for case in cases)
        if op in OPERATORS
        for case in OPERATORS[op](MODELS["tiny"], 4, plan.dtype.itemsize)
    ]
    return [row for case in tiny for row in measure.overhead(case, eager)]


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Yield a function that shows how far it is: a bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda words: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("kernels", total=total)
        yield lambda words: bar.update(task, advance=1, description=words)


def run(cases: Sequence[Case], plan: measure.Plan, *, overhead_too: bool = True) -> dict[str, Any]:
    """Measure the ceilings, the cases and the host's time.

    Args:
        cases: What.
        plan: How.
        overhead_too: Whether to measure the host's time a call too.

    Returns:
        What `report.document` says.
    """
    rows: list[dict[str, Any]] = []
    host: list[dict[str, Any]] = []
    with _progress(1 + len(cases) + overhead_too) as step:
        step("ceilings")
        found = measure.ceilings(plan)
        for case in cases:
            step(f"{case.name} {case.size}")
            rows += measure.measure(case, plan, found)
        if overhead_too:
            step("the host's time")
            host = overhead(cases, plan)
    return report.document(plan.device, plan.dtype, found, rows, host)


def _keep_memory() -> None:
    """Let glibc keep what is freed, instead of giving it back to the system.

    Else the order in which tensors are freed decides who pays for getting it anew: on 5 MB that was
    half of the time of a call, for one contender and not the other.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: all from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which does not shrink


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the words after `warploom bench kernels`."""
    parser = argparse.ArgumentParser(
        prog="warploom bench kernels",
        description=str(__doc__).split("\n\n")[0],
        epilog="\n".join(["columns:", *report.LEGEND, *report.HOST_LEGEND]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comma = "names with commas between them"
    parser.add_argument("--op", help=f"operators, {comma}; all but the suites' without")
    parser.add_argument("--suite", help=f"of {', '.join(SUITES)}, {comma}: in sizes of their own")
    parser.add_argument("--shapes", help=f"of {', '.join(MODELS)}, {comma}")
    parser.add_argument("--tokens", type=int, help="8192 on a GPU, 2048 on the CPU; not of suites")
    known = ", ".join([*measure.PEERS, *peers.PEERS, *measure.PACKAGES])
    parser.add_argument("--peers", help=f"of {known}, {comma}; all that run here without")
    parser.add_argument("--backends", help=f"ours, of {', '.join(measure.OURS)}, {comma}")
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--dtype", help=", ".join(DTYPES))
    parser.add_argument("--rounds", type=int, help="turns of each contender, 5; at least 3")
    parser.add_argument("--threads", type=int, help="of the CPU; of one, the processor time counts")
    parser.add_argument("--quick", action="store_true", help="few tokens, 3 rounds")
    parser.add_argument(
        "--tune", action="store_true", help="search configurations of the Triton kernels first"
    )
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--plot", type=Path, help="draw the roofline into this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a contender of ours failed or differs from eager PyTorch.

    Args:
        argv: The words after `warploom bench kernels`.

    Raises:
        UserError: If what is asked for is unknown or not here.
    """
    asked = arguments(argv)
    if asked.threads is not None:
        if asked.threads < 1:
            raise UserError(f"--threads must be at least 1, got {asked.threads}")
        torch.set_num_threads(asked.threads)
    plan = plan_of(asked)
    cases = cases_of(asked, plan)
    if asked.plot:
        report.need_matplotlib()
    if plan.device.type == "cpu":
        _keep_memory()
    with search.searching() if asked.tune else contextlib.nullcontext():
        result = run(cases, plan)
    print(report.setting_line(plan.device, plan.dtype))
    print(report.ceilings_line(result["ceilings"]))
    print("\n".join(["columns:", *report.LEGEND]))
    report.tables(result["rows"])
    if result["overhead"]:
        report.overhead_table(result["overhead"])
    if asked.json:
        report.write(asked.json, result)
    if asked.plot:
        report.plot(asked.plot, result)
    return judge(result["rows"])


def judge(rows: Sequence[Mapping[str, Any]]) -> int:
    """Print what of ours failed, or computed something else; return the exit code."""
    wrong = [
        f"{row['op']} {row['variant']} {row['size']}, {row['contender']}: "
        + row.get("failed", f"differs from eager PyTorch by {row.get('difference')}")
        for row in rows
        if row["contender"] in measure.OURS
        and not row.get("refused")
        and ("failed" in row or (row["difference"] is not None and not row["difference"] < 0.05))
    ]
    for line in dict.fromkeys(wrong):
        print(f"wrong: {line}", file=sys.stderr)
    return int(bool(wrong))
