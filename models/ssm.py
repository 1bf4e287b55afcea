"""A state-space layer (Mamba-2) in the place of attention, sharded by heads.

    z, x, B, C, dt = in_proj(h)
    x, B, C = silu(convolution of each channel)
    dt = softplus(dt + dt_bias),    a = -exp(a_log)
    y = scan of x, dt, a, B and C (kernels/ssm) + d x
    out_proj(norm(y silu(z)))                           over the features of each group

Each rank has H/R heads and the B and C of the groups that these read; where the groups G are fewer
than the ranks, R/G ranks hold the same one, whose gradients are summed once a step, and the sum of
squares of the norm crosses the ranks. Context-parallel ranks exchange tokens for heads, all of them
(ring or not), and gather B and C. In generation a sequence has the convolution's last inputs and a
state of each head in its slot.

Shapes: T tokens, D model width, H heads of P dimensions, G groups, M state, W taps, R ranks.

Source: Dao and Gu 2024, https://arxiv.org/abs/2405.21060, section 7 (the block), 8.1 (tensor
parallelism); the norm after the gate by groups: 8.1, "GroupNorm".
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.kernels.gemm import Fp8Recipe
from warploom.kernels.library import wide
from warploom.kernels.ssm import causal_convolution, silu, softplus, state_space_scan
from warploom.parallel.collectives import Group, copy, gather, place, reduce, swap
from warploom.parallel.context import Split
from warploom.parallel.mesh import check_degree
from warploom.parallel.sharding import Layout
from warploom.parallel.tensor import ColumnLinear, RowLinear

from .architecture import Architecture, Kind
from .sequences import Sequences


class StateSpaceMixer(nn.Module):
    """Mamba-2 over tokens that are sharded on entry and exit; the interface of `Attention`.

    Args:
        a: Sizes and choices.
        kind: `ssm`.
        layer: Number of the block, under which a cache keeps its states.
        group: The tensor-parallel process group; `None` for one rank.
        ring: Context-parallel ranks; heads are exchanged over these too.
        ulysses: Neighbouring context-parallel ranks.
        context: Not read.
        fp8: How both projections are rounded to FP8; `None` multiplies in the model's dtype.

    Raises:
        ValueError: If the tensor-parallel size does not divide the heads, or neither divides the
            groups nor is a multiple of them; if the context-parallel size does not divide the heads
            of a rank; or if a rank's widths do not fit `fp8`.
    """

    conv_weight: Tensor
    conv_bias: Tensor
    norm_weight: Tensor
    a_log: Tensor
    d: Tensor
    dt_bias: Tensor

    def __init__(
        self, a: Architecture, kind: Kind = "ssm", layer: int = 0, *, group: Group,
        ring: Group = None, ulysses: Group = None, context: str = "ring",
        fp8: Fp8Recipe | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert a.ssm is not None
        self.sizes, self.layer, self.eps, self.group = a.ssm, layer, a.norm_eps, group
        self.ring, self.ulysses = ring, ulysses
        heads, groups, width = a.ssm.heads, a.ssm.groups, a.ssm.heads * a.ssm.head_dim
        rank, ranks = place(group)
        check_degree("tp", ranks, {"ssm.heads": heads}, {"ssm.groups": groups})
        self.heads, self.groups = heads // ranks, max(groups // ranks, 1)
        self.shared = rank * groups // ranks if groups < ranks else None
        members, neighbours = place(ring)[1], place(ulysses)[1]
        check_degree("cp", members * neighbours, {"ssm heads of a tp rank": self.heads})
        both = groups * a.ssm.state
        parts = {"z": width, "x": width, "b": both, "c": both, "dt": heads}
        self.in_proj = ColumnLinear(
            a.width, sum(parts.values()), group=group, parts=parts,
            heads={"b": groups, "c": groups}, fp8=fp8,
        )  # fmt: skip
        for name, layout in self.declare_layouts().items():
            self.register_parameter(name, nn.Parameter(torch.zeros(layout.shape)))
        self.out_proj = RowLinear(width, a.width, group=group, fp8=fp8)

    def declare_layouts(self) -> dict[str, Layout]:
        """Say which heads and channels this rank holds."""
        lay = self.in_proj.lay
        return {
            "conv_weight": lay("conv.{}.weight", "xbc", 1, self.sizes.convolution),
            "conv_bias": lay("conv.{}.bias", "xbc"),
            "norm_weight": lay("norm.weight", "z"),
            **{name: lay(name, ("dt",)) for name in ("a_log", "d", "dt_bias")},
        }

    def initial(self, name: str) -> float | Tensor:
        """Return what a parameter starts as.

        Decays fill [1, 16] evenly and time steps [0.001, 0.1] evenly in their logarithm, in another
        order: the ranges that Mamba-2 draws from.
        """
        head = torch.arange(self.heads) + place(self.group)[0] * self.heads + 0.5
        if name == "a_log":
            return (1 + 15 * (head * (5**0.5 - 1) / 2).frac()).log()
        if name == "dt_bias":  # of which softplus is the step
            return (math.log(1e-3) + math.log(100) * head / self.sizes.heads).exp().expm1().log()
        return float(name != "conv_bias")

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """Map `[T/R, D]` to `[T/R, D]`."""
        return self.out(self.mix(self.in_proj(x), sequences))

    def into(self, x: Tensor, sequences: Sequences) -> tuple[Tensor, ...]:
        """Map `[T/R, D]` to this rank's z, x, B, C and dt, `[T, (2 H P + 2 G M + H) / R]`."""
        return (self.in_proj(x),)

    def out(self, mixed: Tensor) -> Tensor:
        """Map `[T, H P / R]` to `[T/R, D]`."""
        y: Tensor = self.out_proj(mixed)
        return y

    def mix(self, projected: Tensor, sequences: Sequences) -> Tensor:
        """Map this rank's z, x, B, C and dt to `[T, H P / R]`."""
        z, x, *bc, dt = projected.split(self.in_proj.split, dim=-1)
        xdt = torch.cat([x.unflatten(-1, (self.heads, -1)), dt[..., None]], -1)
        flat = torch.cat(bc, -1)
        if sequences.split is not None:
            y = self._across(xdt, flat, sequences.split)
        elif (cache := sequences.cache) is not None:
            states, slots, n = cache.layers[self.layer], cache.slots, len(cache.places)
            kept = [s.index_select(0, slots) for s in states]
            start = [s.masked_fill(cache.fresh.view(-1, *(1,) * (s.dim() - 1)), 0) for s in kept]
            y, *last = self._run(xdt[:n], flat[:n], cache.cu_seqlens, 0, start)
            for state, new in zip(states, last, strict=True):
                state.index_copy_(0, slots, new.detach().to(state.dtype))
            y = F.pad(y, (0, 0, 0, 0, 0, len(z) - n))
        else:
            ends = sequences.cu_seqlens
            if ends is None:
                ends = torch.arange(sequences.batch + 1, device=z.device, dtype=torch.int32)
                ends = ends * (len(z) // sequences.batch)
            y = self._run(xdt, flat, ends, 0)[0]
        return self._normalise(y.flatten(1), z).to(projected.dtype)

    def _run(
        self, xdt: Tensor, bc: Tensor, ends: Tensor, first: int, start: Any = (None, None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convolve and scan whole documents of some heads.

        Args:
            xdt: x and dt of heads from `first` on `[T, h, P + 1]`.
            bc: B and C of all this rank's groups `[T, 2 G M / R]`.
            ends: Where the documents lie `[N + 1]`.
            first: The first of these heads, among this rank's.
            start: What the documents go on from, as it is returned.

        Returns:
            y `[T, h, P]` in float32 at least, and the last inputs and states.
        """
        s, heads, dtype = self.sizes, xdt.shape[1], wide(xdt.dtype)
        own = slice(first, first + heads)
        weight, bias = self.conv_weight[:, 0], self.conv_bias
        each = self.heads // self.groups
        if heads < self.heads:  # a context rank's: as many groups as it takes, one maybe twice
            sharing = math.gcd(heads, each)
            index = torch.arange(first, first + heads, sharing, device=xdt.device) // each
            b_or_c = torch.stack([index, index + self.groups]).flatten()
            split = [self.heads * s.head_dim, 2 * self.groups * s.state]

            def take(t: Tensor) -> Tensor:
                x, both = t.split(split)
                x = x[first * s.head_dim :][: heads * s.head_dim]
                return torch.cat([x, both.unflatten(0, (-1, s.state))[b_or_c].flatten(0, 1)])

            weight, bias = take(weight), take(bias)
            bc = bc.unflatten(-1, (-1, s.state)).index_select(1, b_or_c).flatten(1)
        x, dt = xdt.to(dtype).split([s.head_dim, 1], dim=-1)
        mixed = torch.cat([x.flatten(1), bc.to(dtype)], -1)
        mixed, inputs = causal_convolution(mixed, weight, bias, ends, initial_NCW=start[0])
        x, b, c = silu(mixed).split([heads * s.head_dim, *[bc.shape[1] // 2] * 2], -1)
        x, b, c = (
            t.unflatten(-1, (-1, n)) for t, n in ((x, s.head_dim), (b, s.state), (c, s.state))
        )
        dt = softplus(dt[..., 0] + self.dt_bias[own].to(dtype))
        decay = -self.a_log[own].to(dtype).exp()
        y, state = state_space_scan(x, dt, decay, b, c, ends, initial_NHPM=start[1])
        return y + self.d[own, None].to(dtype) * x, inputs, state

    def _across(self, xdt: Tensor, bc: Tensor, split: Split) -> Tensor:
        """Run some heads of all tokens instead of all heads of some: `[T, h, P]`."""
        first = 0
        for group in (self.ulysses, self.ring):  # then rank after rank, as `Split` counts them
            rank, size = place(group)
            xdt = swap(xdt.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1), group)
            bc = gather(bc, group)
            first = first + rank * xdt.shape[1]
        device, make = xdt.device, lambda: (split.inverse, torch.tensor(split.bounds))
        order, ends = split.kept(("whole", device, 1), lambda: [t.to(device) for t in make()])
        flat, _, _ = self._run(xdt[order], bc[order], ends.int(), first)
        y = flat.new_zeros(*xdt.shape[:2], flat.shape[2]).index_copy(0, order, flat)
        for group in (self.ring, self.ulysses):
            parts = swap(y, group).unflatten(0, (place(group)[1], -1))
            y = parts.transpose(0, 1).flatten(1, 2)
        return y

    def _normalise(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate `[T, H P / R]`, and normalise over each group of heads."""
        y = (y * silu(z.to(y.dtype))).unflatten(-1, (self.groups, -1))
        squares = y.square().sum(-1)
        if (g := self.shared) is not None:
            squares = F.pad(squares, (g, self.sizes.groups - 1 - g))
            squares = copy(reduce(squares, self.group), self.group)[:, g : g + 1]
        mean = squares * (self.sizes.groups / (self.sizes.heads * self.sizes.head_dim))
        return (y * torch.rsqrt(mean + self.eps)[..., None]).flatten(1) * self.norm_weight

    def cache(self, pages: int, page_size: int, slots: int) -> tuple[Tensor, ...]:
        """Allocate last inputs `[slots, channels, W - 1]` and states `[slots, H/R, P, M]`.

        States are float32 at least, as the scan keeps them.
        """
        s, weight = self.sizes, self.in_proj.weight
        channels = weight.new_zeros(slots, len(self.conv_bias), s.convolution - 1)
        shape = (slots, self.heads, s.head_dim, s.state)
        return channels, weight.new_zeros(shape, dtype=wide(weight.dtype))
