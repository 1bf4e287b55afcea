"""The loop. Read it from top to bottom: `train` builds a job, resumes it, and steps to the end.

    for step in range(start, steps):
        the batch of (seed, step)          corpus, read one step ahead
        one step                           parallel/step: forward, backward, reduce, clip, update
        a line of metrics                  runner/metrics
        evaluate, checkpoint               every so often, and after the last step
    report and export                      runner/finish

Nothing here is random but what (seed, step) decides, so a run that is killed at any moment and
started again by the same command writes the same losses, bit for bit.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from warploom.models.batch import Batch
from warploom.models.cost import flops_per_token, mfu
from warploom.parallel.checkpoint import latest
from warploom.parallel.faults import Stragglers
from warploom.parallel.memory import offloaded
from warploom.parallel.step import NonFiniteError, StepResult

from ..errors import StoppedError, UserError
from . import finish, spike
from .data import open_store
from .evaluate import HeldOut, evaluate
from .folder import FULL, RunFolder
from .job import Job, build, resume
from .metrics import JsonLines, Metrics, Sink, TensorBoard
from .peak import peak_memory_gib
from .progress import Progress
from .run import Run, check
from .watch import tell, watching
from .world import World, from_environment, is_broken, joined, set_deterministic, set_threads


def train(run: Run) -> None:
    """Train a run to its end, or go on where it stopped; every rank calls it.

    Raises:
        UserError: For what the user got wrong; before anything is allocated where it can be known.
        SpikeError: If a loss or a gradient is not finite.
        CheckpointError: If the newest checkpoint is damaged.
        LostError: If other ranks are gone.
        StoppedError: If the disk is full.
    """
    world = from_environment()
    check(run, world.size, world.device, local_ranks=world.local_size)
    folder = RunFolder(Path(run.folder))
    folder.check(run)
    if (facts := folder.finished()) is not None:
        _say_finished(folder, facts, world)
        return
    set_threads(world)
    set_deterministic(run.deterministic)
    lock = folder.claim(run) if world.rank == 0 else None
    try:
        folder.wait_for_claim(run)
        store = open_store(run, folder.path / "tokens", verify=world.local_rank == 0)
        with joined(world) as meeting:
            job = build(run, world, folder, store)
            start = resume(job)
            with watching(run.watch, meeting, job.mesh) as times:
                held = loop(job, start, times)
            facts = finish.measure(job, held)
        if world.rank == 0:
            finish.report(job, facts)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StoppedError(_disk_full(error, folder)) from error
    finally:
        if lock is not None:
            lock.close()


def loop(job: Job, start: int, times: Stragglers | None = None) -> HeldOut:
    """Train from step `start` to the last, and return the last evaluation.

    Args:
        job: What was built.
        start: Steps that are done.
        times: Compares how long the ranks take; `None` does not.
    """
    run = job.run
    shown = job.world.rank == 0
    metrics = Metrics(_sinks(job, start) if shown else ())
    progress = Progress(steps=run.steps, done=start, every=run.log_every, shown=shown)
    progress.say(_greeting(job, start))
    held: HeldOut | None = None
    held_batches = job.data.held_out()
    try:
        with job.data.ahead(start) as ahead:
            for number in range(start, run.steps):
                began = time.perf_counter()
                batches, waited = ahead.take()
                rate = run.learning_rate * run.schedule.factor(number, run.steps)
                with nullcontext() if times is None else times.section("step"):
                    result = advance(job, number, batches, rate)
                seconds = time.perf_counter() - began
                done = number + 1
                metrics.add(done, **line(job, result, batches, rate, seconds, waited))
                if done % run.evaluate_every == 0 or done == run.steps:
                    held = _evaluate(job, held_batches, metrics, done)
                if newest := metrics.flush():
                    progress.update(newest)
                if times is not None and (slow := times.step()) is not None:
                    progress.say(tell(slow))
                if done % run.checkpoint_every == 0 or done == run.steps:
                    metrics.sync()
                    checkpoint(job, done)
        _finish_saving(job)
    finally:
        progress.close()
        metrics.close()
    if held is None:
        with job.step.opened():
            held = evaluate(job.model, held_batches, job.byte_counts, job.mesh)
    return held


def advance(job: Job, number: int, batches: list[Batch], rate: float) -> StepResult:
    """Take one step, or stop and say where a value that is not finite came from.

    Raises:
        SpikeError: On every rank.
    """
    away = offloaded() if job.run.parallel.offload_activations else nullcontext()
    try:
        with away:
            return job.step(batches, learning_rate=rate)
    except NonFiniteError as error:
        where = spike.locate(job.step, batches)
        _finish_saving(job)
        good = latest(job.folder.checkpoints)
        found = str(error).partition(": ")[2]
        raise spike.SpikeError(spike.sentence(number + 1, found, where, good)) from error


def line(
    job: Job, result: StepResult, batches: list[Batch], rate: float, seconds: float, waited: float
) -> dict[str, float]:
    """Name what one step measured, with units."""
    run = job.run
    tokens_per_s = run.batch_tokens / seconds
    flops = flops_per_token(
        run.architecture, run.sequence, document_lengths=document_lengths(batches)
    )
    terms = {name: value for name, value in result.losses.items() if name != "language_model"}
    return {
        "loss": result.losses["language_model"],
        **terms,
        "grad_norm": result.grad_norm,
        "learning_rate": rate,
        "trained_tokens": int(result.counts["language_model"]),
        "step_time_s": seconds,
        "data_wait_s": waited,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_gpu": tokens_per_s / job.world.size,
        "mfu": mfu(tokens_per_s, flops.training, job.peak.flops),
        "peak_memory_gib": peak_memory_gib(job.world.device),
    }


def document_lengths(batches: list[Batch]) -> list[int] | None:
    """Return the lengths of the packed documents of this rank's micro-batches, if they are told."""
    lengths: list[int] = []
    for batch in batches:
        if batch.document_lengths is None:
            return None
        lengths += batch.document_lengths.tolist()
    return lengths


