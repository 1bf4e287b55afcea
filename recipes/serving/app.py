"""The server's addresses, and the way of a request: read, understood, queued, answered.

Every request for text ends with exactly one outcome (`metrics.py`), whatever happens to its client,
to the engine or to the server. It gives its room back when the engine has let go of its texts.
"""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..rollout import Completion, Sampling
from ..rollout.codec import Codec
from . import protocol
from .answers import Answer
from .metrics import Metrics
from .refusal import Refusal, dump, failed, stopping
from .worker import Job, Worker

_TEXTS = 128  # that one request may ask for
_DISCARDED = 16  # a body this many times too long is read to its end before it is refused
_TOKENISERS = 2  # threads: a prompt that is made tokens takes a hundred times its bytes
_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_SSE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What clients may take of a server.

    Attributes:
        body: Bytes of a body.
        bodies: Bytes of all bodies that are being read.
        kept: Tokens of a stream that are kept for a client that does not take them.
        request_s: Seconds that a client has for its header, and then for its body.
        stall_s: Seconds that a client may take nothing of what is there for it.
        stop_s: Seconds that requests have to end once the server is to stop.
        connections: Connections at a time.
    """

    body: int = 4 * 2**20
    bodies: int = 64 * 2**20
    kept: int = 4096
    request_s: float = 30.0
    stall_s: float = 30.0
    stop_s: float = 60.0
    connections: int = 1024


@dataclass(kw_only=True, slots=True)
class Cut:
    """How a connection is cut.

    Attributes:
        call: Cuts it.
        late: Whether it was, since its client took nothing.
    """

    call: Callable[[], None] = lambda: None
    late: bool = False


class Service:
    """A model that is served.

    Args:
        worker: Runs its engine.
        codec: Its tokenizer.
        name: What clients call it.
        default: How tokens are chosen, where a request does not say.
        limits: What clients may take.
        api_key: What clients must know; empty for nothing.
        local: Whether only the names of this machine are answered to, so that no page in a browser
            reaches the server under a name of its own.

    Attributes:
        stopping: Whether nothing new is taken.
    """

    def __init__(
        self,
        worker: Worker,
        codec: Codec,
        name: str,
        *,
        default: Sampling,
        limits: Limits,
        api_key: str = "",
        local: bool = True,
    ) -> None:
        self.worker, self.codec, self.name = worker, codec, name
        self.default, self.limits, self.api_key, self.local = default, limits, api_key, local
        self.stopping = False
        self.reading = 0  # bytes of bodies that are held
        self.created = int(time.time())
        self.tokenisers = ThreadPoolExecutor(_TOKENISERS, thread_name_prefix="tokeniser")

    @property
    def metrics(self) -> Metrics:
        """What is counted."""
        return self.worker.metrics

    def check(self, headers: Headers) -> None:
        """Refuse who may not ask.

        Raises:
            Refusal: If the key is wrong, or the server was called by a name that is not its own.
        """
        if self.api_key:
            word, _, key = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(key.strip().encode("latin-1"), self.api_key.encode())
            if word.lower() != "bearer" or not same:
                raise Refusal(
                    401,
                    "the header Authorization must be Bearer and the server's key",
                    outcome="unauthorised",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        elif self.local:
            host = headers.get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in _LOCAL:
                raise Refusal(
                    403,
                    f"a server without a key must be called localhost; got Host: {host!r:.80}: "
                    f"start it with --api-key",
                    outcome="unauthorised",
                )


def make(service: Service) -> Starlette:
    """Return the application; the worker lives as long as it does."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            service.stopping = True
            await asyncio.to_thread(service.worker.stop, service.limits.stop_s)
            service.tokenisers.shutdown(wait=False, cancel_futures=True)

    async def health(request: Request) -> Response:
        state = "failed" if service.worker.error else "stopping" if service.stopping else "ok"
        return _json({"status": state}, 200 if state == "ok" else 503)

    async def metrics(request: Request) -> Response:
        service.check(request.headers)
        text = service.metrics.text(service.worker.stats, service.worker.waiting)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(request: Request) -> Response:
        service.check(request.headers)
        model = {"id": service.name, "object": "model", "created": service.created}
        model |= {"owned_by": "warploom"}
        asked = request.path_params.get("model")
        if asked is None:
            return _json({"object": "list", "data": [model]})
        if asked != service.name:
            message = f"model must be {service.name!r}, the one that is served; got {asked!r:.80}"
            raise Refusal(404, message, param="model", code="model_not_found")
        return _json(model)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{model:path}", models),
            Route("/v1/completions", Texts(service, chat=False), methods=["POST"]),
            Route("/v1/chat/completions", Texts(service, chat=True), methods=["POST"]),
        ],
        exception_handlers={Refusal: _refused, HTTPException: _refused, Exception: _refused},
        lifespan=lifespan,
    )


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(value), status, headers, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    """Answer with an error."""
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path} is not served: {error.detail}"
        error = Refusal(error.status_code, message, headers=error.headers)
    elif not isinstance(error, Refusal):
        error = Refusal(500, f"the server has a fault, see its log: {type(error).__name__}")
    return _json(error.body(), error.status, error.headers)


