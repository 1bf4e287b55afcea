"""What is proven: a model, a mesh, and a way to train on it."""

from dataclasses import dataclass, field, replace
from typing import Any

from warploom.models.architecture import Architecture
from warploom.models.stages import Stages
from warploom.parallel.mesh import Degrees
from warploom.parallel.pipeline import Schedule

from ..runner.parallel import Parallel, table


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is proven.

    Attributes:
        architecture: Sizes, small ones.
        mesh: Degrees; dp is 1 where it is absent.
        parallel: How the axes do their work.
        microbatches: Of each rank and step.
        recompute: As in `Decoder`.
        optimizer: `adamw` or `muon`.
        packed: Whether rows hold several documents.
        z_loss: Weight of the z-loss.
        clip: Largest norm of the gradient.
        rows: Rows of a micro-batch.
        sequence: Tokens of a row.
        seed: Of weights and batches.
    """

    architecture: Architecture
    mesh: str = ""
    parallel: Parallel = field(default_factory=Parallel)
    microbatches: int = 2
    recompute: str = "none"
    optimizer: str = "adamw"
    packed: bool = True
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
        return table(self.parallel, self.degrees, self.microbatches)

    @property
    def stages(self) -> Stages:
        """Which blocks are where."""
        made = self.table
        place = (0,) if made is None else made.placement
        layers = self.parallel.stage_layers if made is not None else ()
        return Stages.deal(self.architecture.layers, place, layers or None)

    def on(self, **changes: Any) -> "Case":
        """Return the case with some fields of `parallel` changed."""
        return replace(self, parallel=replace(self.parallel, **changes))
