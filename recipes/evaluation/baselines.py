"""What counting words and compressing files reach on the same text: the bar for a model.

N-gram models by interpolated Kneser-Ney with three discounts an order,

    P(w | a b) = max(0, c(a b w) - D(c)) / c(a b) + g(a b) P(w | b)

where the lower orders count distinct left neighbours instead of occurrences, D(c) is D1, D2 or D3
for counts of 1, 2 and more, estimated from the counts of counts, g(a b) is the mass that the
discounts freed, and the unigram is mixed with 1 / V. Everything comes from the training rows in
closed form; nothing is fitted on held-out text. It is the stronger bar: on the standard library's
sources (V = 4096, 3.4 million tokens) a mixture whose weights were fitted by expectation
maximisation on a tenth of the rows, by bucket of the context's count, is 0.08 nats (bigram) and
0.23 nats (trigram) worse, and such a mixture on top of Kneser-Ney gains 0.0003. Contexts end where
the model's do: at the start of a document or row a context is shorter.

Source: Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling (1998),
section 3 (modified Kneser-Ney).
"""

import lzma
import math
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from warploom.models.batch import Batch

from ..errors import UserError

NAMES = ("unigram", "bigram", "trigram")


@dataclass(frozen=True)
class Grams:
    """The trained positions of some rows.

    Attributes:
        before: The token two back, or V where the segment has none, `[N]` int64.
        last: The token at the position, which a model sees last, `[N]` int64.
        target: The token to predict, `[N]` int64.
    """

    before: np.ndarray
    last: np.ndarray
    target: np.ndarray


def grams(batches: Iterable[Batch], vocabulary: int) -> Grams:
    """Collect every position that trains, with the context that a model sees there.

    Args:
        batches: Batches of `[B, S]` as `PackedRows.read` gives them.
        vocabulary: Number of ids V.

    Raises:
        UserError: If no position trains.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    for batch in batches:
        tokens, targets = batch.tokens.numpy(), batch.targets.numpy().ravel()
        size = tokens.shape[1]
        before = np.roll(tokens.ravel(), 1)
        before[::size] = vocabulary
        if batch.document_lengths is not None:
            ends = np.cumsum(batch.document_lengths.numpy(), dtype=np.int64)
            before[ends[:-1]] = vocabulary
        trained = targets >= 0
        parts.append(tuple(x[trained] for x in (before, tokens.ravel(), targets)))
    joined = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    if not joined or not len(joined[0]):
        raise UserError(f"a baseline needs positions that train; {len(parts)} batches have none")
    return Grams(*joined)


@dataclass(frozen=True)
class _Counts:
    """Counts of one order and what they free: a context is a number in 0 .. contexts - 1."""

    keys: np.ndarray  # sorted: context x V + token
    discounted: np.ndarray  # count - discount, at each key
    totals: np.ndarray  # sum of counts, at each context
    freed: np.ndarray  # sum of discounts, at each context

    def mix(self, context: np.ndarray, key: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Return P(token | context), given P(token | shorter context)."""
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        seen = np.where(self.keys[at] == key, self.discounted[at], 0.0)
        total = self.totals[context]
        known = total > 0
        divisor = np.where(known, total, 1.0)
        rest: np.ndarray = np.where(known, self.freed[context] / divisor, 1.0)
        share: np.ndarray = np.where(known, seen, 0.0) / divisor + rest * lower
        return share


def _count(keys: np.ndarray, counts: np.ndarray, context: np.ndarray, contexts: int) -> _Counts:
    """Discount sorted, distinct keys; `context` says which context each belongs to."""
    n1, n2, n3, n4 = (float((counts == i).sum()) for i in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2) if n1 else 0.5
    guess = [1 - 2 * y * n2 / max(n1, 1), 2 - 3 * y * n3 / max(n2, 1), 3 - 4 * y * n4 / max(n3, 1)]
    # With few counts of counts the estimates leave their range; there, one plain discount.
    d = np.array([g if 0 < g < i + 1 else 0.75 for i, g in enumerate(guess)])
    discount = np.minimum(d[np.minimum(counts, 3) - 1], counts)
    return _Counts(
        keys=keys,
        discounted=counts - discount,
        totals=np.bincount(context, counts, contexts),
        freed=np.bincount(context, discount, contexts),
    )


