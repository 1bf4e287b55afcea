"""After the last step: what the run has cost and reached, its weights, and its report.

`measure` is for all ranks, `report` for rank 0 alone, which then needs no other: fitting the
baselines takes longer than the others would wait in a collective.
"""

import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from warploom.models import hf
from warploom.models.batch import Batch
from warploom.models.cost import flops_per_token, parameters
from warploom.parallel.collectives import barrier, gather_json
from warploom.parallel.step import divisors

from ..errors import StoppedError
from ..evaluation.baselines import ngram_baselines, xz_baseline
from ..plan.flops import measured_flops
from .data import to_device
from .environment import environment
from .evaluate import HeldOut
from .job import Job
from .metrics import read
from .model_card import card
from .peak import peak_memory_gib
from .report import print_table, write
from .run import describe, fingerprint, needed_bytes
from .sample import continue_ids

_GIB = 2**30
_TEMPERATURE = 0.7
_MOST_IDS, _MOST_TOKENS, _MOST_XZ_BYTES = 65_535, 50_000_000, 1 << 26
_WARM = 2  # steps of a run whose times are not representative


def measure(job: Job, held: HeldOut) -> dict[str, Any]:
    """Collect the facts of the report and export the weights; a collective call."""
    memory = gather_json(peak_memory_gib(job.world.device), job.mesh.world)
    run = job.run
    described = describe(run)
    with job.step.opened():
        samples = _samples(job)
    facts: dict[str, Any] = {
        "folder": run.folder,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": run.steps,
        "tokens": run.steps * run.batch_tokens,
        "parameters": _parameters(job),
        "held_out": {
            "nats_per_token": held.nats_per_token,
            "bits_per_byte": held.bits_per_byte,
            "tokens": held.tokens,
            "bytes": held.bytes,
        },
        "memory": {
            "peak_gib": max(memory),
            "ranks": len(memory),
            "by_rank_gib": memory,
            "planned_gib": needed_bytes(run, job.mesh.degrees) / _GIB,
            "note": "planned: weights, gradients, optimizer, saved activations; measured: "
            + (
                "the allocator's peak"
                if job.world.device.type == "cuda"
                else "the whole process resident, Python, torch and the mapped corpus included"
            ),
        },
        "flops": _flops(job),
        "samples": samples,
        "sampling": f"Each beginning goes on at temperature {_TEMPERATURE}, and then greedily.",
        "corpus": _corpus(job),
        "fingerprint": fingerprint(described),
        "run": described,
    }
    _export(job, facts)
    return facts


def report(job: Job, facts: dict[str, Any]) -> None:
    """Fit the baselines, write the report, print the table; on rank 0 alone."""
    lines = read(job.folder.metrics)
    baselines, left_out = _baselines(job)
    facts |= {
        "speed": _speed(job, lines),
        "training_s": sum(line["step_time_s"] for line in lines),
        "baselines": baselines,
        "notes": left_out,
        "environment": environment(),
    }
    write(job.folder, facts, lines)
    print_table(job.folder, job.folder.finished() or facts)


def _parameters(job: Job) -> dict[str, int]:
    counted = parameters(job.run.architecture)
    return {**counted, "total": sum(counted.values())}


def _flops(job: Job) -> dict[str, Any]:
    """Compare planned and counted FLOPs of one micro-batch (of a pipeline, all), and plan the run.

    Under pp the planned FLOPs of a rank are the mean over the stages, which differ.
    """
    run = job.run
    batches = job.data.train().micro_batches(
        run.steps - 1, rank=job.data.rank, ranks=job.data.ranks, micro=run.micro_batch
    )
    batches = [to_device(b, job.data.device) for b in batches[: None if job.mesh.pp else 1]]
    lengths: list[int] = []
    for batch in batches:
        if batch.document_lengths is None:
            lengths += [run.sequence] * batch.tokens.shape[0]
        else:
            lengths += batch.document_lengths.tolist()
    planned = flops_per_token(run.architecture, run.sequence, document_lengths=lengths).training
    by = divisors(job.model, batches, job.mesh)
    measured = measured_flops(lambda: job.step.accumulate(batches, by))
    job.step.gradients.zero()
    return {
        "planned": planned * sum(lengths) / _ways(job),
        "measured": measured,
        "note": "counted by torch over forward and backward; recomputed products count again",
        "run": planned * run.steps * run.batch_tokens,
        "formula": "planned: 6 a matrix parameter and token, head included, and causal attention "
        "within each document, half of its square",
    }


