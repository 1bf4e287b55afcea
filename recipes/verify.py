"""Prove on this machine that a mesh trains a model as one process does.

    warploom verify --mesh tp2,pp2,cp2,ep2                a built-in decoder, dense and experts
    warploom verify pretrain/llama3-8b --mesh tp2,cp2     the model of a run, made small
    warploom verify FOLDER --mesh tp2,ep4,dp2             that of a Hugging Face folder
    warploom verify --mesh pp2,dp2 --schedule zbv --zero 3 --recompute selective

Starts one CPU process a rank and takes three optimizer steps in float64 twice: on the mesh, and in
one process with the same global batch, in which ranks have unequal numbers of trained tokens and
some none. Losses, every gradient, the gradient's norm, the clip coefficient and the parameters
afterwards must agree to 1e-10. What fails is tried on smaller meshes, until the axis and the
reduction can be named.

Weights are drawn, never read. The model keeps what its layers can trip over, and loses its size.
Exit code 0: proven; 1: not, with the reason; 2: a mistake on the command line.
"""

import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from warploom.models import hf
from warploom.models.architecture import Architecture
from warploom.parallel.memory import Recompute
from warploom.parallel.mesh import Degrees
from warploom.parallel.parity import failures
from warploom.recipes.errors import UserError, unboxed
from warploom.recipes.plan.fits import check
from warploom.recipes.plan.ledger import AXES
from warploom.recipes.pretrain import RUNS
from warploom.recipes.runner.parallel import Parallel, check_mesh, table
from warploom.recipes.runner.run import Muon, Run
from warploom.recipes.verification.case import TOLERANCE, Outcome, prove
from warploom.recipes.verification.diagnosis import Diagnosis, diagnose
from warploom.recipes.verification.plan import Case
from warploom.recipes.verification.pool import Pool, RankError
from warploom.recipes.verification.shrink import built_in, shrink

MOST = 64  # processes on one machine
TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Verify:
    """Prove that a mesh trains a model as one process does."""

    subject: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|FOLDER")] = ""
    """A run such as pretrain/llama3-8b, or a folder with a Hugging Face config.json; without
    either, a small decoder of dense and expert layers."""
    mesh: str = ""
    """Degrees such as tp2,pp2,cp2,ep2: one process for each of tp x cp x pp x dp x rep. An absent
    axis is 1. By default the mesh of the run."""
    parallel: Annotated[Parallel, tyro.conf.arg(name="")] = Parallel()
    """How the axes of the mesh do their work; by default as the run says, as far as the mesh has
    these axes."""
    recompute: str = "none"
    """none, selective, full, or operators such as norm,feed_forward."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """What takes the three steps."""
    micro_batches: int | None = None
    """Micro-batches of each rank and step; by default twice the pp ranks, at least 2."""
    packed: bool = True
    """Whether a row holds several documents."""
    seed: int = 0
    """Of weights and batches."""
    json: Path | None = None
    """Also write all that was found to this file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Words after `warploom verify`; those of the process when None.

    Returns:
        Exit code: 0 where the proof holds, 1 where it does not.

    Raises:
        UserError: If what is asked cannot be: before any process starts.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    asked = _asked(words)
    case = plan(asked)
    if asked.json is not None and not asked.json.parent.is_dir():
        raise UserError(f"json must be a file in a folder that exists; got {asked.json}")
    console = Console()
    console.print(_introduction(asked, case), highlight=False)
    start = time.perf_counter()
    try:
        outcome, diagnosis = _prove(case, console)
    except RankError as error:
        console.print(f"[red]not proven[/red]: {error}", highlight=False)
        return 1
    for shown in tables(outcome):
        console.print(shown)
    taken = time.perf_counter() - start
    wrong, strange = failures(outcome.differences, tolerance=TOLERANCE), surprises(outcome)
    if asked.json is not None:
        asked.json.write_text(_json(case, outcome, diagnosis, taken), encoding="utf-8")
    if not wrong and not strange:
        console.print(f"[green]proven[/green] in {taken:.0f} s: all within {TOLERANCE:g}")
        return 0
    if wrong:
        console.print(f"[red]not proven[/red]: {len(wrong)} errors are above {TOLERANCE:g}")
        console.print(str(diagnosis), highlight=False)
    for sentence in strange:
        console.print(f"[red]not as predicted[/red]: {sentence}", highlight=False)
    return 1


def _asked(words: list[str]) -> Verify:
    """Read the words; a run that they name gives the defaults."""
    options: dict[str, Any] = {"prog": "warploom verify", "description": __doc__, "args": words}
    with unboxed():
        asked: Verify = tyro.cli(Verify, **options)
        run, _ = _read(asked.subject)
        if run is not None and (mesh := asked.mesh or run.mesh):
            asked = tyro.cli(Verify, default=_defaults(run, _degrees(mesh)), **options)
    return asked


