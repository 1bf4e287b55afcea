"""In the batch-invariant mode the logits of a sequence are the same bits, computed any way."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from warploom.kernels.invariant import batch_invariant
from warploom.models.architecture import Architecture
from warploom.models.cache import Cache
from warploom.models.decoder import Decoder
from warploom.models.families import (
    bamba,
    deepseek_v3,
    gemma3,
    gpt2,
    gpt_oss,
    llama,
    mixtral,
    qwen2_moe,
)
from warploom.parallel.mesh import Mesh

SIZES = {"layers": 2, "width": 48, "heads": 6, "kv_heads": 3, "head_dim": 8, "hidden": 60}
SIZES |= {"vocabulary": 90, "max_positions": 400}
WINDOWS = Architecture(
    **SIZES,
    kinds=("sliding", "full"),
    window=5,
    softcap=3.0,
    logit_softcap=9.0,
    sinks=True,
    norm_at="both",
    activation="geglu",
)
MODULES = (bamba, deepseek_v3, gemma3, gpt2, gpt_oss, llama, mixtral, qwen2_moe)
CASES = {"windows": WINDOWS} | {m.FAMILY.model_type: m.tiny() for m in MODULES}
LENGTHS = (13, 5, 270)


def _model(name, dtype, mesh=None):
    model = Decoder.create(
        replace(CASES[name], max_positions=400), seed=1, dtype=dtype, mesh=mesh
    ).requires_grad_(False)
    for p in model.parameters():  # norms, biases and sinks too
        p.mul_(3).add_(torch.arange(p.numel(), dtype=dtype).view(p.shape).sin() / 20)
    return model


def _ways(model, lengths=LENGTHS):
    """Compute logits of each sequence alone, packed, in a batch, and in chunks through pages."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(model.architecture.vocabulary, (n,), generator=g) for n in lengths]
    alone = [model(row[None])[0] for row in rows]
    documents = torch.tensor(lengths, dtype=torch.int32)
    packed = model(torch.cat(rows)[None], documents)[0].split(lengths)
    batch = model(torch.stack([rows[2].flip(0), rows[2]]))[1]
    cache = Cache(model, pages=90, page_size=4, slots=3)
    free = torch.randperm(90, generator=g, dtype=torch.int32)
    tables, paged, place = torch.zeros(3, 75, dtype=torch.int32), [[], [], []], [0, 0, 0]
    for n, (a, b) in enumerate(((0, 6), (6, 9), (9, 82))):
        tables[n, : b - a] = free[a:b]
    while live := [n for n in range(3) if place[n] < lengths[n]]:
        counts = [min(1 + (7 * place[n] + n) % (5, 2, 91)[n], lengths[n] - place[n]) for n in live]
        tokens = [rows[n][place[n] : place[n] + c] for n, c in zip(live, counts, strict=True)]
        starts = torch.tensor([place[n] for n in live])
        where = cache.step(starts, torch.tensor(counts), tables[live], torch.tensor(live))
        logits = model.logits(model.advance(torch.cat(tokens), where))
        for n, c, part in zip(live, counts, logits.split(counts), strict=True):
            paged[n].append(part)
            place[n] += c
    found = [*packed, batch, *(torch.cat(parts) for parts in paged)]
    return list(zip(found, [*alone, alone[2], *alone], strict=True))


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in CASES), ("llama", torch.bfloat16)]
)
def test_company_chunks_and_pages_leave_no_trace(name, dtype):
    model = _model(name, dtype)
    with batch_invariant():
        pairs = _ways(model)
    for n, (found, want) in enumerate(pairs):
        assert torch.equal(found, want), n
    if name == "llama" and dtype == torch.float32:  # and not by itself
        assert not all(torch.equal(*pair) for pair in _ways(model))


def test_the_mode_is_the_model_all_the_same():
    model, tokens = _model("llama", torch.float32), torch.arange(40)[None]
    found = []
    for mode in (nullcontext(), batch_invariant()):
        model.requires_grad_(True).zero_grad()
        with mode:
            logits = model(tokens)
            logits.square().mean().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def _split():
    model = _model("windows", torch.float32, Mesh.build(f"tp{dist.get_world_size()}"))
    with batch_invariant():
        pairs = _ways(model, (7, 3, 16))
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.slow
def test_three_tensor_parallel_ranks_sum_in_one_order(pool):
    pool(3, _split)