def _ways(job: Job) -> int:
    """Count the ranks that share one micro-batch's work."""
    degrees = job.mesh.degrees
    return degrees.tp * degrees.cp * degrees.pp


def _samples(job: Job) -> list[dict[str, str]]:
    tokenizer, run = job.data.store.tokenizer, job.run
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    samples = []
    for temperature in (_TEMPERATURE, 0.0):
        for number, prompt in enumerate(run.prompts):
            ids = [*begin, *tokenizer.encode(prompt)]
            if not ids:
                continue
            made = continue_ids(
                job.model,
                ids,
                count=run.sample_tokens,
                vocabulary=tokenizer.vocabulary,
                temperature=temperature,
                seed=run.seed + number,
                stop=tokenizer.eos,
            )
            text = tokenizer.decode(made)
            samples.append({"prompt": prompt, "text": text, "temperature": str(temperature)})
    return samples


def _corpus(job: Job) -> dict[str, Any]:
    store = job.data.store
    sampler = job.data.train().sampler
    return {
        "paths": list(job.run.corpus.paths),
        "fingerprint": store.fingerprint,
        "vocabulary": store.tokenizer.vocabulary,
        "train": _split(store.train),
        "held_out": _split(store.heldout),
        "epochs": sampler.epoch(job.run.steps),
        "skipped": store.manifest["skipped"],
    }


def _split(split: Any) -> dict[str, int]:
    return {"documents": split.documents, "tokens": len(split.ids), "bytes": split.bytes}


def _speed(job: Job, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the steps by their medians; the first few warm up."""
    kept = lines[_WARM:] or lines
    times = sorted(line["step_time_s"] for line in kept)
    middle = times[len(times) // 2]
    mfus = sorted(line["mfu"] for line in kept)
    return {
        "step_time_s": middle,
        "tokens_per_s": job.run.batch_tokens / middle,
        "tokens_per_s_per_rank": job.run.batch_tokens / middle / job.world.size,
        "mfu": mfus[len(mfus) // 2],
        "peak_flops": job.peak.flops,
        "peak": job.peak.words,
        "data_wait_share": sum(line["data_wait_s"] for line in kept) / sum(times),
    }


def _export(job: Job, facts: dict[str, Any]) -> None:
    """Write the weights as a Hugging Face folder; one that a killed process wrote is replaced."""
    folder = job.folder.model
    if job.world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    barrier(job.mesh.world)
    try:
        with job.step.opened(whole=True):
            hf.save(job.model, folder, job.data.store.folder / "tokenizer", card(facts))
    except OSError as error:
        raise StoppedError(
            f"{error}; the steps are done and kept in {job.folder.checkpoints}: start the same "
            f"command again when the folder can be written"
        ) from error


def _baselines(job: Job) -> tuple[list[dict[str, Any]], list[str]]:
    """Score n-grams fitted on exactly the rows that the model has seen, and xz, on held-out text.

    Returns:
        The baselines, and a sentence for each that is left out.
    """
    data, store = job.data, job.data.store
    tokenizer, size = store.tokenizer, store.train.bytes + store.heldout.bytes
    found, left_out = [], []
    rows, sampler = data.rows("train"), data.train().sampler
    seen = (int(row) for row in sampler.seen(job.run.steps))
    tokens = min(sampler.rows, job.run.steps * sampler.sequences) * job.run.sequence
    if tokenizer.vocabulary <= _MOST_IDS and tokens <= _MOST_TOKENS:
        batches = (rows.read([row]) for row in seen)
        found = ngram_baselines(batches, _held_out(job), tokenizer.byte_counts())
    else:
        left_out.append(
            f"n-grams are not fitted: {tokens:,} tokens of {tokenizer.vocabulary:,} ids are above "
            f"{_MOST_TOKENS:,} or {_MOST_IDS:,}"
        )
    if size <= _MOST_XZ_BYTES:
        found.append(xz_baseline(store.train.text(tokenizer), store.heldout.text(tokenizer)))
    else:
        left_out.append(f"xz is not run: {size:,} bytes of text are above {_MOST_XZ_BYTES:,}")
    return [asdict(one) for one in found], left_out


def _held_out(job: Job) -> list[Batch]:
    """Read the held-out batches of all ranks."""
    from ..corpus.packing import heldout_batches

    limit = max(1, job.run.evaluate_tokens // job.run.sequence)
    return list(heldout_batches(job.data.rows("heldout"), sequences=1, limit=limit))
