"""What a parallel layer of one rank (`group=None`) costs over the plain torch module.

    python benchmarks/parallel.py --rounds 100

Layer and peer take turns on the same tiny input, where nothing but their overhead is seen; a round
is the median of single calls, and the quietest round counts, forward alone and with backward. Exit
1 if a layer costs more than 10 microseconds over its peer.

Measured: 1.8 us at most, forward and backward together 3.7 us, on two quiet CPU cores with torch
2.13.0 (2026-11-21).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from warploom.parallel.tensor import ColumnLinear, RowLinear, VocabEmbedding, VocabHead

_LIMIT_US = 10.0
_CALLS = 100
_WIDTH, _FEATURES, _VOCABULARY, _TOKENS = 8, 16, 11, 4


def layers() -> Iterator[tuple[str, nn.Module, nn.Module, Tensor]]:
    """Yield the name of each layer, the layer, its peer and an input."""
    x, ids = torch.randn(_TOKENS, _WIDTH), torch.arange(_TOKENS)
    for bias in (True, False):
        peer = nn.Linear(_WIDTH, _FEATURES, bias=bias)
        suffix = " with bias" if bias else ""
        column = ColumnLinear(_WIDTH, _FEATURES, group=None, bias=bias, chunks=2, regather=True)
        yield f"ColumnLinear{suffix}", column, peer, x
        yield f"RowLinear{suffix}", RowLinear(_WIDTH, _FEATURES, group=None, bias=bias), peer, x
    embedding = VocabEmbedding(_VOCABULARY, _WIDTH, group=None)
    yield "VocabEmbedding", embedding, nn.Embedding(_VOCABULARY, _WIDTH), ids
    head = VocabHead(_VOCABULARY, _WIDTH, group=None)
    yield "VocabHead", head, nn.Linear(_WIDTH, _VOCABULARY, bias=False), x


def _timed(run: Callable[[], object]) -> float:
    times = []
    for _ in range(_CALLS):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


def overhead(layer: nn.Module, peer: nn.Module, x: Tensor, rounds: int, *, train: bool) -> Tensor:
    """Return the microseconds of a call of the layer and of its peer, `[2]`.

    Args:
        layer: What is measured.
        peer: What it is compared with.
        x: Input of both.
        rounds: How often they take turns; the quietest counts.
        train: Whether a call is a forward and a backward.
    """

    def call(module: nn.Module) -> Callable[[], object]:
        return (lambda: module(x).sum().backward()) if train else (lambda: module(x))

    pairs = [(_timed(call(layer)), _timed(call(peer))) for _ in range(rounds)]
    return torch.tensor([min(side) for side in zip(*pairs, strict=True)])


def main() -> int:
    """Print the table; return 1 if a layer costs too much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    worst = 0.0
    print(f"{'us a call':24} {'forward':>9} {'peer':>9} {'and backward':>13} {'peer':>9}")
    for name, layer, peer, x in layers():
        forward = overhead(layer, peer, x, rounds, train=False)
        both = overhead(layer, peer, x, rounds, train=True)
        worst = max(worst, float(forward[0] - forward[1]), float(both[0] - both[1]))
        print(f"{name:24} {forward[0]:9.2f} {forward[1]:9.2f} {both[0]:13.2f} {both[1]:9.2f}")
    print(f"at most {worst:.2f} us over the peer, {_LIMIT_US:g} are allowed")
    return int(worst > _LIMIT_US)


if __name__ == "__main__":
    sys.exit(main())
