"""What clients and the engine may do to `warploom serve`: others go on, and nothing is kept."""

import asyncio
import os
import random
import socket
import threading
import time

import httpx2
import openai
import pytest
from tests.recipes.serving import CREATE, client_of, live, make_folder, wait_for

from warploom.recipes.rollout import Sampling
from warploom.recipes.rollout.codec import Codec
from warploom.recipes.serving.app import Limits

LONG = {"max_tokens": 100, "ignore_eos": True, "prompt": "abc"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("serve"))


def hold(server):
    """Let the engine step only while the gate that is returned is open."""
    gate, step = threading.Event(), server.engine.step
    server.engine.step = lambda: (gate.wait(30), step())[1]
    return gate


def read(s):
    """Read until there is nothing."""
    while s.recv(2**20):
        continue


def trickle(s):
    """Send a header that never ends."""
    while True:
        s.sendall(b"x")
        time.sleep(0.02)


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
