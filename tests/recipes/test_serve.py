"""`warploom serve`: what OpenAI's client gets is what the engine gives, whatever others do."""

import asyncio
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import openai
import pytest
from tests.recipes.serving import live, make_folder

from warploom.models import hf
from warploom.recipes import serve
from warploom.recipes.errors import UserError
from warploom.recipes.rollout import Engine, Sampling
from warploom.recipes.rollout.codec import Codec
from warploom.recipes.serving.app import Limits
from warploom.recipes.serving.refusal import dump

CHAT = [{"role": "user", "content": "abc äöü"}]
LONG = {"max_tokens": 100, "ignore_eos": True, "prompt": "abc"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def server(folder):
    with live(folder) as made:
        yield made


@pytest.fixture(scope="module")
def alone(folder):
    """An engine that nobody else uses."""
    return Engine(hf.load(folder), Codec(folder), pages=400, max_sequences=64, page_size=8)


@pytest.fixture
def client(server):
    with client_of(server) as made:
        yield made


def client_of(server, **options):
    options = {"api_key": "none", "max_retries": 0, "timeout": 30, **options}
    return openai.OpenAI(base_url=f"{server.url}/v1", **options)


def hold(server):
    """Let the engine step only while the gate that is returned is open."""
    gate, step = threading.Event(), server.engine.step
    server.engine.step = lambda: (gate.wait(30), step())[1]
    return gate


def wait_for(happened):
    until = time.monotonic() + 120  # as slow as a machine may be
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.005)


def read(s):
    """Read until there is nothing."""
    while s.recv(2**20):
        continue


def trickle(s):
    """Send a header that never ends."""
    while True:
        s.sendall(b"x")
        time.sleep(0.02)


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


def test_a_key_is_asked_for(folder):
    with live(folder, api_key="sésame", local=False) as server:
        for path in ("/v1/models", "/metrics", "/v1/completions"):
            assert server.ask(path, {} if "comp" in path else None)[0] == 401
            assert server.ask(path, Authorization="Bearer nothing")[0] in (401, 405)
        assert server.ask("/health")[2] == {"status": "ok"}
        with pytest.raises(openai.AuthenticationError, match="server's key"):
            client_of(server).models.list()
        word = "Bearer sésame".encode().decode("latin-1")
        assert server.ask("/v1/models", Authorization=word, Host="any.example")[0] == 200


def test_a_full_queue_says_when_to_come_back(folder):
    with live(folder, texts=3) as server:
        gate = hold(server)
        first = threading.Thread(target=server.ask, args=("/v1/completions", {**LONG, "n": 2}))
        first.start()
        wait_for(lambda: server.worker.pending == 2)
        status, headers, answer = server.ask("/v1/completions", {"prompt": "a", "n": 2})
        assert (status, headers["retry-after"]) == (429, "1")
        assert "may have 3 texts under way and has 2" in answer["error"]["message"]
        with pytest.raises(openai.RateLimitError):
            client_of(server).completions.create(model="tiny", prompt="a", n=2)
        assert server.ask("/v1/completions", {"prompt": "a", "n": 4})[0] == 400
        gate.set()
        first.join(30)
        server.settle()
        retrying = client_of(server, max_retries=2)
        assert retrying.completions.create(model="tiny", prompt="a", n=3).choices
        server.settle()
        found = server.metrics()
        assert found['requests_total{outcome="busy"}'] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_pages(server, stream):
    before, step = server.metrics(), server.engine.step
    gate = hold(server)
    gate.set()
    s = server.connect("/v1/completions", {**LONG, "n": 4, "stream": stream})
    wait_for(lambda: server.worker.stats.running == 4)
    s.close()
    server.settle()
    after = server.metrics()
    server.engine.step = step
    name = 'requests_total{outcome="disconnected"}'
    assert after[name] - before[name] == 1
    assert after["generated_tokens_total"] - before["generated_tokens_total"] < 4 * 100
    assert after["cache_pages_free"] == 400


@pytest.mark.parametrize("limits", [Limits(stall_s=0.3), Limits(kept=64)])
def test_a_client_that_takes_nothing_ends_alone(folder, limits):
    body = {**LONG, "n": 16, "stream": True, "logprobs": 20, "return_token_ids": True}
    with live(folder, limits=limits, running=32) as server:
        stalled = server.connect("/v1/completions", body, buffer=2048)
        other = client_of(server).completions.create(model="tiny", prompt="a", temperature=0)
        assert other.choices[0].finish_reason
        wait_for(lambda: server.service.metrics.outcomes["stalled"] == 1)
        server.settle()
        assert server.metrics()["cache_pages_free"] == 400
        stalled.settimeout(10)
        with pytest.raises(ConnectionResetError):
            read(stalled)
        stalled.close()


