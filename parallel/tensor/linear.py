"""Linear layers whose weight is sharded over a tensor-parallel group.

R ranks, T tokens, D input width, F output width; `/R` marks the dimension a rank holds a part of.

                    weight      input       output      forward         backward
    ColumnLinear    [F/R, D]    [T/R, D]    [T, F/R]    gather x        reduce-scatter dx
      not sequence  [F/R, D]    [T, D]      [T, F/R]    nothing         all-reduce dx
    RowLinear       [F, D/R]    [T, D/R]    [T/R, F]    reduce-scatter  all-gather dy
      not sequence  [F, D/R]    [T, D/R]    [T, F]      all-reduce      nothing

A bias of ColumnLinear is `[F/R]`; that of RowLinear is `[F]` on every rank and is added after the
sum, so that under sequence parallelism its gradient is partial over the group.

With `fp8` the product is that of `fp8.py`, between the same collectives, which carry the layer's
dtype; gathers and scatters then do not overlap with products.

Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3; Korthikanti et al. 2022,
https://arxiv.org/abs/2205.05198, section 4.2.2 (the sequence-parallel form).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from warploom.kernels.gemm import Fp8Recipe

from ..collectives import Group, copy, gather, place, reduce, scatter
from ..initialise import draw_seed, normal_
from ..mesh import check_degree
from ..sharding import Layout, Piece, rows, whole
from .fp8 import Fp8Product, check_widths
from .overlap import Plan, gather_linear, linear_scatter
from .product import linear


class _Share(NamedTuple):
    """What a rank holds of a part: `size` rows from `first` on; whether others hold them too."""

    size: int
    first: int
    shared: bool = False


def _share(total: int, group: Group, name: str) -> _Share:
    rank, ranks = place(group)
    check_degree("tp", ranks, {name: total})
    return _Share(total // ranks, rank * (total // ranks))


def _share_heads(total: int, heads: int, group: Group, name: str) -> _Share:
    """Split whole heads; where they are fewer than the ranks, give R/G ranks the same one."""
    rank, ranks = place(group)
    if total % heads or (heads % ranks and ranks % heads):
        raise ValueError(
            f"{name}: its heads ({heads}) must divide its features ({total}), and the "
            f"tensor-parallel size ({ranks}) must divide the heads or be a multiple of them"
        )
    if heads % ranks == 0:
        return _share(total, group, name)
    head = total // heads
    return _Share(head, rank * heads // ranks * head, shared=True)


def _plan(
    group: Group, sequence_parallel: bool, chunks: int, regather: bool, symmetric: bool
) -> Plan | None:
    """Return how product and collective overlap; `None` where no such collective runs."""
    if not sequence_parallel and (chunks != 1 or regather or symmetric):
        raise ValueError(
            f"chunks ({chunks}), regather ({regather}) and symmetric ({symmetric}) overlap what "
            f"sequence_parallel=True gathers and scatters; it is False"
        )
    return Plan(group, chunks, regather, symmetric) if group and sequence_parallel else None


def _fp8(
    recipe: Fp8Recipe | None, plan: Plan | None, width: int, features: int
) -> Fp8Product | None:
    """Return the product in FP8, or `None` without a recipe; refuse what it cannot serve."""
    if recipe is None:
        return None
    if plan is not None and (plan.chunks > 1 or plan.regather or plan.symmetric):
        raise ValueError(
            f"chunks ({plan.chunks}), regather ({plan.regather}) and symmetric ({plan.symmetric}) "
            f"overlap products in high precision: leave them out with fp8, or leave fp8 out"
        )
    check_widths(recipe, {"width": width, "features": features})
    return Fp8Product(recipe)


def _start(layer: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Give a new layer N(0, 0.02) weights and zero biases, the same under every topology."""
    for name, parameter in layer.named_parameters(recurse=False):
        if parameter.is_meta:
            continue
        normal_(parameter, layouts[name], seed=draw_seed(), std=0.02 if name == "weight" else 0.0)


