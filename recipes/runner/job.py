"""Everything that a run builds on one rank, and how it is brought back from a checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from warploom.models import hf
from warploom.models.decoder import Decoder
from warploom.models.mup import is_hidden, learning_rates
from warploom.parallel import optimizer as optimizers
from warploom.parallel.checkpoint import AsyncSaver, CheckpointError, Entry, latest, load
from warploom.parallel.collectives import gather_json
from warploom.parallel.mesh import Mesh
from warploom.parallel.optimizer import ShardedOptimizer
from warploom.parallel.step import Step

from ..errors import UserError
from ..tokens.store import TokenStore
from .data import Data
from .environment import environment
from .folder import RunFolder, write_json
from .fp8 import recipe
from .parallel import schedule, stages
from .peak import Peak, peak
from .run import DTYPES, AdamW, Run
from .world import World


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a run has built on one rank."""

    run: Run
    world: World
    mesh: Mesh
    folder: RunFolder
    data: Data
    model: Decoder
    optimizer: ShardedOptimizer
    step: Step
    saver: AsyncSaver
    peak: Peak
    byte_counts: Tensor

    def entries(self) -> list[Entry]:
        """List the tensors that a checkpoint keeps."""
        return [*self.optimizer.entries(), *self.model.buffer_entries()]


def build(run: Run, world: World, folder: RunFolder, store: TokenStore) -> Job:
    """Build mesh, model, optimizer and step."""
    mesh = Mesh.build(run.mesh)
    dtype = DTYPES[run.precision]
    microbatches = run.batch_tokens // (run.sequence * run.micro_batch * mesh.data_ranks)
    table = schedule(run.parallel, mesh.degrees, microbatches)
    device_peak = peak(mesh, world.device, dtype)
    model = Decoder.create(
        run.architecture,
        seed=run.seed,
        mesh=mesh,
        recompute=run.recompute,
        fp8=recipe(run.fp8),
        z_loss=run.z_loss,
        context=run.parallel.context,
        balance=run.parallel.balance,
        stages=stages(run.parallel, run.architecture.layers, table),
        dtype=dtype,
        device=world.device,
    )
    if run.weights:
        hf.load_into(model, run.weights)
    layouts = model.layouts()
    optimizer = make_optimizer(run, model, mesh)
    return Job(
        run=run,
        world=world,
        mesh=mesh,
        folder=folder,
        data=Data(run=run, store=store, mesh=mesh, device=world.device),
        model=model,
        optimizer=optimizer,
        step=Step(
            model, layouts, optimizer, mesh, clip=run.clip, zero=run.parallel.zero, schedule=table
        ),
        saver=AsyncSaver(keep=run.keep, patience_s=45.0),
        peak=device_peak,
        byte_counts=torch.from_numpy(store.tokenizer.byte_counts()),
    )


def make_optimizer(run: Run, model: Decoder, mesh: Mesh) -> ShardedOptimizer:
    """Build the optimizer that the run names."""
    parameters, layouts, chosen = dict(model.named_parameters()), model.layouts(), run.optimizer
    if isinstance(chosen, AdamW):
        return optimizers.AdamW(
            parameters,
            layouts,
            mesh,
            betas=chosen.betas,
            eps=chosen.eps,
            weight_decay=chosen.weight_decay,
            rate=learning_rates(run.architecture),
            offload=run.parallel.offload,
        )
    return optimizers.Muon(
        parameters,
        layouts,
        mesh,
        hidden=is_hidden,
        momentum=chosen.momentum,
        betas=chosen.betas,
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
        rest_rate=chosen.rest_rate,
        offload=run.parallel.offload,
    )


def resume(job: Job) -> int:
    """Load the newest checkpoint of the run folder, and return how many steps are done.

    Raises:
        CheckpointError: If it is damaged; names what, and the last good one.
        UserError: If it was made from other tokens.
    """
    newest = latest(job.folder.checkpoints)
    chosen = gather_json(None if newest is None else str(newest), job.mesh.world)[0]
    done = 0
    if chosen is not None:
        try:
            state = load(chosen, job.entries(), job.mesh)
        except CheckpointError as error:
            names = " and ".join(map(str, error.damaged)) or str(chosen)
            which = "them" if len(error.damaged) > 1 else "it"
            raise CheckpointError(
                f"{error}; remove {names} and start the same command again to go on without {which}"
            ) from error
        _check_store(job, state, chosen)
        done = job.optimizer.steps = state["step"]
        job.optimizer.publish()
    if job.world.rank == 0:
        _record_start(job, done)
    return done


def _check_store(job: Job, state: Mapping[str, Any], path: str) -> None:
    store = job.data.store
    if state["store"] != store.fingerprint:
        raise UserError(
            f"checkpoint {path} must have been trained on the tokens of {store.folder}, but those "
            f"were built again since ({state['store'][:12]} then, {store.fingerprint[:12]} now): "
            f"put the old token store back, or choose another --folder"
        )


def _record_start(job: Job, done: int) -> None:
    facts = environment()
    write_json(job.folder.path / "environment.json", facts)
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": done,
        "ranks": job.world.size,
        "mesh": job.run.mesh,
        "commit": facts["warploom"]["commit"],
        "peak_flops": job.peak.flops,
    }
    with (job.folder.path / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")