def test_an_answer_that_nobody_reads_ends_its_connection(folder):
    body = {**LONG, "n": 4, "logprobs": 20}
    with live(folder, limits=Limits(stall_s=0.3)) as server:
        stalled = server.connect("/v1/completions", body, buffer=2048)
        wait_for(lambda: server.service.metrics.outcomes["completed"] == 1)
        wait_for(lambda: not server.server.server_state.connections)
        stalled.close()


def test_late_headers_and_bodies_are_not_waited_for(folder):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with live(folder, limits=Limits(request_s=0.3, body=1000)) as server:
        nothing = socket.create_connection(("127.0.0.1", server.port))
        slow = socket.create_connection(("127.0.0.1", server.port))
        slow.sendall(head[:30])
        late = socket.create_connection(("127.0.0.1", server.port))
        late.sendall(head + b"Content-Length: 100\r\n\r\n{")
        for s in (nothing, slow, late):
            s.settimeout(10)
        assert nothing.recv(10) == b""
        again = socket.create_connection(("127.0.0.1", server.port))
        again.settimeout(10)
        again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        got = b""
        while not got.endswith(b"}"):
            got += again.recv(9999)
        again.sendall(b"G")
        assert again.recv(10) == b""  # the second header is not waited for either
        slow.sendall(b"x")
        with pytest.raises(ConnectionError):
            trickle(slow)
        answer = late.recv(9999)
        assert b" 408 " in answer
        assert b"connection: close" in answer.lower()
        huge = socket.create_connection(("127.0.0.1", server.port))
        huge.sendall(head + b"A: " + b"x" * 99_999)
        assert b" 400 " in huge.recv(9999)
        status, headers, answer = server.ask("/v1/completions", {"prompt": "a" * 5000})
        assert (status, headers["connection"]) == (413, "close")
        assert "a body may have 1000 bytes" in answer["error"]["message"]
        huge = server.connect("/v1/completions", {"prompt": "a" * 20_000})
        assert b" 413 " in huge.recv(9999)
        for s in (nothing, again, slow, late, huge):
            s.close()
        assert server.ask("/v1/completions", {"prompt": "a"})[0] == 200
        assert server.service.reading == 0


def test_bodies_together_are_bounded(folder):
    with live(folder, limits=Limits(bodies=3000)) as server:
        first = {"prompt": "a" * 2000}
        half = server.connect("/v1/completions", first | {"seed": 1})
        half.close()
        late = socket.create_connection(("127.0.0.1", server.port))
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        late.sendall(f"{head}\r\nContent-Length: 3000\r\n\r\n".encode() + b" " * 2000)
        wait_for(lambda: server.service.reading == 2000)
        assert server.ask("/v1/completions", first)[0] == 429
        late.close()
        wait_for(lambda: server.service.reading == 0)
        assert server.ask("/v1/completions", {"prompt": "a"})[0] == 200


def test_a_server_that_stops_ends_what_runs_and_takes_nothing_new(folder):
    with live(folder) as server:
        gate, got = hold(server), []
        body = {"prompt": "abc", "max_tokens": 5}
        runs = threading.Thread(target=lambda: got.append(server.ask("/v1/completions", body)))
        runs.start()
        wait_for(lambda: server.service.metrics.accepted == 1)
        server.server.stop()
        time.sleep(0.3)
        status, headers, answer = server.ask("/v1/completions", body)
        assert (status, answer["error"]["code"]) == (503, "stopping")
        assert headers["retry-after"]
        assert server.ask("/health")[0] == 503
        assert server.ask("/health")[2] == {"status": "stopping"}
        gate.set()
        runs.join(20)
        assert got[0][0] == 200
        server.thread.join(20)
        assert not server.thread.is_alive()
        assert server.service.metrics.outcomes == {"completed": 1, "unavailable": 1}


def test_what_does_not_end_in_time_is_told(folder):
    with live(folder, limits=Limits(stop_s=0.2)) as server:
        gate, got = hold(server), []
        body = {"prompt": "abc", "max_tokens": 100, "ignore_eos": True}
        runs = threading.Thread(target=lambda: got.append(server.ask("/v1/completions", body)))
        runs.start()
        wait_for(lambda: server.service.metrics.accepted == 1)
        server.server.stop()
        runs.join(20)
        gate.set()
        assert got[0][0] == 503
        server.settle()
        assert server.service.metrics.outcomes == {"stopped": 1}


