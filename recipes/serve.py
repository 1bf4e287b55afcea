"""`warploom serve`: a model over HTTP, as OpenAI's clients speak it.

    warploom serve FOLDER                                   http://127.0.0.1:8000/v1
    warploom serve FOLDER --port 0 --name llama             a port that is free, a name to ask for
    WARPLOOM_API_KEY=... warploom serve FOLDER --host 0.0.0.0

needs a Hugging Face folder with weights and tokenizer.json, for chats also its template; and
uvicorn and starlette (pip install 'warploom[serve]'), for chats jinja2. What a request leaves open
is as the folder's generation_config.json says, where that draws tokens, else as OpenAI's. The first
Ctrl-C or SIGTERM takes nothing new and lets what runs end, the second ends it. Exit code 0:
stopped; 1: the engine failed, with its traceback; 2: a mistake of the user.
"""

import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from warploom.recipes.errors import UserError, unboxed
from warploom.recipes.rollout.codec import Codec
from warploom.recipes.rollout.command import Command, folder_sampling

KEY = "WARPLOOM_API_KEY"


@dataclass(frozen=True, kw_only=True, slots=True)
class Serve(Command):
    """Serve a model."""

    host: str = "127.0.0.1"
    """Address to listen on; another than this machine's own should have a key."""
    port: int = 8000
    """Port to listen on; 0 for a free one."""
    name: str = ""
    """What clients call the model; by default the folder's name."""
    api_key: str = ""
    """What clients must know; by default WARPLOOM_API_KEY, which other users cannot see."""
    running: int = 64
    """Texts that are computed at a time."""
    queue: int = 256
    """Texts that may wait; a request that would be one more is told to come later."""
    chunk: int = 512
    """Tokens of prompts in a step."""
    body_mib: Annotated[int, tyro.conf.arg(name="body-mib")] = 4
    """Largest body of a request, in MiB."""
    stall_s: float = 30.0
    """Seconds that a client may take nothing of what is there for it."""
    stop_s: float = 60.0
    """Seconds that requests have to end once the server is to stop."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Words after `warploom serve`; those of the process when None.

    Returns:
        Exit code.

    Raises:
        UserError: If the folder cannot be read, an option is out of range or the port is taken.
    """
    with unboxed():
        asked = tyro.cli(Serve, prog="warploom serve", description=__doc__, args=argv)
    _check(asked)
    try:
        from warploom.recipes.serving.app import Limits, Service
        from warploom.recipes.serving.metrics import Metrics
        from warploom.recipes.serving.server import Server
        from warploom.recipes.serving.worker import Worker
    except ImportError as error:
        raise UserError(
            f"serve needs uvicorn and starlette: pip install 'warploom[serve]' ({error})"
        ) from None
    key = asked.api_key or os.environ.get(KEY, "")
    local = is_local(asked.host)
    codec, default = Codec(asked.folder), folder_sampling(asked.folder, temperature=1.0)
    with _bound(asked.host, asked.port) as listener:
        engine = asked.engine(codec, max_sequences=asked.running, chunk=asked.chunk)
        worker = Worker(engine, Metrics(), most=asked.running + asked.queue)
        limits = Limits(body=asked.body_mib * 2**20, stall_s=asked.stall_s, stop_s=asked.stop_s)
        name = asked.name or asked.folder.resolve().name
        service = Service(
            worker, codec, name, default=default, limits=limits, api_key=key, local=local
        )
        if not (local or key):
            print(
                f"warning: whoever reaches {asked.host} may use the model: set {KEY}",
                file=sys.stderr,
            )
        Server(
            service, lambda: _tell(name, listener), lambda running: _tell_end(running, asked.stop_s)
        ).run([listener])
    if worker.error is not None:
        raise worker.error
    return 0


def _check(asked: Serve) -> None:
    for name, least in (("running", 1), ("queue", 0), ("chunk", 1), ("body_mib", 1)):
        if getattr(asked, name) < least:
            raise UserError(f"{name} must be at least {least}; got {getattr(asked, name)}")
    for name in ("stall_s", "stop_s"):
        if not 0 < getattr(asked, name) < float("inf"):
            raise UserError(f"{name} must be more than 0 seconds; got {getattr(asked, name)}")
    if not 0 <= asked.port < 2**16:
        raise UserError(f"port must be from 0 to {2**16 - 1}; got {asked.port}")


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that has the address, and does not listen before the model is there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UserError(f"host and port must be free; {host}:{port} is not: {error}") from None
    return listener


def _tell(name: str, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"serving {name} at http://{host}:{port}/v1 (Ctrl-C stops)", flush=True)


def _tell_end(running: int, stop_s: float) -> None:
    print(
        f"stopping: requests that run ({running}) have {stop_s:g} s to end; "
        "a second Ctrl-C ends them",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
