"""The experts that a rank holds: SwiGLU layers of equal size, as two grouped matrix products.

P ep ranks, S etp ranks, E experts, M rows, D width, F hidden; rank (p, s) holds part s of the F
features of experts [p E/P, (p + 1) E/P):

    gate_up   [E/P 2F/S, D]    expert after expert: its gate's rows, its up's rows
    down      [E/P D, F/S]     expert after expert: its rows
    y [M, D] = down(silu(gate x) up x)                  partial over etp

Both are matrices of stacked rows, not of three dimensions, so that shards of an optimizer, which
are rows, can be smaller than an expert. The logical tensors are those of one expert:
`<e>.gate.weight`, `<e>.up.weight` `[F, D]`, `<e>.down.weight` `[D, F]`.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 6.
"""

import torch
from torch import Tensor, nn

from warploom.kernels.activation import swiglu
from warploom.kernels.gemm import grouped_gemm, grouped_gemm_weight_gradient

from ..collectives import Group, place
from ..initialise import draw_seed, normal_
from ..sharding import Layout, Piece, rows
from ..tensor.product import deferred


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply each expert's rows by its weight; the weight's gradient waits, if a queue is open.

    Args:
        x: `[M, D]`, sorted by expert.
        weight: `[E F, D]`, the experts' matrices one below the other.
        counts: Rows of each expert `[E]` int64.

    Returns:
        `[M, F]`; rows beyond the counts are not written.
    """
    stacked = (len(counts), len(weight) // len(counts), weight.shape[1])
    return deferred(
        x,
        weight,
        forward=lambda x, w: grouped_gemm(x, w.view(stacked), counts),
        input_gradient=lambda dy, x, w: grouped_gemm(
            dy, w.view(stacked).transpose(1, 2), counts, zero_rest=True
        ),
        weight_gradient=lambda dy, x: grouped_gemm_weight_gradient(dy, x, counts).flatten(0, 1),
    )


class Experts(nn.Module):
    """This rank's part of E experts.

    Args:
        width: Model width D.
        hidden: Hidden width F of an expert.
        experts: Experts E, over all ranks.
        group: The expert-parallel process group; `None` for one rank.
        etp_group: The expert-tensor-parallel process group; `None` for one rank.

    Raises:
        ValueError: If the groups' sizes do not divide `experts` and `hidden`.
    """

    def __init__(
        self, width: int, hidden: int, experts: int, *, group: Group, etp_group: Group
    ) -> None:
        super().__init__()
        if min(width, hidden, experts) < 1:
            raise ValueError(
                f"width, hidden and experts must be at least 1; got {width}, {hidden}, {experts}"
            )
        rank, ranks = place(group)
        part, parts = place(etp_group)
        if experts % ranks:
            raise ValueError(
                f"experts ({experts}) must be divisible by the expert-parallel size ({ranks})"
            )
        if hidden % parts:
            raise ValueError(
                f"hidden ({hidden}) must be divisible by the expert-tensor-parallel size ({parts})"
            )
        self.width, self.hidden = width, hidden
        self.held = experts // ranks
        self.first = rank * self.held
        self.part = hidden // parts
        self.start = part * self.part
        self.gate_up = nn.Parameter(torch.empty(self.held * 2 * self.part, width))
        self.down = nn.Parameter(torch.empty(self.held * width, self.part))
        for name, layout in self.declare_layouts().items():
            parameter = self.get_parameter(name)
            if not parameter.is_meta:
                normal_(parameter, layout, seed=draw_seed(), std=0.02)

    def declare_layouts(self) -> dict[str, Layout]:
        """Say which rows of which expert's gate and up, and columns of its down, this rank has."""
        stop = self.start + self.part
        gate_up: list[Piece] = []
        down: list[Piece] = []
        for at in range(self.held):
            expert = self.first + at
            for half, name in enumerate(("gate", "up")):
                shape, offset = (self.hidden, self.width), (2 * at + half) * self.part
                gate_up.append(rows(f"{expert}.{name}.weight", shape, self.start, stop, offset))
            slices = ((0, self.width, 1), (self.start, stop, 1))
            name, shape = f"{expert}.down.weight", (self.width, self.hidden)
            down.append(Piece(name, shape, slices, (at * self.width, 0)))
        return {
            "gate_up": Layout(tuple(self.gate_up.shape), tuple(gate_up), expert=True),
            "down": Layout(tuple(self.down.shape), tuple(down), expert=True),
        }

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Map rows `[M, D]`, sorted by held expert, to this rank's part of `[M, D]`.

        Args:
            x: Rows; those beyond the counts are not read, nor written in the result.
            counts: Rows of each held expert `[E/P]` int64.
        """
        return grouped_linear(swiglu(grouped_linear(x, self.gate_up, counts)), self.down, counts)
