"""Rows of a fixed length, cut from the documents of a store.

The documents lie end to end, each framed by `Tokenizer.document`; row r is the S tokens from r x S
on, and its targets are the tokens that follow. No document crosses a row: one that is longer is cut
there and goes on as a new segment, whose positions begin at 0, in the next row. A position's target
is the true next token of the same document, across the cut too, or -100 at a document's last token.
So every token but a document's first is the target of exactly one position. Training drops the last
row if it is not full; evaluation pads it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from warploom.models.batch import Batch

from ..errors import UserError
from ..tokens.store import TokenSplit

IGNORE = -100


@dataclass(frozen=True)
class PackedRows:
    """The rows of one split.

    Args:
        split: The documents.
        sequence: Tokens a row, S.
        pad: Id that fills the rest of the last row and rows past it.

    Raises:
        UserError: If `sequence` is not positive.
    """

    split: TokenSplit
    sequence: int
    pad: int

    def __post_init__(self) -> None:
        if self.sequence < 1:
            raise UserError(f"sequence ({self.sequence}) must be at least 1")

    @property
    def full(self) -> int:
        """Number of rows without padding: what training reads."""
        return len(self.split.ids) // self.sequence

    @property
    def padded(self) -> int:
        """Number of rows that hold all tokens, the last one padded: what evaluation reads."""
        return -(-len(self.split.ids) // self.sequence)

    @property
    def dropped(self) -> int:
        """Number of tokens behind the last full row, which training does not read."""
        return len(self.split.ids) - self.full * self.sequence

    def read(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Read rows by number; a row past the last is padding throughout.

        Args:
            rows: B row numbers, not negative.

        Returns:
            A batch of `[B, S]`. Padding is a segment of its own, trained nowhere.
        """
        ids, size = self.split.ids, self.sequence
        tokens = np.full((len(rows), size), self.pad, np.int64)
        targets = np.full((len(rows), size), IGNORE, np.int64)
        lengths: list[np.ndarray] = []
        for i, row in enumerate(rows):
            start = min(int(row) * size, len(ids))
            stop = min(start + size, len(ids))
            ends = self._ends(start, stop) - start
            follow = ids[start + 1 : stop + 1]
            tokens[i, : stop - start] = ids[start:stop]
            targets[i, : len(follow)] = follow
            targets[i, ends - 1] = IGNORE
            borders = np.unique(np.concatenate([[0], ends, [stop - start, size]]))
            lengths.append(np.diff(borders))
        flat = np.concatenate(lengths) if lengths else np.zeros(0)
        return Batch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            document_lengths=torch.from_numpy(flat.astype(np.int32)),
        )

    def _ends(self, start: int, stop: int) -> np.ndarray:
        """Return where documents end in (start, stop]: one behind their last token."""
        offsets = self.split.offsets
        first, last = np.searchsorted(offsets, [start, stop], side="right")
        return np.asarray(offsets[first:last])


def heldout_batches(
    rows: PackedRows, *, sequences: int, rank: int = 0, ranks: int = 1, limit: int | None = None
) -> Iterator[Batch]:
    """Yield every held-out token once, in a fixed order, the same number of batches on each rank.

    Args:
        rows: The held-out split.
        sequences: Rows a batch and rank, B; the last batches are filled up with padding rows.
        rank: This rank among those that see different tokens.
        ranks: Their number.
        limit: Read at most this many rows, evenly spaced, instead of all.

    Raises:
        UserError: If there is no held-out token, or a number is not positive.
    """
    if not rows.padded:
        raise UserError(
            f"evaluation needs held-out tokens, the store holds out {len(rows.split.ids)}: build "
            "it with held_out above 0"
        )
    if min(sequences, ranks, rows.padded if limit is None else limit) < 1:
        raise UserError(f"sequences ({sequences}), ranks ({ranks}), limit ({limit}) must be >= 1")
    count = rows.padded if limit is None else min(limit, rows.padded)
    chosen = np.arange(count) * rows.padded // count
    step = sequences * ranks
    filled = np.full(-(-count // step) * step, rows.padded)
    filled[:count] = chosen
    for block in filled.reshape(-1, ranks, sequences):
        yield rows.read(block[rank])
