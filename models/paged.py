"""Where the keys, values and states of the sequences of one pass lie; see `cache.py`.

Shapes: N sequences, T new tokens of all of them, P pages, G key/value heads of a rank, K head
dimension.

Source: Kwon et al. 2023, https://arxiv.org/abs/2309.06180, section 4.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from warploom.kernels.attention import Decoding, paged_attention


@dataclass(frozen=True, slots=True, eq=False)
class Paged:
    """Where the keys and values of this pass's sequences lie.

    Attributes:
        layers: Tensors of each layer by its number: pages `[P, page, ...]`, or states by slot.
        places: Row of each new token `[T]` in the flattened pages, int64.
        tables: Pages of each sequence `[N, pages]`, int32.
        lengths: Keys of each sequence `[N]`, int32, with the new ones.
        cu_seqlens: Boundaries of the new tokens `[N + 1]`, int32.
        slots: Slot of each sequence `[N]`, int64.
        fresh: Whether a sequence begins with these tokens `[N]`, so that its state is zero.
        decoding: The same, where each sequence has one new token, for the operators of `cpu`.
    """

    layers: dict[int, tuple[Tensor, ...]]
    places: Tensor
    tables: Tensor
    lengths: Tensor
    cu_seqlens: Tensor
    slots: Tensor
    fresh: Tensor
    decoding: Decoding | None = None

    def write(self, pages: Tensor, rows: Tensor) -> None:
        """Put the new tokens' rows `[T, ...]`, without padding, into pages `[P, page, ...]`."""
        pages.flatten(0, 1).index_copy_(0, self.places, rows[: len(self.places)])

    def attend(self, layer: int, q_THK: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Keep new keys `[T, G, K]` and values, and attend to all of each sequence: `[T, H, L]`."""
        (k_pages, v_pages), n, rows = self.layers[layer], self.places.shape[0], q_THK.shape[0]
        if rows > n:  # padding, which tensor-parallel ranks share
            q_THK, k, v = q_THK[:n], k[:n], v[:n]
        mixed: Any
        if self.decoding is not None and self.decoding.serves(q_THK, k_pages, v_pages):
            mixed = self.decoding.attend(q_THK, k, v, k_pages, v_pages, **options)
        else:
            self.write(k_pages, k)
            self.write(v_pages, v)
            where = self.tables, self.lengths, self.cu_seqlens
            mixed = paged_attention(q_THK, k_pages, v_pages, *where, **options)
        return F.pad(mixed, (0, 0, 0, 0, 0, rows - n)) if rows > n else mixed
