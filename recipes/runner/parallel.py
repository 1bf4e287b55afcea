"""How the axes of a run's mesh do their work, and what is refused before a rank starts."""

from dataclasses import dataclass
from typing import Literal

from warploom.models.architecture import Architecture
from warploom.models.stages import Stages
from warploom.parallel.mesh import Degrees
from warploom.parallel.pipeline import Schedule

from ..errors import UserError
from ..plan.fits import check as check_fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """How the axes of the mesh do their work; what is trained does not depend on it."""

    schedule: Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zbv", "dualpipev"] = "1f1b"
    """Order of forwards and backwards, where the mesh has pp. zb_h1, zbv and dualpipev delay the
    gradients of weights to fill the bubble."""
    virtual: int = 2
    """Stages a rank, of `interleaved` alone."""
    stage_layers: tuple[int, ...] = ()
    """Blocks of each pipeline stage; none deals them evenly."""
    context: Literal["ring", "all_gather"] = "ring"
    """How keys and values cross cp; ranks of uly (as in cp4,uly2) exchange heads instead."""
    balance: Literal["zigzag", "document", "contiguous"] = "zigzag"
    """How the tokens of a batch are dealt to cp: `document` balances packed documents."""
    zero: Literal[0, 1, 2, 3] = 1
    """What ranks with the same parameters share out: 1 optimizer states, 2 gradients too, 3
    parameters too; 0 nothing."""
    offload: bool = False
    """Keep masters and moments of the optimizer in host memory."""
    offload_activations: bool = False
    """Keep what the backward pass needs in host memory until then."""


def table(parallel: Parallel, degrees: Degrees, microbatches: int) -> Schedule | None:
    """Make the pipeline schedule; `None` where nothing is pipelined.

    Raises:
        ValueError: If it cannot run with so many ranks and micro-batches.
    """
    if degrees.pp == 1:
        return None
    virtual = parallel.virtual if parallel.schedule == "interleaved" else 1
    return Schedule.named(parallel.schedule, degrees.pp, microbatches, virtual=virtual)


def schedule(parallel: Parallel, degrees: Degrees, microbatches: int) -> Schedule | None:
    """Make the pipeline schedule of a step; `None` where nothing is pipelined.

    Raises:
        UserError: If it cannot run with so many ranks and micro-batches.
    """
    try:
        return table(parallel, degrees, microbatches)
    except ValueError as error:
        raise UserError(
            f"{error}: change batch_tokens or micro_batch, or choose another parallel.schedule"
        ) from None


def stages(parallel: Parallel, layers: int, made: Schedule | None) -> Stages | None:
    """Deal the blocks to the stages of a schedule; `None` for one stage.

    Raises:
        UserError: If there are fewer blocks than stages, or `stage_layers` do not fit.
    """
    if made is None:
        return None
    try:
        return Stages.deal(layers, made.placement, parallel.stage_layers or None)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_mesh(architecture: Architecture, mesh: str, parallel: Parallel) -> None:
    """Refuse degrees that cannot split this model, and options that do nothing in this mesh.

    Raises:
        UserError: In one sentence, with what would fit.
    """
    try:
        degrees = Degrees.parse(mesh)
        check_fit(architecture, degrees, stages=1 if parallel.stage_layers else None)
    except ValueError as error:
        raise UserError(f"mesh {mesh!r}: {error}") from None
    if degrees.pp == 1 and (parallel.schedule != "1f1b" or parallel.stage_layers):
        raise UserError(
            f"parallel.schedule ({parallel.schedule}) and parallel.stage_layers "
            f"({parallel.stage_layers}) need pipeline stages: put pp2 or more into the mesh "
            f"({mesh!r}), or leave them out"
        )
    if parallel.virtual != 2 and parallel.schedule != "interleaved":
        raise UserError(
            f"parallel.virtual ({parallel.virtual}) is of parallel.schedule interleaved alone; the "
            f"schedule is {parallel.schedule}: leave it out"
        )
    if degrees.cp == degrees.uly and parallel.context != "ring":
        raise UserError(
            f"parallel.context ({parallel.context}) needs ranks between which keys travel: put "
            f"cp2 or more, beyond uly, into the mesh ({mesh!r}), or leave it out"
        )
    if degrees.cp == 1 and parallel.balance != "zigzag":
        raise UserError(
            f"parallel.balance ({parallel.balance}) needs context parallelism: put cp2 or more "
            f"into the mesh ({mesh!r}), or leave it out"
        )