def _wrong_width(layer: nn.Module, width: int, x: Tensor) -> ValueError:
    name = type(layer).__name__
    return ValueError(f"{name}: x must have {width} features on a rank, its shape is {[*x.shape]}")


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
        heads: Of which parts only whole heads may be split, and how many each has, such as
            `{"k": 2, "v": 2}`. Where the heads G are fewer than the ranks R, rank r holds head
            r G // R: its gradient is a part, to be summed as the layout's `spread` says.
        chunks: Into how many the rows are cut, so that gathering one overlaps with multiplying
            another.
        regather: Whether the backward gathers the input again instead of keeping it whole.
        symmetric: Whether fused operators over symmetric memory run (CUDA; unproven).
        fp8: How the product is rounded to FP8; `None` multiplies in the layer's dtype.

    Raises:
        ValueError: If the group's size does not fit `features`, a part or its heads, the parts do
            not sum to `features`, options contradict each other, or a rank's widths do not fit
            `fp8`.
    """

    def __init__(
        self, width: int, features: int, *, group: Group, bias: bool = False,
        sequence_parallel: bool = True, parts: Mapping[str, int] | None = None,
        heads: Mapping[str, int] | None = None, chunks: int = 1, regather: bool = False,
        symmetric: bool = False, fp8: Fp8Recipe | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.group = group
        self.width = width
        self.plan = _plan(group, sequence_parallel, chunks, regather, symmetric)
        self.parts = dict(parts or {"": features})
        if sum(self.parts.values()) != features:
            raise ValueError(f"parts {self.parts} must sum to the features ({features})")
        heads = heads or {}
        if unknown := sorted(heads.keys() - self.parts.keys()):
            raise ValueError(f"heads must name parts ({', '.join(self.parts)}); got {unknown}")
        self.shares = {
            name: _share_heads(n, heads[name], group, name)
            if name in heads
            else _share(n, group, name or "features")
            for name, n in self.parts.items()
        }
        self.split = [share.size for share in self.shares.values()]
        self.fp8 = _fp8(fp8, self.plan, width, sum(self.split))
        self.weight = nn.Parameter(torch.empty(sum(self.split), width))
        self.bias = nn.Parameter(torch.empty(sum(self.split))) if bias else None
        _start(self, self.declare_layouts())

    def declare_layouts(self) -> dict[str, Layout]:
        """Say which rows of each part this rank holds."""
        label = "{}" if "" in self.parts else "{}."
        own = self.named_parameters(recurse=False)
        return {name: self.lay(label + name, self.parts, *p.shape[1:]) for name, p in own}

    def lay(self, name: str, parts: Iterable[str], *rest: int) -> Layout:
        """Lay out a parameter whose rows are sharded as the outputs of some parts.

        Args:
            name: Of its logical tensors; `{}` is where that of the part goes.
            parts: In order.
            rest: Its sizes but the first.
        """
        pieces: list[Piece] = []
        shared: list[str] = []
        offset = 0
        for part in parts:
            share, label = self.shares[part], name.format(part)
            logical = (self.parts[part], *rest)
            pieces.append(rows(label, logical, share.first, share.first + share.size, offset))
            shared += [label] * share.shared
            offset += share.size
        spread = ((self.group, tuple(shared)),) if shared else ()
        return Layout((offset, *rest), tuple(pieces), spread=spread)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[T/R, D]` (or `[T, D]`) to `[T, F/R]`.

        Raises:
            ValueError: If `x` has another width, or the chunks do not divide its rows.
        """
        if x.shape[-1] != self.width:
            raise _wrong_width(self, self.width, x)
        if self.fp8 is not None:
            enter = copy if self.plan is None else gather
            y: Tensor = self.fp8(enter(x, self.group), self.weight)
            return y if self.bias is None else y + self.bias
        if self.plan is not None:
            return gather_linear(x, self.weight, self.bias, self.plan)
        x = x if self.group is None else copy(x, self.group)
        return linear(x, self.weight, self.bias)


class RowLinear(nn.Module):
    """Linear layer that holds `D/R` of the input features. The mirror of `ColumnLinear`.

    Args:
        width: Input width D, over all ranks.
        features: Output width F.
        group: The tensor-parallel process group; `None` for one rank.
        bias: Whether a bias is added, once, after the sum over the ranks.
        sequence_parallel: Whether the output is sharded over its tokens.
        chunks: Into how many the rows are cut, so that scattering one overlaps with multiplying
            another.
        symmetric: Whether fused operators over symmetric memory run (CUDA; unproven).
        fp8: How the product is rounded to FP8; `None` multiplies in the layer's dtype.

    Raises:
        ValueError: If the group's size does not divide `width`, options contradict each other, or
            a rank's widths do not fit `fp8`.
    """

    def __init__(
        self, width: int, features: int, *, group: Group, bias: bool = False,
        sequence_parallel: bool = True, chunks: int = 1, symmetric: bool = False,
        fp8: Fp8Recipe | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.leave = scatter if sequence_parallel else reduce
        self.plan = _plan(group, sequence_parallel, chunks, False, symmetric)
        self.overlaps = self.plan is not None and (chunks > 1 or symmetric)
        self.width = width
        self.own = _share(width, group, "width").size
        self.fp8 = _fp8(fp8, self.plan, self.own, features)
        self.weight = nn.Parameter(torch.empty(features, self.own))
        self.bias = nn.Parameter(torch.empty(features)) if bias else None
        _start(self, self.declare_layouts())

    def declare_layouts(self) -> dict[str, Layout]:
        """Say which columns this rank holds."""
        features, size = self.weight.shape
        first = place(self.group)[0] * size
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

    def forward(self, x: Tensor, *, product: Callable[[Tensor, Tensor], Tensor] = linear) -> Tensor:
        """Map `[T, D/R]` to `[T/R, F]` (or `[T, F]`).

        Args:
            x: This rank's features.
            product: Of `x` and the local weight; an operator that fuses what comes before.

        Raises:
            ValueError: If `x` has another width, the rows do not divide over ranks and chunks, or
                a fused product comes to a layer that overlaps in chunks or multiplies in FP8.
        """
        if product is linear and x.shape[-1] != self.own:
            raise _wrong_width(self, self.own, x)
        if self.fp8 is not None:
            if product is not linear:
                raise ValueError(
                    f"a RowLinear with fp8 ({self.fp8.recipe.scaling}) multiplies by itself: apply "
                    f"what the product fuses before the layer, or leave fp8 out"
                )
            product = self.fp8
        elif self.group is None and product is linear:
            return linear(x, self.weight, self.bias)
        if self.plan is None or not self.overlaps:
            y = self.leave(product(x, self.weight), self.group)
        elif product is not linear:
            raise ValueError(
                f"a RowLinear with chunks ({self.plan.chunks}) or symmetric "
                f"({self.plan.symmetric}) multiplies by itself: apply what the product fuses "
                f"before the layer, or leave the option out"
            )
        else:
            y = linear_scatter(x, self.weight, self.plan)
        return y if self.bias is None else y + self.bias
