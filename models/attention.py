"""Causal self-attention with grouped queries, sharded by heads.

    qkv -> (norms of q and k) -> rotary -> flash attention -> out

Queries, keys and values come from one column-parallel matrix product and go on as views of its
output. Each rank has H/R query heads and G/R key/value heads, so that a query head always finds
its key head on its own rank. Where G < R, R/G ranks hold the same key/value head, and their
gradients of it are summed once a step (`spread` in its layout).

Shapes: T tokens of the flattened batch, D model width, H query heads, G key/value heads, K head
dimension, J half the dimensions that rotate, R tensor-parallel ranks.

Source: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245 (grouped queries); Su et al. 2021,
https://arxiv.org/abs/2104.09864 (rotary positions); Yang et al. 2025,
https://arxiv.org/abs/2505.09388, section 2 (the norms of queries and keys); Beltagy et al. 2020,
https://arxiv.org/abs/2004.05150 (windows); Xiao et al. 2023, https://arxiv.org/abs/2309.17453
(sinks).
"""

from typing import Any

import torch
from torch import Tensor, nn

from warploom.kernels.attention import flash_attention, flash_attention_varlen
from warploom.kernels.cpu import rotate
from warploom.kernels.gemm import Fp8Recipe
from warploom.kernels.invariant import plain
from warploom.kernels.rope import rotary
from warploom.parallel import context as context_parallel
from warploom.parallel.collectives import Group, place
from warploom.parallel.mesh import check_degree
from warploom.parallel.sharding import Layout, rows
from warploom.parallel.tensor import ColumnLinear, RowLinear

from .architecture import Architecture, Kind
from .norm import RMSNorm, ShardedRMSNorm
from .sequences import Sequences


def attend(
    layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGL: Tensor, sequences: Sequences, *, ring: Group,
    ulysses: Group, context: str, **options: Any,
) -> Tensor:  # fmt: skip
    """Attend to one's own document: of this pass, over the context ranks, or in a cache's pages.

    Args:
        layer: Number of the block, under which a cache keeps its keys.
        q_THK: Rotated queries `[T, H, K]`.
        k_TGK: Rotated keys `[T, G, K]`.
        v_TGL: Values `[T, G, L]`.
        sequences: Where the sequences lie.
        ring: As in `Attention`.
        ulysses: As in `Attention`.
        context: As in `Attention`.
        options: `scale`, `window`, `softcap` and `sinks` of flash attention.

    Returns:
        `[T, H L]`.
    """
    mixed: Any  # without return_lse a tensor
    if sequences.cache is not None:
        mixed = sequences.cache.attend(layer, q_THK, k_TGK, v_TGL, **options)
    elif sequences.split is not None:
        if "window" in options:
            options["window"] = options["window"][0] + 1
        mixed = context_parallel.attention(
            q_THK, k_TGK, v_TGL, sequences.split, ring=ring, ulysses=ulysses, kind=context,
            **options,
        )  # fmt: skip
    elif sequences.cu_seqlens is None:
        qkv = (x.unflatten(0, (sequences.batch, -1)) for x in (q_THK, k_TGK, v_TGL))
        mixed = flash_attention(*qkv, **options)
    else:
        bounds, longest = sequences.cu_seqlens, sequences.max_seqlen
        mixed = flash_attention_varlen(q_THK, k_TGK, v_TGL, bounds, max_seqlen=longest, **options)
    y: Tensor = mixed.reshape(q_THK.shape[0], -1)
    return y


def score_options(a: Architecture, kind: Kind) -> dict[str, Any]:
    """Return what `attend` is told of the scores: `scale`, `softcap` and `window`, if any."""
    scale = a.attention_scale or (8 / a.head_dim if a.mup_base else None)
    window = (a.window - 1, 0) if kind == "sliding" and a.window else None
    options = {"scale": scale, "softcap": a.softcap or None, "window": window}
    return {name: x for name, x in options.items() if x is not None}