class NGrams:
    """Unigram, bigram and trigram probabilities, fitted on given positions.

    Args:
        train: The positions to count.
        vocabulary: Number of ids V, below 2^21, so that a trigram fits into an int64.
    """

    def __init__(self, train: Grams, vocabulary: int) -> None:
        if vocabulary >= 1 << 21:
            raise UserError(f"n-gram baselines take fewer than 2097152 ids, found {vocabulary}")
        self.vocabulary = size = vocabulary
        pairs = train.last * size + train.target
        triples, counts3 = np.unique(train.before * size * size + pairs, return_counts=True)
        pair_of_triple = triples % (size * size)
        contexts, context_of_triple = np.unique(triples // size, return_inverse=True)
        self._contexts = contexts
        self._trigram = _count(triples, counts3, context_of_triple, len(contexts) + 1)
        distinct, counts2 = np.unique(pairs, return_counts=True)
        self._bigram = _count(distinct, counts2, distinct // size, size)
        left, neighbours2 = np.unique(pair_of_triple, return_counts=True)
        self._bigram_left = _count(left, neighbours2, left // size, size)
        tokens, counts1 = np.unique(train.target, return_counts=True)
        self._unigram = _count(tokens, counts1, np.zeros_like(tokens), 1)
        tokens, neighbours1 = np.unique(left % size, return_counts=True)
        self._unigram_left = _count(tokens, neighbours1, np.zeros_like(tokens), 1)

    def probabilities(self, before: np.ndarray, last: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Return P(target) by each order.

        Args:
            before: Token two back, V where there is none, `[N]` int64.
            last: Token before the target, `[N]` int64.
            target: Token to predict, `[N]` int64.

        Returns:
            `[4, N]` float64: uniform, unigram, bigram and trigram.
        """
        size = self.vocabulary
        zero = np.zeros_like(target)
        uniform = np.full(len(target), 1 / size)
        unigram = self._unigram.mix(zero, target, uniform)
        left = self._unigram_left.mix(zero, target, uniform)
        pair = last * size + target
        bigram = self._bigram.mix(last, pair, left)
        lower = self._bigram_left.mix(last, pair, left)
        context = before * size + last
        at = np.minimum(np.searchsorted(self._contexts, context), len(self._contexts) - 1)
        at = np.where(self._contexts[at] == context, at, len(self._contexts))
        trigram = self._trigram.mix(at, context * size + target, lower)
        return np.stack([uniform, unigram, bigram, trigram])


@dataclass(frozen=True, slots=True)
class Baseline:
    """A baseline's score on held-out text; `nats_per_token` is `None` for a compressor."""

    name: str
    nats_per_token: float | None
    bits_per_byte: float
    seconds: float


def ngram_baselines(
    train: Iterable[Batch], heldout: Iterable[Batch], byte_counts: np.ndarray
) -> list[Baseline]:
    """Fit n-grams on what the model has trained on, and score them where the model is scored.

    Args:
        train: The rows that the model has seen, each once: a row that is counted twice would look
            surer than it is.
        heldout: The rows that the model is evaluated on.
        byte_counts: Bytes of text of each id `[V]`, from `Tokenizer.byte_counts`.

    Returns:
        Unigram, bigram, trigram; seconds are of fitting all and scoring all.

    Raises:
        UserError: If either has no position that trains, or V is 2^21 or more.

    It takes about 200 bytes of memory a training token.
    """
    start = time.perf_counter()
    vocabulary = len(byte_counts)
    seen, test = grams(train, vocabulary), grams(heldout, vocabulary)
    given = NGrams(seen, vocabulary).probabilities(test.before, test.last, test.target)
    nats = -np.log(given[1:]).mean(1)
    per_byte = len(test.target) / byte_counts[test.target].sum() / math.log(2)
    seconds = time.perf_counter() - start
    return [
        Baseline(name, float(n), float(n * per_byte), seconds)
        for name, n in zip(NAMES, nats, strict=True)
    ]


def xz_baseline(train: bytes, heldout: bytes) -> Baseline:
    """Return what the held-out text adds to the size of the training text under `xz -9e`.

    The dictionary is 64 MiB: of longer training text only the last 64 MiB help.

    Args:
        train: The training text, as `TokenSplit.text` gives it.
        heldout: The held-out text.

    Raises:
        UserError: If there is no held-out text.
    """
    if not heldout:
        raise UserError(f"the xz baseline needs held-out text, it got {len(heldout)} bytes")
    start = time.perf_counter()

    def size(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    with ThreadPoolExecutor(2) as pool:  # lzma works outside the interpreter's lock
        alone, both = pool.map(size, [train, train + heldout])
    seconds = time.perf_counter() - start
    return Baseline("xz -9e", None, 8 * (both - alone) / len(heldout), seconds)
