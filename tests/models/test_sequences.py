"""What a context-parallel rank is told of its tokens is what one process is told of them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from warploom.kernels.rope import DynamicNtk
from warploom.models.families import llama
from warploom.models.sequences import sequences

MADE = replace(llama.tiny(), rope_scaling=DynamicNtk(4.0, 8, 8), max_positions=64)


@pytest.mark.parametrize("balance", ["zigzag", "contiguous", "document"])
def test_angles_go_by_the_longest_document_of_all_ranks(balance):
    lengths = torch.tensor([29, 3, 16, 16], dtype=torch.int32)
    whole = sequences((2, 32), lengths, MADE, mesh=None)
    for rank in range(2):
        mesh = SimpleNamespace(
            cp=object(),
            degree=lambda axis: 2 if axis == "cp" else 1,
            coordinate=lambda axis, rank=rank: rank if axis == "cp" else 0,
        )
        own = sequences((2, 32), lengths, MADE, mesh=mesh, balance=balance)
        held = own.indices >= 0
        assert held.any()
        taken = own.indices[held]
        for mine, all_ in zip(own.angles["full"], whole.angles["full"], strict=True):
            assert torch.equal(mine[held], all_[taken])
        assert torch.equal(own.positions[held], whole.positions[taken])
        assert torch.equal(own.documents[held], whole.documents[taken])
        assert (own.documents[~held] == -1).all()
