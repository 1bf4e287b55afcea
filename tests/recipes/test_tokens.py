import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from warploom.recipes.errors import UserError
from warploom.recipes.tokens import BPE, SPECIAL_TOKENS, Tokenizer, measure_fertility, train_bpe
from warploom.recipes.tokens.tokenizer import byte_alphabet

NASTY = [
    "",
    " ",
    "\n",
    "naïve 日本 🙂\x00\n\t  x",
    "\r\n\r\n  \r",
    "\ufeffbom",
    "e\u0301 \u200d \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "1" * 1000,
    "a" * 5000,
    "\u2028\u0085\x0b\x0c\x1c",
    "\U0010ffff\ue000",
    "'LL we'll ½ Ⅷ ٣٤٥ 1,234,567.89",
    "".join(map(chr, range(0x250))),
    *SPECIAL_TOKENS,
    "<|bos|><|eos|><|bos|>" * 3,
]


def stdlib_texts(limit=16):
    folder = Path(sysconfig.get_path("stdlib"))
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("[a-d]*.py"))[:limit]]


@pytest.fixture(scope="module", params=["three", "one", "triples-from-the-right"])
def tokenizer(request):
    return train_bpe(stdlib_texts(), BPE(vocabulary=600, digits=request.param))


@pytest.fixture(scope="module")
def small():
    return train_bpe(stdlib_texts(), BPE(vocabulary=600))


def test_nasty_text_and_real_sources_come_back_byte_for_byte(tokenizer):
    for text in NASTY + stdlib_texts():
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_counts()[ids].sum() == len(text.encode())


@given(text=st.text() | st.text(alphabet="<|bos>e p0123456789\n'l"))
@settings(deadline=None, max_examples=150)
def test_any_text_comes_back_and_is_never_special(small, text):
    tokenizer = small
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


def test_digits_are_cut_as_asked(tokenizer, request):
    """The pieces are those of the pre-tokenizer: merges do not cross them."""
    mode = request.node.callspec.params["tokenizer"]
    step = tokenizer._plain.pre_tokenizer
    pieces = [piece for piece, _ in step.pre_tokenize_str("x1234567, 12 1000")]
    want = {
        "three": ["x", "123", "456", "7", ",", "Ġ", "12", "Ġ", "100", "0"],
        "one": ["x", *"1234567", ",", "Ġ", "1", "2", "Ġ", *"1000"],
        "triples-from-the-right": ["x", "1", "234", "567", ",", "Ġ", "12", "Ġ", "1", "000"],
    }
    assert pieces == want[mode]


def test_a_long_run_of_digits_costs_linear_time(tokenizer):
    """A look-ahead to the end of the run would be quadratic: minutes for these 200,000."""
    start = time.process_time()
    assert tokenizer.decode(tokenizer.encode("7" * 200_000)) == "7" * 200_000
    assert time.process_time() - start < 10


def test_the_special_tokens_are_frozen_and_last(small):
    assert SPECIAL_TOKENS[:8] == (
        "<|bos|>",
        "<|eos|>",
        "<|pad|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|tool|>",
        "<|end_of_turn|>",
    )
    assert len(SPECIAL_TOKENS) == len(set(SPECIAL_TOKENS)) == 24
    assert small.vocabulary == 600
    assert [small.special[s] for s in SPECIAL_TOKENS] == list(range(576, 600))
    assert (small.bos, small.eos, small.pad) == (576, 577, 578)


def test_text_full_of_special_spellings_teaches_no_special_token():
    """A trainer that is told of the special tokens maps a merge with that spelling to them."""
    texts = ["".join(SPECIAL_TOKENS) + "<|eos|> bos eos pad" * 50] * 20
    tokenizer = train_bpe(texts, BPE(vocabulary=300))
    for text in texts[:1] + list(SPECIAL_TOKENS):
        assert max(tokenizer.encode(text)) < 300 - len(SPECIAL_TOKENS)


def test_a_document_is_framed_once(small):
    ids = small.encode("x = 1")
    assert small.document(ids) == [small.bos, *ids, small.eos]
    assert small.decode(small.document(ids)) == "x = 1"
    assert small.decode(small.document(ids), show_special=True) == "<|bos|>x = 1<|eos|>"
    assert small.byte_counts()[[small.bos, small.eos, small.pad]].tolist() == [0, 0, 0]


def test_an_id_outside_the_vocabulary_is_refused(small):
    for wrong in (-1, 600):
        with pytest.raises(UserError, match=r"ids to decode must lie in 0 \.\. 599"):
            small.decode([1, wrong])


def test_transformers_loads_the_folder(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    small.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in NASTY[:13] + stdlib_texts(5):
        assert theirs.encode(text, add_special_tokens=False) == small.encode(text)
        assert theirs.encode(text) == [small.bos, *small.encode(text)]
        assert theirs.decode(small.encode(text)) == text
    assert len(theirs) == small.vocabulary
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (576, 577, 578)
    assert theirs.convert_tokens_to_ids("<|think|>") == small.special["<|think|>"]
    assert theirs.decode(small.document(small.encode("y")), skip_special_tokens=True) == "y"


def test_save_and_load_keep_everything(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.special, again.bos, again.eos, again.pad, again.vocabulary) == (
        tokenizer.special,
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.pad,
        tokenizer.vocabulary,
    )
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint, "formatting is no change"


@pytest.mark.parametrize("change", ["merge", "digits", "role"])
def test_the_fingerprint_sees_what_changes_ids(small, tmp_path, change):
    small.save(tmp_path)
    files = {n: json.loads((tmp_path / n).read_text()) for n in os.listdir(tmp_path)}
    if change == "merge":
        merges = files["tokenizer.json"]["model"]["merges"]
        merges[3], merges[4] = merges[4], merges[3]
    elif change == "digits":
        step = files["tokenizer.json"]["pre_tokenizer"]["pretokenizers"][0]
        step["pattern"]["Regex"] = step["pattern"]["Regex"].replace("{1,3}", "{1,2}")
    else:
        files["tokenizer_config.json"]["eos_token"] = "<|end_of_turn|>"
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).fingerprint != small.fingerprint


