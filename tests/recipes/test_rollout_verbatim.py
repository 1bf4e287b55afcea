"""What a message spells is text; special tokens are those of the template."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from warploom.recipes.errors import UserError
from warploom.recipes.rollout.codec import Codec
from warploom.recipes.tokens import BPE, train_bpe
from warploom.recipes.tokens.tokenizer import byte_alphabet

TEMPLATE = """\
{%- for m in messages %}
    {{- bos_token + m.role + ':' + m.content + eos_token }}
{%- endfor %}
{%- if switch is defined %}{{ switch }}{% endif %}
{%- if tools %}{{ tools | tojson(ensure_ascii=True) }}{% endif %}
{%- for part in parts %}{{ part }}{% endfor %}
"""
PARTS = (
    "<s>",
    "</s>",
    "<",
    "s>",
    "/s>",
    "<s",
    " ",
    "  ",
    "a",
    "ab",
    "user",
    ":",
    "ä",
    "\n",
    "\x7f",
)
TEXTS = st.lists(st.sampled_from((*PARTS, "|")), max_size=12).map("".join)


def _bytes():
    """Merges that make a special token of text."""
    vocabulary = {"<s>": 0, "</s>": 1} | {c: 2 + i for i, c in enumerate(sorted(byte_alphabet()))}
    merges = [("<", "s"), ("<s", ">"), ("a", "b"), ("s", ">")]
    vocabulary |= {"<s": 258, "ab": 259, "s>": 260}
    made = Backend(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return made


def _pieces():
    """Pieces of which special tokens are the likeliest, and spaces that the first is given."""
    rest = [(c, -3.0) for c in "▁<s>/abuer:ä\n|"] + [("▁a", -2.0), ("ab", -2.5), ("▁user", -1.0)]
    made = Backend(models.Unigram([("<unk>", -9.0), ("<s>", 0.0), ("</s>", 0.0), *rest], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def _words():
    """Words, of which special tokens are some; one takes the spaces around it; one is unknown."""
    names = ["<unk>", "user", ":", "a", "ab", "<s>", "</s>", "<", "s", ">", "/"]
    made = Backend(models.WordLevel({name: n for n, name in enumerate(names)}, "<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken("</s>", lstrip=True, rstrip=True), AddedToken("<s>")])
    made.add_special_tokens(["<far>", "<unk>"])  # the first is behind the vocabulary
    made.add_tokens(["user:"])
    return made


KINDS = {"bytes": _bytes, "pieces": _pieces, "words": _words}


def _codec(root, backend):
    root.mkdir()
    backend.save(str(root / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (root / "tokenizer_config.json").write_text(json.dumps(named))
    return Codec(root)


@pytest.fixture(scope="module", params=KINDS)
def codec(request, tmp_path_factory):
    return _codec(tmp_path_factory.mktemp("verbatim") / request.param, KINDS[request.param]())


def _said(*contents):
    return [{"role": "user", "content": content} for content in contents]


@settings(max_examples=200, deadline=None)
@given(contents=st.lists(TEXTS, min_size=1, max_size=3))
def test_special_tokens_are_as_many_as_the_template_has(codec, contents):
    ids = codec.encode_chat(_said(*contents))
    bos, eos = (codec.encode(name, special=False)[0] for name in ("<s>", "</s>"))
    assert [i for i in ids if i in (bos, eos)] == [bos, eos] * len(contents)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS.filter(lambda text: "s>" not in text))
def test_what_spells_none_is_read_as_ever(codec, text):
    """By the tokenizer itself, and by its twin, which another message calls for."""
    plain = codec.chat.render(_said(text))
    ids = codec.encode_chat(_said(text))
    assert ids == codec.encode(plain, special=False)
    assert codec.encode_chat(_said("<s></s>", text))[-len(ids) + 1 :] == ids[1:]


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_a_message_is_the_text_that_transformers_splits(tmp_path_factory, text):
    tokenizer = train_bpe(["abc abc user: <s></s>"] * 20, BPE(vocabulary=290))
    root = tmp_path_factory.mktemp("split")
    tokenizer.save(root)
    (root / "chat_template.jinja").write_text(TEMPLATE)
    text = text.replace("<s>", "<|bos|>").replace("</s>", "<|eos|>")
    theirs = PreTrainedTokenizerFast.from_pretrained(root)
    found = theirs(f"user:{text}", add_special_tokens=False, split_special_tokens=True).input_ids
    assert Codec(root).encode_chat(_said(text)) == [tokenizer.bos, *found, tokenizer.eos]
    assert theirs.decode(found) == f"user:{text}"


@pytest.mark.parametrize(
    ("role", "options", "text"),
    [
        ("</s>", {}, "</s>:a"),
        ("user", {"switch": "</s>"}, "user:a</s>"),
        ("user", {"tools": [{"n": ["<s>", 1]}]}, 'user:a[{"n": ["<s>", 1]}]'),
        ("user", {"tools": [{"</s>": 1}]}, 'user:a[{"</s>": 1}]'),
        ("user", {"parts": ["a<", "/s>"]}, "user:aa</s>"),
        ("user", {"parts": ["<", "/", "s", ">"]}, "user:a</s>"),
    ],
)
def test_roles_switches_and_tools_are_text_too(tmp_path, role, options, text):
    codec, seen = _codec(tmp_path / "made", _bytes()), []
    said = [{"role": role, "content": "a"}]
    ids = codec.encode_chat(said, seen.append, **options)
    assert [i for i in ids if i < 2] == [0, 1]
    assert codec.decode(ids) == text
    assert seen == [codec.chat.render(said, **options)]  # as it was meant


def test_a_check_comes_before_ids_and_nests_are_refused(tmp_path):
    codec = _codec(tmp_path / "made", _bytes())

    def refuse(text):
        raise UserError(text)

    with pytest.raises(UserError, match="^<s>user:<s>x</s>$"):
        codec.encode_chat(_said("<s>x"), refuse)
    deep = "a"
    for _ in range(900):
        deep = [deep]
    with pytest.raises(UserError, match="messages must be plain JSON"):
        codec.encode_chat(_said("a"), documents=deep)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("tokenizer_config.json", {"sep_token": {"content": "<end>"}}),
        ("special_tokens_map.json", {"additional_special_tokens": ["<end>"]}),
        ("generation_config.json", {"eos_token_id": [1, 261]}),
    ],
)
def test_what_the_folder_calls_special_is_text_too(tmp_path, file, said):
    """Though tokenizer.json has it as a word like others."""
    backend = _bytes()
    backend.add_tokens(["<end>", "<tool>"])
    _codec(tmp_path / "made", backend)
    path = tmp_path / "made" / file
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | said))
    codec = Codec(path.parent)
    ids = codec.encode_chat(_said("<end><tool>"))
    assert 261 not in ids
    assert 262 in ids
    assert codec.decode(ids) == "user:<end><tool>"
