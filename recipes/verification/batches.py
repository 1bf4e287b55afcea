"""The global batch of a case: odd documents, ranks and micro-batches that train nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from warploom.models.batch import Batch
from warploom.parallel.context import Split

from .plan import Case

IGNORED = -100


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """What all ranks train on in one step, micro-batch after micro-batch of rank after rank.

    Attributes:
        tokens: Ids `[ranks, microbatches, rows, S]`.
        targets: Their targets, of the same shape.
        lengths: Lengths of the documents of each row, in the same order of nesting.
    """

    tokens: Tensor
    targets: Tensor
    lengths: list[list[list[list[int]]]]

    def part(self, rank: int, microbatch: int, packed: bool) -> Batch:
        """Cut out one micro-batch."""
        lengths = None
        if packed:
            flat = [n for row in self.lengths[rank][microbatch] for n in row]
            lengths = torch.tensor(flat, dtype=torch.int32)
        return Batch(self.tokens[rank, microbatch], self.targets[rank, microbatch], lengths)


def global_batch(case: Case, step: int) -> GlobalBatch:
    """Draw the batch of a step: the same for every mesh that splits it equally."""
    d = case.degrees
    ranks = (d.dp or 1) * d.rep
    shape = (ranks, case.microbatches, case.rows, case.sequence)
    g = torch.Generator().manual_seed(1000 * case.seed + step)
    tokens = torch.randint(0, case.architecture.vocabulary, shape, generator=g)
    targets = torch.randint(0, case.architecture.vocabulary, shape, generator=g)
    share = torch.rand(shape[:3], generator=g)[..., None]  # of the tokens of a row that train
    targets[torch.rand(shape, generator=g) > share] = IGNORED
    lengths = [
        [[_documents(case.sequence, g) for _ in range(case.rows)] for _ in range(shape[1])]
        for _ in range(ranks)
    ]
    _mask_whole_parts(case, targets, lengths)
    targets[0, 0, 0, :2] = tokens[0, 0, 0, 1:3]  # something trains, whatever was drawn
    return GlobalBatch(tokens, targets, lengths)


def _documents(total: int, g: torch.Generator) -> list[int]:
    """Cut a row into documents of odd and even lengths, one of them long."""
    first = int(torch.randint(1, max(2, total // 3), (), generator=g))
    rest = total - first
    last = int(torch.randint(1, max(2, rest // 2), (), generator=g))
    return [n for n in (first, rest - last, last) if n]


def _mask_whole_parts(case: Case, targets: Tensor, lengths: list[list[list[list[int]]]]) -> None:
    """Let the last data rank, the last micro-batch and one context-parallel rank train nothing."""
    ranks, microbatches, rows, length = targets.shape
    if ranks > 1:
        targets[-1] = IGNORED
    if microbatches > 1:
        targets[0, -1] = IGNORED
    d = case.degrees
    if d.cp == 1:
        return
    for m in range(microbatches):
        sizes = [n for row in lengths[0][m] for n in row] if case.packed else [length] * rows
        split = Split.build(
            sizes, d.cp, multiple=d.tp, balance=case.parallel.balance, ulysses=d.uly
        )
        own = split.indices(d.cp - 1)
        targets[0, m].view(-1)[own[own >= 0]] = IGNORED
