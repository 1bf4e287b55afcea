"""What a run is made of. Frozen: a changed run is another one, made by `dataclasses.replace`.

`Run` refuses what it can judge alone; `check` refuses, before anything is allocated, what needs the
number of ranks or the machine. Each refusal is one sentence: what must hold, what was found, what
to do.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from warploom.models import hf
from warploom.models.architecture import Architecture
from warploom.models.families import of_architecture
from warploom.parallel.context import Split
from warploom.parallel.memory import Recompute
from warploom.parallel.mesh import NAMED, Degrees

from ..errors import UserError
from ..plan.memory import memory
from .fp8 import Fp8, check_device, check_sizes, recipe
from .learning_rate import WSD, Schedule
from .parallel import Parallel, check_mesh, schedule, stages
from .watch import Watch

_GIB = 2**30
_MOST = 2**40  # of anything that is counted: far above any run, far below what overflows
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}

_COUNTS = (
    "batch_tokens",
    "micro_batch",
    "sequence",
    "steps",
    "checkpoint_every",
    "keep",
    "evaluate_every",
    "evaluate_tokens",
    "log_every",
    "sample_tokens",
)

# What a run may change when it goes on: nothing of the trace (of the mesh and of the way a batch is
# cut into micro-batches only its rounding).
FREE = ("folder", "log_every", "checkpoint_every", "keep", "prompts", "sample_tokens", "watch")
LAYOUT = ("mesh", "micro_batch", "recompute", "parallel")


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The text, how it is split, and how it becomes tokens."""

    paths: tuple[str, ...] = ("stdlib",)
    """`stdlib` (the sources of Python's standard library), or folders and files: each .jsonl(.gz)
    holds one JSON object a line, every other file is one document."""
    suffixes: tuple[str, ...] = ()
    """Endings of the files that are read in a folder; none means every file."""
    text_field: str = "text"
    """The field of a JSON object that holds the text."""
    held_out: float = 0.05
    """Share of the documents that are never trained on, chosen by hash."""
    tokenizer: str | None = None
    """A folder with a tokenizer.json; without one, a byte-level BPE as large as the architecture's
    vocabulary is trained on the training documents."""
    digits: Literal["three", "one", "triples-from-the-right"] = "three"
    """How the BPE cuts numbers: up to three digits from the left, one by one, or 1|234|567."""
    store: str | None = None
    """Folder of the token store, which runs may share; by default tokens/ in the run folder."""

    def __post_init__(self) -> None:
        if not self.paths or ("stdlib" in self.paths and len(self.paths) > 1):
            raise UserError(
                f"corpus.paths must be `stdlib` alone, or folders and files; got "
                f"{' '.join(self.paths) or 'none'}"
            )
        if not 0 < self.held_out < 1:
            raise UserError(
                f"corpus.held_out must be a share between 0 and 1 of the documents, got "
                f"{self.held_out}: 0.05 holds one in twenty"
            )


