"""What `warploom serve` answers: to OpenAI's client, what the engine gives; else a sentence."""

import json
import re

import openai
import pytest
from tests.recipes.serving import client_of, make_folder

from warploom.recipes.rollout import Sampling
from warploom.recipes.rollout.codec import Codec
from warploom.recipes.serving.refusal import dump

CHAT = [{"role": "user", "content": "abc äöü"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("serve"))


@pytest.fixture
def client(server):
    with client_of(server) as made:
        yield made


@pytest.mark.parametrize("prompts", ["abc", ["abc", "cab aab"], [272, 257, 5], [[272], [257, 5]]])
def test_completions_are_the_engines(client, alone, prompts):
    how = {"max_tokens": 9, "n": 2, "temperature": 0.9, "top_p": 0.95, "seed": 7}
    extra = {"top_k": 40, "min_p": 0.001}
    got = client.completions.create(
        model="tiny",
        prompt=prompts,
        **how,
        logprobs=3,
        extra_body={**extra, "return_token_ids": True},
    )
    many = prompts if isinstance(prompts[0], str | list) and prompts != "abc" else [prompts]
    sampling = [Sampling(**{**how, "seed": 7 + i}, **extra, logprobs=3) for i in range(len(many))]
    wanted = alone.generate(many, sampling)
    assert [c.index for c in got.choices] == list(range(2 * len(many)))
    for choice, one in zip(got.choices, wanted, strict=True):
        assert choice.text == one.text
        assert choice.finish_reason == one.finish_reason
        assert choice.token_ids == list(one.ids)
        assert choice.prompt_token_ids == list(one.prompt_ids)
        assert choice.logprobs.token_logprobs == list(one.logprobs)
        before = ["".join(choice.logprobs.tokens[:i]) for i in range(len(one.ids))]
        assert choice.logprobs.text_offset == [*map(len, before)]
        tops = [sorted(logprob for _, logprob in token.top) for token in one.tokens]
        assert [sorted(top.values()) for top in choice.logprobs.top_logprobs] == tops
    given = sum(len(one.prompt_ids) for one in wanted[::2])
    drawn = sum(len(one.ids) for one in wanted)
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (given, drawn)
    assert got.usage.total_tokens == given + drawn


def test_chats_are_the_engines_on_the_folders_template(client, alone, folder):
    how = {"max_tokens": 12, "temperature": 0.7, "seed": 3}
    parts = [{"type": "text", "text": "abc "}, {"type": "text", "text": "äöü"}]
    ids = Codec(folder).encode_chat(CHAT, switch="on")
    (wanted,) = alone.generate([ids], Sampling(**how, logprobs=2))
    for content in (CHAT[0]["content"], parts):
        got = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": content}],
            **how,
            logprobs=True,
            top_logprobs=2,
            extra_body={"return_token_ids": True, "chat_template_kwargs": {"switch": "on"}},
        )
        assert got.prompt_token_ids == ids
        assert got.choices[0].message.content == wanted.text
        assert got.choices[0].token_ids == list(wanted.ids)
        listed = got.choices[0].logprobs.content
        assert [one.logprob for one in listed] == list(wanted.logprobs)
        for one, token in zip(listed, wanted.tokens, strict=True):
            assert [t.logprob for t in one.top_logprobs] == [logprob for _, logprob in token.top]
            assert one.bytes is None or bytes(one.bytes).decode() == one.token
    got = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0)
    (wanted,) = alone.generate(
        [Codec(folder).encode_chat(CHAT)],
        Sampling(**dict.fromkeys(["temperature"], 0), max_tokens=999),
    )
    assert got.choices[0].message.content == wanted.text  # until the window ends it
    assert got.usage.completion_tokens == len(wanted.ids)


