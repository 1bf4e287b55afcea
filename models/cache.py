"""Keys, values and states of sequences that are being generated, in pages, for all layers.

A sequence n lies in pages tables[n, 0], tables[n, 1], ... of every layer alike: its key j in row
j % page of page tables[n, j // page]. Who owns which page is the caller's to say (an engine);
sequences may share pages. What has one state a sequence, not a key a token, lies in a slot.

    cache = Cache(model, pages=256, page_size=16, slots=8)
    where = cache.step(starts, counts, tables, slots)
    logits = model.logits(model.advance(tokens, where)[last])

Shapes: N sequences, T new tokens of all of them, P pages, G key/value heads of a rank, K head
dimension.

Source: Kwon et al. 2023, https://arxiv.org/abs/2309.06180, section 4.
"""

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from warploom.kernels.attention import Decoding
from warploom.kernels.invariant import plain
from warploom.kernels.rope import DynamicNtk

from .architecture import Architecture
from .block import Block
from .paged import Paged
from .sequences import Sequences, rotary_angles

if TYPE_CHECKING:
    from .decoder import Decoder


def longest(a: Architecture) -> int:
    """Return how many tokens a cached sequence may have.

    Under dynamic NTK scaling no more than in the pretraining: beyond, the angles of all keys change
    with the length, and cached ones are already rotated.
    """
    scaling = a.rope_scaling
    most = scaling.original if isinstance(scaling, DynamicNtk) else a.max_positions
    return min(most, a.max_positions)


class Cache:
    """Pages and slots of every layer that a rank holds, in the model's dtype.

    Args:
        model: Whose layers; not split into pipeline stages or over context ranks.
        pages: Pages P of each layer.
        page_size: Keys of a page.
        slots: Sequences that may have a state at a time.

    Raises:
        ValueError: If a size is not positive, or the model is split over pp or cp.
    """

    def __init__(
        self, model: "Decoder", *, pages: int, page_size: int = 16, slots: int = 1
    ) -> None:
        if min(pages, page_size, slots) < 1:
            raise ValueError(
                f"pages, page_size and slots must be at least 1; got {pages}, {page_size}, {slots}"
            )
        mesh = model.mesh
        if mesh is not None and (mesh.degree("pp") > 1 or mesh.degree("cp") > 1):
            raise ValueError(
                f"generation needs whole sequences and layers on a rank: leave pp "
                f"({mesh.degree('pp')}) and cp ({mesh.degree('cp')}) out of the mesh"
            )
        self.architecture, self.size = model.architecture, model.size
        self.longest = longest(model.architecture)
        self.pages, self.page_size, self.slots = pages, page_size, slots
        self.layers: dict[int, tuple[Tensor, ...]] = {}
        for n, block in model.blocks.items():
            assert isinstance(block, Block)
            if int(n) < model.architecture.layers:  # those after predict further tokens in training
                self.layers[int(n)] = block.attention.cache(pages, page_size, slots)
        self.states = [n for n in self.layers if model.architecture.kind(n) == "ssm"]

    def copy(self, source: int, target: int) -> None:
        """Copy a page of every layer."""
        for n, tensors in self.layers.items():
            for x in () if n in self.states else tensors:
                x[target].copy_(x[source])

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the state of a sequence in every layer that has one."""
        for n in self.states:
            for x in self.layers[n]:
                x[target].copy_(x[source])

    def step(
        self, starts: Tensor, counts: Tensor, tables: Tensor, slots: Tensor | None = None
    ) -> Sequences:
        """Say where the new tokens of N sequences go.

        Args:
            starts: Tokens that each sequence has in the cache `[N]`, int64, on the CPU.
            counts: New tokens of each `[N]`, int64, at least 1, on the CPU.
            tables: Pages of each sequence in order `[N, pages]`, int32, with room for the new ones.
            slots: Slot of each `[N]`, int64; `None` for 0 to N - 1.

        Returns:
            What `Decoder.advance` takes beside the tokens.
        """
        held = next(iter(self.layers.values()))[0]
        device = held.device
        total = int(counts.sum())
        number = torch.arange(len(counts)).repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        positions = torch.arange(total) - before[number] + starts[number]
        pages = tables[number, (positions // self.page_size).to(tables.device)]
        places = pages.long() * self.page_size + (positions % self.page_size).to(tables.device)
        ends = torch.tensor([0, *accumulate(counts.tolist())], dtype=torch.int32)
        lengths = starts + counts
        if (most := int(lengths.max())) > self.longest:
            raise ValueError(
                f"a sequence of {most} tokens must be at most {self.longest}: the model's "
                f"positions, or where its angles would change with the length (dynamic NTK)"
            )
        padding = -total % self.size
        decoding = None
        if total == len(counts) and plain(held):
            decoding = Decoding(tables, lengths, self.pages, self.page_size)
        paged = Paged(
            layers=self.layers, places=places.to(device), tables=tables.to(device),
            lengths=lengths.to(torch.int32).to(device), cu_seqlens=ends.to(device),
            slots=(torch.arange(len(counts)) if slots is None else slots).to(device),
            fresh=(starts == 0).to(device), decoding=decoding,
        )  # fmt: skip
        places_of = F.pad(positions, (0, padding)).to(device)
        return Sequences(
            batch=1, angles=rotary_angles(places_of, self.architecture, most), positions=places_of,
            documents=F.pad(number, (0, padding), value=-1).to(device), count=len(counts),
            padding=padding, cu_seqlens=paged.cu_seqlens, max_seqlen=int(counts.max()), cache=paged,
        )  # fmt: skip
