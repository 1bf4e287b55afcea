"""Keys and values in pages: hidden states of a sequence in chunks are those of the whole pass."""

from dataclasses import replace

import pytest
import torch

from warploom.kernels.rope import DynamicNtk
from warploom.models.architecture import Architecture
from warploom.models.cache import Cache, longest
from warploom.models.decoder import Decoder
from warploom.models.families import bamba, deepseek_v3, llama, mixtral, qwen3

SIZES = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 48}
SIZES |= {"vocabulary": 90, "max_positions": 64}
CASES = {
    "llama": llama.tiny(),
    "qwen3": qwen3.tiny(),
    "mixtral": mixtral.tiny(),
    "windows": Architecture(
        **SIZES, kinds=("sliding", "full"), window=5, softcap=3.0, sinks=True, norm_at="both"
    ),
    "positions": Architecture(
        **SIZES, positions="learned", norm="layer", activation="gelu", qkv_bias=True, mlp_bias=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_chunks_through_pages_give_the_logits_of_the_whole(name):
    model = Decoder.create(CASES[name], seed=1, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():  # norms, biases and sinks too
            p.add_(torch.randn(p.shape, dtype=p.dtype) / 10)
        g = torch.Generator().manual_seed(0)
        vocabulary = model.architecture.vocabulary
        rows = [torch.randint(vocabulary, (n,), generator=g) for n in (23, 9, 14)]
        want = [model(row[None])[0] for row in rows]
        cache = Cache(model, pages=20, page_size=4, slots=3)
        for tensors in cache.layers.values():
            for x in tensors:
                x.fill_(torch.nan)
        free = torch.randperm(20, generator=g, dtype=torch.int32)
        tables = free[:18].view(3, 6)
        got = [[], [], []]
        place = [0, 0, 0]
        while live := [n for n in range(3) if place[n] < len(rows[n])]:
            counts = [min(1 + (place[n] + n) % 5, len(rows[n]) - place[n]) for n in live]
            tokens = [rows[n][place[n] : place[n] + c] for n, c in zip(live, counts, strict=True)]
            where = cache.step(
                torch.tensor([place[n] for n in live]), torch.tensor(counts), tables[live]
            )
            logits = model.logits(model.advance(torch.cat(tokens), where))
            for n, c, part in zip(live, counts, logits.split(counts), strict=True):
                got[n].append(part)
                place[n] += c
    for n in range(3):
        torch.testing.assert_close(torch.cat(got[n]), want[n], atol=1e-10, rtol=0)


def test_a_sequence_longer_than_its_angles_are_made_for_is_refused():
    a = replace(CASES["llama"], rope_scaling=DynamicNtk(2.0, original=16, length=16))
    assert (longest(a), longest(replace(a, max_positions=8))) == (16, 8)
    cache = Cache(Decoder.create(a), pages=4, page_size=8)
    tables = torch.arange(4, dtype=torch.int32)[None]
    cache.step(torch.tensor([0]), torch.tensor([16]), tables)
    with pytest.raises(ValueError, match="a sequence of 17 tokens must be at most 16: the model"):
        cache.step(torch.tensor([16]), torch.tensor([1]), tables)


@pytest.mark.parametrize("made", [bamba.tiny(), deepseek_v3.tiny()], ids=["states", "latent"])
def test_a_copy_goes_on_as_its_source(made):
    """Keys, values and states of every layer, and no more layers than those."""
    model = Decoder.create(made, seed=1, dtype=torch.float64).requires_grad_(False)
    row = torch.arange(11) * 7 % 250
    cache = Cache(model, pages=6, page_size=4, slots=2)
    assert sorted(cache.layers) == [*range(made.layers)]
    for tensors in cache.layers.values():
        for x in tensors:
            x.fill_(torch.nan)
    tables = torch.tensor([[5, 3, 0]], dtype=torch.int32)
    start, some = torch.tensor([0]), torch.tensor([6])
    model.advance(row[:6], cache.step(start, some, tables, torch.tensor([0])))
    cache.copy(5, 1), cache.copy(3, 4), cache.copy_slot(0, 1)
    for tensors in cache.layers.values():
        for x in tensors:  # the source is gone
            x[[0]] = torch.nan
            if len(x) > 2:
                x[[5, 3]] = torch.nan
    tables = torch.tensor([[1, 4, 2]], dtype=torch.int32)
    where = cache.step(some, torch.tensor([5]), tables, torch.tensor([1]))
    logits = model.logits(model.advance(row[6:], where))
    torch.testing.assert_close(logits, model(row[None])[0, 6:], atol=1e-10, rtol=0)
