"""Causal self-attention with grouped queries and rotary positions, sharded by heads.

    qkv -> (norms of q and k) -> rotary -> flash attention -> out

Queries, keys and values come from one column-parallel matrix product and go on as views of its
output. Each rank has H/R query heads and G/R key/value heads, so that a query head always finds
its key head on its own rank. Where G < R, R/G ranks hold the same key/value head, and their
gradients of it are summed once a step (`spread` in its layout).

Shapes: T tokens of the flattened batch, D model width, H query heads, G key/value heads, K head
dimension, J = K/2, R tensor-parallel ranks.

Source: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245 (grouped queries); Su et al. 2021,
https://arxiv.org/abs/2104.09864 (rotary positions); Yang et al. 2025,
https://arxiv.org/abs/2505.09388, section 2 (the norms of queries and keys).
"""

from typing import Any

from torch import Tensor, nn

from warploom.kernels.attention import flash_attention, flash_attention_varlen
from warploom.kernels.gemm import Fp8Recipe
from warploom.kernels.rope import rotary
from warploom.parallel import context as context_parallel
from warploom.parallel.collectives import Group, place
from warploom.parallel.tensor import ColumnLinear, RowLinear

from .norm import RMSNorm
from .sequences import Sequences


class Attention(nn.Module):
    """Grouped-query attention over tokens that are sharded on entry and exit.

    Args:
        width: Model width D.
        heads: Query heads H, over all ranks.
        kv_heads: Key/value heads G, over all ranks.
        head_dim: Head dimension K.
        group: The tensor-parallel process group; `None` for one rank.
        ring: The context-parallel ranks between which keys and values travel.
        ulysses: The context-parallel ranks that exchange heads.
        context: How keys and values travel, `ring` or `all_gather`.
        qk_norm: Whether each query and key head is normalised before its rotation.
        norm_eps: Epsilon of these norms.
        fp8: How both projections are rounded to FP8; `None` multiplies in the model's dtype.

    Raises:
        ValueError: If the group's size does not divide `heads`, or neither divides `kv_heads` nor
            is a multiple of it, or a rank's widths do not fit `fp8`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        group: Group,
        ring: Group = None,
        ulysses: Group = None,
        context: str = "ring",
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        fp8: Fp8Recipe | None = None,
    ) -> None:
        super().__init__()
        _, size = place(group)
        if heads % size or (kv_heads % size and size % kv_heads):
            raise ValueError(
                f"the tensor-parallel size ({size}) must divide heads ({heads}), and divide "
                f"kv_heads ({kv_heads}) or be a multiple of them: choose another tp"
            )
        self.head_dim = head_dim
        self.ring, self.ulysses, self.context = ring, ulysses, context
        parts = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
        self.qkv = ColumnLinear(
            width,
            sum(parts.values()),
            group=group,
            parts=parts,
            heads={"q": heads, "k": kv_heads, "v": kv_heads},
            fp8=fp8,
        )
        self.widths = self.qkv.split
        self.q_norm = RMSNorm(head_dim, eps=norm_eps, group=group) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=norm_eps, group=group) if qk_norm else None
        self.out = RowLinear(heads * head_dim, width, group=group, fp8=fp8)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """Map `[T/R, D]` to `[T/R, D]`."""
        y: Tensor = self.out(self.mix(self.qkv(x), sequences))
        return y

    def mix(self, qkv: Tensor, sequences: Sequences) -> Tensor:
        """Map this rank's queries, keys and values `[T, (H + 2 G) K / R]` to `[T, H K / R]`."""
        parts = qkv.split(self.widths, dim=-1)
        q_THK, k_TGK, v_TGK = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q_THK, k_TGK = self.q_norm(q_THK), self.k_norm(k_TGK)
        else:  # nothing else keeps the fused output: a copy of v, the smallest part, frees it
            v_TGK = v_TGK.contiguous()
        q_THK, k_TGK = rotary(q_THK, k_TGK, sequences.cos_TJ, sequences.sin_TJ)
        mixed: Any  # without return_lse a tensor
        if sequences.split is not None:
            mixed = context_parallel.attention(
                q_THK,
                k_TGK,
                v_TGK,
                sequences.split,
                ring=self.ring,
                ulysses=self.ulysses,
                kind=self.context,
            )
        elif sequences.cu_seqlens is None:
            rows = (x.unflatten(0, (sequences.batch, -1)) for x in (q_THK, k_TGK, v_TGK))
            mixed = flash_attention(*rows)
        else:
            mixed = flash_attention_varlen(
                q_THK, k_TGK, v_TGK, sequences.cu_seqlens, max_seqlen=sequences.max_seqlen
            )
        y: Tensor = mixed.reshape(len(q_THK), -1)
        return y
