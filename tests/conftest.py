"""Shared fixtures: fresh memory is poisoned; `ranks` and `pool` run a function on processes.

`ranks` starts new ones each time; `pool` starts them once a session, for proofs of many cases.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from tests.pool import TestPool
from tests.pool import poison as _poison

from warploom.recipes.verification.pool import PRELOADED

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = (
    *(*PRELOADED, "pytest", "hypothesis", "warploom.parallel.mesh"),
    # What a run imports when it comes to it: a second of every rank, else.
    *("warploom.recipes.runner.train", "warploom.recipes.runner.launch", "tokenizers"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "torch.utils.tensorboard"),
)
_CONTEXT.set_forkserver_preload(list(_PRELOADED))


@pytest.fixture(autouse=True)
def poison():
    _poison()


def _worker(rank: int, size: int, port: int, failures, fn: Callable[..., None], args: tuple):
    _poison()
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=60))
        dist.barrier()  # a rank that is done must not close on one that still connects
        fn(*args)
        dist.destroy_process_group()
    except BaseException:
        failures.put((rank, traceback.format_exc()))
        raise SystemExit(1) from None


def _run_on_ranks(size: int, fn: Callable[..., None], *args: object, timeout: float = 120) -> None:
    """Run `fn(*args)` on `size` gloo ranks, forked from a server that has imported torch."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    failures = _CONTEXT.SimpleQueue()
    workers = [
        _CONTEXT.Process(target=_worker, args=(rank, size, port, failures, fn, args), daemon=True)
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout)
    hung = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    for worker in workers:
        worker.kill()
    if not failures.empty():
        rank, text = failures.get()
        pytest.fail(f"rank {rank} of {size}:\n{text}", pytrace=False)
    assert not hung, f"ranks {hung} of {size} did not end within {timeout} s"
    assert all(worker.exitcode == 0 for worker in workers)


@pytest.fixture
def ranks():
    """`ranks(size, fn, *args)`: run `fn` on gloo processes; fails with the first rank's trace."""
    return _run_on_ranks


@pytest.fixture(scope="session")
def pool():
    """`pool(size, fn, *args)`: as `ranks`, on processes that stay; returns rank 0's result."""
    with TestPool(preload=_PRELOADED) as made:
        yield made
