"""Multi-token prediction: further tokens at each position while training, each by a block more.

    h_0 = the normalised stream of the last block
    h_k = norm_k(block_k(project_k [norm(embedding of the token k ahead) ; norm(h_{k-1})]))

h_k goes through the head of the model to the token k + 1 ahead, and to the next depth, each time
with the logits' factor, as h_0 has it; embedding and head are those of the model. Block k is number
L + k - 1, as in the Hub's folders. A position whose token ahead is beyond the end of its document
trains nothing, and no expert serves it; only later positions of its document, which are beyond the
end too, see it.

    loss = weight / depths  x  sum over the depths of their mean cross-entropies

Shapes: B rows of S tokens, T tokens of a rank, D width, R tensor-parallel ranks, L layers.

Source: DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437, section 2.2; the published weights have
the embedding before the hidden state, and take both after the norm that precedes the head.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from warploom.parallel.mesh import Mesh

from .architecture import Architecture
from .batch import IGNORED, Batch
from .block import Block, Sums
from .latent import ReplicatedLinear
from .norm import block_norm
from .sequences import Sequences


class Prediction(Block):
    """A block that goes on from the hidden states of the depth before and the tokens ahead.

    Args:
        a: Sizes and choices.
        layer: Number of the block, from the number of layers on.
        mesh: Groups of ranks; `None` for one rank.
        options: As of `Block`.
    """

    def __init__(self, a: Architecture, layer: int, *, mesh: Mesh | None, **options: Any) -> None:
        super().__init__(a, layer, mesh=mesh, **options)
        group = None if mesh is None else mesh.tp
        self.embedding_norm = block_norm(a, group=group)
        self.hidden_norm = block_norm(a, group=group)
        self.project = ReplicatedLinear(2 * a.width, a.width, group=group)
        self.norm = block_norm(a, group=group)

    def forward(
        self, added: Tensor, stream: Tensor | None, sequences: Sequences
    ) -> tuple[Tensor, Tensor, Sums]:
        """Map the embeddings of the tokens ahead, and hidden states, to hidden states.

        Args:
            added: Embeddings `[T/R, D]`.
            stream: Normalised hidden states `[T/R, D]` of the depth before.
            sequences: Where the sequences lie in the T tokens.

        Returns:
            Normalised hidden states, the stream, and the sums of the routers' losses by name.
        """
        assert stream is not None
        both = torch.cat((self.embedding_norm(added), self.hidden_norm(stream)), -1)
        added, stream, sums = super().forward(self.project(both), None, sequences)
        return *self.norm.add(added, stream), sums


def ahead(x: Tensor, lengths: Tensor | None, distance: int, fill: int) -> Tensor:
    """Take at each position what lies ahead of it in its document.

    Args:
        x: Of the whole batch `[B, S]`.
        lengths: Lengths `[N]` of its documents; `None` where each row is one.
        distance: How far ahead, in tokens.
        fill: Stands beyond the end of a document.

    Returns:
        `[B S]`.
    """
    sizes = torch.full((x.shape[0],), x.shape[1]) if lengths is None else lengths
    number = torch.arange(len(sizes)).repeat_interleave(sizes.cpu()).to(x.device)
    y = torch.full_like(x.flatten(), fill)
    same = number[distance:] == number[:-distance]
    y[:-distance] = torch.where(same, x.flatten()[distance:], fill)
    return y


def targets_ahead(batch: Batch, where: Sequences, depths: int) -> list[Tensor]:
    """Return what each depth is trained on `[T]` at this rank's tokens; -100 is nothing."""
    args, distances = (batch.targets, batch.document_lengths), range(1, depths + 1)
    return [where.cut(ahead(*args, distance, IGNORED), IGNORED) for distance in distances]


def predict(
    run: Callable[..., tuple[Tensor, Tensor, Sums]], blocks: Iterable[Prediction],
    embed: Callable[[Tensor, Sequences], Tensor], scaled: Callable[[Tensor], Tensor],
    hidden: Tensor, batch: Batch, where: Sequences,
) -> Iterator[tuple[Tensor, Sums]]:  # fmt: skip
    """Yield the hidden states `[T/R, D]` of each depth, for the head, and its routers' sums.

    Args:
        run: Calls a block, and says what of it runs again in the backward pass.
        blocks: One a depth.
        embed: Maps ids `[T]` to embeddings `[T/R, D]`.
        scaled: Multiplies by the factor of the logits.
        hidden: What the head of the model takes `[T/R, D]`.
        batch: The whole micro-batch.
        where: Which of its tokens are here.
    """
    for distance, block in enumerate(blocks, 1):
        ids = where.cut(ahead(batch.tokens, batch.document_lengths, distance, -1), -1)
        own = replace(where, documents=where.documents.masked_fill(ids < 0, -1))
        normed, _, sums = run(block, embed(ids.clamp(min=0), where), hidden, own)
        yield (hidden := scaled(normed)), sums
