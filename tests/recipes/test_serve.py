"""`warploom serve` as a command: it serves until it is told to stop, and tells mistakes."""

import functools
import io
import os
import re
import signal
import subprocess
import sys
import threading

import httpx2
import openai
import pytest
from tests.recipes.serving import CREATE, make_folder, wait_for

from warploom.kernels.invariant import invariant
from warploom.models.decoder import Decoder
from warploom.recipes import serve
from warploom.recipes.errors import UserError
from warploom.recipes.rollout import Engine

STOPPING = "stopping: requests that run (1) have 60 s to end; a second Ctrl-C ends them\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("serve"))


class Told(io.StringIO):
    """Standard output of a server in this thread; another one waits for what it says."""

    def url(self):
        wait_for(lambda: "serving" in self.getvalue())
        line = r"serving mine at (http://127\.0\.0\.1:\d+/v1) \(Ctrl-C stops\)\n"
        return re.fullmatch(line, self.getvalue())[1]


def commanded(folder, monkeypatch, ask, *more):
    """Run the command while another thread asks; return the exit code and what was got."""
    told, got = Told(), []
    monkeypatch.setattr("sys.stdout", told)
    asks = threading.Thread(target=lambda: got.append(ask(told.url())))
    asks.start()
    words = [str(folder), "--port", "0", "--device", "cpu", "--name", "mine", "--pages", "99"]
    try:
        return serve.main([*words, *more]), got
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
def test_the_command_serves_until_it_is_told_to_stop(folder, monkeypatch, capsys, number):
    handler = signal.getsignal(number)
    code, got = commanded(
        folder, monkeypatch, lambda url: use(url, lambda: os.kill(os.getpid(), number))
    )
    assert (code, got) == (0, [100])
    assert capsys.readouterr().err == STOPPING
    assert signal.getsignal(number) is handler


def test_the_engines_thread_is_in_the_batch_invariant_mode(folder, monkeypatch):
    modes, advance = set(), Decoder.advance
    monkeypatch.setattr(Decoder, "advance", lambda *a: (modes.add(invariant()), advance(*a))[1])
    end = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    for more, mode in (((), False), (("--batch-invariant",), True)):
        modes.clear()
        assert commanded(folder, monkeypatch, lambda url: use(url, end), *more) == (0, [100])
        assert modes == {mode}


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
    assert (process.returncode, out, err) == (0, "", STOPPING)


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
