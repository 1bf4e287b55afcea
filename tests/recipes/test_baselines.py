import math
import shutil
import subprocess
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from warploom.models.batch import Batch
from warploom.recipes.corpus import PackedRows, heldout_batches
from warploom.recipes.errors import UserError
from warploom.recipes.evaluation import NGrams, ngram_baselines, xz_baseline
from warploom.recipes.evaluation.baselines import grams
from warploom.recipes.tokens import BPE, TokenSplit, train_bpe

V = 40


def text_split(seed, documents=60):
    """Documents with structure: each token depends on the two before it."""
    rng = np.random.default_rng(seed)
    table = np.random.default_rng(0).dirichlet(np.full(V - 2, 0.05), (V, V))
    ids, offsets = [], [0]
    for _ in range(documents):
        a, b = V, 0
        ids.append(0)
        for _ in range(int(rng.integers(1, 80))):
            a, b = b, int(rng.choice(V - 2, p=table[a % V, b])) + 2
            ids.append(b)
        ids.append(1)
        offsets.append(len(ids))
    return TokenSplit(np.array(ids, np.uint16), np.array(offsets), 0)


def batches(split, sequence=32):
    return heldout_batches(PackedRows(split, sequence, 1), sequences=4)


class Reference:
    """Modified Kneser-Ney over Python dictionaries, in the words of the book."""

    def __init__(self, positions):
        self.c3, self.c2, self.c1 = Counter(), Counter(), Counter()
        for a, b, w in positions:
            self.c3[a, b, w] += 1
            self.c2[b, w] += 1
            self.c1[w,] += 1
        self.n2 = Counter((b, w) for _, b, w in self.c3)  # distinct left neighbours
        self.n1 = Counter((w,) for _, w in self.n2)

    @staticmethod
    def level(counts, context, w, lower):
        n = [sum(1 for c in counts.values() if c == i) for i in range(1, 5)]
        y = n[0] / (n[0] + 2 * n[1]) if n[0] else 0.5
        d = [i - (i + 1) * y * n[i] / max(n[i - 1], 1) for i in (1, 2, 3)]
        d = [x if 0 < x < i + 1 else 0.75 for i, x in enumerate(d)]
        row = {g[-1]: c for g, c in counts.items() if g[:-1] == context}
        if not row:
            return lower
        off = {token: min(d[min(c, 3) - 1], c) for token, c in row.items()}
        seen = row.get(w, 0) - off.get(w, 0)
        return (seen + sum(off.values()) * lower) / sum(row.values())

    def probabilities(self, a, b, w):
        unigram = self.level(self.c1, (), w, 1 / V)
        left = self.level(self.n1, (), w, 1 / V)
        bigram = self.level(self.c2, (b,), w, left)
        lower = self.level(self.n2, (b,), w, left)
        return [1 / V, unigram, bigram, self.level(self.c3, (a, b), w, lower)]


def positions_of(split, sequence=32):
    """The trained positions by a plain walk over documents and rows; V where a segment begins."""
    ids, found = split.ids.tolist(), []
    for start, stop in zip(split.offsets[:-1].tolist(), split.offsets[1:].tolist(), strict=True):
        for i in range(start, stop - 1):
            first = i == start or i % sequence == 0
            found.append((V if first else ids[i - 1], ids[i], ids[i + 1]))
    return found


def test_positions_and_contexts_are_those_a_model_sees():
    split = text_split(1)
    found = grams(batches(split), V)
    want = positions_of(split)
    rows = zip(found.before.tolist(), found.last.tolist(), found.target.tolist(), strict=True)
    assert list(rows) == want


def test_probabilities_are_those_of_the_dictionary_model():
    train, test = text_split(1), text_split(2, documents=6)
    reference = Reference(positions_of(train))
    model = NGrams(grams(batches(train), V), V)
    held = positions_of(test)[:120]
    found = model.probabilities(*np.array(held).T)
    want = np.array([reference.probabilities(*gram) for gram in held]).T
    np.testing.assert_allclose(found, want, rtol=1e-12)


@pytest.mark.parametrize("documents", [1, 3, 60])
def test_every_order_sums_to_one_after_any_context(documents):
    train = text_split(3, documents)
    model = NGrams(grams(batches(train), V), V)
    seen = set(positions_of(train)[:25])
    contexts = {(a, b) for a, b, _ in seen} | {(V, V - 1), (3, 4), (V - 1, 2)}
    for a, b in contexts:
        every = np.arange(V)
        given = model.probabilities(np.full(V, a), np.full(V, b), every)
        np.testing.assert_allclose(given.sum(1), 1, rtol=1e-12)
        assert (given > 0).all()


def test_a_unigram_by_hand():
    """Counts 2, 1, 1 of 4 ids: with n1 = 2, n2 = 1 the discount of 1 is 1/2, of 2 it is 3/4 here.

    D1 = 1 - 2 (1/2) (1/2) = 1/2; D2 = 2 - 3 (1/2) 0 = 2 would erase the count, so plain 3/4.
    """
    tokens = torch.tensor([[0, 0, 0, 0]])
    batch = Batch(tokens, torch.tensor([[0, 0, 1, 2]]), torch.tensor([4], dtype=torch.int32))
    found = NGrams(grams([batch], 4), 4).probabilities(*np.zeros((2, 4), int), np.arange(4))[1]
    freed = (2 - 1.25 + 0.5 + 0.5) / 4
    want = [(1.25 + 4 * freed / 4) / 4, (0.5 + freed) / 4, (0.5 + freed) / 4, freed / 4]
    np.testing.assert_allclose(found, want)