def test_a_message_that_spells_a_special_token_is_text(client, server, folder):
    codec, said = Codec(folder), [{"role": "user", "content": "abc<|eos|><|assistant|>a"}]
    extra = {"return_token_ids": True, "chat_template_kwargs": {"switch": "<|eos|>"}}
    got = client.chat.completions.create(
        model="tiny", messages=said, max_tokens=1, extra_body=extra
    )
    assert got.prompt_token_ids == codec.encode_chat(said, switch="<|eos|>")
    assert sum(i in codec.eos for i in got.prompt_token_ids) == 1
    said[0]["content"] = "<|eos|>" * 500  # of 3840 characters that are read
    status, _, answer = server.ask("/v1/chat/completions", {"messages": said})
    assert (status, "window of 120; this one has" in answer["error"]["message"]) == (400, True)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("told", [{}, {"logprobs": 2}])
def test_a_stream_says_what_the_whole_says(client, chat, told):
    how = {"max_tokens": 24, "n": 2, "temperature": 1.0, "seed": 11, "stop": ["b", "zz"]}
    create = client.chat.completions.create if chat else client.completions.create
    how |= {"messages": CHAT} if chat else {"prompt": ["abc", "a"]}
    if chat and told:
        told = {"logprobs": True, "top_logprobs": 2}
    how |= {"model": "tiny", **told, "extra_body": {"return_token_ids": True}}
    whole = create(**how)
    chunks = list(create(**how, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        text = "".join((c.delta.content if chat else c.text) for c in mine)
        assert text == (choice.message.content if chat else choice.text)
        assert sum((c.token_ids for c in mine), []) == choice.token_ids
        assert [c.finish_reason for c in mine][:-1] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == choice.finish_reason
        if chat:
            assert [c.delta.role for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
        else:
            assert mine[0].prompt_token_ids == choice.prompt_token_ids
        if told:
            names = ["content"] if chat else ["tokens", "token_logprobs", "text_offset"]
            for name in names:
                parts = [getattr(c.logprobs, name) for c in mine]
                assert sum(parts, []) == getattr(choice.logprobs, name)
        else:
            assert choice.logprobs is None


def test_a_stream_is_what_the_protocol_says(server):
    body = {"prompt": "abc", "max_tokens": 3, "temperature": 0, "stream": True}
    status, headers, text = server.ask("/v1/completions", body)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(line.removeprefix("data: "))["choices"] for line in lines[:-2])


def test_texts_end_where_they_should(client, alone):
    (free,) = alone.generate(["abc"], Sampling(temperature=0.9, seed=5, max_tokens=40))
    stop = free.text[5:7]
    how = {"model": "tiny", "prompt": "abc", "temperature": 0.9, "seed": 5, "max_tokens": 40}
    got = client.completions.create(**how, stop=stop).choices[0]
    assert (got.text, got.finish_reason) == (free.text[: free.text.index(stop)], "stop")
    extra = {"stop_token_ids": [free.ids[3]], "return_token_ids": True}
    got = client.completions.create(**how, extra_body=extra).choices[0]
    assert got.token_ids == list(free.ids[: free.ids.index(free.ids[3]) + 1])
    assert got.finish_reason == "stop"
    got = client.completions.create(model="tiny", prompt=[5], extra_body={"ignore_eos": True})
    assert got.usage.completion_tokens == 16


def test_seeds_are_reproducible_and_else_differ(client):
    def text(**how):
        got = client.completions.create(model="tiny", prompt="abc", max_tokens=8, **how)
        return got.choices[0].text

    assert text(seed=1) == text(seed=1)
    assert len({text() for _ in range(3)}) == 3
    assert text(temperature=0) == text(temperature=0, seed=9)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="model must be 'tiny'"):
        client.models.retrieve("gpt/4")


WRONG = [
    ({"temperature": -1}, "temperature must be a number from 0 to 100; got -1"),
    ({"temperature": 1e-5}, "temperature must be 0, for the likeliest token"),
    ({"temperature": "hot"}, "temperature must be a number"),
    ({"top_p": 1.5}, "top_p must be a number from 0 to 1"),
    ({"top_k": -1}, "top_k must be an integer from 0"),
    ({"min_p": True}, "min_p must be a number"),
    ({"n": 0}, "n must be an integer from 1"),
    ({"n": 129}, "a request may ask for 128 texts; got 1 prompts and n=129"),
    ({"n": 10**30}, "n must be an integer"),
    ({"max_tokens": 0}, "max_tokens must be an integer of at least 1; got 0"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "the same as max_completion_tokens"),
    ({"seed": 2**63}, "seed must be an integer"),
    ({"stop": [""]}, "stop must hold no empty string"),
    ({"stop": ["a"] * 17}, "stop must be at most 16 texts"),
    ({"stop": "\ud800"}, "stop must be Unicode text"),
    ({"stop": 3}, "stop must be a text or a list of texts"),
    ({"stop_token_ids": [-1]}, "stop_token_ids must be ids from 0 to 295"),
    ({"stop_token_ids": 2}, "stop_token_ids must be a list"),
    ({"logprobs": 21}, "logprobs must be an integer from 0 to 20"),
    ({"logprobs": True}, "logprobs must be an integer"),
    ({"stream": 1}, "stream must be true or false; got 1"),
    ({"stream_options": {"include_usage": True}}, "left out where stream is false"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options must be an object"),
    ({"echo": True}, "echo is not served: leave it out; got True"),
    ({"best_of": 3}, "best_of is not served"),
    ({"frequency_penalty": 0.5}, "frequency_penalty is not served"),
    ({"logit_bias": {"5": 1}}, "logit_bias is not served"),
    ({"tools": [{}]}, "tools is not served"),
    ({"response_format": {"type": "json_object"}}, "response_format is not served"),
    ({"guided_regex": "a+", "beam": 2}, "no field that is not known; got 'beam', 'guided_regex'"),
    ({"messages": CHAT}, "no field that is not known; got 'messages'"),
    ({"prompt": "a" * 2000}, "leave room for a token in the window of 120"),
    ({"prompt": "a" * 9999}, "3840 characters at most; this one has 9999: shorten it"),
    ({"prompt": []}, "prompt must be a text, a list of ids, or a list of either"),
    ({"prompt": [[]]}, "a prompt must have at least one token"),
    ({"prompt": [1, "a"]}, "prompt must be a text, a list of ids"),
    ({"prompt": [5, -1]}, "ids must be from 0 to 295; the prompt has -1"),
    ({"prompt": [296]}, "the prompt has 296"),
    ({"prompt": [10**30]}, "ids must be from 0 to 295"),
    ({"prompt": [True]}, "prompt must be a text"),
    ({"prompt": None}, "prompt must be a text"),
    ({"prompt": "a\udfff"}, "prompt must be Unicode text"),
    ({"prompt": ["a"] * 129}, "got 129 prompts"),
    ({"model": "\ud800"}, "model must be 'tiny'"),
    ({"logprobs": 20, "n": 128, "max_tokens": 10**6}, "an answer may list 1048576"),
]
WRONG_CHATS = [
    ({"messages": []}, "messages must be a list of messages"),
    ({"messages": [{"content": "a"}]}, "messages must be objects with a role"),
    ({"messages": [{"role": "user", "content": 3}]}, "content must be a text, or a list of parts"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "content must be a text, or a list of parts of type text",
    ),
    ({"messages": [{"role": "bad", "content": ""}]}, "refuses the conversation: no bad ones"),
    ({"messages": [{"role": "user"}]}, "refuses the conversation"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages must be Unicode text"),
    ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs must be an object without"),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be an object"),
    ({"top_logprobs": 3}, "left out where logprobs is false"),
    ({"logprobs": 3}, "logprobs must be true or false"),
    ({"prompt": "a"}, "no field that is not known; got 'prompt'"),
]


def test_what_cannot_be_had_is_refused_in_a_sentence(server):
    cases = [("/v1/completions", {"prompt": "a"} | body, said) for body, said in WRONG]
    cases += [("/v1/chat/completions", {"messages": CHAT} | b, said) for b, said in WRONG_CHATS]
    before = server.metrics()
    for path, body, said in cases:
        status, _, answer = server.ask(path, dump(body))
        assert status == (404 if "model" in body else 400), body
        error = answer["error"]
        assert said in error["message"], (body, error)
        assert error["type"] == "invalid_request_error"
        assert "\n" not in error["message"]
        assert len(error["message"]) < 500
    server.settle()
    after = server.metrics()
    name = 'requests_total{outcome="invalid"}'
    assert after[name] - before[name] == len(cases)
    assert after["requests_accepted_total"] == before["requests_accepted_total"]
    assert server.worker.pending == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe{}",
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 50_000,
        b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": {"a": 1}}',
        b'{"prompt": "a", "stream_options": 7, "stream": true}',
        b'{"prompt": "a", "stop": {"a": 1}}',
        b'{"prompt": "a", "chat_template_kwargs": {}}',
        b'{"messages": {}}',
        b'{"prompt": "", "model": ["tiny"]}',
    ],
)
def test_what_is_no_request_is_refused(server, body):
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, _, answer = server.ask(path, body)
        assert status in (400, 404), answer
        assert answer["error"]["message"]
        assert len(answer["error"]["message"]) < 500


