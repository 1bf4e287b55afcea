"""A run of seconds: a tiny model on a few files of the standard library, on one rank or several."""

import dataclasses
import multiprocessing
import os
import shutil
import socket
import sysconfig
import time
from pathlib import Path

import torch

from warploom.models.families import llama
from warploom.recipes.runner import peak
from warploom.recipes.runner.data import open_store
from warploom.recipes.runner.learning_rate import WSD
from warploom.recipes.runner.metrics import read
from warploom.recipes.runner.run import Corpus, Run

_CONTEXT = multiprocessing.get_context("forkserver")


def corpus(folder):
    """A folder of thirty small source files, and a place for the store that tests share."""
    text = folder / "text"
    text.mkdir()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    small = [p for p in sources if 1000 < p.stat().st_size < 20_000][:30]
    for path in small:
        shutil.copy(path, text / path.name)
    made = Corpus(paths=(str(text),), held_out=0.2, store=str(folder / "store"))
    open_store(tiny_run(made, folder / "unused"), folder / "unused", verify=True)
    return made


def tiny_run(corpus, folder, **changes):
    """Eight steps of two layers, on batches of 8 x 64 tokens."""
    given = {
        "architecture": dataclasses.replace(
            llama.tiny(), vocabulary=300, width=32, head_dim=8, hidden=64, max_positions=128
        ),
        "corpus": corpus,
        "folder": str(folder),
        "sequence": 64,
        "batch_tokens": 512,
        "micro_batch": 2,
        "steps": 8,
        "learning_rate": 3e-3,
        "schedule": WSD(warmup=2),
        "checkpoint_every": 3,
        "evaluate_every": 4,
        "evaluate_tokens": 2048,
        "prompts": ("def ",),
        "sample_tokens": 4,
    }
    return Run(**{**given, **changes})


def losses(folder):
    """The loss trace as it was written: step, loss and gradient norm of each line."""
    lines = read(Path(folder) / "metrics.jsonl")
    return [(line["step"], repr(line["loss"]), repr(line["grad_norm"])) for line in lines]


def skip_ceiling():
    """Have this process take a number for what it multiplies a second, not measure it (2 s)."""
    peak.matmul_ceiling = lambda device, dtype: 1e11


def _rank(rank, size, port, output, run, plant):
    """One process as torchrun would start it; its exit code is the launcher's."""
    from warploom.recipes.runner import launch

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    skip_ceiling()
    file = open(output, "a")  # noqa: SIM115 - standard streams of the process
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    if plant is not None:
        plant(rank)
    launch.parse = lambda *_, **__: run
    raise SystemExit(launch.main([], {}, "", prog="test"))


class Ranks:
    """Processes of one run; `text` is what they have printed."""

    def __init__(self, run, size, output, plant=None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.output = Path(output)
        self.processes = [
            _CONTEXT.Process(
                target=_rank, args=(rank, size, port, str(output), run, plant), daemon=True
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout=120.0):
        """Exit codes in rank order; a process that is still alive then has none."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self, *ranks):
        """SIGKILL to some ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].join()

    @property
    def text(self):
        return self.output.read_text() if self.output.exists() else ""


def train_on(run, size, output, plant=None, timeout=120.0):
    """Train on `size` processes to the end; exit codes and what was printed."""
    ranks = Ranks(run, size, output, plant)
    return ranks.wait(timeout), ranks.text