def test_scores_are_means_over_the_held_out_targets_and_order_helps():
    train, test = text_split(1, 400), text_split(2)
    byte_counts = np.full(V, 3)
    byte_counts[:2] = 0
    scored = ngram_baselines(batches(train), batches(test), byte_counts)
    given = NGrams(grams(batches(train), V), V).probabilities(*np.array(positions_of(test)).T)
    assert [b.name for b in scored] == ["unigram", "bigram", "trigram"]
    nats = [b.nats_per_token for b in scored]
    np.testing.assert_allclose(nats, -np.log(given[1:]).mean(1), rtol=1e-12)
    assert nats[0] > nats[1] + 0.05 > nats[2] + 0.1
    text = 3 * sum(w > 1 for _, _, w in positions_of(test))
    bits = -np.log2(given[1:]).sum(1) / text
    np.testing.assert_allclose([b.bits_per_byte for b in scored], bits, rtol=1e-12)


def test_rows_of_padding_change_nothing():
    train, test = text_split(1), text_split(2)
    rows = PackedRows(test, 32, 1)
    alone = ngram_baselines(batches(train), batches(test), np.full(V, 3))
    padded = [rows.read(range(rows.padded + 5))]
    again = ngram_baselines(batches(train), padded, np.full(V, 3))
    assert [b.nats_per_token for b in again] == [b.nats_per_token for b in alone]


def test_on_real_sources_a_longer_context_wins():
    """Real text, so that the estimates of the discounts are what they are in use."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [p.read_text(encoding="utf-8") for p in sorted(folder.glob("[a-c]*.py"))[:24]]
    tokenizer = train_bpe(texts, BPE(vocabulary=500))

    def pack(chosen):
        framed = [tokenizer.document(ids) for ids in tokenizer.encode_batch(chosen)]
        offsets = np.cumsum([0, *map(len, framed)])
        return PackedRows(TokenSplit(np.concatenate(framed), offsets, 0), 128, tokenizer.pad)

    train, test = pack(texts[4:]), pack(texts[:4])
    scored = ngram_baselines(
        heldout_batches(train, sequences=8),
        heldout_batches(test, sequences=8),
        tokenizer.byte_counts(),
    )
    nats = [b.nats_per_token for b in scored]
    assert math.log(500) > nats[0] > nats[1] + 0.5 > nats[2] + 0.6
    size = sum(len(t.encode()) for t in texts[:4])
    tokens = len(test.split.ids) - 4
    np.testing.assert_allclose(
        [b.bits_per_byte for b in scored], np.array(nats) * tokens / size / math.log(2)
    )


def test_what_cannot_be_scored_is_refused():
    nothing = Batch(torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), -100))
    with pytest.raises(UserError, match="needs positions that train; 1 batches have none"):
        ngram_baselines([nothing], [nothing], np.ones(V))
    with pytest.raises(UserError, match="needs positions that train; 0 batches"):
        ngram_baselines([], [], np.ones(V))
    with pytest.raises(UserError, match="fewer than 2097152 ids"):
        NGrams(grams(batches(text_split(1)), V), 1 << 21)
    with pytest.raises(UserError, match="needs held-out text, it got 0 bytes"):
        xz_baseline(b"text", b"")


def test_xz_is_the_xz_program_s_size(tmp_path):
    program = shutil.which("xz")
    if program is None:
        pytest.skip("no xz program here")
    folder = Path(sysconfig.get_path("stdlib"))
    train = b"".join(p.read_bytes() for p in sorted(folder.glob("a*.py")))
    held = (folder / "base64.py").read_bytes()
    sizes = []
    for data in (train, train + held):
        run = subprocess.run([program, "-9e", "-c"], input=data, capture_output=True, check=True)
        sizes.append(len(run.stdout))
    found = xz_baseline(train, held)
    assert found.nats_per_token is None
    assert abs(found.bits_per_byte * len(held) / 8 - (sizes[1] - sizes[0])) <= 8
    assert 0.5 < found.bits_per_byte < 8
    twice = xz_baseline(train + held, held)
    assert twice.bits_per_byte < 0.1, "text that was seen before costs next to nothing"


def test_repeated_contexts_share_their_mass():
    """The freed mass of a context is what its discounts took: no more, no less."""
    model = NGrams(grams(batches(text_split(1)), V), V)
    for counts in (model._trigram, model._bigram, model._unigram, model._bigram_left):
        kept = defaultdict(float)
        vocabulary = 1 if counts is model._unigram else V
        for key, value in zip(counts.keys.tolist(), counts.discounted.tolist(), strict=True):
            kept[key // vocabulary if vocabulary > 1 else 0] += value
        total = sum(kept.values()) + counts.freed.sum()
        np.testing.assert_allclose(total, counts.totals.sum())
        assert (counts.discounted >= 0).all()
