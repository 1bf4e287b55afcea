"""Suites `attention` and `paged`, by every backend, beside PyTorch's SDPA.

FLOPs are those of the pairs that a query sees: 2 (K + L) a pair and head forward, and 2 (3 K + 2 L)
backward, where the scores are made again. Eager is `scaled_dot_product_attention` as PyTorch
chooses; of documents with the mask that keeps them apart on the CPU, and a call a document on a
GPU, where that mask would be a gibibyte. Eager of pages gathers them to the longest sequence's
length and masks what is behind each; the roof is one read of the keys and values that are there.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from warploom.kernels import backends
from warploom.kernels.attention import (
    Scores,
    flash_attention,
    flash_attention_varlen,
    paged_attention,
)

from .cases import Case, Scale, Work

_SHAPES: Mapping[Scale, tuple[tuple[int, int, int, int, tuple[int, ...]], ...]] = MappingProxyType(
    {
        "tiny": ((4, 2, 64, 64, (256, 1024)), (4, 4, 96, 64, (256,))),
        "cpu": ((9, 3, 64, 64, (512, 2048)), (4, 4, 192, 128, (1024,))),
        "cuda": (
            (32, 8, 64, 64, (2048, 8192, 32_768)),
            (32, 8, 128, 128, (2048, 4096, 8192, 16_384, 32_768)),
            (16, 16, 192, 128, (2048, 8192, 32_768)),
        ),
    }
)
"""Heads of queries and of keys, their widths K and L, and the tokens."""

_PAGED: Mapping[Scale, tuple[tuple[int, int, int, int, int, int, int], ...]] = MappingProxyType(
    {
        "tiny": ((4, 2, 64, 64, 4, 1, 256), (4, 2, 64, 64, 1, 64, 256)),
        "cpu": ((9, 3, 64, 64, 16, 1, 1024), (9, 3, 64, 64, 2, 256, 1024)),
        "cuda": (
            (32, 8, 128, 128, 64, 1, 8192),
            (32, 8, 128, 128, 4, 512, 16_384),
            (32, 8, 128, 128, 1, 1, 131_072),
        ),
    }
)
"""As above, then sequences, queries of each (one when decoding), and keys of the longest."""
_PAGE = 64  # keys


def _sdpa(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGL: Tensor, **rest: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BSGK, v_BSGL))
    grouped = q.shape[1] != k.shape[1]
    out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **rest)
    return out.transpose(1, 2)


def _work(pairs: int, shape: Sequence[int], tokens: int, item: int) -> tuple[Work, Work]:
    heads, groups, key, value = shape
    moved = tokens * (heads * (key + value) + groups * (key + value)) * item
    rest = 4.0 * tokens * heads  # the log-sum-exp
    forward = Work(moved + rest, 2.0 * pairs * heads * (key + value), products=True)
    flops = 2.0 * pairs * heads * (3 * key + 2 * value)
    return forward, Work(2 * moved + rest, flops, products=True)


def _key(causal: bool, key: int, value: int, tokens: int) -> str:
    return backends.case_key(causal=causal, head=key, value=value, tokens=tokens)


def _dense(shape: Sequence[int], tokens: int, causal: bool, item: int) -> Case:
    heads, groups, key, value = shape
    pairs = Scores(scale=1.0, right=0 if causal else -1).pairs(tokens, tokens)

    def draw(d: Any) -> Any:
        sizes = (heads, key), (groups, key), (groups, value)
        return tuple(d(1, tokens, n, width) for n, width in sizes), {}

    def ours(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None) -> Any:
        return flash_attention(q, k, v, causal=causal, backend=backend)

    forward, backward = _work(pairs, shape, tokens, item)
    return Case(
        op="flash_attention",
        variant="causal" if causal else "full",
        size=f"{tokens}x({heads}/{groups})x{key}/{value}",
        key=_key(causal, key, value, tokens),
        draw=draw,
        ours=ours,
        eager=lambda q, k, v: _sdpa(q, k, v, is_causal=causal),
        forward=forward,
        backward=backward,
        compiles=False,
    )


def documents(tokens: int, mean: int) -> list[int]:
    """Draw lengths of packed documents, the same in every run.

    Args:
        tokens: Their sum.
        mean: About the mean length; lengths are spread as those of texts, exponentially.
    """
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        drawn = torch.empty(()).exponential_(1 / mean, generator=generator)
        lengths.append(min(int(drawn) + 1, left))
    return lengths


def _varlen(shape: Sequence[int], tokens: int, mean: int, item: int) -> Case:
    heads, groups, key, value = shape
    lengths = documents(tokens, mean)
    scores = Scores(scale=1.0, right=0)
    longest = max(lengths)

    def draw(d: Any) -> Any:
        sizes = (heads, key), (groups, key), (groups, value)
        cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(d.device)
        return tuple(d(tokens, n, width) for n, width in sizes), {"cu_seqlens": cu}

    def ours(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, backend: str | None) -> Any:
        return flash_attention_varlen(q, k, v, cu_seqlens, max_seqlen=longest, backend=backend)

    def eager(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor) -> Tensor:
        if q.is_cuda:
            parts = [x.split(lengths) for x in (q, k, v)]
            each = zip(*parts, strict=True)
            return torch.cat([_sdpa(*(x[None] for x in one), is_causal=True)[0] for one in each])
        number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        mask = (number[:, None] == number[None, :]).tril_()
        return _sdpa(q[None], k[None], v[None], attn_mask=mask)[0]

    pairs = sum(scores.pairs(length, length) for length in lengths)
    forward, backward = _work(pairs, shape, tokens, item)
    return Case(
        op="flash_attention_varlen",
        variant="causal",
        size=f"{tokens} in {len(lengths)}x({heads}/{groups})x{key}/{value}",
        key=_key(True, key, value, tokens),
        draw=draw,
        ours=ours,
        eager=eager,
        forward=forward,
        backward=backward,
        compiles=False,
        memory=True,
    )


def suite(scale: Scale, item: int) -> Iterator[Case]:
    """Yield the cases, the packed documents first.

    Args:
        scale: Which sizes.
        item: Bytes of an element.
    """
    for *shape, tokens in _SHAPES[scale]:
        most = max(tokens)
        yield _varlen(shape, most, 1024 if scale == "cuda" else most // 8, item)
    for *shape, tokens in _SHAPES[scale]:
        for length in tokens:
            for causal in (True, False):
                yield _dense(shape, length, causal, item)


def _decoding(shape: Sequence[int], item: int) -> Case:
    heads, groups, key, value, sequences, queries, longest = shape
    held = [longest - longest // 2 * n // sequences for n in range(sequences)]
    pages = -(-longest // _PAGE)

    def draw(d: Any) -> Any:
        pools = (d(sequences * pages, _PAGE, groups, width) for width in (key, value))
        tables = torch.randperm(sequences * pages, generator=torch.Generator().manual_seed(0))
        return (d(sequences * queries, heads, key), *pools), {
            "tables": tables.view(sequences, pages).to(d.device, torch.int32),
            "lengths": torch.tensor(held, dtype=torch.int32, device=d.device),
            "cu_seqlens": torch.arange(
                0, sequences * queries + 1, queries, dtype=torch.int32, device=d.device
            ),
        }

    @torch.no_grad()
    def ours(*tensors: Tensor, backend: str | None, **where: Any) -> Any:
        return paged_attention(*tensors, **where, backend=backend)

    @torch.no_grad()
    def eager(q: Tensor, k: Tensor, v: Tensor, **where: Tensor) -> Tensor:
        k, v = (x[where["tables"]].flatten(1, 2)[:, :longest] for x in (k, v))
        last = where["lengths"][:, None, None, None] - queries
        place = last + torch.arange(queries, device=q.device)[:, None]
        seen = torch.arange(longest, device=q.device) <= place
        return _sdpa(q.view(sequences, queries, heads, key), k, v, attn_mask=seen).flatten(0, 1)

    pairs = sum(Scores(scale=1.0, right=0).pairs(queries, length) for length in held)
    moved = (sum(held) * groups + sequences * queries * heads) * (key + value) * item
    return Case(
        op="paged_attention",
        variant="decode" if queries == 1 else "chunk",
        size=f"{sequences}x{queries} of {longest}x({heads}/{groups})x{key}/{value}",
        draw=draw,
        ours=ours,
        eager=eager,
        forward=Work(float(moved), 2.0 * pairs * heads * (key + value), products=True),
        backward=None,
        compiles=False,
    )


def paged(scale: Scale, item: int) -> Iterator[Case]:
    """Yield decoding and chunked prefill from keys and values in pages.

    Args:
        scale: Which sizes.
        item: Bytes of an element.
    """
    for shape in _PAGED[scale]:
        yield _decoding(shape, item)
