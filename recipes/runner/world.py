"""This process among the ranks of a run: read from torchrun's environment, joined, and lost.

A rank that dies takes the others with it: their next collective fails at once when the connection
breaks, or after `TIMEOUT` when the machine is gone; one that never joins, after `JOINING`. `lost`
then says which ranks are known dead.
"""

import json
import os
import platform
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ..errors import UserError

TIMEOUT = timedelta(seconds=60)
JOINING = timedelta(seconds=45)
_BROKEN = re.compile(
    r"connection (closed|reset|refused)|timed? ?out|broken pipe|socket|gloo|nccl", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Who this process is."""

    rank: int = 0
    """Among all processes."""
    size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Among those of this machine."""
    local_size: int = 1
    """How many this machine has."""
    device: torch.device = torch.device("cpu")
    """Where this process computes."""


def from_environment() -> World:
    """Read who this process is; one rank where no launcher says otherwise.

    Raises:
        UserError: If there are more ranks on this machine than GPUs.
    """
    environ = os.environ
    local_rank, local_size = (
        int(environ.get("LOCAL_RANK", 0)),
        int(environ.get("LOCAL_WORLD_SIZE", environ.get("WORLD_SIZE", 1))),
    )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_size > torch.cuda.device_count():
            raise UserError(
                f"each rank needs a GPU of its own: {local_size} ranks were started on a machine "
                f"with {torch.cuda.device_count()}; start fewer, or hide them from it"
            )
        device = torch.device("cuda", local_rank)
    return World(
        rank=int(environ.get("RANK", 0)),
        size=int(environ.get("WORLD_SIZE", 1)),
        local_rank=local_rank,
        local_size=local_size,
        device=device,
    )


def set_threads(world: World) -> int:
    """Give each rank of this machine its share of the cores, and return how many threads it has.

    torchrun sets OMP_NUM_THREADS=1 where the user has not set it; any other value is the user's.
    """
    if world.local_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    return torch.get_num_threads()


def set_deterministic(on: bool) -> None:
    """Have torch choose algorithms that give the same bits each time, or those it finds fastest."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def joined(world: World) -> Iterator[Store | None]:
    """Join the process group for a block; gives the store that all ranks reach, if several."""
    own = {"host": platform.node(), "pid": os.getpid()}
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.size == 1:
        yield None
        return
    roster: list[dict[str, Any] | None] = [None] * world.size
    try:
        store = _meet(world)
        _gather(store, own, world, roster)
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT
        )
        yield store
    except LostError:
        raise
    except Exception as error:
        if is_broken(error):
            raise LostError(lost(roster, world, error)) from error
        raise
    dist.destroy_process_group()


def _meet(world: World) -> Store:
    """Open the store that all ranks find each other in, where the launcher says."""
    environ = os.environ
    if not {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        raise UserError(
            f"{world.size} ranks must find MASTER_ADDR and MASTER_PORT in the environment, but do "
            f"not: start them by torchrun"
        )
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    launchers = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = world.rank == 0 and not launchers
    if not serves:
        _reach(host, port, world)
    try:
        store = TCPStore(host, port, is_master=serves, timeout=JOINING, wait_for_workers=False)
    except RuntimeError as error:
        if not serves:
            raise
        raise UserError(
            f"rank 0 must be able to listen on {host}:{port}, but cannot ({_first(error)}): choose "
            f"another port"
        ) from error
    return PrefixStore(f"attempt-{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _reach(host: str, port: int, world: World) -> None:
    """Wait until something listens there; `TCPStore` itself would wait for twice its timeout.

    Raises:
        LostError: If nothing has within `JOINING`.
    """
    end = time.monotonic() + JOINING.seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            if time.monotonic() > end:
                raise LostError(
                    f"rank {world.rank} could not reach rank 0 at {host}:{port} within "
                    f"{JOINING.seconds} s ({error}), so rank 0 died or was never started"
                ) from error
            time.sleep(0.1)
        else:
            return


def _gather(
    store: Store, own: dict[str, Any], world: World, roster: list[dict[str, Any] | None]
) -> None:
    """Fill the roster as ranks arrive, until all are there and alive.

    Raises:
        LostError: If one is dead, or has not come in time.
    """
    store.set(f"roster-{world.rank}", json.dumps(own))
    end = time.monotonic() + JOINING.seconds
    while True:
        for rank, one in enumerate(roster):
            if one is None and store.check([f"roster-{rank}"]):
                roster[rank] = json.loads(store.get(f"roster-{rank}"))
        if dead := _dead(roster, world):
            raise LostError(f"{', '.join(dead)} died, so rank {world.rank} stops too")
        missing = [str(rank) for rank, one in enumerate(roster) if one is None]
        if not missing:
            return
        if time.monotonic() > end:
            raise LostError(
                f"all {world.size} ranks must join within {JOINING.seconds} s of rank "
                f"{world.rank}, but rank {', '.join(missing)} did not"
            )
        time.sleep(0.05)


class LostError(RuntimeError):
    """Other ranks are gone; says which, as far as this machine knows."""


def is_broken(error: BaseException) -> bool:
    """Say whether an error is that of a collective whose partners are gone."""
    if isinstance(error, getattr(dist, "DistError", ())):
        return True
    return type(error) is RuntimeError and _BROKEN.search(str(error)) is not None


def lost(roster: Sequence[dict[str, Any] | None], world: World, error: BaseException) -> str:
    """Say which ranks are gone, in one sentence.

    Args:
        roster: Host and process id of each rank, `None` of those that never joined.
        world: Who this process is.
        error: What its collective said.
    """
    if dead := _dead(roster, world):
        return f"{', '.join(dead)} died, so rank {world.rank} stops too"
    return (
        f"rank {world.rank} lost another rank, which is not on this machine or still exits; the "
        f"network says: {_first(error)}"
    )


def _dead(roster: Sequence[dict[str, Any] | None], world: World) -> list[str]:
    """Name the ranks of this machine whose processes are gone."""
    own = roster[world.rank]
    host = platform.node() if own is None else own["host"]
    return [
        f"rank {rank} (process {one['pid']} on {host})"
        for rank, one in enumerate(roster)
        if one is not None and one["host"] == host and rank != world.rank and not _alive(one["pid"])
    ]


def _first(error: BaseException) -> str:
    """Return the first line of what an error says, without what follows 200 letters."""
    return " ".join(str(error).split("\n")[0].split())[:200]


def _alive(pid: int) -> bool:
    """Say whether a process of this machine runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