def _defaults(run: Run, degrees: Degrees) -> Verify:
    """Return what a run says, without what does nothing on such a mesh."""
    parallel = replace(run.parallel, stage_layers=())  # of the model before it is made small
    if degrees.pp == 1:
        parallel = replace(parallel, schedule="1f1b")
    if degrees.cp == 1:
        parallel = replace(parallel, balance="zigzag")
    if degrees.cp == degrees.uly:
        parallel = replace(parallel, context="ring")
    if not _shares(run.architecture, degrees):
        parallel = replace(parallel, zero=1)
    return Verify(
        mesh=run.mesh,
        parallel=parallel,
        recompute=run.recompute,
        optimizer="muon" if isinstance(run.optimizer, Muon) else "adamw",
    )


def plan(asked: Verify) -> Case:
    """Turn what is asked into a case that can run.

    Raises:
        UserError: If it cannot.
    """
    run, architecture = _read(asked.subject)
    if not asked.mesh:
        raise UserError(f"verify needs a mesh, such as --mesh tp2,pp2,cp2,ep2; got {asked.mesh!r}")
    try:
        return _case(asked, architecture, z_loss=1e-2 if run is None else run.z_loss)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def _read(subject: str) -> tuple[Run | None, Architecture | None]:
    """Return the run or the architecture that the user names."""
    if not subject:
        return None, None
    recipe, _, name = subject.partition("/")
    if recipe == "pretrain" and name in RUNS:
        run = RUNS[name]()
        return run, run.architecture
    if Path(subject).is_dir():
        try:
            return None, hf.architecture(subject)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(str(error)) from None
    raise UserError(
        f"verify takes a run (pretrain/{', pretrain/'.join(RUNS)}) or a folder with a config.json; "
        f"{subject} is neither"
    )


def _degrees(mesh: str) -> Degrees:
    """Return the degrees of a mesh that this machine can start.

    Raises:
        UserError: If it cannot.
    """
    try:
        parsed = Degrees.parse(mesh)
        d = replace(parsed, dp=parsed.dp or 1)
        if d.world <= MOST:
            return d.resolve(d.world)
    except ValueError as error:
        raise UserError(str(error)) from None
    raise UserError(
        f"verify starts one process a rank, at most {MOST}; {mesh} has {d.world}: what a layer "
        f"does on an axis shows with degree 2 or 4"
    )


def _case(asked: Verify, architecture: Architecture | None, *, z_loss: float) -> Case:
    """Make the case that is asked for.

    Raises:
        ValueError: In one sentence, if it cannot run or asks for what would do nothing.
    """
    d, parallel = _degrees(asked.mesh), asked.parallel
    if asked.micro_batches is not None and asked.micro_batches < 1:
        raise ValueError(f"micro_batches must be at least 1; got {asked.micro_batches}")
    microbatches = asked.micro_batches or max(2, 2 * d.pp)
    Recompute.parse(asked.recompute)
    if (schedule := table(parallel, d, microbatches)) is not None:
        schedule.validate()
    stages = 1 if schedule is None else len(schedule.placement)
    made = built_in(d, stages) if architecture is None else shrink(architecture, d, stages)
    if parallel.stage_layers:
        made = replace(made, layers=sum(parallel.stage_layers))
    check_mesh(made, asked.mesh, parallel)
    if parallel.zero != 1 and not _shares(made, d):
        raise ValueError(
            f"zero ({parallel.zero}) needs ranks that hold the same parameters: put dp2 or cp2 "
            f"into the mesh ({asked.mesh!r}), or leave it out"
        )
    case = Case(
        architecture=made,
        mesh=asked.mesh,
        parallel=parallel,
        microbatches=microbatches,
        recompute=asked.recompute,
        optimizer=asked.optimizer,
        packed=asked.packed,
        z_loss=z_loss,
        seed=asked.seed,
    )
    dealt = len(case.stages.placement)
    check(made, d, stages=1 if parallel.stage_layers else dealt)
    return case


def _shares(architecture: Architecture, degrees: Degrees) -> bool:
    """Whether ranks of such a mesh hold the same parameters, which ZeRO can share out."""
    tokens = degrees.cp * (degrees.dp or 1)
    experts = architecture.experts is not None and degrees.tp * tokens > degrees.ep * degrees.etp
    return tokens > 1 or experts


def _introduction(asked: Verify, case: Case) -> str:
    a, d, how = case.architecture, case.degrees, case.parallel
    experts = ""
    if a.experts is not None:
        experts = f", {a.experts.count} experts of which {a.experts.top_k} a token"
    subject = asked.subject or "a built-in decoder"
    return (
        f"{subject}, made small: {a.layers} layers, width {a.width}, {a.heads} heads over "
        f"{a.kv_heads} key/value heads, hidden {a.hidden}, vocabulary {a.vocabulary}{experts}"
        f"{', tied' if a.tied else ''}\n"
        f"{case.mesh}: {d.world} processes, {case.microbatches} micro-batches of "
        f"{case.rows} x {case.sequence} tokens, {case.optimizer}, ZeRO-{how.zero}, "
        f"recompute {case.recompute}"
        + (f", {how.schedule}" if d.pp > 1 else "")
        + (f", {how.context}, {how.balance}" if d.cp > 1 else "")
    )


