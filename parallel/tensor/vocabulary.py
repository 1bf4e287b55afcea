"""Embedding and head whose vocabulary is sharded over a tensor-parallel group.

R ranks, T tokens, D width, V vocabulary, W = ceil(V / R) rows a rank; the last ranks' rows beyond V
are padding: they are zero, have no piece and never take part.

                      weight   input      output     forward         backward
    VocabEmbedding    [W, D]   [T] ids    [T/R, D]   reduce-scatter  all-gather dy
      not sequence    [W, D]   [T] ids    [T, D]     all-reduce      nothing
    VocabHead         [W, D]   [T/R, D]   [T, V]     gather x, join  own rows, reduce-scatter dx
      not sequence    [W, D]   [T, D]     [T, V]     join            own rows, all-reduce dx

`VocabHead.loss` never forms [T, V]: see `loss.py`.

Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3 (input and output
embedding).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..collectives import Group, copy, gather, join, place, reduce, scatter
from ..initialise import draw_seed, normal_
from ..sharding import Layout, rows
from .loss import linear_cross_entropy
from .product import linear


class _Vocabulary(nn.Module):
    """The `[W, D]` rows of the vocabulary that this rank holds."""

    def __init__(self, vocabulary: int, width: int, *, group: Group) -> None:
        super().__init__()
        rank, size = place(group)
        self.group = group
        self.vocabulary = vocabulary
        self.held = -(-vocabulary // size)
        self.start = min(rank * self.held, vocabulary)
        self.stop = min(self.start + self.held, vocabulary)
        self.width = width

    def _rows(self) -> nn.Parameter:
        weight = nn.Parameter(torch.empty(self.held, self.width))
        if not weight.is_meta:
            normal_(weight, self.declare_layouts()["weight"], seed=draw_seed(), std=0.02)
        return weight

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.width:
            raise ValueError(
                f"{type(self).__name__}: x must have {self.width} features, its shape is "
                f"{[*x.shape]}"
            )

    def declare_layouts(self) -> dict[str, Layout]:
        """Say which rows of the vocabulary this rank holds."""
        logical = (self.vocabulary, self.width)
        piece = rows("weight", logical, self.start, self.stop)
        pieces = (piece,) if self.stop > self.start else ()
        return {"weight": Layout((self.held, self.width), pieces)}


class VocabEmbedding(_Vocabulary):
    """Look up token vectors in a sharded vocabulary.

    Args:
        vocabulary: Vocabulary V, over all ranks; it need not be divisible.
        width: Width D.
        group: The tensor-parallel process group; `None` for one rank.
        sequence_parallel: Whether the output is sharded over its tokens.
    """

    def __init__(
        self, vocabulary: int, width: int, *, group: Group, sequence_parallel: bool = True
    ) -> None:
        super().__init__(vocabulary, width, group=group)
        self.leave = scatter if sequence_parallel else reduce
        self.weight = self._rows()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ids `[T]` (int64) to `[T/R, D]` (or `[T, D]`).

        Raises:
            IndexError: On every rank, if an id is outside the vocabulary (on CUDA a device assert).
        """
        if self.group is None:
            return F.embedding(tokens, self.weight)
        outside = (tokens < self.start) | (tokens >= self.stop)
        unknown = (tokens < 0) | (tokens >= self.vocabulary)
        index = (tokens - self.start).masked_fill(outside, 0).masked_fill(unknown, self.held)
        local = F.embedding(index, self.weight)
        return self.leave(local.masked_fill(outside[..., None], 0.0), self.group)


class VocabHead(_Vocabulary):
    """Map hidden states to logits, or to a loss without the logits.

    Args:
        vocabulary: Vocabulary V, over all ranks; it need not be divisible.
        width: Width D.
        group: The tensor-parallel process group; `None` for one rank.
        sequence_parallel: Whether the input is sharded over its tokens.
        tied: The embedding whose weight this head uses; `None` for a weight of its own.
        softcap: Bound c of the logits, c tanh(logit / c); `None` for none.

    Raises:
        ValueError: If the tied embedding has another vocabulary or width.
    """

    def __init__(
        self, vocabulary: int, width: int, *, group: Group, sequence_parallel: bool = True,
        tied: VocabEmbedding | None = None, softcap: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(vocabulary, width, group=group)
        self.softcap = softcap
        self.enter = gather if sequence_parallel else copy
        if tied is not None and (tied.vocabulary, tied.width) != (vocabulary, width):
            raise ValueError(
                f"a tied head must have the embedding's vocabulary and width "
                f"({tied.vocabulary}, {tied.width}), got ({vocabulary}, {width})"
            )
        self.weight = tied.weight if tied is not None else self._rows()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[T/R, D]` (or `[T, D]`) to logits `[T, V]`, equal on all ranks.

        Raises:
            ValueError: If `x` has another width.
        """
        self._check(x)
        if self.group is None and self.softcap is None:
            return linear(x, self.weight)
        return self.project(self.enter(x, self.group))

    def project(self, x: Tensor) -> Tensor:
        """Map `[T, D]`, whole and equal on all ranks, to logits `[T, V]`, equal on all ranks."""
        logits = linear(x, self.weight)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.group is None:
            return logits
        return join(logits.t().contiguous(), self.group).t()[:, : self.vocabulary]

    def loss(
        self, x: Tensor, targets: Tensor, *, z_loss: bool = False
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return the `(sum, count)` of the cross-entropy, and with `z_loss` that of lse^2.

        Args:
            x: Hidden states `[T/R, D]` (or `[T, D]`).
            targets: Ids `[T]` int64, equal on all ranks; -100 is not trained.
            z_loss: Whether the second pair is wanted.

        Raises:
            ValueError: If `x` has another width, or not one row for each target.
        """
        self._check(x)
        size = 1 if self.group is None or self.enter is copy else self.group.size()
        if x.shape[0] * size != targets.shape[0]:
            raise ValueError(
                f"VocabHead: hidden states ({x.shape[0]} rows on each of {size} ranks that hold "
                f"parts) must be as many as targets ({targets.shape[0]})"
            )
        hidden = self.enter(x, self.group)
        weight = self.weight[: self.stop - self.start]
        return linear_cross_entropy(
            hidden, weight, targets, group=self.group, start=self.start, softcap=self.softcap,
            z_loss=z_loss,
        )  # fmt: skip