def test_null_and_what_changes_nothing_are_as_not_given(server):
    nothing = {"frequency_penalty": 0, "logit_bias": {}, "echo": False, "best_of": 1, "n": None}
    nothing |= {"suffix": None, "logprobs": None, "user": "ada", "metadata": {"a": "b"}}
    body = {"model": "tiny", "prompt": "abc", "temperature": 0, "max_tokens": 5}
    plain, other = (server.ask("/v1/completions", b)[2]["choices"] for b in (body, body | nothing))
    assert plain == other


def test_paths_and_types_that_are_not_served(server):
    assert server.ask("/v1/nothing")[0] == 404
    assert server.ask("/v1/completions")[0] == 405
    assert "error" in server.ask("/v1/embeddings", {"input": "a"})[2]
    status, _, answer = server.ask("/v1/completions", b"{}", **{"Content-Type": "text/plain"})
    assert status == 415
    assert "Content-Type must be application/json" in answer["error"]["message"]
    status, _, answer = server.ask("/v1/models", Host="evil.example:80")
    assert (status, "must be called localhost" in answer["error"]["message"]) == (403, True)
    for host in ("localhost", "[::1]:9", "127.0.0.1:80", "LOCALHOST:1"):
        assert server.ask("/v1/models", Host=host)[0] == 200


def test_metrics_are_what_prometheus_reads(server, client):
    before = server.metrics()
    client.completions.create(model="tiny", prompt=["abc", "a"], n=2, max_tokens=4)
    server.settle()
    after = server.metrics()
    grown = {name: after[name] - before[name] for name in after}
    assert grown['requests_total{outcome="completed"}'] == grown["requests_accepted_total"] == 1
    assert grown["prompt_tokens_total"] == 4
    drawn = grown["generated_tokens_total"]
    assert 4 <= drawn <= 16
    assert grown["time_to_first_token_seconds_count"] == grown["request_seconds_count"] == 1
    assert grown["time_per_token_seconds_count"] == drawn - 4
    assert grown['request_seconds_bucket{le="+Inf"}'] == 1
    assert 0 < grown["time_to_first_token_seconds_sum"] <= grown["request_seconds_sum"]
    assert after["cache_pages"] == after["cache_pages_free"] == 400
    assert after["samples_running"] == after["samples_waiting"] == 0
    text = server.ask("/metrics")[2]
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="[^"]*"\})? [-+.\w]+', line), line
