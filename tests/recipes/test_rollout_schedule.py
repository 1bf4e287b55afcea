"""Whatever the pages, the chunks and the company: a sample is what it would be alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.recipes.rollout_fakes import WINDOW, FakeModel, V, check, engine, expected

from warploom.recipes.errors import UserError
from warploom.recipes.rollout import Sampling
from warploom.recipes.rollout.pages import Pages

BEGINNING = [3, 1, 4, 1, 5, 9, 2, 6, 5]
PROMPTS = st.lists(st.integers(0, V - 1), min_size=1, max_size=14) | st.builds(
    lambda cut, rest: BEGINNING[:cut] + rest,
    st.integers(1, 9),
    st.lists(st.integers(0, V - 1), max_size=9),
)
REQUESTS = st.lists(
    st.tuples(
        PROMPTS,
        st.builds(
            Sampling,
            temperature=st.sampled_from([0.0, 1.0, 0.7]),
            top_k=st.sampled_from([0, 3]),
            top_p=st.sampled_from([1.0, 0.8]),
            n=st.integers(1, 5),
            seed=st.integers(0, 3),
            max_tokens=st.integers(1, 12),
            stop_ids=st.sampled_from([(), (7, 11)]),
        ),
        st.integers(0, 6),  # the step at which it arrives
        st.none() | st.integers(0, 8),  # the step at which it is cancelled
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(
    requests=REQUESTS,
    kind=st.sampled_from(["full", "ssm"]),
    page=st.sampled_from([1, 3, 4]),
    spare=st.integers(0, 12),
    slots=st.integers(1, 5),
    chunk=st.integers(1, 20),
    share=st.booleans(),
    fails=st.sets(st.integers(1, 12), max_size=2),
)
def test_a_sample_is_what_it_would_be_alone(
    requests, kind, page, spare, slots, chunk, share, fails
):
    model = FakeModel(kind)
    model.fails = fails
    least = max(-(-(len(p) + s.max_tokens - 1) // page) for p, s, _, _ in requests)
    options = {"page_size": page, "max_sequences": slots, "chunk": chunk, "share_prefixes": share}
    made = engine(model, pages=least + spare, **options)
    ended, streamed, numbers, step = {}, {}, {}, 0
    while made.busy or len(numbers) < len(requests):
        for i, (prompt, sampling, arrives, _) in enumerate(requests):
            if i not in numbers and (arrives <= step or not made.busy):
                numbers[i] = made.add(prompt, sampling)
        for i, (*_, cancelled) in enumerate(requests):
            if i in numbers and cancelled == step:
                made.cancel(numbers[i])
        try:
            events = made.step()
        except MemoryError:
            events = []
        check(made)
        for event in events:
            which = event.request, event.sample
            assert which not in ended
            if event.token is not None:
                streamed.setdefault(which, []).append(event.token.id)
            if event.completion is not None:
                ended[which] = event.completion
        step += 1
        assert step < 3000
    assert made._pages.free == made._pages.count
    assert model.most <= chunk + slots
    for i, (prompt, sampling, _, cancelled) in enumerate(requests):
        for sample in range(sampling.n):
            found = ended.pop((numbers[i], sample))
            tokens, reason = expected(prompt, sampling, sample)
            if found.finish_reason == "cancelled":
                assert cancelled is not None
                tokens = tokens[: len(found.ids)]
            else:
                assert found.finish_reason == reason
            assert list(found.ids) == [t.id for t in tokens]
            assert list(found.logprobs) == [t.logprob for t in tokens]
            assert list(found.sampling_logprobs) == [t.sampling_logprob for t in tokens]
            assert list(found.prompt_ids) == prompt
            assert streamed.get((numbers[i], sample), []) == list(found.ids)
    assert not ended


def test_samples_of_a_prompt_share_its_pages():
    made = engine(pages=100, max_sequences=8, chunk=64)
    prompt = [*range(18)]
    made.add(prompt, Sampling(n=8, max_tokens=2))
    made.step()  # the prompt, and a token of each sample
    assert made.model.computed == 18
    assert made.stats.pages_free == 100 - 5
    assert len(made._scheduler.running) == 8
    made.step()  # 8 tokens behind a last page of 2, which 7 must copy
    assert made.model.computed == 18 + 8
    assert made._cache.copied == 7
    assert not made.busy


def test_a_prompt_is_found_again():
    made = engine(pages=30, chunk=64)
    made.generate([[*range(18)]], Sampling(max_tokens=3))
    (again,) = made.generate([[*range(18)]], Sampling(max_tokens=3))
    assert again.found == 16
    assert made.stats.found_tokens == 16
    (whole,) = made.generate([[*range(16)]], Sampling(max_tokens=3))
    assert whole.found == 12  # the last token is computed: its logits are wanted
    (other,) = made.generate([[1, *range(1, 18)]], Sampling(max_tokens=3))
    assert other.found == 0
    (later,) = made.generate([[*range(4, 18)]], Sampling(max_tokens=3))
    assert later.found == 0  # its first page holds what the second of another holds
    made.forget()
    (anew,) = made.generate([[*range(18)]], Sampling(max_tokens=3))
    assert anew.found == 0
    alone = engine(share_prefixes=False)
    alone.generate([[*range(18)]] * 2, Sampling(max_tokens=3))
    assert alone.stats.found_tokens == 0


def test_equal_prompts_of_one_step_share_at_once():
    made = engine(pages=100, chunk=64)
    made.generate([[*range(18)]] * 3, Sampling(max_tokens=1))
    assert made.stats.steps == 1
    assert made.model.computed == 18 + 2 + 2


def test_running_samples_go_first_and_the_youngest_is_put_back():
    made = engine(pages=4, page_size=4, max_sequences=4, chunk=16, share_prefixes=False)
    old, young = ([n] * 7 for n in (1, 2))
    made.add(old, Sampling(max_tokens=10))
    made.add(young, Sampling(max_tokens=10))
    order = []
    while made.busy:
        events = made.step()
        assert order or events[0].request == 0  # a token of the old one in each step
        order += [e.request for e in events if e.completion is not None]
    assert order == [0, 1]
    assert made.stats.put_back == 1


def test_a_chunk_bounds_prompts_alone():
    made = engine(pages=100, chunk=4, max_sequences=4)
    made.add([1], Sampling(max_tokens=20))
    made.step()
    made.add([*range(20)], Sampling(max_tokens=2))
    for _ in range(5):
        assert [e.request for e in made.step()][0] == 0  # it never waits for the prompt
    assert made.model.most == 5
    assert made.stats.steps == 6


def test_what_came_first_is_not_overtaken():
    made = engine(pages=6, page_size=4, max_sequences=4, chunk=64)
    made.add([1] * 16, Sampling(max_tokens=4))
    made.add([2] * 16, Sampling(max_tokens=4))
    made.add([3], Sampling(max_tokens=1))
    order = []
    while made.busy:
        order += [e.request for e in made.step() if e.completion is not None]
    assert order[0] == 0


def test_what_was_found_is_given_back_where_the_rest_does_not_fit():
    made = engine(pages=5, page_size=4, chunk=64)
    made.add([1] * 12, Sampling(max_tokens=5))
    made.step()
    made.add([1] * 12 + [2] * 5, Sampling(max_tokens=2))
    while made.busy:
        made.step()
        check(made)
    assert made.stats.found_tokens == 12


def test_idle_pages_go_from_the_end_of_what_was_given_back_first():
    pages = Pages(4, 2)
    digests: list[bytes] = []
    pages.extend(digests, [1, 2, 3, 4])
    first = [pages.take(), pages.take()]
    for page, one in zip(first, digests, strict=True):
        pages.publish(page, one)
    pages.give_back(first)
    assert pages.free == 4
    taken = [pages.take() for _ in range(3)]
    assert first[1] in taken
    assert pages.find(digests) == first[:1]
    assert pages.free == 0


@pytest.mark.parametrize(
    ("prompt", "sampling", "sentence"),
    [
        ([], {}, "at least one token"),
        ([1, V], {}, f"ids must be from 0 to {V - 1}; the prompt has {V}"),
        ([-1], {}, "the prompt has -1"),
        ([1.7], {}, r"a text or a list of ids; got \[1.7\]"),
        (5, {}, "a text or a list of ids; got 5"),
        ([1], {"stop_ids": (2, V)}, f"stop_ids has {V}"),
        ([1] * WINDOW, {}, f"window of {WINDOW}; this one has {WINDOW} tokens"),
        ("text", {}, "need a tokenizer"),
        ([1], {"stop": ("a",)}, "need a tokenizer"),
        ([1], {"logprobs": V + 1}, f"at most the vocabulary \\({V}\\)"),
        ([1] * 10, {"max_tokens": 20}, "fit the 4 pages of 4 tokens"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(prompt, sampling, sentence):
    made = engine(pages=4)
    with pytest.raises(UserError, match=sentence):
        made.add(prompt, Sampling(**sampling))
    assert not made.busy


def test_what_fits_just_is_served():
    made = engine(pages=4)
    (one,) = made.generate([[1] * 10], Sampling(max_tokens=7))
    assert len(one.ids) == 7
    (last,) = engine(pages=12).generate([[1] * (WINDOW - 1)], Sampling())
    assert (len(last.ids), last.finish_reason) == (1, "length")


@pytest.mark.parametrize("name", ["pages", "page_size", "max_sequences", "chunk"])
def test_sizes_are_positive(name):
    with pytest.raises(UserError, match=f"{name} must be at least 1; got 0"):
        engine(**{name: 0})


def test_generate_leaves_nothing_behind_when_it_fails():
    made = engine()
    made.model.fails = (3,)
    with pytest.raises(MemoryError):
        made.generate([[1, 2, 3]], Sampling(max_tokens=9))
    assert not made.busy
    (one,) = made.generate([[1, 2, 3]], Sampling(max_tokens=9))
    assert list(one.ids) == [t.id for t in expected([1, 2, 3], Sampling(max_tokens=9), 0)[0]]


def test_generate_wants_a_list_and_an_idle_engine():
    made = engine()
    with pytest.raises(UserError, match="prompts must be a list of texts"):
        made.generate("text")
    with pytest.raises(UserError, match="2 prompts must have as many samplings; got 1"):
        made.generate([[1], [2]], [Sampling()])
    made.add([1])
    with pytest.raises(RuntimeError, match="1 are under way"):
        made.generate([[1]])
