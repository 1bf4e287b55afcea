"""A decoder-only language model of the Llama family, sharded over a tensor-parallel group.

    embedding -> L x (norm, attention, norm, feed-forward) -> norm -> head

Between the blocks a rank holds T/R of the flat tokens. A block hands on what it adds and the stream
it is to be added to, apart: the next norm adds them in the kernel that normalises.

Shapes: B batch, S sequence, T = B x S tokens, D width, V vocabulary, L layers, R tensor-parallel
ranks.

Source: Touvron et al. 2023, https://arxiv.org/abs/2302.13971, section 2.2; Radford et al. 2019,
"Language Models are Unsupervised Multitask Learners", section 2.3 (residual projections start
1/sqrt(2 L) smaller).
"""

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from warploom.kernels.rope import rotary_tables
from warploom.parallel import sharding
from warploom.parallel.collectives import Group
from warploom.parallel.initialise import normal_
from warploom.parallel.mesh import Mesh
from warploom.parallel.step import Term
from warploom.parallel.tensor import VocabEmbedding, VocabHead

from .architecture import Architecture
from .attention import Attention, Sequences
from .batch import Batch
from .feed_forward import FeedForward
from .norm import RMSNorm

INIT_STD = 0.02
IGNORED = -100  # the target of a position that is not trained
RECOMPUTE = ("none", "full")


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    Args:
        architecture: Sizes.
        group: The tensor-parallel process group; `None` for one rank.
    """

    def __init__(self, architecture: Architecture, *, group: Group) -> None:
        super().__init__()
        a = architecture
        self.attention_norm = RMSNorm(a.width, eps=a.norm_eps, group=group)
        self.attention = Attention(
            a.width,
            a.heads,
            a.kv_heads,
            a.head_dim,
            group=group,
            qk_norm=a.qk_norm,
            norm_eps=a.norm_eps,
        )
        self.feed_forward_norm = RMSNorm(a.width, eps=a.norm_eps, group=group)
        self.feed_forward = FeedForward(a.width, a.hidden, group=group)

    def forward(
        self, added: Tensor, stream: Tensor | None, sequences: Sequences
    ) -> tuple[Tensor, Tensor]:
        """Map what the last block adds, and the stream, to the same of this block.

        Args:
            added: `[T/R, D]`, not yet in the stream.
            stream: Residual stream `[T/R, D]`; `None` at the start of the model.
            sequences: Where the sequences lie in the T tokens.
        """
        h, stream = self.attention_norm.add(added, stream)
        h, stream = self.feed_forward_norm.add(self.attention(h, sequences), stream)
        return self.feed_forward(h), stream

    def whole(self, x: Tensor, sequences: Sequences) -> Tensor:
        """Map the stream `[T/R, D]` to the stream: one tensor to keep where a block recomputes."""
        added, stream = self.forward(x, None, sequences)
        return added + stream


class Decoder(nn.Module):
    """Llama-family language model; `Decoder.create` also draws its weights.

    Memory of the parameters is allocated but not written: call `initialise`, or load into it.

    Args:
        architecture: Sizes.
        mesh: Groups of ranks; layers are split over `mesh.tp`. `None` for one rank.
        names: From a logical name here (`blocks.0.attention.qkv.q.weight`) to the one that
            `layouts` gives; by default the same.
        recompute: `full` keeps only the input of each block and runs it again in the backward
            pass; `none` keeps what the backward pass needs.
        z_loss: Weight of the term sum(lse^2); 0 leaves the term out.
        dtype: Of parameters and activations.
        device: Where the parameters are; `meta` allocates nothing.

    Raises:
        ValueError: If the tensor-parallel size does not divide heads, kv_heads or hidden, the
            mesh splits what a decoder cannot, `recompute` is unknown, or `z_loss` is negative.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        mesh: Mesh | None = None,
        names: Callable[[str], str] | None = None,
        recompute: str = "none",
        z_loss: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}; got {recompute!r}")
        if z_loss < 0:
            raise ValueError(f"z_loss must be at least 0; got {z_loss}")
        for axis in ("cp", "pp"):
            if mesh is not None and mesh.degree(axis) > 1:
                raise ValueError(
                    f"Decoder splits over tp, dp and rep; the mesh has {axis}{mesh.degree(axis)}: "
                    f"leave {axis} out of the mesh"
                )
        a = architecture
        group = None if mesh is None else mesh.tp
        self.architecture, self.mesh, self.names = architecture, mesh, names
        self.recompute, self.z_loss = recompute, z_loss
        self.size = 1 if group is None else group.size()
        with torch.device("meta"):
            self.embedding = VocabEmbedding(a.vocabulary, a.width, group=group)
            self.blocks = nn.ModuleList(Block(a, group=group) for _ in range(a.layers))
            self.norm = RMSNorm(a.width, eps=a.norm_eps, group=group)
            tied = self.embedding if a.tied else None
            self.head = VocabHead(a.vocabulary, a.width, group=group, tied=tied)
        self.to(dtype=dtype).to_empty(device=device)
        if a.tied:  # a new device makes two parameters of one
            self.head.weight = self.embedding.weight

    @classmethod
    def create(
        cls,
        architecture: Architecture,
        *,
        seed: int = 0,
        mesh: Mesh | None = None,
        names: Callable[[str], str] | None = None,
        recompute: str = "none",
        z_loss: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Decoder":
        """Build a decoder and draw its weights; the arguments are those of the class."""
        model = cls(
            architecture,
            mesh=mesh,
            names=names,
            recompute=recompute,
            z_loss=z_loss,
            dtype=dtype,
            device=device,
        )
        return model.initialise(seed)

    def layouts(self) -> dict[str, sharding.Layout]:
        """Return how each parameter is made of logical tensors, by path."""
        return sharding.layouts(self, self.names)

    def logical_layouts(self) -> dict[str, sharding.Layout]:
        """Return the same with the names that logical tensors have in this module."""
        return sharding.layouts(self)

    @torch.no_grad()
    def initialise(self, seed: int) -> "Decoder":
        """Draw every weight from N(0, 0.02), residual projections 1/sqrt(2 L) smaller; norms are 1.

        The values depend on the seed and the logical names alone: on no mesh, and not on `names`.
        """
        made = self.logical_layouts()
        residual = INIT_STD / (2 * self.architecture.layers) ** 0.5
        for path, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            narrow = path.endswith(("attention.out.weight", "feed_forward.down.weight"))
            normal_(parameter, made[path], seed=seed, std=residual if narrow else INIT_STD)
        return self

    def forward(self, tokens: Tensor, document_lengths: Tensor | None = None) -> Tensor:
        """Return the logits of every position, on every rank.

        Args:
            tokens: Ids `[B, S]`, int64, equal on all tensor-parallel ranks.
            document_lengths: Lengths `[N]` int32 of packed documents; see `Batch`.

        Returns:
            `[B, S, V]` in the dtype of the parameters.

        Raises:
            ValueError: If S is longer than the positions, or the documents do not fit the rows.
        """
        hidden, _ = self._hidden(tokens, document_lengths)
        logits: Tensor = self.head(hidden)[: tokens.numel()]
        return logits.view(*tokens.shape, -1)

    def loss(self, batch: Batch) -> tuple[Term, ...]:
        """Return the summed cross-entropy of the trained positions, and z-loss when it is asked.

        Never forms `[T, V]`. Sums are in nats; nothing is divided.

        Raises:
            ValueError: As `forward`, or if the targets' shape differs from the tokens'.
        """
        if batch.targets.shape != batch.tokens.shape:
            raise ValueError(
                f"targets must have the shape of tokens {tuple(batch.tokens.shape)}; "
                f"got {tuple(batch.targets.shape)}"
            )
        hidden, padding = self._hidden(batch.tokens, batch.document_lengths)
        targets = F.pad(batch.targets.flatten(), (0, padding), value=IGNORED)
        pairs = self.head.loss(hidden, targets, z_loss=self.z_loss > 0)
        named = zip(("language_model", "z_loss"), pairs, (1.0, self.z_loss), strict=False)
        return tuple(Term(name, total, count, weight) for name, (total, count), weight in named)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return the counts of the terms that `loss` will give, 0-dim, without a forward pass."""
        trained = (batch.targets != IGNORED).sum()
        names = ("language_model", "z_loss") if self.z_loss > 0 else ("language_model",)
        return dict.fromkeys(names, trained)

    def _hidden(self, tokens: Tensor, lengths: Tensor | None) -> tuple[Tensor, int]:
        """Run the blocks: final states `[(T + padding)/R, D]`, and how many tokens of padding."""
        padding = -tokens.numel() % self.size
        sequences = self._sequences(tokens, lengths, padding)
        x = self.embedding(F.pad(tokens.flatten(), (0, padding)))
        stream: Tensor | None = None
        for block in self.blocks:
            if self.recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(block.whole, x, sequences, use_reentrant=False)
            else:
                x, stream = block(x, stream, sequences)
        return self.norm.add(x, stream)[0], padding

    def _sequences(self, tokens: Tensor, lengths: Tensor | None, padding: int) -> Sequences:
        """Turn lengths of documents into boundaries, positions and rotary tables.

        Padding up to a multiple of the tensor-parallel size is a document of its own.
        """
        batch, length = tokens.shape
        a = self.architecture
        if length > a.max_positions:
            raise ValueError(
                f"sequence ({length}) must be at most max_positions ({a.max_positions}): "
                "shorten the sequence, or build the model with more positions"
            )
        if lengths is None and not padding:
            positions = torch.arange(length, device=tokens.device).repeat(batch)
            return Sequences(batch, *self._tables(positions))
        sizes = [length] * batch if lengths is None else lengths.tolist()
        _check_documents(sizes, batch, length)
        sizes = sizes + [padding] if padding else sizes
        ends = list(accumulate(sizes))
        positions = torch.cat([torch.arange(n) for n in sizes]).to(tokens.device)
        boundaries = torch.tensor([0, *ends], dtype=torch.int32, device=tokens.device)
        return Sequences(batch, *self._tables(positions), boundaries, max(sizes))

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        a = self.architecture
        cos_TJ, sin_TJ = rotary_tables(positions, a.head_dim, base=a.rope_base)
        return cos_TJ, sin_TJ


def _check_documents(sizes: list[int], batch: int, length: int) -> None:
    """Refuse documents that do not fill the rows one after the other."""
    if sum(sizes) != batch * length or min(sizes) < 1:
        raise ValueError(
            f"document_lengths must be positive and sum to the batch's tokens "
            f"({batch} x {length} = {batch * length}); got {len(sizes)} lengths, the shortest "
            f"{min(sizes)}, that sum to {sum(sizes)}"
        )
    starts = set(accumulate(sizes))
    crossed = [row for row in range(1, batch) if row * length not in starts]
    if crossed:
        raise ValueError(
            f"no document may cross a row: no document ends with row {crossed[0] - 1} "
            f"({length} tokens a row)"
        )