class Attention(nn.Module):
    """Grouped-query attention over tokens that are sharded on entry and exit.

    Args:
        a: Sizes and choices.
        kind: `full`, or `sliding` with the window of `a`.
        layer: Number of the block.
        group: The tensor-parallel process group; `None` for one rank.
        ring: The context-parallel ranks between which keys and values travel.
        ulysses: The context-parallel ranks that exchange heads.
        context: How keys and values travel, `ring` or `all_gather`.
        fp8: How both projections are rounded to FP8; `None` multiplies in the model's dtype.

    Raises:
        ValueError: If the group's size does not divide the heads, or neither divides the key/value
            heads nor is a multiple of them, or a rank's widths do not fit `fp8`.
    """

    def __init__(
        self, a: Architecture, kind: Kind = "full", layer: int = 0, *, group: Group,
        ring: Group = None, ulysses: Group = None, context: str = "ring",
        fp8: Fp8Recipe | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _, size = place(group)
        check_degree("tp", size, {"heads": a.heads}, {"kv_heads": a.kv_heads})
        self.head_dim, self.layer, self.kind = a.head_dim, layer, kind
        self.across: dict[str, Any] = {"ring": ring, "ulysses": ulysses, "context": context}
        self.rotates = a.positions == "rotary"
        heads = {"q": a.heads, "k": a.kv_heads, "v": a.kv_heads}
        parts = {name: n * a.head_dim for name, n in heads.items()}
        self.qkv = ColumnLinear(
            a.width, sum(parts.values()), group=group, bias=a.qkv_bias, parts=parts, heads=heads,
            fp8=fp8,
        )  # fmt: skip
        self.widths = self.qkv.split
        self.whole = a.qk_norm == "full"
        self.q_norm, self.k_norm = (_qk_norm(a, n, group) for n in (a.heads, a.kv_heads))
        self.options = score_options(a, kind)
        self.heads, self.first = a.heads, place(group)[0] * (a.heads // size)
        self.sinks = nn.Parameter(torch.zeros(a.heads // size)) if a.sinks else None
        self.out = RowLinear(a.heads * a.head_dim, a.width, group=group, bias=a.out_bias, fp8=fp8)

    def initial(self, name: str) -> float:
        """Return what the sinks start as."""
        return 0.0

    def declare_layouts(self) -> dict[str, Layout]:
        """Say which heads' sinks this rank holds."""
        if self.sinks is None:
            return {}
        held = len(self.sinks)
        piece = rows("sinks", (self.heads,), self.first, self.first + held)
        return {"sinks": Layout((held,), (piece,))}

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """Map `[T/R, D]` to `[T/R, D]`."""
        y: Tensor = self.out(self.mix(self.qkv(x), sequences))
        return y

    def into(self, x: Tensor, sequences: Sequences) -> tuple[Tensor, ...]:
        """Map `[T/R, D]` to this rank's queries, keys and values `[T, (H + 2 G) K / R]`."""
        return (self.qkv(x),)

    def mix(self, qkv: Tensor, sequences: Sequences) -> Tensor:
        """Map this rank's queries, keys and values to `[T, H K / R]`."""
        q_THK, k_TGK, v_TGK = self._turned(qkv, sequences)
        options = self.options if self.sinks is None else self.options | {"sinks": self.sinks}
        return attend(self.layer, q_THK, k_TGK, v_TGK, sequences, **self.across, **options)

    def _turned(self, qkv: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys, normalised and rotated, and values: `[T, heads, K]`."""
        cos, sin = sequences.angles[self.kind] if self.rotates else (qkv, qkv)
        if 2 * cos.shape[1] == self.head_dim and self.q_norm is None and plain(qkv, cos, sin):
            *heads, last = (width // self.head_dim for width in self.widths)
            x_THK = qkv.view(qkv.shape[0], -1, self.head_dim)
            q_THK, k_TGK = rotate(x_THK[:, :-last], cos, sin).split_with_sizes(heads, 1)
            return q_THK, k_TGK, x_THK[:, -last:]
        q, k, v = qkv.split(self.widths, dim=-1)
        if self.whole and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q_THK, k_TGK, v_TGK = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None and not self.whole:
            q_THK, k_TGK = self.q_norm(q_THK), self.k_norm(k_TGK)
        elif self.rotates:  # nothing else keeps the fused output: a copy of v frees it
            v_TGK = v_TGK.contiguous()
        if self.rotates:
            q_THK, k_TGK = rotary(q_THK, k_TGK, cos, sin)
        return q_THK, k_TGK, v_TGK

    def cache(self, pages: int, page_size: int, slots: int) -> tuple[Tensor, ...]:
        """Allocate the pages of this rank's keys and values, `[P, page, G/R, K]` each."""
        shape = (pages, page_size, self.widths[1] // self.head_dim, self.head_dim)
        return tuple(self.qkv.weight.new_empty(shape) for _ in range(2))


def _qk_norm(a: Architecture, heads: int, group: Group) -> RMSNorm | None:
    """Build the norm of queries or keys."""
    options: dict[str, Any] = {"eps": a.norm_eps, "plus_one": a.norm == "rms_plus_one"}
    if a.qk_norm == "full":
        return ShardedRMSNorm(heads * a.head_dim, heads, group=group, **options)
    return RMSNorm(a.head_dim, group=group, **options) if a.qk_norm == "head" else None