def _check_adamw(betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optimizer.betas must be from 0 to below 1, got {betas}")
    if not 0 < eps < float("inf"):
        raise UserError(f"optimizer.eps must be above 0 and finite, got {eps}")
    if not 0 <= weight_decay < float("inf"):
        raise UserError(f"optimizer.weight_decay must be at least 0 and finite, got {weight_decay}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW:
    """AdamW with decoupled weight decay; norms do not decay."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Each step takes learning rate x this of the weight."""

    def __post_init__(self) -> None:
        _check_adamw(self.betas, self.eps, self.weight_decay)


@dataclass(frozen=True, kw_only=True, slots=True)
class Muon:
    """Muon for the matrices of the blocks; AdamW for embedding, head and norms."""

    momentum: float = 0.95
    """Of Muon's one moment."""
    rest_rate: float = 1.0
    """AdamW's learning rate as a factor on Muon's."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Each step takes learning rate x this of the weight, for both."""

    def __post_init__(self) -> None:
        _check_adamw(self.betas, self.eps, self.weight_decay)
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.momentum must be from 0 to below 1, got {self.momentum}")
        if not 0 < self.rest_rate < float("inf"):
            raise UserError(f"optimizer.rest_rate must be above 0 and finite, got {self.rest_rate}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training run, from text to weights and a report."""

    architecture: Architecture
    """Sizes of the model."""
    weights: str = ""
    """A Hugging Face folder whose weights the run begins with; on the command line the architecture
    is then the folder's, and so is the tokenizer, if none is named. Empty draws them."""
    corpus: Corpus = Corpus()
    """The text."""
    mesh: str = ""
    """Degrees of parallelism such as `tp2,cp2,pp2,dp4,rep2,ep4,etp2`; an absent dp is what is left
    of the ranks; ep and etp fold into tp x cp x dp."""
    parallel: Parallel = Parallel()
    """How the axes of the mesh do their work."""
    watch: Watch = Watch()
    """What watches over the ranks."""
    optimizer: AdamW | Muon = AdamW()
    """The optimizer."""
    learning_rate: float = 3e-4
    """Peak of the learning rate."""
    schedule: Schedule = WSD()
    """The learning rate over the steps."""
    clip: float | None = 1.0
    """Largest norm of the global gradient; None leaves it as it is."""
    batch_tokens: int = 524_288
    """Tokens of one optimizer step, over all ranks and micro-batches."""
    micro_batch: int = 1
    """Sequences that a rank runs at a time; more are accumulated."""
    sequence: int = 2048
    """Tokens of a sequence."""
    steps: int = 1000
    """Optimizer steps."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: weights and activations in bf16, master weights and gradient sums in float32."""
    fp8: Fp8 | None = None
    """Multiply the projections of attention and of dense feed-forwards in FP8, with scales of the
    tensor (its own, or delayed: of the last 16 steps), of a row, of a block of 128 elements or of
    32 (mx). Embedding, head, norms, routers, experts and masters stay as `precision` says; a CPU
    emulates it, slowly."""
    recompute: str = "none"
    """What runs again in the backward pass: `none`, `full` (whole blocks), `selective` (norms with
    the gather behind them), or a list of norm, attention, feed_forward, moe."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition; 0 leaves the term out."""
    deterministic: bool = True
    """Choose algorithms that give the same bits each time, so that a run that was killed writes the
    trace of one that was not. Costs nothing that was measured on the CPU; unmeasured on GPUs."""
    seed: int = 0
    """Of the weights, of the order of the documents and of the samples."""
    folder: str = "runs/unnamed"
    """Where everything is kept; the same command goes on from what it finds there."""
    checkpoint_every: int = 100
    """Steps from one checkpoint to the next; there is one at the end too."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    evaluate_every: int = 100
    """Steps from one evaluation on held-out text to the next; there is one at the end too."""
    evaluate_tokens: int = 1_000_000
    """At most this many held-out tokens are evaluated, the same ones each time."""
    log_every: int = 10
    """Steps from one printed line to the next, where the output is no terminal."""
    prompts: tuple[str, ...] = ("def ", "import ", "class ")
    """Beginnings that the trained model continues in the report."""
    sample_tokens: int = 64
    """Tokens of each sample in the report."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        check_mesh(self.architecture, self.mesh, self.parallel)
        check_sizes(self.fp8, self.architecture, Degrees.parse(self.mesh))
        try:
            Recompute.parse(self.recompute)
            # the weights are exported at the end, without muP
            of_architecture(dataclasses.replace(self.architecture, mup_base=None))
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.weights:
            _check_weights(self.weights, self.architecture)
        a = self.architecture
        if self.sequence > a.max_positions:
            raise UserError(
                f"sequence ({self.sequence}) must be at most architecture.max_positions "
                f"({a.max_positions}): shorten the sequence, or give the model more positions"
            )
        if self.sample_tokens > a.max_positions:
            raise UserError(
                f"sample_tokens ({self.sample_tokens}) must be at most architecture.max_positions "
                f"({a.max_positions}): ask for shorter samples"
            )
        for prompt in self.prompts:
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise UserError(f"prompts must be text that UTF-8 can encode, got {prompt!a}")
        if self.batch_tokens % self.sequence:
            raise UserError(
                f"batch_tokens ({self.batch_tokens}) must be a multiple of sequence "
                f"({self.sequence}): {nearest(self.batch_tokens, self.sequence)} fits"
            )
        if self.schedule.warmup >= self.steps:
            raise UserError(
                f"schedule.warmup ({self.schedule.warmup}) must be less than steps ({self.steps}): "
                f"--schedule.warmup {self.steps // 10} is a tenth of them"
            )


def nearest(value: int, unit: int) -> str:
    """Name the multiples of `unit` on both sides of `value`, for a sentence."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def begin_from(run: Run, folder: str) -> Run:
    """Return the run of the model in a Hugging Face folder, with its tokenizer if none is named.

    Raises:
        UserError: If the folder holds no model that can be trained, or the run does not fit it.
    """
    has_tokenizer = (Path(folder) / "tokenizer.json").exists()
    tokenizer = run.corpus.tokenizer or (folder if has_tokenizer else None)
    return dataclasses.replace(
        run,
        weights=folder,
        architecture=_architecture(folder),
        corpus=dataclasses.replace(run.corpus, tokenizer=tokenizer),
    )


def _architecture(folder: str) -> Architecture:
    try:
        return hf.architecture(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"weights: {error}") from None


def _check_weights(folder: str, architecture: Architecture) -> None:
    found = _architecture(folder)
    free = ("mup_base", "max_positions", "predict_weight")
    for field in dataclasses.fields(found):
        held, wanted = getattr(found, field.name), getattr(architecture, field.name)
        if held != wanted and field.name not in free:
            raise UserError(
                f"architecture.{field.name} ({wanted}) must be that of the weights in {folder} "
                f"({held}): leave it out, or draw other weights"
            )


def _check_numbers(run: Run) -> None:
    for name in _COUNTS:
        if (value := getattr(run, name)) < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
        if value > _MOST:
            raise UserError(f"{name} must be at most {_MOST:,}, got {value:,}")
    for name in ("learning_rate", "clip"):
        value = getattr(run, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} must be above 0 and finite, got {value}")
    if not 0 <= run.z_loss < float("inf"):
        raise UserError(f"z_loss must be at least 0 and finite, got {run.z_loss}")
    if not 0 <= run.seed < 2**63:
        raise UserError(f"seed must be from 0 to 2^63 - 1, got {run.seed}")
    if not run.folder:
        raise UserError(f"folder must name where the run is kept, got {run.folder!r}")


def check(run: Run, world: int, device: torch.device, *, local_ranks: int = 1) -> Degrees:
    """Refuse what does not fit the ranks or the machine, before anything is allocated.

    Args:
        run: The run.
        world: Ranks in all.
        device: This rank's.
        local_ranks: Ranks that share this machine.

    Returns:
        The mesh's degrees, with dp filled in.

    Raises:
        UserError: If the mesh does not multiply to `world`, the batch does not divide over data
            ranks and micro-batches, the pipeline schedule cannot run, the device has no FP8 that
            the run asks for, or the memory is less than the run needs.
    """
    check_device(run.fp8, device)
    try:
        degrees = Degrees.parse(run.mesh).resolve(world)
    except ValueError as error:
        raise UserError(str(error)) from None
    ranks = (degrees.dp or 1) * degrees.rep
    unit = run.sequence * run.micro_batch * ranks
    if run.batch_tokens % unit:
        raise UserError(
            f"batch_tokens ({run.batch_tokens}) must be a multiple of sequence x micro_batch x "
            f"data ranks ({run.sequence} x {run.micro_batch} x {ranks} = {unit}): "
            f"{nearest(run.batch_tokens, unit)} fits"
        )
    microbatches = run.batch_tokens // unit
    stages(run.parallel, run.architecture.layers, schedule(run.parallel, degrees, microbatches))
    _check_memory(run, degrees, device, local_ranks)
    return degrees


def needed_bytes(run: Run, degrees: Degrees, *, host: bool = False) -> int:
    """Return the bytes that training takes on one rank, without what is alive for a moment.

    Of the pipeline rank that needs most, with as many micro-batches as its schedule has in flight.

    Args:
        run: The run.
        degrees: Of its mesh, resolved.
        host: Whether what offload keeps in host memory counts too: on a machine without GPUs.
    """
    d, options = degrees, run.parallel
    lengths = [run.sequence] * run.micro_batch
    split = Split.build(lengths, d.cp, multiple=d.tp, balance=options.balance, ulysses=d.uly)
    microbatches = run.batch_tokens // (run.sequence * run.micro_batch * (d.dp or 1) * d.rep)
    table = schedule(options, d, microbatches)
    found = memory(
        run.architecture,
        split.tokens,
        dtype=DTYPES[run.precision],
        degrees=d,
        zero=options.zero,
        optimizer="muon" if isinstance(run.optimizer, Muon) else "adamw",
        offload=options.offload,
        recompute=run.recompute,
        fp8=recipe(run.fp8),
        z_loss=run.z_loss > 0,
        context=options.context,
        lengths=lengths,
        stages=stages(options, run.architecture.layers, table),
        schedule=table,
    )
    return found.total + (found.host if host else 0)


def _check_memory(run: Run, degrees: Degrees, device: torch.device, local_ranks: int) -> None:
    host = device.type != "cuda"
    if host:
        there, what = _machine_bytes() // local_ranks, "a rank"
    else:
        there, what = torch.cuda.get_device_properties(device).total_memory, "a GPU"
    needed = needed_bytes(run, degrees, host=host)
    if needed <= there:
        return
    sizes = {words: needed_bytes(*other, host=host) for words, other in _smaller(run, degrees)}
    shown = [f"{words} ({n / _GIB:.1f} GiB)" for words, n in sorted(sizes.items(), key=_by_size)]
    fit = shown[: sum(size <= there for size in sizes.values())][-3:]
    advice = "use more ranks"
    if fit:
        advice = f"nearest that fit are {', '.join(fit[::-1])}"
    elif shown:
        advice = f"the least, {shown[0]}, does not fit either: use more ranks"
    raise UserError(
        f"run needs {needed / _GIB:.1f} GiB {what}, there are {there / _GIB:.1f}: {advice}"
    )


def _by_size(named: tuple[str, int]) -> int:
    return named[1]


def _smaller(run: Run, degrees: Degrees) -> Iterator[tuple[str, tuple[Run, Degrees]]]:
    """Yield what saves memory, each by itself and then all at once: words, run and degrees."""
    changes: dict[str, Run] = {}
    if run.recompute != "full":
        changes["--recompute full"] = dataclasses.replace(run, recompute="full")
    if run.micro_batch > 1:
        changes["--micro-batch 1"] = dataclasses.replace(run, micro_batch=1)
    sharded = run.parallel
    if sharded.zero < 3 and (degrees.dp or 1) * degrees.cp > 1:
        sharded = dataclasses.replace(sharded, zero=3)
        changes["--parallel.zero 3"] = dataclasses.replace(run, parallel=sharded)
    yield from ((words, (other, degrees)) for words, other in changes.items())
    yield from _more_tp(run, degrees)
    least = dataclasses.replace(run, recompute="full", micro_batch=1, parallel=sharded)
    if changes:
        yield " ".join(changes), (least, degrees)


def _more_tp(run: Run, degrees: Degrees) -> Iterator[tuple[str, tuple[Run, Degrees]]]:
    """Yield the meshes of as many ranks that have more tp and less dp."""
    tp, dp = 2 * degrees.tp, (degrees.dp or 1) // 2
    while dp * tp == (degrees.dp or 1) * degrees.tp:
        other = dataclasses.replace(degrees, tp=tp, dp=dp)
        named = {axis: getattr(other, axis) for axis in NAMED}
        mesh = ",".join(f"{axis}{n}" for axis, n in named.items() if n > 1)
        try:
            check_mesh(run.architecture, mesh, run.parallel)
        except UserError:
            return
        yield f"--mesh {mesh}", (run, other)
        tp, dp = 2 * tp, dp // 2


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe(run: Run) -> dict[str, Any]:
    """Return the run as JSON values; a choice between classes has its name as `kind`."""

    def value(x: Any) -> Any:
        if dataclasses.is_dataclass(x):
            fields = {f.name: value(getattr(x, f.name)) for f in dataclasses.fields(x)}
            kinds = (AdamW, Muon, *Schedule.__args__)
            return {"kind": type(x).__name__, **fields} if isinstance(x, kinds) else fields
        return list(x) if isinstance(x, tuple) else x

    described: dict[str, Any] = value(run)
    return described


def flatten(described: dict[str, Any]) -> dict[str, Any]:
    """Flatten a described run into dotted names, as they are on the command line."""
    flat: dict[str, Any] = {}
    for name, value in described.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": v for inner, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def fingerprint(described: dict[str, Any]) -> str:
    """Hash what decides the loss trace: 16 hexadecimal digits, the same for the same trace."""
    kept = {k: v for k, v in described.items() if k not in FREE + LAYOUT}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