def _prove(case: Case, console: Console) -> tuple[Outcome, Diagnosis | None]:
    """Run the case, and smaller ones if it fails."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        Pool(case.degrees.world) as pool,
    ):
        task = bar.add_task("", total=None)

        def run(one: Case) -> Outcome:
            bar.update(task, description=f"{one.degrees.world} ranks, {one.mesh or 'dp1'}")
            found: Outcome = pool(one.degrees.world, prove, one, one == case, timeout_s=TIMEOUT_S)
            return found

        outcome = run(case)
        if not failures(outcome.differences, tolerance=TOLERANCE):
            return outcome, None
        return outcome, diagnose(case, outcome, run)


def module_of(name: str) -> str:
    """Return the module of a parameter, without the numbers of blocks and experts."""
    return re.sub(r"\.\d+\.", ".", name).removeprefix("blocks.").removesuffix(".weight")


def tables(outcome: Outcome) -> list[Table]:
    """Lay out what was found."""
    style: dict[str, Any] = {"title_justify": "left"}
    parity = Table("quantity", "largest error", "", title="parity with one process", **style)
    for what, error in summary(outcome.differences).items():
        parity.add_row(what, f"{error:.1e}", _verdict(error <= TOLERANCE))
    sent = Table("on axis", "collective", "calls", "formula", "bytes", "formula", "", **style)
    sent.title = "what all ranks send"
    sent.caption = f"a group that is of several axes has the first name of {', '.join(AXES)}"
    for line in outcome.traffic:
        numbers = (line.calls, line.calls_wanted, line.bytes, line.bytes_wanted)
        what = f"{line.op} {line.phase}".strip()
        shown = ("-" if math.isnan(n) else f"{n:,.0f}" for n in numbers)
        name = f"{line.axis}, {line.where}"
        sent.add_row(name, what, *shown, _verdict(line.agrees))
    memory = Table("saved for the backward", "predicted", "", title="a rank, bytes", **style)
    memory.add_row(*(f"{n:,.0f}" for n in outcome.peak), _verdict(not _off(outcome.peak)))
    return [parity, sent, memory] if outcome.traffic else [parity]


def _verdict(good: bool) -> str:
    return "[green]ok[/green]" if good else "[red]differs[/red]"


def _off(peak: tuple[float, float]) -> bool:
    """Whether what was saved differs from its prediction, if there is one."""
    found, wanted = peak
    return not math.isnan(wanted) and found != wanted


def surprises(outcome: Outcome) -> list[str]:
    """Say what was sent or saved otherwise than predicted, a sentence each."""
    found = [
        f"on axis {t.axis} a {t.where} makes {t.calls:.0f} {t.op} calls {t.phase} of "
        f"{t.bytes:,.0f} bytes, the formula says {t.calls_wanted:.0f} of {t.bytes_wanted:,.0f}"
        for t in outcome.traffic
        if not t.agrees
    ]
    if _off(outcome.peak):
        found.append(
            f"a micro-batch saves {outcome.peak[0]:,.0f} bytes, not {outcome.peak[1]:,.0f}"
        )
    return found


def summary(differences: dict[str, float]) -> dict[str, float]:
    """Return the largest error by quantity: gradients by module, the rest over all steps."""
    found: dict[str, float] = {}
    for name, error in differences.items():
        kind, _, rest = name.partition(" ")
        if kind == "gradient" and not rest.startswith("norm,"):
            what = f"gradient of {module_of(rest)}"
        elif kind == "parameter":
            what = "parameters after 3 steps"
        else:
            what = name.split(",")[0]
        worst = found.get(what, 0.0)
        found[what] = error if not error <= worst else worst
    return found


def _json(case: Case, outcome: Outcome, diagnosis: Diagnosis | None, taken: float) -> str:
    wrong, strange = failures(outcome.differences, tolerance=TOLERANCE), surprises(outcome)
    found: dict[str, Any] = {
        "proven": not wrong and not strange,
        "tolerance": TOLERANCE,
        "case": asdict(case),
        "seconds": taken,
        "differences": outcome.differences,
        "failures": wrong,
        "not as predicted": strange,
        "diagnosis": None if diagnosis is None else asdict(diagnosis),
        "traffic": [_finite(asdict(line)) for line in outcome.traffic],
        "saved_bytes": _finite(dict(zip(("found", "predicted"), outcome.peak, strict=True))),
    }
    return json.dumps(found, indent=2) + "\n"


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Write what has no formula as null."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


if __name__ == "__main__":
    sys.exit(main())
