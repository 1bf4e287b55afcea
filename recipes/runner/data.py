"""From a run's corpus to batches: open or build the store, read ahead, bring to the device."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch

from warploom.models.batch import Batch
from warploom.parallel.mesh import Mesh

from ..corpus.building import prepare_store
from ..corpus.packing import PackedRows, heldout_batches
from ..corpus.sampling import Batches
from ..corpus.sources import TextSource, stdlib_sources
from ..errors import UserError
from ..tokens.store import TokenStore
from ..tokens.tokenizer import Tokenizer
from ..tokens.training import BPE
from .run import Run


def open_store(run: Run, default: Path, *, verify: bool) -> TokenStore:
    """Open the token store of a run; the first of several processes builds it, the others wait.

    Args:
        run: The run.
        default: Where the store lies if the run does not say.
        verify: Hash the files of a store that was there.

    Raises:
        UserError: If no text is left, the store is damaged or of something else, or its tokenizer
            has more ids than the model.
    """
    corpus, rows = run.corpus, run.architecture.vocabulary
    source = (
        stdlib_sources()
        if corpus.paths == ("stdlib",)
        else TextSource(paths=corpus.paths, suffixes=corpus.suffixes, text_field=corpus.text_field)
    )
    tokenizer: Tokenizer | BPE = BPE(vocabulary=rows, digits=corpus.digits)
    if corpus.tokenizer is not None:
        tokenizer = Tokenizer.load(corpus.tokenizer)
        if tokenizer.vocabulary > rows:
            raise UserError(
                f"architecture.vocabulary ({rows}) must be at least the tokenizer's "
                f"({tokenizer.vocabulary} ids in {corpus.tokenizer})"
            )
    return prepare_store(
        corpus.store or default, source, tokenizer, held_out=corpus.held_out, verify=verify
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """The batches of one rank."""

    run: Run
    store: TokenStore
    mesh: Mesh
    device: torch.device

    @property
    def rank(self) -> int:
        """This rank among those that get different rows."""
        return self.mesh.data_rank

    @property
    def ranks(self) -> int:
        """How many ranks get different rows."""
        return self.mesh.data_ranks

    def rows(self, split: str) -> PackedRows:
        """Return the rows of a split, `train` or `heldout`."""
        pad = self.store.tokenizer.pad
        kept = self.store.train if split == "train" else self.store.heldout
        return PackedRows(kept, self.run.sequence, self.store.tokenizer.eos if pad is None else pad)

    def train(self) -> Batches:
        """Return the batches to train on.

        Raises:
            UserError: If the corpus does not fill one sequence.
        """
        run = self.run
        return Batches(self.rows("train"), run.batch_tokens // run.sequence, run.seed)

    def held_out(self) -> list[Batch]:
        """Read this rank's held-out batches, on the device."""
        run = self.run
        rows = self.rows("heldout")
        limit = max(1, run.evaluate_tokens // run.sequence)
        batches = heldout_batches(
            rows, sequences=run.micro_batch, rank=self.rank, ranks=self.ranks, limit=limit
        )
        return [to_device(batch, self.device) for batch in batches]

    def ahead(self, first: int) -> "Ahead":
        """Read this rank's micro-batches of steps `first`, `first + 1`, ..., one step ahead."""
        return Ahead(self, first)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch; lengths of documents stay where Python reads them without waiting."""
    if device.type == "cpu":
        return batch
    return replace(batch, tokens=batch.tokens.to(device), targets=batch.targets.to(device))


class Ahead:
    """Reads the next step's micro-batches in a thread while this step computes."""

    def __init__(self, data: Data, first: int) -> None:
        self._data, self._next = data, first
        self._batches = data.train()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._future: Future[list[Batch]] = self._pool.submit(self._read, first)

    def _read(self, step: int) -> list[Batch]:
        data = self._data
        read = self._batches.micro_batches(
            step, rank=data.rank, ranks=data.ranks, micro=data.run.micro_batch
        )
        return [to_device(batch, data.device) for batch in read]

    def take(self) -> tuple[list[Batch], float]:
        """Return the next step's micro-batches, and the seconds that it took to get them."""
        start = time.perf_counter()
        batches = self._future.result()
        waited = time.perf_counter() - start
        self._next += 1
        self._future = self._pool.submit(self._read, self._next)
        return batches, waited

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)
