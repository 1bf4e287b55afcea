"""Gated feed-forward block, sharded over the tensor-parallel group.

    down(silu(gate(x)) * up(x))

Gate and up are one column-parallel matrix product; each rank holds F/R features of both. With FP8
the activation is an operator by itself: its result is rounded to the model's dtype, and then, once
for each of the two products that take it, to FP8.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 6.
"""

from torch import Tensor, nn

from warploom.kernels.activation import swiglu
from warploom.kernels.gemm import Fp8Recipe
from warploom.parallel.collectives import Group, place
from warploom.parallel.tensor import ColumnLinear, RowLinear
from warploom.parallel.tensor.product import swiglu_linear


class FeedForward(nn.Module):
    """SwiGLU feed-forward over tokens that are sharded on entry and exit.

    Args:
        width: Model width D.
        hidden: Feed-forward width F, over all ranks.
        group: The tensor-parallel process group; `None` for one rank.
        fp8: How both products are rounded to FP8; `None` multiplies in the model's dtype.

    Raises:
        ValueError: If the group's size does not divide `hidden`, or a rank's widths do not fit
            `fp8`.
    """

    def __init__(
        self, width: int, hidden: int, *, group: Group, fp8: Fp8Recipe | None = None
    ) -> None:
        super().__init__()
        _, size = place(group)
        if hidden % size:
            raise ValueError(
                f"hidden ({hidden}) must be divisible by the tensor-parallel size ({size})"
            )
        parts = {"gate": hidden, "up": hidden}
        self.gate_up = ColumnLinear(width, 2 * hidden, group=group, parts=parts, fp8=fp8)
        self.down = RowLinear(hidden, width, group=group, fp8=fp8)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[T/R, D]` to `[T/R, D]`."""
        return self.leave(self.gate_up(x))

    def leave(self, gate_up: Tensor) -> Tensor:
        """Map gate and up `[T, 2 F/R]` to `[T/R, D]`."""
        fused = self.down.fp8 is None
        y: Tensor = (
            self.down(gate_up, product=swiglu_linear) if fused else self.down(swiglu(gate_up))
        )
        return y
