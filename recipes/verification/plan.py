"""What is proven: a model, a mesh, and a way to train on it."""

from dataclasses import dataclass, replace

from warploom.models.architecture import Architecture
from warploom.models.stages import Stages
from warploom.parallel.mesh import Degrees
from warploom.parallel.pipeline import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is proven.

    Attributes:
        architecture: Sizes, small ones.
        mesh: Degrees; dp is 1 where it is absent.
        schedule: Name of the pipeline schedule; read where pp is above 1.
        virtual: Stages of a pipeline rank, for `interleaved`.
        stage_layers: Blocks of each stage; `None` for equal ones.
        microbatches: Of each rank and step.
        zero: Stage of the optimizer's and the gradients' sharding, 0 to 3.
        recompute: As in `Decoder`.
        optimizer: `adamw` or `muon`.
        packed: Whether rows hold several documents.
        context: As in `Decoder`.
        balance: As in `Decoder`.
        offload: Whether activations and the optimizer's state wait in host memory.
        z_loss: Weight of the z-loss.
        clip: Largest norm of the gradient.
        rows: Rows of a micro-batch.
        sequence: Tokens of a row.
        seed: Of weights and batches.
    """

    architecture: Architecture
    mesh: str = ""
    schedule: str = "1f1b"
    virtual: int = 2
    stage_layers: tuple[int, ...] | None = None
    microbatches: int = 2
    zero: int = 1
    recompute: str = "none"
    optimizer: str = "adamw"
    packed: bool = True
    context: str = "ring"
    balance: str = "zigzag"
    offload: bool = False
    z_loss: float = 1e-2
    clip: float | None = 1.0
    rows: int = 2
    sequence: int = 13
    seed: int = 0

    @property
    def degrees(self) -> Degrees:
        """The degrees of the mesh, with dp filled in."""
        parsed = Degrees.parse(self.mesh)
        d = replace(parsed, dp=parsed.dp or 1)
        return d.resolve(d.world)

    @property
    def table(self) -> Schedule | None:
        """The pipeline schedule; `None` with one pipeline rank."""
        pp = self.degrees.pp
        if pp == 1:
            return None
        virtual = self.virtual if self.schedule == "interleaved" else 1
        return Schedule.named(self.schedule, pp, self.microbatches, virtual=virtual)

    @property
    def stages(self) -> Stages:
        """Which blocks are where."""
        table = self.table
        place = (0,) if table is None else table.placement
        return Stages.deal(self.architecture.layers, place, self.stage_layers)
