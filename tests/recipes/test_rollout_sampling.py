"""What is kept is what transformers keeps; what is drawn has its distribution, and no company."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as oracle

from warploom.kernels.loss import linear_log_probs
from warploom.recipes.errors import UserError
from warploom.recipes.rollout import Sampling, sampling
from warploom.recipes.rollout.sampling import draw, floors, uniform

CHOICES = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 7, 5000]),
    top_p=st.sampled_from([0.0, 0.2, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    kept=st.just(True),
)


def kept_by_transformers(logits, s):
    """The processors that `generate` would build, in its order."""
    steps = [oracle.TemperatureLogitsWarper(s.temperature)]
    steps += [oracle.TopKLogitsWarper(s.top_k)] if s.top_k else []
    steps += [oracle.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    steps += [oracle.MinPLogitsWarper(s.min_p)] if s.min_p else []
    for step in steps:
        logits = step(None, logits)
    return logits


@settings(max_examples=60, deadline=None)
@given(
    how=st.lists(CHOICES, min_size=1, max_size=4),
    seed=st.integers(0, 9),
    size=st.sampled_from([3, 50, 3000]),
    spread=st.sampled_from([0.01, 3.0, 50.0]),
)
def test_the_kept_are_those_of_transformers(how, seed, size, spread):
    logits = torch.randn(len(how), size, generator=torch.Generator().manual_seed(seed)).double()
    logits *= spread
    tokens = draw(logits, how, [(0, 0)] * len(how))
    for row, s, token in zip(logits, how, tokens, strict=True):
        scores = kept_by_transformers(row[None], s)[0]
        kept = scores.isfinite().nonzero()[:, 0]
        assert torch.equal(torch.arange(size) if token.kept is None else token.kept, kept)
        assert token.id in kept
        for found, wanted in (
            (token.logprob, row.log_softmax(-1)[token.id]),
            (token.sampling_logprob, scores.log_softmax(-1)[token.id]),
        ):
            torch.testing.assert_close(found, float(wanted), atol=1e-9, rtol=1e-9)


def test_what_ties_with_the_last_is_kept():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    for how in (Sampling(top_k=2), Sampling(top_p=0.1), Sampling(min_p=1.0)):
        assert floors(logits, [how]).tolist() == [3.0]


@pytest.mark.parametrize(
    "how",
    [
        Sampling(seed=3),
        Sampling(temperature=0.5, seed=4),
        Sampling(top_k=4, seed=5),
        Sampling(top_p=0.7, temperature=1.5, seed=6),
        Sampling(min_p=0.2, top_k=6, seed=7),
    ],
)
def test_draws_have_their_distribution(how):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)) * 2
    count = 20_000
    numbers = [(n % 7, n // 7) for n in range(count)]
    tokens = draw(logits.expand(count, -1), [how] * count, numbers)
    found = torch.bincount(torch.tensor([t.id for t in tokens]), minlength=12).double()
    wanted = kept_by_transformers(logits.double(), how).softmax(-1)[0] * count
    assert (found[wanted == 0] == 0).all()
    possible = wanted > 0
    chi = ((found - wanted)[possible].square() / wanted[possible]).sum()
    freedom = int(possible.sum()) - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_uniform_numbers_differ_by_seed_sample_and_position():
    found = {uniform(a, b, c) for a in range(-9, 9) for b in range(9) for c in range(99)}
    assert len(found) == 18 * 9 * 99
    assert 0 <= min(found) < 1e-3
    assert 0.999 < max(found) < 1


@settings(max_examples=30, deadline=None)
@given(how=st.lists(CHOICES | st.just(Sampling(temperature=0.0)), min_size=2, max_size=6))
def test_a_row_depends_on_no_other(how):
    logits = torch.randn(len(how), 999, generator=torch.Generator().manual_seed(2)) * 3
    numbers = [(n, n) for n in range(len(how))]
    for row, (together, s) in enumerate(zip(draw(logits, how, numbers), how, strict=True)):
        (alone,) = draw(logits[row : row + 1], [s], numbers[row : row + 1])
        assert alone[:4] == together[:4]
        assert (alone.kept is None) == (together.kept is None)
        assert alone.kept is None or torch.equal(alone.kept, together.kept)


def test_log_probabilities_are_those_of_the_loss():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 16, generator=g), torch.randn(70, 16, generator=g)
    tokens = draw(hidden @ weight.t(), [Sampling()] * 5, [(0, n) for n in range(5)])
    wanted = linear_log_probs(hidden, weight, torch.tensor([t.id for t in tokens]))
    assert [t.logprob for t in tokens] == wanted.tolist()
    assert [t.sampling_logprob for t in tokens] == wanted.tolist()


def test_the_likeliest_is_taken_and_listed():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    how = [Sampling(temperature=0.0, logprobs=n, kept=True) for n in (0, 3, 40)]
    tokens = draw(logits, how, [(0, 0)] * 3)
    log_probs = logits.log_softmax(-1)
    for row, (token, s) in enumerate(zip(tokens, how, strict=True)):
        assert token.id == int(logits[row].argmax())
        assert token.sampling_logprob == 0
        assert token.kept.tolist() == [token.id]
        order = log_probs[row].argsort(descending=True)[: s.logprobs].tolist()
        assert [i for i, _ in token.top] == order
        values = torch.tensor([p for _, p in token.top])
        torch.testing.assert_close(values, log_probs[row][order], atol=1e-6, rtol=0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(wrong):
    logits = torch.zeros(2, 5)
    logits[1, 2] = wrong
    for temperature in (0.0, 1.0):
        with pytest.raises(RuntimeError, match="1 of 2 texts are not"):
            draw(logits, [Sampling(temperature=temperature)] * 2, [(0, 0)] * 2)


def test_masked_logits_are_never_drawn(monkeypatch):
    logits = torch.full((1, 50), -math.inf)
    logits[0, 17] = 1.0
    logits[0, 3] = 1.0
    drawn = {draw(logits, [Sampling(seed=n)], [(0, 0)])[0].id for n in range(40)}
    assert drawn == {3, 17}
    for number, wanted in ((0.0, 3), (1 - 2.0**-53, 17)):
        monkeypatch.setattr(sampling, "uniform", lambda *_, n=number: n)
        assert draw(logits, [Sampling()], [(0, 0)])[0].id == wanted


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("temperature", -0.1, "a number from 0 to 100; got -0.1"),
        ("temperature", math.nan, "a number from 0 to 100; got nan"),
        ("temperature", 1e-4, "0, for the likeliest token, or at least 0.001; got 0.0001"),
        ("temperature", "1", "a number from 0 to 100; got '1'"),
        ("top_k", -1, "an integer from 0"),
        ("top_k", 2.0, "an integer from 0"),
        ("top_k", True, "an integer from 0"),
        ("top_p", 1.1, "a number from 0 to 1; got 1.1"),
        ("min_p", -1, "a number from 0 to 1; got -1"),
        ("max_tokens", 0, "an integer from 1"),
        ("seed", 2**63, "an integer from"),
        ("n", 0, "an integer from 1 to 4096; got 0"),
        ("logprobs", -1, "an integer from 0"),
        ("stop", "abc", "a tuple of str; got 'abc'"),
        ("stop", ("a", ""), "no empty string"),
        ("stop_ids", (1.0,), "a tuple of int; got"),
    ],
)
def test_impossible_values_are_refused(name, value, sentence):
    with pytest.raises(UserError, match=f"^{name} must .*{sentence}"):
        Sampling(**{name: value})
