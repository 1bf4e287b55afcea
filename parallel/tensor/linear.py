"""Linear layers whose weight is sharded over a tensor-parallel group.

R ranks, T tokens, D input width, F output width; `/R` marks the dimension a rank holds a part of.

                    weight      input       output      forward         backward
    ColumnLinear    [F/R, D]    [T/R, D]    [T, F/R]    gather x        reduce-scatter dx
      not sequence  [F/R, D]    [T, D]      [T, F/R]    nothing         all-reduce dx
    RowLinear       [F, D/R]    [T, D/R]    [T/R, F]    reduce-scatter  all-gather dy
      not sequence  [F, D/R]    [T, D/R]    [T, F]      all-reduce      nothing

A bias of ColumnLinear is `[F/R]`; that of RowLinear is `[F]` on every rank and is added after the
sum, so that under sequence parallelism its gradient is partial over the group.

Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3; Korthikanti et al. 2022,
https://arxiv.org/abs/2205.05198, section 4.2.2 (the sequence-parallel form).
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..collectives import Group, copy, gather, reduce, scatter
from ..initialise import draw_seed, normal_
from ..sharding import Layout, Piece, rows, whole


def _split(total: int, group: Group, name: str) -> int:
    size = 1 if group is None else group.size()
    if total % size:
        raise ValueError(f"{name} ({total}) must be divisible by the tensor-parallel size ({size})")
    return total // size


def _rank(group: Group) -> int:
    return 0 if group is None else group.rank()


def _start(layer: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Give a new layer N(0, 0.02) weights and zero biases, the same under every topology."""
    for name, parameter in layer.named_parameters(recurse=False):
        if parameter.is_meta:
            continue
        normal_(parameter, layouts[name], seed=draw_seed(), std=0.02 if name == "weight" else 0.0)


class ColumnLinear(nn.Module):
    """Linear layer that holds `F/R` of the output features.

    Args:
        width: Input width D.
        features: Output width F, over all ranks.
        group: The tensor-parallel process group; `None` for one rank.
        bias: Whether a bias is added.
        sequence_parallel: Whether the input is sharded over its tokens.
        parts: Several logical weights in one, such as `{"q": 512, "k": 128, "v": 128}`; each is
            split over the group by itself, and the output holds the local part of each in order.

    Raises:
        ValueError: If the group's size does not divide `features` or a part, or the parts do not
            sum to `features`.
    """

    def __init__(
        self,
        width: int,
        features: int,
        *,
        group: Group,
        bias: bool = False,
        sequence_parallel: bool = True,
        parts: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.enter = gather if sequence_parallel else copy
        self.parts = dict(parts or {"": features})
        if sum(self.parts.values()) != features:
            raise ValueError(f"parts {self.parts} must sum to the features ({features})")
        self.split = [_split(n, group, name or "features") for name, n in self.parts.items()]
        self.weight = nn.Parameter(torch.empty(sum(self.split), width))
        self.bias = nn.Parameter(torch.empty(sum(self.split))) if bias else None
        _start(self, self.declare_layouts())

    def declare_layouts(self) -> dict[str, Layout]:
        """Say which rows of each part this rank holds."""
        own: dict[str, Layout] = {}
        for name, parameter in self.named_parameters(recurse=False):
            pieces: list[Piece] = []
            offset = 0
            for (part, features), size in zip(self.parts.items(), self.split, strict=True):
                logical = (features, *parameter.shape[1:])
                first = _rank(self.group) * size
                label = f"{part}.{name}" if part else name
                pieces.append(rows(label, logical, first, first + size, offset))
                offset += size
            own[name] = Layout(tuple(parameter.shape), tuple(pieces))
        return own

    def forward(self, x: Tensor) -> Tensor:
        """Map `[T/R, D]` (or `[T, D]`) to `[T, F/R]`."""
        return F.linear(self.enter(x, self.group), self.weight, self.bias)


class RowLinear(nn.Module):
    """Linear layer that holds `D/R` of the input features. The mirror of `ColumnLinear`.

    Args:
        width: Input width D, over all ranks.
        features: Output width F.
        group: The tensor-parallel process group; `None` for one rank.
        bias: Whether a bias is added, once, after the sum over the ranks.
        sequence_parallel: Whether the output is sharded over its tokens.

    Raises:
        ValueError: If the group's size does not divide `width`.
    """

    def __init__(
        self,
        width: int,
        features: int,
        *,
        group: Group,
        bias: bool = False,
        sequence_parallel: bool = True,
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.leave = scatter if sequence_parallel else reduce
        self.width = width
        self.weight = nn.Parameter(torch.empty(features, _split(width, group, "width")))
        self.bias = nn.Parameter(torch.empty(features)) if bias else None
        _start(self, self.declare_layouts())

    def declare_layouts(self) -> dict[str, Layout]:
        """Say which columns this rank holds."""
        features, size = self.weight.shape
        first = _rank(self.group) * size
        slices = ((0, features, 1), (first, first + size, 1))
        own = {
            "weight": Layout(
                (features, size), (Piece("weight", (features, self.width), slices, (0, 0)),)
            )
        }
        if self.bias is not None:
            partial = (self.group,) if self.sequence_parallel else ()
            own["bias"] = whole("bias", (features,), partial=partial)
        return own

    def forward(
        self, x: Tensor, *, product: Callable[[Tensor, Tensor], Tensor] = F.linear
    ) -> Tensor:
        """Map `[T, D/R]` to `[T/R, F]` (or `[T, F]`).

        Args:
            x: This rank's features.
            product: Of `x` and the local weight; an operator that fuses what comes before.
        """
        y = self.leave(product(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias
