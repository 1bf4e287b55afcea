"""The experts that a rank holds: gated layers of equal size, as two grouped matrix products.

P ep ranks, S etp ranks, E experts, M rows, D width, F hidden; rank (p, s) holds part s of the F
features of experts [p E/P, (p + 1) E/P):

    gate_up   [E/P 2F/S, D]    expert after expert: its gate's rows, its up's rows
    down      [E/P D, F/S]     expert after expert: its rows
    y [M, D] = down(silu(gate x) up x)                  partial over etp

or, with a clamp c, down((up + 1) gate s(1.702 gate)) of gate = min(gate x, c) and up = up x within
[-c, c]; s is the sigmoid. The biases lie as the rows do; that of down is added by part 0 alone, so
that its gradient is partial over etp.

Both weights are matrices of stacked rows, not of three dimensions, so that shards of an optimizer,
which are rows, can be smaller than an expert. The logical tensors are those of one expert:
`<e>.gate.weight`, `<e>.up.weight` `[F, D]`, `<e>.down.weight` `[D, F]`, and `.bias` for each.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 6; OpenAI 2025,
https://arxiv.org/abs/2508.10925, section 2.3 (the clamp).
"""

from typing import Any

import torch
from torch import Tensor, nn

from warploom.kernels.activation import swiglu
from warploom.kernels.gemm import grouped_gemm, grouped_gemm_weight_gradient
from warploom.kernels.invariant import sigmoid
from warploom.kernels.library import first_derivative_only, wide

from ..collectives import Group, place
from ..initialise import draw_seed, normal_
from ..mesh import check_degree
from ..sharding import Layout, Piece
from ..tensor.product import deferred

_ALPHA = 1.702  # of the sigmoid that is about GELU's