def test_training_does_not_depend_on_threads_or_hash_seed():
    code = (
        "import sys; from tests.recipes.test_tokens import *;"
        "print(train_bpe(stdlib_texts(12), BPE(vocabulary=500)).fingerprint)"
    )
    found = []
    for threads, seed in (("1", "1"), ("2", "2")):
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        found.append(run.stdout)
    assert found == [train_bpe(stdlib_texts(12), BPE(vocabulary=500)).fingerprint + "\n"] * 2


def test_learning_stops_at_the_sample_s_size():
    texts = stdlib_texts(12)
    size = sum(len(text.encode()) for text in texts[:6]) + len(texts[6]) // 2
    limited = train_bpe(texts, BPE(vocabulary=400, sample_bytes=size))
    assert limited.fingerprint == train_bpe(texts[:6], BPE(vocabulary=400)).fingerprint
    assert limited.fingerprint != train_bpe(texts, BPE(vocabulary=400)).fingerprint


def test_wishes_that_cannot_be_met_are_refused():
    with pytest.raises(UserError, match=r"vocabulary \(279\) must be at least 280: 256 bytes"):
        BPE(vocabulary=279)
    with pytest.raises(UserError, match="digits .'two'. must be one of three, one"):
        BPE(digits="two")
    with pytest.raises(UserError, match="give only 28[0-9] tokens; ask for at most"):
        train_bpe(["a few words, a few words"], BPE(vocabulary=1000))


def _foreign(folder, roles, model=None):
    """Write a tokenizer in the manner of SmolLM2: special tokens first, inside the vocabulary."""
    alphabet = sorted(byte_alphabet())
    vocab = {"<|endoftext|>": 0, "<|im_start|>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    backend = Backend(model or models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def test_a_tokenizer_of_others_loads(tmp_path):
    end = {"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<|endoftext|>"}
    _foreign(tmp_path, end)
    theirs = Tokenizer.load(tmp_path)
    assert (theirs.eos, theirs.bos, theirs.pad) == (0, None, None), "pad never equals eos"
    ids = theirs.encode("<|endoftext|>é")
    assert 0 not in ids
    assert theirs.decode(ids) == "<|endoftext|>é"
    assert theirs.document([5]) == [5, 0]


def test_what_cannot_serve_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must hold tokenizer\.json; there is none"):
        Tokenizer.load(tmp_path)
    _foreign(tmp_path, {})
    with pytest.raises(UserError, match="must name an eos token"):
        Tokenizer.load(tmp_path)
    _foreign(tmp_path, {"eos_token": "</s>"})
    with pytest.raises(UserError, match="the eos token '</s>' is not in the vocabulary"):
        Tokenizer.load(tmp_path)
    _foreign(tmp_path, {"eos_token": "<|endoftext|>"}, models.WordLevel({"a": 0}, "a"))
    with pytest.raises(UserError, match="must be byte-level BPE.*found model WordLevel"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json must be JSON in UTF-8"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_in_which_text_reaches_a_special_token_is_refused(tmp_path):
    alphabet = sorted(byte_alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"<s": 256, "<s>": 257}
    model = models.BPE(vocab=vocab, merges=[("<", "s"), ("<s", ">")])
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(["<s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    with pytest.raises(UserError, match="text that spells '<s>' would become a special token"):
        Tokenizer.load(tmp_path)


def test_the_byte_alphabet_is_that_of_tokenizers():
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_fertility_counts_by_type(small):
    texts = [("a/x.py", "import os\n"), ("b.md", "naïve"), ("d.jsonl#3", "z"), ("y.py", "x")]
    report = measure_fertility(small, texts)
    assert set(report.by_type) == {".py", ".md", ".jsonl"}
    assert (report.by_type[".md"].characters, report.by_type[".md"].bytes) == (5, 6)
    assert report.by_type[".py"].tokens == len(small.encode("import os\n")) + 1
    assert report.total.documents == 4
    assert report.lossless
    assert "lossless" in report.table()


def test_common_words_are_found_in_one_token(small):
    assert measure_fertility(small, [("a", "self self self")]).single_token_words == 1
    assert measure_fertility(small, [("a", "self Donaudampfschiff")]).single_token_words == 0.5


def test_a_tokenizer_that_loses_text_is_told():
    spec = json.loads(train_bpe(stdlib_texts(5), BPE(vocabulary=300))._plain.to_str())
    spec["normalizer"] = {"type": "Lowercase"}
    spec["added_tokens"] = [
        {"id": 299, "content": "<e>", "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
    ]  # fmt: skip
    lossy = Tokenizer(spec, {"eos": "<e>"})
    assert not measure_fertility(lossy, [("a", "Big")]).lossless
