"""`warploom generate` and what it reads of a folder: tokenizer, ends of text, chat template."""

import dataclasses
import io
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from warploom import cli
from warploom.kernels.invariant import invariant
from warploom.models import hf
from warploom.models.decoder import Decoder
from warploom.models.families import llama
from warploom.recipes.errors import UserError
from warploom.recipes.rollout.chat import Chat
from warploom.recipes.rollout.codec import Codec
from warploom.recipes.tokens import BPE, train_bpe

PLAIN = """\
{%- for m in messages %}
    {%- if loop.first and m.role != 'system' %}
        {{- '<|system|>be brief' + eos_token }}
    {%- endif %}
    {{- '<|' + m['role'] + '|>' + m['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
RICH = """\
{% set ns = namespace(last=-1, seen=[]) %}
{% for m in messages %}
    {% if m.role == "user" %}
        {% set ns.last = loop.index0 %}
    {% endif %}
{% endfor %}
{{ bos_token }}year {{ strftime_now("%Y") }}{% if tools %} tools:
{% for t in tools %}
{{ t | tojson }} {{ t | tojson(indent=1) }}
{% endfor %}
{% endif %}
{% for m in messages %}
    {% if m.role == "tool" %}{% continue %}{% endif %}
    {% if m.role not in ["user", "assistant"] %}{{ raise_exception("no " + m.role) }}{% endif %}
    {% if m.role == "assistant" %}
{% generation %}{% set inside = 1 %}{{ m.content }}{{ eos_token }}
{% endgeneration %}
    {% else %}
{{ m.content }}{{ m.name is defined }}
    {% endif %}
    {% if inside is defined %}leaked{% endif %}
    {% if loop.index > 8 %}{% break %}{% endif %}
{% endfor %}
{{ ns.last }}{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}
"""
CHATS = [
    [{"role": "user", "content": "  What is <this> & 'that'?\n"}],
    [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "äöü €"},
        {"role": "assistant", "content": "well", "name": None},
        {"role": "user", "content": "and?", "name": "ada"},
    ],
    [{"role": "user", "content": "x"}, {"role": "tool", "content": "3"}],
]
TOOLS = [{"type": "function", "function": {"name": "äh", "parameters": {"a": [1, 2.5, None]}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and a tokenizer, as a Hugging Face folder with a chat template."""
    root = tmp_path_factory.mktemp("generate")
    tokenizer = train_bpe(["abc abc aab cab äöü €"] * 20, BPE(vocabulary=296))
    tokenizer.save(root / "tokenizer")
    a = dataclasses.replace(llama.tiny(), vocabulary=tokenizer.vocabulary, max_positions=200)
    made = Decoder.create(a, seed=5)
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.mul_(5)
    hf.save(made, root / "model", tokenizer_folder=root / "tokenizer")
    (root / "model" / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
    return root / "model"


@pytest.fixture
def theirs(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder)


def generated(folder, text, count, ids=False):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    out = model.generate(prompt, do_sample=False, max_new_tokens=count)[0, prompt.shape[1] :]
    return out.tolist() if ids else tokenizer.decode(out, skip_special_tokens=True)


def run(capsys, *words):
    code = cli.main(["generate", *map(str, words)])
    return code, capsys.readouterr()


def test_a_prompt_is_continued_as_transformers_does(folder, capsys, monkeypatch):
    wanted = generated(folder, "<|bos|>abc", 20)
    words = (folder, "--max-tokens", 20)
    assert run(capsys, *words, "--prompt", "abc")[1].out == wanted + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
    assert run(capsys, *words)[1].out == wanted + "\n"


def test_many_texts_are_json_lines(folder, capsys):
    words = (folder, "--max-tokens", 6, "--temperature", 1, "--n", 2, "--kept", "--top-k", 9)
    code, shown = run(capsys, *words, "--json", "--logprobs", 2, "--prompt", "a", "--prompt", "b")
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert code == 0
    assert [(one["request"], one["sample"]) for one in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for one in lines:
        size = len(one["ids"])
        for name in ("logprobs", "sampling_logprobs", "top", "kept"):
            assert len(one[name]) == size
        assert all(i in kept for i, kept in zip(one["ids"], one["kept"], strict=True))
        assert one["text"] == Codec(folder).decode(one["ids"])
    _, shown = run(capsys, folder, "--max-tokens", 4, "--prompt", "a", "--prompt", "b")
    assert len(shown.out.splitlines()) >= 2


def test_a_chat_is_answered(folder, capsys, monkeypatch, theirs):
    words = (folder, "--chat", "--max-tokens", 12)
    first = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "abc"}]

    def render(messages):
        return theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    answer = generated(folder, render(first), 12)
    shown = run(capsys, *words, "--system", "be kind", "--prompt", "abc")[1]
    assert shown.out == answer + "\n"
    second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "b"}]
    lines = iter(["abc", "b"])

    def line(prompt):
        for one in lines:
            return one
        raise EOFError

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    shown = run(capsys, *words, "--system", "be kind")[1]
    assert shown.out == answer + "\n" + generated(folder, render(second), 12) + "\n\n"


