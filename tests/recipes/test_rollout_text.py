"""Streaming shows the text, all of it, never more, and nothing that must be taken back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.recipes.rollout_fakes import WINDOW, FakeCache, FakeModel
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from warploom.recipes.errors import UserError
from warploom.recipes.rollout import Engine, Sampling
from warploom.recipes.rollout.text import TextStream
from warploom.recipes.tokens import BPE, train_bpe


@pytest.fixture(scope="module")
def bytes_():
    """A byte-level tokenizer of little more than bytes, so that characters fall into tokens."""
    return train_bpe(["abc abc aab cab äöü € 😀"] * 20, BPE(vocabulary=290))


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer with spaces in its pieces, and bytes for what it does not know."""
    vocabulary = {"<unk>": 0, "<s>": 1} | {f"<0x{b:02X}>": 2 + b for b in range(256)}
    for piece in ("▁a", "▁b", "a", "ab", "▁", "c"):
        vocabulary[piece] = len(vocabulary)
    made = Backend(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    made.add_special_tokens(["<s>"])
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


UNITS = st.integers(258, 263).map(lambda n: [n]) | st.just([1])  # whole characters, one <s>
UNITS |= st.sampled_from("a\0ä€😀").map(lambda c: [2 + b for b in c.encode()])


def stream(decode, ids, stop=()):
    """Push ids until one ends the text; return what was shown, and the ids that were used."""
    made, shown = TextStream(decode, stop), []
    for used, token in enumerate(ids, 1):
        shown.append(made.push(token))
        if made.stopped:
            ids = ids[:used]
            break
    shown.append(made.close())
    assert "".join(shown) == made.text
    return shown, ids


def cut(text, stop):
    places = [text.find(s) for s in stop if s in text]
    return text[: min(places)] if places else text


TEXTS = st.text("abc ä€😀\N{REPLACEMENT CHARACTER}", max_size=12)
STOPS = st.lists(st.text("abc ä€", min_size=1, max_size=4), max_size=3)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, stop=STOPS, noise=st.lists(st.integers(0, 255), max_size=3))
def test_streams_of_bytes(bytes_, text, stop, noise):
    ids = bytes_.encode(text) + noise + bytes_.encode(text)
    shown, used = stream(bytes_.decode, ids, stop)
    assert "".join(shown) == cut(bytes_.decode(used), stop)
    for end in range(1, len(shown)):  # what was shown is a beginning of what comes
        assert cut(bytes_.decode(used), stop).startswith("".join(shown[:end]))


@settings(max_examples=150, deadline=None)
@given(units=st.lists(UNITS, max_size=12), stop=STOPS)
def test_streams_of_pieces(pieces, units, stop):
    ids = [token for unit in units for token in unit]
    shown, used = stream(pieces.decode, ids, stop)
    assert "".join(shown) == cut(pieces.decode(used), stop)


def test_a_character_is_shown_when_it_is_whole(bytes_):
    ids = [bytes_.encode(" ")[0], *(i for i in range(256) if bytes_.decode_bytes([i]) in EURO)]
    order = [next(i for i in ids if bytes_.decode_bytes([i]) == b) for b in EURO]
    shown, _ = stream(bytes_.decode, [*order, order[0]])
    assert shown == ["", "", "€", "", "\N{REPLACEMENT CHARACTER}"]


EURO = [b"\xe2", b"\x82", b"\xac"]


def test_what_may_become_a_stop_string_is_held_back():
    shown, used = stream(lambda ids: "".join(map(chr, ids)), [*map(ord, "xENxEND!")], ("END",))
    assert shown == ["x", "", "", "ENx", "", "", "", ""]
    assert len(used) == 7
    shown, _ = stream(lambda ids: "".join(map(chr, ids)), [*map(ord, "xEN")], ("END",))
    assert shown == ["x", "", "", "EN"]


class Letters:
    """Ids are letters; 5 ends a text."""

    eos = 5

    def encode(self, text):
        return [ord(c) - 97 for c in text]

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


def run(prompt, sampling, tokenizer=None):
    made = Engine(FakeModel(), tokenizer or Letters(), pages=40, page_size=4, make_cache=FakeCache)
    made.add(prompt, sampling)
    events = []
    while made.busy:
        events += made.step()
    return events, events[-1].completion


def test_an_engine_ends_texts():
    free = Sampling(temperature=0.0, max_tokens=40, ignore_eos=True)
    _, whole = run("hello", free)
    assert whole.finish_reason == "length"
    assert len(whole.ids) == 40
    assert whole.text == Letters().decode(whole.ids)
    assert WINDOW > 45

    def ends(**changes):
        events, done = run("hello", Sampling(temperature=0.0, max_tokens=40, **changes))
        assert "".join(e.text for e in events) == done.text
        assert done.ids == whole.ids[: len(done.ids)]
        return done

    stop = whole.text[6:9]
    cut_short = ends(stop=(stop,), ignore_eos=True)
    at = whole.text.find(stop)
    assert (cut_short.text, cut_short.finish_reason) == (whole.text[:at], "stop")
    assert len(cut_short.ids) == at + 3
    end = whole.ids[10]
    by_id = ends(stop_ids=(end,), ignore_eos=True)
    first = whole.ids.index(end)
    assert (by_id.ids, by_id.finish_reason) == (whole.ids[: first + 1], "stop")
    assert by_id.text == whole.text[:first]  # what ended the text is not in it

    class Ends(Letters):
        eos = (99, end)

    _, done = run("hello", Sampling(temperature=0.0, max_tokens=40), Ends())
    assert done.ids == by_id.ids
    assert done.text == by_id.text
    _, done = run("hello", free, Ends())
    assert done.ids == whole.ids

    class Theirs:  # as transformers names it
        eos_token_id = end
        encode, decode = Letters.encode, Letters.decode

    _, done = run("hello", Sampling(temperature=0.0, max_tokens=40), Theirs())
    assert (done.text, done.finish_reason) == (by_id.text, "stop")
    with pytest.raises(UserError, match="tokenizer must encode and decode"):
        run("hello", free, "folder")


def test_a_tokenizer_that_fails_loses_no_text():
    """What was drawn in the same step for others is drawn again."""

    class Fails(Letters):
        calls = 0

        def decode(self, ids):
            self.calls += 1
            if self.calls == 11:
                raise OSError("no")
            return super().decode(ids)

    def texts(tokenizer):
        made = Engine(FakeModel(), tokenizer, pages=40, page_size=4, make_cache=FakeCache)
        for seed in range(3):
            made.add("hello", Sampling(max_tokens=9, seed=seed, ignore_eos=True))
        events, failures = [], 0
        for _ in range(40):
            try:
                events += made.step()
            except OSError:
                failures += 1
        assert not made.busy
        told = {e.request: e.completion for e in events if e.completion}
        assert [len(told[n].ids) for n in range(3)] == [9, 9, 9]
        assert failures == hasattr(tokenizer, "calls")
        return [told[n].text for n in range(3)]

    assert texts(Fails()) == texts(Letters())


def test_a_cancelled_text_keeps_what_it_has():
    made = Engine(FakeModel(), Letters(), pages=40, page_size=4, make_cache=FakeCache)
    request = made.add("hello", Sampling(n=2, stop=("zzz",), max_tokens=30))
    shown = [e.text for _ in range(3) for e in made.step() if e.sample == 1]
    made.cancel(request)
    made.cancel(request)
    assert made.busy
    first, second = made.step()
    assert not made.busy
    assert (first.completion.finish_reason, first.token) == ("cancelled", None)
    assert second.completion.text == "".join(shown) + second.text
    assert len(second.completion.ids) == 3