def _evaluate(job: Job, batches: list[Batch], metrics: Metrics, done: int) -> HeldOut:
    began = time.perf_counter()
    with job.step.opened():
        held = evaluate(job.model, batches, job.byte_counts, job.mesh)
    metrics.add(
        done,
        held_out_loss=held.nats_per_token,
        held_out_bits_per_byte=held.bits_per_byte,
        held_out_time_s=time.perf_counter() - began,
    )
    return held


def checkpoint(job: Job, done: int) -> None:
    """Begin to write a checkpoint of `done` steps.

    Its state is what a resumed run needs beside the tensors: all that is random is a function of
    the run's seed and the step, so the position in the data is the step too.
    """
    state = {"step": done, "seed": job.run.seed, "store": job.data.store.fingerprint}
    try:
        job.saver.start(job.folder.checkpoints, job.entries(), state, job.mesh)
    except RuntimeError as error:
        _stop(error)


def _finish_saving(job: Job) -> None:
    try:
        job.saver.finish()
    except RuntimeError as error:
        _stop(error)


def _stop(error: RuntimeError) -> None:
    if is_broken(error):
        raise error
    raise StoppedError(str(error)) from error


def _sinks(job: Job, start: int) -> list[Sink]:
    sinks: list[Sink] = [JsonLines(job.folder.metrics, after=start)]
    if TensorBoard.available():
        sinks.append(TensorBoard(job.folder.path / "tensorboard", after=start))
    return sinks


def _greeting(job: Job, start: int) -> str:
    run, train_split = job.run, job.data.store.train
    begin = f"goes on from step {start}" if start else "starts"
    return (
        f"{run.folder} {begin}: {sum(p.numel() for p in job.model.parameters()):,} parameters on "
        f"rank 0 of {job.world.size}, {len(train_split.ids):,} training tokens, "
        f"{run.steps * run.batch_tokens:,} to see; MFU is against {job.peak.words}"
    )


def _say_finished(folder: RunFolder, facts: Mapping[str, Any], world: World) -> None:
    again = f"remove {folder.report} and start the same command again"
    try:
        if world.rank == 0:
            from .report import print_table

            print(f"{folder.path} is finished ({facts['steps']} steps, {facts['finished']})")
            print_table(folder, facts)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder.report} must be the report that the run wrote, but it lacks something "
            f"({type(error).__name__}: {error}): {again}, which writes it anew"
        ) from None
    if gone := folder.gone():
        good = latest(folder.checkpoints)
        how = f"writes it from {good}" if good else "trains anew, as there is no checkpoint"
        raise UserError(
            f"{gone} must be there after a finished run, but it is gone: {again}, which {how}"
        )


def _disk_full(error: OSError, folder: RunFolder) -> str:
    good = latest(folder.checkpoints)
    kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
    return (
        f"{error.filename or folder.path} cannot be written, the disk is full; {kept}: free some "
        f"space and start the same command again"
    )