def test_the_folder_says_how_tokens_are_chosen(folder, capsys, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "generation_config.json").unlink()
    config = {"do_sample": True, "temperature": 0.6, "top_k": 5, "eos_token_id": [1, 2]}
    (copy / "generation_config.json").write_text(json.dumps(config))
    words = ("--prompt", "abc", "--max-tokens", 8, "--json", "--seed", 3)
    said = run(capsys, copy, *words)[1].out
    assert said == run(capsys, folder, *words, "--temperature", 0.6, "--top-k", 5)[1].out
    assert Codec(copy).eos == {1, 2}
    (copy / "generation_config.json").write_text(json.dumps(config | {"top_p": 7}))
    assert run(capsys, copy, *words)[0] == 2
    for file, eos in (("config.json", 9), ("tokenizer_config.json", "<|eos|>")):
        (copy / "generation_config.json").unlink(missing_ok=True)
        kept = json.loads((folder / "config.json").read_text()) | {"eos_token_id": None}
        (copy / "config.json").unlink()
        kept |= {"eos_token_id": eos} if file == "config.json" else {}
        (copy / "config.json").write_text(json.dumps(kept))
        known = json.loads((folder / "config.json").read_text())["eos_token_id"]
        assert Codec(copy).eos == {eos if file == "config.json" else known}


def test_a_text_has_the_same_bits_in_company_in_the_batch_invariant_mode(
    folder, capsys, monkeypatch
):
    modes, advance = [], Decoder.advance
    monkeypatch.setattr(Decoder, "advance", lambda *a: (modes.append(invariant()), advance(*a))[1])
    words = [folder, "--max-tokens", 24, "--json", "--temperature", 1, "--logprobs", 3]
    others = [word for text in ("b", "cab " * 20, "äöü", "aa") for word in ("--prompt", text)]

    def first(*more):
        one = json.loads(run(capsys, *words, "--prompt", "abc abc", *more)[1].out.splitlines()[0])
        return one["ids"], one["logprobs"], one["top"]

    assert first("--batch-invariant") == first("--batch-invariant", *others)
    assert set(modes) == {True}
    modes.clear()
    first()
    assert set(modes) == {False}


def test_a_mode_that_cannot_be_had_is_told(folder, capsys, tmp_path, monkeypatch):
    words = ("--prompt", "a", "--batch-invariant")
    hf.save(hf.load(folder, dtype=torch.float64), tmp_path / "wide", tokenizer_folder=folder)
    code, shown = run(capsys, tmp_path / "wide", *words)
    assert (code, "add --dtype float32" in shown.err) == (2, True)
    assert run(capsys, tmp_path / "wide", *words, "--dtype", "float32", "--max-tokens", 2)[0] == 0
    code, shown = run(capsys, folder, *words, "--device", "meta")
    assert code == 2
    assert "device must be cpu with --batch-invariant; got meta" in shown.err


