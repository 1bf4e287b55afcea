"""How the flat tokens of one micro-batch fall into documents, and which of them a rank holds.

Without context parallelism a rank holds all T tokens, padded at the end to a multiple of the
tensor-parallel size; with it, a rank holds the share that `parallel/context` deals to it. Padding
is a document of its own that nothing trains, routes or counts.

Shapes: B batch, S sequence, T tokens that this rank holds, J half the head dimension, N documents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from warploom.kernels.rope import DynamicNtk, rotary_tables
from warploom.parallel.context import Split
from warploom.parallel.mesh import Mesh

from .architecture import Architecture, Kind
from .paged import Paged

Angles = Mapping[Kind, tuple[Tensor, Tensor]]
"""Cosines and sines `[T, J]` of the rotary angles, float32, for each kind of block."""


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Where the sequences lie in the tokens that this rank holds.

    Attributes:
        batch: Number B of rows of equal length; read where `cu_seqlens` and `split` are `None`.
        angles: Of the rotary positions; empty without them.
        positions: Place of each token in its document `[T]`, int64.
        documents: Number of the document of each token `[T]`, int64; -1 is padding.
        count: Documents N of the micro-batch, over all ranks.
        padding: Tokens of padding at the end, without context parallelism.
        cu_seqlens: Boundaries `[N + 1]` of the documents in the flat tokens, int32; `None` when
            each row is one document.
        max_seqlen: Length of the longest document.
        split: What the context-parallel ranks hold; `None` without context parallelism.
        indices: Place of each token in the flat batch `[T]`, int64, -1 for padding; with `split`.
        cache: Where the tokens before these lie, in generation; `None` in training.
    """

    batch: int
    angles: Angles
    positions: Tensor
    documents: Tensor
    count: int
    padding: int = 0
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    split: Split | None = None
    indices: Tensor | None = None
    cache: Paged | None = None

    def cut(self, x: Tensor, fill: int) -> Tensor:
        """Take this rank's tokens of a flat tensor `[B S]`, with `fill` where they are padding."""
        if self.indices is None:
            return F.pad(x, (0, self.padding), value=fill)
        return torch.where(self.indices < 0, fill, x[self.indices.clamp(min=0)])


def sequences(
    shape: tuple[int, int], lengths: Tensor | None, architecture: Architecture, *,
    mesh: Mesh | None, balance: str = "zigzag", device: torch.device | str = "cpu",
) -> Sequences:  # fmt: skip
    """Turn the lengths of documents into what the blocks need.

    Args:
        shape: Rows B and tokens of a row S.
        lengths: Lengths `[N]`, int32, of packed documents; `None` makes each row one.
        architecture: Sizes.
        mesh: Groups of ranks; `None` for one rank.
        balance: How the tokens are dealt to context-parallel ranks; see `Split`.
        device: Where the tensors go.

    Raises:
        ValueError: If S is longer than the positions, or the documents do not fit the rows.
    """
    batch, length = shape
    if length > architecture.max_positions:
        raise ValueError(
            f"sequence ({length}) must be at most max_positions ({architecture.max_positions}): "
            "shorten the sequence, or build the model with more positions"
        )
    sizes = [length] * batch if lengths is None else lengths.tolist()
    _check_documents(sizes, batch, length)
    tp = 1 if mesh is None else mesh.degree("tp")
    if mesh is not None and mesh.cp is not None:
        return _shared(sizes, architecture, mesh, balance, tp, device)
    padding = -batch * length % tp
    numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    documents = F.pad(numbers, (0, padding), value=-1).to(device)
    padded = [*sizes, padding] if padding else sizes
    positions = torch.cat([torch.arange(n) for n in padded]).to(device)
    made = Sequences(
        batch=batch, angles=rotary_angles(positions, architecture, max(sizes)), positions=positions,
        documents=documents, count=len(sizes), padding=padding,
    )  # fmt: skip
    if lengths is None and not padding:
        return made
    ends = torch.tensor([0, *accumulate(padded)], dtype=torch.int32, device=device)
    return replace(made, cu_seqlens=ends, max_seqlen=max(padded, default=0))


def _shared(
    sizes: list[int], architecture: Architecture, mesh: Mesh, balance: str, tp: int,
    device: torch.device | str,
) -> Sequences:  # fmt: skip
    """Deal the tokens to the context-parallel ranks."""
    split = Split.build(
        sizes, mesh.degree("cp"), multiple=tp, balance=balance, ulysses=mesh.degree("uly")
    )
    rank = mesh.coordinate("cp")
    indices = split.indices(rank)
    numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    documents = torch.where(indices < 0, -1, numbers[indices.clamp(min=0)])
    positions = split.positions(rank).to(device)
    return Sequences(
        batch=1, angles=rotary_angles(positions, architecture, max(sizes)), positions=positions,
        documents=documents.to(device), count=len(sizes), split=split, indices=indices.to(device),
    )  # fmt: skip


def rotary_angles(positions: Tensor, a: Architecture, longest: int) -> Angles:
    """Tabulate the angles of tokens for each kind of block.

    Args:
        positions: Place of each token in its document `[T]`, integers.
        a: Sizes and choices.
        longest: Tokens of the longest document, which dynamic NTK scaling goes by.
    """
    if a.positions != "rotary":
        return {}
    scaling = a.rope_scaling
    if isinstance(scaling, DynamicNtk):
        scaling = replace(scaling, length=longest)
    full = rotary_tables(positions, a.rotated, base=a.rope_base, scaling=scaling)
    if a.sliding_rope_base is None:
        return {"full": full, "sliding": full}
    sliding = rotary_tables(positions, a.rotated, base=a.sliding_rope_base)
    return {"full": full, "sliding": sliding}


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