class _Clamped(torch.autograd.Function):
    """The clamped activation; only its input is saved."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.limit = limit
        gate, up = gate_up.to(wide(gate_up.dtype)).chunk(2, -1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return ((up + 1) * gate * sigmoid(_ALPHA * gate)).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor, None]:
        first_derivative_only("clamped_swiglu")
        (gate_up,), limit = ctx.saved_tensors, ctx.limit
        x, dy = (y.to(wide(y.dtype)) for y in (gate_up, dys[0]))
        gate, up = x.chunk(2, -1)
        dgate, dup = (gate <= limit) * dy, (up.abs() <= limit) * dy
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        s = torch.sigmoid(_ALPHA * gate)
        dgate = dgate * (up + 1) * s * (1 + _ALPHA * gate * (1 - s))
        return torch.cat([dgate, dup * gate * s], -1).to(gate_up.dtype), None


def clamped_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """Map gate and up `[M, 2F]` to `[M, F]`: (up + 1) gate sigmoid(1.702 gate), both clamped."""
    y: Tensor = _Clamped.apply(gate_up, limit)
    return y


class _AddBias(torch.autograd.Function):
    """Adds to each expert's rows its bias; rows beyond the counts may get any."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        ctx.dtype = bias.dtype
        rows = torch.arange(len(y), device=y.device)
        expert = torch.searchsorted(counts.cumsum(0), rows, right=True).clamp(max=len(counts) - 1)
        return y + bias.view(len(counts), -1).to(y.dtype)[expert]

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor, Tensor, None]:
        first_derivative_only("the bias of experts")
        (counts,), (dy,) = ctx.saved_tensors, dys
        ones = dy.new_ones(len(dy), 8)  # as narrow as every backend takes
        dbias = grouped_gemm_weight_gradient(dy, ones, counts)[..., 0]
        return dy, dbias.flatten().to(ctx.dtype), None


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply each expert's rows by its weight; the weight's gradient waits, if a queue is open.

    Args:
        x: `[M, D]`, sorted by expert.
        weight: `[E F, D]`, the experts' matrices one below the other.
        counts: Rows of each expert `[E]` int64.
        bias: `[E F]`, added to each expert's rows, if given.

    Returns:
        `[M, F]`; rows beyond the counts are not written.
    """
    stacked = (len(counts), len(weight) // len(counts), weight.shape[1])
    y = deferred(
        x,
        weight,
        forward=lambda x, w: grouped_gemm(x, w.view(stacked), counts),
        input_gradient=lambda dy, x, w: grouped_gemm(
            dy, w.view(stacked).transpose(1, 2), counts, zero_rest=True
        ),
        weight_gradient=lambda dy, x: grouped_gemm_weight_gradient(dy, x, counts).flatten(0, 1),
    )
    return y if bias is None else _AddBias.apply(y, bias, counts)


class Experts(nn.Module):
    """This rank's part of E experts.

    Args:
        width: Model width D.
        hidden: Hidden width F of an expert.
        experts: Experts E, over all ranks.
        group: The expert-parallel process group; `None` for one rank.
        etp_group: The expert-tensor-parallel process group; `None` for one rank.
        bias: Whether the three products have biases.
        clamp: Where gate and up are cut off; `None` for SwiGLU.

    Raises:
        ValueError: If the groups' sizes do not divide `experts` and `hidden`.
    """

    def __init__(
        self, width: int, hidden: int, experts: int, *, group: Group, etp_group: Group,
        bias: bool = False, clamp: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(width, hidden, experts) < 1:
            raise ValueError(
                f"width, hidden and experts must be at least 1; got {width}, {hidden}, {experts}"
            )
        rank, ranks = place(group)
        part, parts = place(etp_group)
        check_degree("ep", ranks, {"experts": experts})
        check_degree("etp", parts, {"hidden": hidden})
        self.width, self.hidden = width, hidden
        self.etp_group, self.clamp = etp_group, clamp
        self.held = experts // ranks
        self.first = rank * self.held
        self.part = hidden // parts
        self.start = part * self.part
        self.gate_up = nn.Parameter(torch.empty(self.held * 2 * self.part, width))
        self.down = nn.Parameter(torch.empty(self.held * width, self.part))
        self.gate_up_bias = nn.Parameter(torch.zeros(len(self.gate_up))) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(len(self.down))) if bias else None
        for name, layout in self.declare_layouts().items():
            parameter = self.get_parameter(name)
            if not parameter.is_meta and parameter.dim() > 1:
                normal_(parameter, layout, seed=draw_seed(), std=0.02)

    def declare_layouts(self) -> dict[str, Layout]:
        """Say which rows of which expert's gate and up, and columns of its down, this rank has."""
        part, whole = (self.start, self.start + self.part, 1), (0, self.width, 1)
        wide, tall = (self.hidden, self.width), (self.width, self.hidden)
        pieces: dict[str, list[Piece]] = {name: [] for name, _ in self.named_parameters()}
        for at, expert in enumerate(range(self.first, self.first + self.held)):
            for name, own, shape, slices, offset in (
                ("gate", "gate_up", wide, (part, whole), 2 * at * self.part),
                ("up", "gate_up", wide, (part, whole), (2 * at + 1) * self.part),
                ("down", "down", tall, (whole, part), at * self.width),
            ):
                stem = f"{expert}.{name}"
                pieces[own].append(Piece(f"{stem}.weight", shape, slices, (offset, 0)))
                if self.down_bias is not None:
                    bias = Piece(f"{stem}.bias", shape[:1], slices[:1], (offset,))
                    pieces[f"{own}_bias"].append(bias)
        once = () if self.etp_group is None else (self.etp_group,)
        return {
            name: Layout(
                tuple(parameter.shape),
                tuple(pieces[name]),
                partial=once if name == "down_bias" else (),
                expert=True,
            )
            for name, parameter in self.named_parameters()
        }

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Map rows `[M, D]`, sorted by held expert, to this rank's part of `[M, D]`.

        Args:
            x: Rows; those beyond the counts are not read, nor written in the result.
            counts: Rows of each held expert `[E/P]` int64.
        """
        bias = None if self.down_bias is None else self.down_bias * (self.start == 0)
        y = grouped_linear(x, self.gate_up, counts, self.gate_up_bias)
        y = swiglu(y) if self.clamp is None else clamped_swiglu(y, self.clamp)
        return grouped_linear(y, self.down, counts, bias)