def test_a_terminal_is_told_while_weights_are_loaded(folder, capsys, monkeypatch):
    words = (folder, "--prompt", "a", "--max-tokens", 2)
    assert run(capsys, *words)[1].err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    shown = run(capsys, *words)[1].err
    assert shown.index("loading") < shown.index("[2 tokens")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{}", "--prompt", "a", "--top-p", "2"], "top_p must be a number from 0 to 1; got 2.0"),
        (["{}", "--prompt", "a" * 999], "room for a token in the window of 200"),
        (["{}", "--prompt", "a", "--system", "x"], "add --chat"),
        (["{}", "--prompt", "a", "--pages", "1"], "must fit the 1 pages"),
        (["{}", "--prompt", "a", "--pages", "0"], "pages must be at least 1; got 0"),
        (["nowhere", "--prompt", "a"], "nowhere must be a folder on this machine: fetch it first"),
        ([__file__, "--prompt", "a"], "this is a file; `warploom convert` makes a folder"),
        (["{}", "--prompt", "a", "--device", "abacus"], "device (abacus) must be one that torch"),
    ],
)
def test_mistakes_are_told_in_a_sentence(folder, capsys, words, sentence):
    code, shown = run(capsys, *(w.format(folder) for w in words))
    assert code == 2
    assert sentence in shown.err
    assert len(shown.err.splitlines()) == 1


def test_a_tokenizer_of_another_model_is_refused(folder, capsys, tmp_path):
    other = tmp_path / "other"
    hf.save(Decoder.create(llama.tiny()), other)
    (other / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    code, shown = run(capsys, other, "--prompt", "a")
    assert code == 2
    assert "the tokenizer of another model" in shown.err
    code, shown = run(capsys, other, "--chat", "--prompt", "a")
    assert "must hold chat_template.jinja" in shown.err


def test_ids_are_those_of_transformers(folder, theirs):
    codec = Codec(folder)
    for text in ("", "abc äöü", "a<|eos|>b", " € \n"):
        assert codec.encode(text) == theirs(text)["input_ids"]
        assert codec.encode(text, special=False) == theirs(text, add_special_tokens=False).input_ids
    assert codec.eos == {theirs.eos_token_id}


@pytest.mark.parametrize("template", [PLAIN, RICH])
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("more", [{}, {"tools": TOOLS}, {"enable_thinking": False}])
def test_chats_are_rendered_as_transformers_does(folder, theirs, template, messages, more):
    ours, theirs.chat_template = Chat(template, Codec(folder).special), template
    for prompt in (False, True):
        options = {"add_generation_prompt": prompt, **more}
        if template is RICH and messages[0]["role"] == "system":
            with pytest.raises(UserError, match="refuses the conversation: no system"):
                ours.render(messages, **options)
            continue
        wanted = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.render(messages, **options) == wanted
        assert "leaked" not in wanted


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ namespace(__init__=1) }}", "begins with _"),
        ("{% set ns = namespace() %}{% set ns.__x = 1 %}", "begins with _"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ range(999999999) | list }}", "Range too big"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ strftime_now.__globals__['sys'] }}", "__globals__"),
    ],
)
def test_a_template_stays_in_its_box(template, sentence):
    with pytest.raises(UserError, match=f"refuses the conversation: .*{sentence}"):
        Chat(template, {}).render(CHATS[0])
    assert Chat("{{ messages.__class__ }}", {}).render(CHATS[0]) == ""


def test_templates_and_messages_that_are_broken():
    with pytest.raises(UserError, match="cannot be compiled"):
        Chat("{% if %}", {})
    with pytest.raises(UserError, match="plain JSON"):
        Chat("", {}).render([{"role": "user", "content": object()}])
    for messages in ([], [{"content": "x"}], ["x"]):
        with pytest.raises(UserError, match="objects with a role"):
            Chat("", {}).render(messages)
