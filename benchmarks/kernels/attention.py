"""Suite `attention`: whole sequences and packed documents, by every backend, beside PyTorch's SDPA.

FLOPs are those of the pairs that a query sees: 2 (K + L) a pair and head forward, and 2 (3 K + 2 L)
backward, where the scores are made again. Eager is `scaled_dot_product_attention` as PyTorch
chooses; of documents with the mask that keeps them apart on the CPU, and a call a document on a
GPU, where that mask would be a gibibyte.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from warploom.kernels import backends
from warploom.kernels.attention import Scores, flash_attention, flash_attention_varlen

from .cases import Case, Work

_SMALL = ((4, 2, 64, 64, (256, 1024)), (4, 4, 96, 64, (256,)))
_LARGE = (
    (32, 8, 64, 64, (2048, 8192, 32_768)),
    (32, 8, 128, 128, (2048, 4096, 8192, 16_384, 32_768)),
    (16, 16, 192, 128, (2048, 8192, 32_768)),
)
"""Heads of queries and of keys, their widths K and L, and the tokens."""


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


def suite(small: bool, item: int) -> Iterator[Case]:
    """Yield the cases, the packed documents first.

    Args:
        small: Whether for a CPU.
        item: Bytes of an element.
    """
    shapes = _SMALL if small else _LARGE
    for *shape, tokens in shapes:
        most = max(tokens)
        yield _varlen(shape, most, most // 8 if small else 1024, item)
    for *shape, tokens in shapes:
        for length in tokens:
            for causal in (True, False):
                yield _dense(shape, length, causal, item)
