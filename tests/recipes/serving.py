"""A tiny model behind HTTP, for tests."""

import contextlib
import dataclasses
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import openai
import torch

from warploom.models import hf
from warploom.models.decoder import Decoder
from warploom.models.families import llama
from warploom.recipes.rollout import Engine, Sampling
from warploom.recipes.rollout.codec import Codec
from warploom.recipes.serving.app import Limits, Service
from warploom.recipes.serving.metrics import Metrics
from warploom.recipes.serving.server import Server
from warploom.recipes.serving.worker import Worker
from warploom.recipes.tokens import BPE, train_bpe

TEMPLATE = """\
{%- for m in messages %}
    {%- if m.role == 'bad' %}{{ raise_exception('no bad ones') }}{% endif %}
    {{- '<|' + m['role'] + '|>' + m['content'] + eos_token }}
{%- endfor %}
{%- if switch is defined %}{{ switch }}{% endif %}
{{- '<|assistant|>' }}
"""


def make_folder(root, positions=120):
    """A tiny model and a tokenizer, as a Hugging Face folder with a chat template."""
    tokenizer = train_bpe(["abc abc aab cab äöü €"] * 20, BPE(vocabulary=296))
    tokenizer.save(root / "tokenizer")
    a = dataclasses.replace(
        llama.tiny(), vocabulary=tokenizer.vocabulary, max_positions=positions, layers=1
    )
    made = Decoder.create(a, seed=5)
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.mul_(5)
    hf.save(made, root / "tiny", tokenizer_folder=root / "tokenizer")
    (root / "tiny" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return root / "tiny"


CREATE = {"prompt": "abc", "max_tokens": 100, "extra_body": {"ignore_eos": True}}


class Live:
    """A server that runs in a thread of this process."""

    def __init__(self, engine, codec, *, texts=256, limits=None, **options):
        self.engine, self.codec = engine, codec
        self.worker = Worker(engine, Metrics(), most=texts)
        self.service = Service(
            self.worker, codec, "tiny", default=Sampling(), limits=limits or Limits(), **options
        )
        self.ready = threading.Event()
        self.server = Server(self.service, self.ready.set)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()
        assert self.ready.wait(20)

    def stop(self):
        self.server.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()

    def ask(self, path, body=None, **headers):
        """Status, headers and the body, read as JSON where it is."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, data, given)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.headers, _read(answer.read())
        except urllib.error.HTTPError as answer:
            with answer:
                return answer.code, answer.headers, _read(answer.read())

    def metrics(self):
        """Values of `/metrics` by their names, labels with them."""
        text = self.ask("/metrics")[2]
        rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("warploom_"): float(value) for name, value in rows}

    def settle(self):
        """Wait until nothing is under way."""
        until = time.monotonic() + 120  # as slow as a machine may be
        while self.service.metrics.in_progress or self.worker.pending:
            assert time.monotonic() < until
            time.sleep(0.01)

    def connect(self, path, body, buffer=None):
        """A raw connection that has sent a request."""
        s = socket.socket()
        if buffer:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        s.settimeout(30)
        s.connect(("127.0.0.1", self.port))
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        s.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return s


def _read(body):
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()


def engine_of(folder, codec, *, running, pages=400):
    return Engine(hf.load(folder), codec, pages=pages, max_sequences=running, page_size=8)


@contextlib.contextmanager
def live(folder, *, pages=400, running=16, **options):
    codec = Codec(folder)
    made = Live(engine_of(folder, codec, pages=pages, running=running), codec, **options)
    try:
        yield made
    finally:
        made.stop()


def client_of(server, **options):
    options = {"api_key": "none", "max_retries": 0, "timeout": 30, **options}
    return openai.OpenAI(base_url=f"{server.url}/v1", **options)


def wait_for(happened):
    until = time.monotonic() + 120  # as slow as a machine may be
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.005)
