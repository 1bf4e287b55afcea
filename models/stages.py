"""Which blocks are on which pipeline stage, and which stage is on which rank.

A stage is a run of blocks; the first also embeds, the last also normalises and gives the loss. A
rank holds one stage or several (virtual stages): stage s is on rank `placement[s]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of a model.

    Attributes:
        placement: Pipeline rank of each stage.
        layers: Number of blocks of each stage; a stage may have none.
    """

    placement: tuple[int, ...] = (0,)
    layers: tuple[int, ...] = ()

    @staticmethod
    def deal(layers: int, placement: Sequence[int], sizes: Sequence[int] | None = None) -> "Stages":
        """Deal `layers` blocks to stages.

        Args:
            layers: Blocks of the model.
            placement: Pipeline rank of each stage.
            sizes: Blocks of each stage; by default equal ones, what is left over going to the
                stages in the middle, as the first also embeds and the last has the head.

        Raises:
            ValueError: If there are fewer blocks than stages, `sizes` do not sum to them, or a
                rank would hold nothing.
        """
        count = len(placement)
        if sizes is None:
            if layers < count:
                most = max(1, layers // (count // (max(placement) + 1)))
                raise ValueError(
                    f"layers ({layers}) must be at least the pipeline stages ({count}): use "
                    f"pp{most}, fewer virtual stages, or name the layers of each stage"
                )
            each, rest = divmod(layers, count)
            first = (count - rest + 1) // 2
            sizes = [each + (first <= s < first + rest) for s in range(count)]
        if len(sizes) != count or sum(sizes) != layers or min(sizes) < 0:
            raise ValueError(
                f"stage_layers {tuple(sizes)} must name {count} stages, none negative, that sum "
                f"to the layers ({layers})"
            )
        busy = {at for at, size in zip(placement, sizes, strict=True) if size}
        if idle := {*placement} - busy - {placement[0], placement[-1]}:
            raise ValueError(
                f"stage_layers {tuple(sizes)} leave pipeline rank {min(idle)} without a "
                f"block: give one of its stages a layer"
            )
        return Stages(tuple(placement), tuple(sizes))

    @property
    def last(self) -> int:
        """The number of the last stage."""
        return len(self.placement) - 1

    def blocks(self, stage: int) -> range:
        """Return the numbers of the blocks of a stage."""
        ends = [0, *accumulate(self.layers)]
        return range(ends[stage], ends[stage + 1])

    def on(self, rank: int) -> list[int]:
        """Return the stages on a pipeline rank, in order."""
        return [stage for stage, at in enumerate(self.placement) if at == rank]