def test_an_engine_that_fails_ends_the_server_loudly(folder):
    with live(folder) as server:
        gate = hold(server)
        step = server.engine.step
        server.engine.step = lambda: (step(), 1 / 0)
        got = []
        body = {"prompt": "abc", "max_tokens": 30, "ignore_eos": True}
        asks = [
            threading.Thread(target=lambda: got.append(server.ask("/v1/completions", body)))
            for _ in range(3)
        ]
        for ask in asks:
            ask.start()
        wait_for(lambda: server.service.metrics.accepted == 3)
        gate.set()
        for ask in asks:
            ask.join(20)
        assert [status for status, *_ in got] == [500] * 3
        assert "the engine has failed" in got[0][2]["error"]["message"]
        server.thread.join(20)
        assert isinstance(server.worker.error, ZeroDivisionError)
        assert server.service.metrics.outcomes == {"failed": 3}


def test_a_stream_tells_that_the_engine_failed(folder):
    with live(folder) as server:
        step, count = server.engine.step, iter(range(5))
        server.engine.step = lambda: (next(count), step())[1]
        stream = client_of(server).completions.create(model="tiny", **CREATE, stream=True)
        with pytest.raises(openai.APIError, match="the engine has failed"):
            list(stream)
        server.thread.join(20)
        assert isinstance(server.worker.error, StopIteration)


CREATE = {"prompt": "abc", "max_tokens": 100, "extra_body": {"ignore_eos": True}}


def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def storm(server, wanted, seed):
    """64 requests at once, some cancelled; the texts of the others as they came."""
    rng = random.Random(seed)
    base = f"{server.url}/v1"
    http = openai.DefaultAsyncHttpxClient(limits=httpx2.Limits(max_connections=100))
    async with openai.AsyncOpenAI(
        base_url=base, api_key="none", max_retries=0, timeout=60, http_client=http
    ) as client:

        async def ask(index, sampling):
            how = {"model": "tiny", "temperature": 0, "max_tokens": sampling.max_tokens}
            if index % 2:
                made = client.completions.create(prompt=PROMPTS[index], **how, stream=index % 4 > 1)
            else:
                messages = [{"role": "user", "content": PROMPTS[index]}]
                made = client.chat.completions.create(
                    messages=messages, **how, stream=index % 4 > 1
                )
            got = await made
            if index % 4 < 2:
                one = got.choices[0]
                return one.text if index % 2 else one.message.content
            parts = []
            async for chunk in got:
                parts += chunk.choices
            return "".join((c.text if index % 2 else c.delta.content) or "" for c in parts)

        tasks = [asyncio.create_task(ask(i, how)) for i, how in enumerate(HOW)]
        first = server.service.metrics.tokens
        ends = sorted(first + rng.randrange(600) for _ in range(20))
        for index, tokens in zip(rng.sample(range(64), 20), ends, strict=True):
            while server.service.metrics.tokens < tokens:
                await asyncio.sleep(0.002)
            tasks[index].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)


PROMPTS = [f"{'abc' * (i % 7)} cab {i}" for i in range(64)]
HOW = [Sampling(temperature=0, max_tokens=4 + i % 24) for i in range(64)]


def test_64_requests_with_cancellations_and_a_client_that_stalls(folder, alone):
    codec = Codec(folder)
    ids = [
        codec.encode(text) if i % 2 else codec.encode_chat([{"role": "user", "content": text}])
        for i, text in enumerate(PROMPTS)
    ]
    wanted = [one.text for one in alone.generate(ids, HOW)]
    with live(folder, pages=120, running=24, limits=Limits(kept=128)) as server:
        before = None
        for seed in (1, 2):
            body = {**LONG, "n": 8, "stream": True, "logprobs": 20, "max_tokens": 100}
            stalled = server.connect("/v1/completions", body, buffer=2048)
            got = asyncio.run(storm(server, wanted, seed))
            cancelled = [isinstance(one, asyncio.CancelledError) for one in got]
            assert sum(cancelled) <= 20
            for one, text, gone in zip(got, wanted, cancelled, strict=True):
                assert gone or one == text
            wait_for(lambda seed=seed: server.service.metrics.outcomes["stalled"] == seed)
            server.settle()
            stalled.close()
            before = before or rss()
        assert rss() - before < 48
        found = server.metrics()
        counts = server.service.metrics
        assert counts.received == counts.outcomes.total() <= 130
        assert counts.outcomes["stalled"] == 2
        assert counts.outcomes["completed"] >= 88
        assert set(counts.outcomes) == {"completed", "disconnected", "stalled"}
        assert found["cache_pages_free"] == 120
        assert found["samples_running"] == found["samples_waiting"] == 0
        assert found["request_seconds_count"] == found["requests_accepted_total"]
        assert not server.worker._owners
        assert not server.worker._left
        assert not server.worker._jobs


