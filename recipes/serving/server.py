"""uvicorn with deadlines for clients, and an end that loses nothing.

A connection is closed when its header takes too long, and is cut when its client takes nothing of
what waits for it. The first signal refuses new requests and lets those that run end; the second
ends them too. Either way the process ends with exit code 0; with 1 where the engine failed.
"""

import asyncio
import functools
import socket
import struct
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import Cut, Limits, Service, make

_SEND_BUFFER = 64 * 2**10  # bytes of a connection that the system keeps
_CLOSING_S = 5  # that connections have when all requests have ended


class Connection(H11Protocol):
    """A client's connection.

    Args:
        limits: Its deadlines.
        **options: uvicorn's.
    """

    def __init__(self, *, limits: Limits, **options: Any) -> None:
        super().__init__(**options)
        self._limits, self._cut = limits, Cut(call=self._stalled)
        self._header: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin the deadline of the first header."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "cut": self._cut}
        if (own := transport.get_extra_info("socket")) is not None:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._expect_header()

    def data_received(self, data: bytes) -> None:
        """Take bytes; a header that is not whole has a deadline."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            if self._header is None:
                self._expect_header()
        else:
            _end(self._header)
            self._header = None

    def connection_lost(self, exc: Exception | None) -> None:
        """End all deadlines."""
        _end(self._header, self._stall)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin the deadline of a client that takes nothing."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self._limits.stall_s, self._stalled)

    def resume_writing(self) -> None:
        """End the deadline of a client that took something."""
        _end(self._stall)
        self._stall = None
        super().resume_writing()

    def on_response_complete(self) -> None:
        """Give a connection that closes a deadline for what is not sent yet."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that nothing came from, with a deadline."""
        super().timeout_keep_alive_handler()
        self._abort_later()

    def _abort_later(self) -> None:
        self.loop.call_later(self._limits.stall_s, self._abort)

    def _expect_header(self) -> None:
        self._header = self.loop.call_later(self._limits.request_s, self._late)

    def _late(self) -> None:
        self._header = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
            self._abort_later()

    def _stalled(self) -> None:
        self._cut.late = True
        self._abort()

    def _abort(self) -> None:
        """Cut the connection; the system forgets too what it has not sent."""
        own = self.transport.get_extra_info("socket")
        if own is not None and own.fileno() >= 0:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


def _end(*timers: asyncio.TimerHandle | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()


class Server(uvicorn.Server):
    """A server that can be told to stop, and knows when it may.

    Args:
        service: What is served.
        ready: Called once connections are taken.
        ending: Called when it is first told to stop while requests run, with their number.
    """

    def __init__(
        self,
        service: Service,
        ready: Callable[[], None] = lambda: None,
        ending: Callable[[int], None] = lambda running: None,
    ) -> None:
        limits = service.limits
        http: Any = functools.partial(Connection, limits=limits)
        super().__init__(
            uvicorn.Config(
                make(service),
                http=http,
                loop="asyncio",
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=limits.connections,
                timeout_graceful_shutdown=_CLOSING_S,
            )
        )
        self.service, self.ready, self.ending = service, ready, ending
        self._until: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take connections."""
        await super().startup(sockets)
        self.ready()

    def stop(self) -> None:
        """Take nothing new, and end when what runs has ended; said twice, end now."""
        again = self._until is not None
        self._until = time.monotonic() + (0 if again else self.service.limits.stop_s)
        self.service.stopping = True
        if not again and (running := self.service.metrics.in_progress):
            self.ending(running)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at a signal."""
        self.stop()

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server ends."""
        service = self.service
        if service.worker.error is not None:
            return True
        if self._until is not None:
            late = time.monotonic() >= self._until
            if late:
                service.worker.end_all("stopped")
            if late or not service.metrics.in_progress:
                return True
        return await super().on_tick(counter)
