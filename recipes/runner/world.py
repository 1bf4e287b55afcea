"""This process among the ranks of a run: read from torchrun's environment, joined, and lost.

A rank that dies takes the others with it: their next collective fails at once when the connection
breaks, or after `TIMEOUT` when the machine is gone. `lost` then says which ranks are known dead.
"""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from warploom.parallel.collectives import gather_json

from ..errors import UserError

TIMEOUT = timedelta(seconds=60)
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
def joined(world: World) -> Iterator[list[dict[str, Any]]]:
    """Join the process group for a block; gives host and process id of each rank."""
    own = {"host": platform.node(), "pid": os.getpid()}
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.size == 1:
        yield [own]
        return
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    roster = gather_json(own, dist.group.WORLD)
    try:
        yield roster
    except Exception as error:
        if is_broken(error):
            raise LostError(lost(roster, world, error)) from error
        raise
    dist.destroy_process_group()


class LostError(RuntimeError):
    """Other ranks are gone; says which, as far as this machine knows."""


def is_broken(error: BaseException) -> bool:
    """Say whether an error is that of a collective whose partners are gone."""
    if isinstance(error, getattr(dist, "DistError", ())):
        return True
    return type(error) is RuntimeError and _BROKEN.search(str(error)) is not None


def lost(roster: list[dict[str, Any]], world: World, error: BaseException) -> str:
    """Say which ranks are gone, in one sentence."""
    host = roster[world.rank]["host"]
    dead = [
        f"rank {rank} (process {one['pid']} on {host})"
        for rank, one in enumerate(roster)
        if one["host"] == host and rank != world.rank and not _alive(one["pid"])
    ]
    what = " ".join(str(error).split("\n")[0].split())
    if dead:
        return f"{', '.join(dead)} died, so rank {world.rank} stops too"
    return (
        f"rank {world.rank} lost another rank, which is not on this machine or still exits; the "
        f"network says: {what[:200]}"
    )


def _alive(pid: int) -> bool:
    """Say whether a process of this machine runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
