"""Multi-head latent attention: keys and values of all heads come from one small vector a token.

    c = norm(x Dkv)    r = x Dr                  the latent, and the key that rotates, of all heads
    [k | v] = c Ukv                              of each head; its key is [k | rotated r]
    q = norm(x Dq) Uq                            or x Wq; the last P dimensions of a head rotate

                what a rank of R holds          forward                 backward
    q_down      whole, its T/R tokens           nothing                 a part of dW a rank
    kv_down     whole, its T/R tokens           nothing                 a part of dW a rank
    norms       whole, its T/R tokens           nothing                 a part of dW a rank
    q_up        H/R heads                       gather the latent       reduce-scatter
    kv_up       H/R heads                       gather the latent       reduce-scatter
    r           its T/R tokens                  gather                  reduce-scatter
    out         H/R heads                       reduce-scatter          all-gather

The latents are gathered, not the stream that is several times as wide. Each rank's heads give a
part of the gradient of r, so that its backward must sum: keeping the own rows alone is the bug that
diverges after a thousand steps. Pairs that rotate are neighbours. The norms of latents have the
epsilon 1e-6, whatever that of the blocks is.

Shapes: T tokens of the flattened batch, D model width, H heads, K head dimension of queries and
keys, of which P rotate and N do not, L of values, R tensor-parallel ranks.

Source: DeepSeek-AI 2024, https://arxiv.org/abs/2405.04434, section 2.1 and equations 37 to 47.
"""

from typing import Any

import torch
from torch import Tensor, nn

from warploom.kernels.gemm import Fp8Recipe
from warploom.kernels.rope import rotary
from warploom.parallel.collectives import Group, gather, place
from warploom.parallel.mesh import check_degree
from warploom.parallel.sharding import Layout, whole
from warploom.parallel.tensor import ColumnLinear, RowLinear
from warploom.parallel.tensor.product import linear

from .architecture import Architecture, Kind
from .attention import attend, score_options
from .norm import RMSNorm
from .sequences import Sequences

_EPS = 1e-6  # of every published checkpoint; none of their configs has a field for it
_UNSERVED = ("qk_norm", "qkv_bias", "out_bias", "sinks")


class ReplicatedLinear(nn.Module):
    """Linear layer that every rank holds whole and applies to its own tokens.

    Its gradient is partial over the group, and is declared so.

    Args:
        width: Input width.
        features: Output width.
        group: The tensor-parallel process group; `None` for one rank.
    """

    def __init__(self, width: int, features: int, *, group: Group) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.empty(features, width))

    def declare_layouts(self) -> dict[str, Layout]:
        """Declare the weight: whole on each rank, its gradient partial over the group."""
        return {"weight": whole("weight", self.weight.shape, partial=(self.group,))}

    def forward(self, x: Tensor) -> Tensor:
        """Map `[T/R, D]` to `[T/R, F]`."""
        y: Tensor = linear(x, self.weight)
        return y


class LatentAttention(nn.Module):
    """Multi-head latent attention over tokens that are sharded on entry and exit.

    Args:
        a: Sizes and choices, with `latent`.
        kind: `full`, or `sliding` with the window of `a`.
        layer: Number of the block.
        group: The tensor-parallel process group; `None` for one rank.
        ring: The context-parallel ranks between which keys and values travel.
        ulysses: The context-parallel ranks that exchange heads.
        context: How keys and values travel, `ring` or `all_gather`.
        fp8: How the projections up and out are rounded to FP8, where `None` multiplies in the
            model's dtype; those down are in that dtype always.

    Raises:
        ValueError: If the group's size does not divide the heads, a rank's widths do not fit
            `fp8`, or the architecture has a choice that is not for latent attention.
    """

    def __init__(
        self, a: Architecture, kind: Kind, layer: int, *, group: Group, ring: Group = None,
        ulysses: Group = None, context: str = "ring", fp8: Fp8Recipe | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        latent, (_, size) = a.latent, place(group)
        assert latent is not None
        check_degree("tp", size, {"heads": a.heads})
        if unserved := [name for name in _UNSERVED if getattr(a, name)]:
            raise ValueError(f"latent attention has no {', '.join(unserved)}: leave them out")
        self.a, self.kind, self.layer, self.group = a, kind, layer, group
        self.across: dict[str, Any] = {"ring": ring, "ulysses": ulysses, "context": context}
        self.options = score_options(a, kind)
        self.still, self.values = a.head_dim - latent.rotated, latent.values
        self.down_widths = [latent.keys, latent.rotated]
        queries = a.heads * a.head_dim
        self.q_norm = None
        if latent.queries is None:
            self.q = ColumnLinear(a.width, queries, group=group, fp8=fp8)
        else:
            self.q_down = ReplicatedLinear(a.width, latent.queries, group=group)
            self.q_norm = RMSNorm(latent.queries, eps=_EPS, group=group)
            self.q_up = ColumnLinear(latent.queries, queries, group=group, fp8=fp8)
        self.kv_down = ReplicatedLinear(a.width, sum(self.down_widths), group=group)
        self.kv_norm = RMSNorm(latent.keys, eps=_EPS, group=group)
        up = a.heads * (self.still + latent.values)
        self.kv_up = ColumnLinear(latent.keys, up, group=group, fp8=fp8)
        self.out = RowLinear(a.heads * latent.values, a.width, group=group, fp8=fp8)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """Map `[T/R, D]` to `[T/R, D]`."""
        y: Tensor = self.out(self.mix(*self.into(x, sequences), sequences))
        return y

    def into(self, x: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """Map `[T/R, D]` to queries, keys with values, and the key of all heads that rotates.

        Args:
            x: This rank's tokens.
            sequences: Where the sequences lie in the T tokens.

        Returns:
            `[T, H K / R]`, `[T, H (N + L) / R]` and `[T, P]`.
        """
        q = self.q(x) if self.q_norm is None else self.q_up(self.q_norm(self.q_down(x)))
        latent, rotated = self.kv_down(x).split(self.down_widths, dim=-1)
        return q, self.kv_up(self.kv_norm(latent)), gather(rotated, self.group)

    def mix(self, q: Tensor, kv: Tensor, rotated: Tensor, sequences: Sequences) -> Tensor:
        """Attend: from what `into` gives to `[T, H L / R]`."""
        q_THK = q.unflatten(-1, (-1, self.a.head_dim))
        still_THN, v_THL = kv.unflatten(-1, (q_THK.shape[1], -1)).tensor_split([self.still], -1)
        turning = q_THK[..., self.still :], rotated.unsqueeze(1)
        turned_THP, rotated_T1P = rotary(*turning, *sequences.angles[self.kind], interleaved=True)
        q_THK = torch.cat((q_THK[..., : self.still], turned_THP), -1)
        k_THK = torch.cat((still_THN, rotated_T1P.expand(-1, q_THK.shape[1], -1)), -1)
        v_THL = v_THL.contiguous()  # nothing else keeps the output of kv_up: a copy frees it
        return attend(self.layer, q_THK, k_THK, v_THL, sequences, **self.across, **self.options)

    def cache(self, pages: int, page_size: int, slots: int) -> tuple[Tensor, ...]:
        """Allocate the pages of this rank's keys `[P, page, H/R, K]` and values `[..., L]`."""
        weight, widths = self.kv_up.weight, (self.a.head_dim, self.values)
        shape = (pages, page_size, len(weight) // (self.still + self.values))
        return tuple(weight.new_empty(*shape, width) for width in widths)
