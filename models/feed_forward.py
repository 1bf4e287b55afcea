"""Feed-forward block, sharded over the tensor-parallel group.

    down(silu(gate(x)) * up(x)),    down(gelu(gate(x)) * up(x)),    down(gelu(up(x))),
    down(relu(up(x))^2)

Gate and up are one column-parallel matrix product; each rank holds F/R features of both. With FP8
the activation is an operator by itself: its result is rounded to the model's dtype, and then, once
for each of the two products that take it, to FP8.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, equations 5 and 6; Radford et al. 2019 (GELU
without a gate); So et al. 2021, https://arxiv.org/abs/2109.08668, section 4 (squared ReLU).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from warploom.kernels.activation import geglu, relu2, swiglu
from warploom.kernels.gemm import Fp8Recipe
from warploom.kernels.invariant import gelu
from warploom.parallel.collectives import Group, place
from warploom.parallel.mesh import check_degree
from warploom.parallel.tensor import ColumnLinear, RowLinear
from warploom.parallel.tensor.product import swiglu_linear

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"swiglu": swiglu, "geglu": geglu, "gelu": gelu, "relu2": relu2}
)


class FeedForward(nn.Module):
    """Feed-forward block over tokens that are sharded on entry and exit.

    Args:
        width: Model width D.
        hidden: Feed-forward width F, over all ranks.
        group: The tensor-parallel process group; `None` for one rank.
        activation: `swiglu` or `geglu`, or without a gate `gelu` or `relu2`.
        bias: Whether the products have biases.
        fp8: How both products are rounded to FP8; `None` multiplies in the model's dtype.

    Raises:
        ValueError: If the group's size does not divide `hidden`, or a rank's widths do not fit
            `fp8`.
    """

    def __init__(
        self, width: int, hidden: int, *, group: Group, activation: str = "swiglu",
        bias: bool = False, fp8: Fp8Recipe | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_degree("tp", place(group)[1], {"hidden": hidden})
        self.activation = activation
        names = ("gate", "up") if activation.endswith("glu") else ("up",)
        parts = dict.fromkeys(names, hidden)
        self.gate_up = ColumnLinear(
            width, len(parts) * hidden, group=group, bias=bias, parts=parts, fp8=fp8
        )
        self.down = RowLinear(hidden, width, group=group, bias=bias, fp8=fp8)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[T/R, D]` to `[T/R, D]`."""
        return self.leave(self.gate_up(x))

    def leave(self, gate_up: Tensor) -> Tensor:
        """Map gate and up `[T, 2 F/R]`, or up alone, to `[T/R, D]`."""
        y: Tensor
        if self.activation == "swiglu" and self.down.fp8 is None:
            y = self.down(gate_up, product=swiglu_linear)
        else:
            y = self.down(_ACTIVATIONS[self.activation](gate_up))
        return y