class Texts:
    """An address that texts come from.

    Args:
        service: What is served.
        chat: Whether bodies are those of chats.
    """

    def __init__(self, service: Service, *, chat: bool) -> None:
        self.service, self.chat = service, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and count how it ended."""
        counts, outcome = self.service.metrics, "failed"
        counts.received += 1
        try:
            outcome = await self._request(scope, receive, send)
        except Refusal as refusal:
            outcome = refusal.outcome
            raise
        except asyncio.CancelledError:
            outcome = "stopped"
            raise
        finally:
            counts.outcomes[outcome] += 1

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> str:
        """Answer a request; return how it ended."""
        service, worker = self.service, self.service.worker
        headers = Headers(scope=scope)
        service.check(headers)
        if service.stopping:
            raise stopping()
        body = await self._body(headers, receive)
        if body is None:
            return "disconnected"
        most, name = min(_TEXTS, worker.most), service.name
        asked = protocol.read(body, chat=self.chat, name=name, default=service.default, most=most)
        worker.reserve(asked.samples)
        try:
            loop, known = asyncio.get_running_loop(), (asked, worker.engine, service.codec)
            prompts = await loop.run_in_executor(service.tokenisers, protocol.prepare, *known)
            if service.stopping:
                raise stopping()
        except BaseException:
            worker.release(asked.samples)
            raise
        cut = scope.get("state", {}).get("cut", Cut())
        job = Job(prompts, stream=asked.stream, limit=service.limits.kept, abort=cut.call)
        worker.submit(job)
        watch = asyncio.create_task(self._watch(receive, job, cut))
        answer = Answer(asked, [ids for ids, _ in prompts], service.name, service.codec)
        try:
            ended = await (self._stream if asked.stream else self._whole)(job, answer, scope, send)
            return job.gone or ended
        finally:
            watch.cancel()
            worker.end(job, "stopped")

    async def _watch(self, receive: Receive, job: Job, cut: "Cut") -> None:
        """End a job whose client goes, or is cut off."""
        while (await receive())["type"] != "http.disconnect":
            continue
        job.gone = "stalled" if cut.late else "disconnected"
        self.service.worker.end(job, job.gone)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return a body; `None` where the client goes before its end."""
        limits = self.service.limits
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"Content-Type must be application/json; got {kind!r:.80}")
        length = headers.get("content-length", "")
        close = {"Connection": "close"}
        long = Refusal(
            413, f"a body may have {limits.body} bytes; this one has more: send less", headers=close
        )
        if length.isdecimal() and int(length) > _DISCARDED * limits.body:
            raise long
        chunks: list[bytes] = []
        size = held = 0
        try:
            async with asyncio.timeout(limits.request_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    size += len(chunk)
                    if size > limits.body:
                        chunks.clear()  # the rest is read, so that the client hears why
                        if size > _DISCARDED * limits.body:
                            raise long
                        continue
                    held += len(chunk)
                    self.service.reading += len(chunk)
                    if self.service.reading > limits.bodies:
                        raise Refusal(
                            429,
                            f"all bodies that are read may have {limits.bodies} bytes: ask later",
                            outcome="busy",
                            headers={"Retry-After": "1", **close},
                        )
                    chunks.append(chunk)
        except TimeoutError:
            late = f"a body must come within {limits.request_s:g} s; {size} bytes have"
            raise Refusal(408, late, headers=close) from None
        finally:
            self.service.reading -= held
        if size > limits.body:
            raise long
        return b"".join(chunks)

    async def _whole(self, job: Job, answer: Answer, scope: Scope, send: Send) -> str:
        """Answer once all texts have ended."""
        ended: list[tuple[int, Completion]] = []
        while batch := await job.take():
            ended += [(choice, e.completion) for choice, e in batch if e.completion is not None]
        if job.ended == "completed":
            await _json(answer.whole(ended))(scope, _nothing, send)
        else:
            _raise(job)
        return job.ended or "failed"

    async def _stream(self, job: Job, answer: Answer, scope: Scope, send: Send) -> str:
        """Answer with each token as it comes; the header waits for the first."""
        started = False
        while batch := await job.take():
            chunks = [answer.chunk(choice, event) for choice, event in batch]
            if not started:
                started = True
                await send(_start())
            await _send(send, [chunk for chunk in chunks if chunk is not None])
        if not started:
            _raise(job)
            return job.ended or "failed"
        if job.ended == "completed":
            await _send(send, [answer.last()] if answer.asked.usage else [], b"data: [DONE]\n\n")
        elif job.ended in ("failed", "stopped"):
            refusal = failed() if job.ended == "failed" else stopping()
            await _send(send, [refusal.body()], b"")
        return job.ended or "failed"


def _raise(job: Job) -> None:
    """Refuse a request whose job did not end as it should, where its client is there to hear."""
    if job.ended == "failed":
        raise failed()
    if job.ended == "stopped":
        refusal = stopping()
        refusal.outcome = "stopped"
        raise refusal


def _start() -> dict[str, Any]:
    headers = Response(headers=_SSE, media_type="text/event-stream").raw_headers
    kept = [pair for pair in headers if pair[0] != b"content-length"]
    return {"type": "http.response.start", "status": 200, "headers": kept}


async def _send(send: Send, values: Sequence[Any], last: bytes | None = None) -> None:
    """Send events of a stream, and what ends it."""
    data = b"".join(b"data: " + dump(value) + b"\n\n" for value in values) + (last or b"")
    if data or last is not None:
        await send({"type": "http.response.body", "body": data, "more_body": last is None})


async def _nothing() -> Any:
    return {"type": "http.disconnect"}