class Told(io.StringIO):
    """Standard output of a server in this thread; another one waits for what it says."""

    def url(self):
        wait_for(lambda: "serving" in self.getvalue())
        line = r"serving mine at (http://127\.0\.0\.1:\d+/v1) \(Ctrl-C stops\)\n"
        return re.fullmatch(line, self.getvalue())[1]


def commanded(folder, monkeypatch, ask):
    """Run the command while another thread asks; return the exit code and what was got."""
    told, got = Told(), []
    monkeypatch.setattr("sys.stdout", told)
    asks = threading.Thread(target=lambda: got.append(ask(told.url())))
    asks.start()
    words = [str(folder), "--port", "0", "--device", "cpu", "--name", "mine", "--pages", "99"]
    try:
        return serve.main(words), got
    finally:
        asks.join(20)


def use(url, stop):
    """Have the server told to stop while a text is streamed; return its tokens."""
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        how = {"stream": True, "stream_options": {"include_usage": True}}
        stream = client.completions.create(model="mine", **CREATE, **how)
        next(iter(stream))
        stop()
        return [*stream][-1].usage.completion_tokens


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_stop(folder, monkeypatch, number):
    handler = signal.getsignal(number)
    code, got = commanded(
        folder, monkeypatch, lambda url: use(url, lambda: os.kill(os.getpid(), number))
    )
    assert (code, got) == (0, [100])
    assert signal.getsignal(number) is handler


def test_the_command_ends_as_the_engine_does(folder, monkeypatch):
    def fail(engine):
        raise RuntimeError("logits must be finite")

    def ask(url):
        got.append(httpx2.post(f"{url}/completions", json={"prompt": "a"}).status_code)

    got = []
    monkeypatch.setattr(Engine, "step", fail)
    with pytest.raises(RuntimeError, match="logits must be finite"):
        commanded(folder, monkeypatch, ask)
    assert got == [500]


@pytest.mark.slow
def test_the_process_ends_with_code_0(folder):
    command = [sys.executable, "-m", "warploom.cli", "serve", str(folder), "--port", "0"]
    words = ["--device", "cpu", "--name", "mine", "--pages", "99"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *words], **pipes) as process:
        url = Told(process.stdout.readline()).url()
        assert use(url, lambda: process.send_signal(signal.SIGTERM)) == 100
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")


def test_the_commands_mistakes_are_told(folder, tmp_path, capsys):
    with pytest.raises(UserError, match="must hold tokenizer.json"):
        serve.main([str(tmp_path)])
    for words, said in (
        (["--running", "0"], "running must be at least 1; got 0"),
        (["--stop-s", "nan"], "stop_s must be more than 0 seconds; got nan"),
        (["--port", "70000"], "port must be from 0 to 65535"),
        (["--host", "203.0.113.9"], "host and port must be free; 203.0.113.9:8000 is not"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            serve.main([str(folder), *words])
    assert [serve.is_local(h) for h in ("127.9.9.9", "::1", "localhost", "0.0.0.0", "a.b")] == [
        *(True, True, True),
        *(False, False),
    ]


def test_a_loop_that_is_late_slows_the_engine_down(folder):
    with live(folder) as server:
        ask = threading.Thread(target=server.ask, args=("/v1/completions", LONG))
        ask.start()
        wait_for(lambda: server.service.metrics.tokens > 3)
        late, go = threading.Event(), threading.Event()
        server.worker._loop.call_soon_threadsafe(lambda: (late.set(), go.wait(20)))
        assert late.wait(20)
        steps = server.engine.stats.steps
        time.sleep(0.3)
        assert server.engine.stats.steps <= steps + 6
        go.set()
        ask.join(20)
        server.settle()
        assert server.service.metrics.outcomes == {"completed": 1}
