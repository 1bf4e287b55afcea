"""Loss on held-out text: nats a token, and bits a byte, which any tokenizer's model can share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from warploom.models.batch import Batch
from warploom.models.decoder import IGNORED
from warploom.parallel.collectives import all_reduce_, device_of
from warploom.parallel.mesh import Mesh

from .forward import language_model_terms


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a model scores on held-out text."""

    nats: float
    """Sum of the negative log-likelihoods of the predicted tokens."""
    tokens: int
    """How many tokens were predicted, ends of documents included."""
    bytes: int
    """Bytes of text that these tokens stand for."""

    @property
    def nats_per_token(self) -> float:
        """The loss."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """The same text's cost in bits, a byte."""
        return self.nats / math.log(2) / self.bytes


@torch.no_grad()
def evaluate(model: Any, batches: Sequence[Batch], byte_counts: Tensor, mesh: Mesh) -> HeldOut:
    """Score batches; a collective call.

    Args:
        model: Has `loss`, with a term `language_model`, or under pp its stages.
        batches: This rank's share; ranks that hold parts of one model bring the same, and ranks
            between which neither experts nor parameters travel may bring different numbers.
        byte_counts: Bytes of text of each id `[V]`, int64, on the CPU.
        mesh: The ranks.

    Raises:
        ValueError: If no rank brings a token to predict.
    """
    terms = language_model_terms(model, batches, mesh)
    totals = torch.zeros(3, dtype=torch.float64)
    for term, batch in zip(terms, batches, strict=False):  # no terms without the last stage
        size = 0
        if mesh.coordinate("cp") == 0:  # the others hold other tokens of the same batch
            targets = batch.targets[batch.targets != IGNORED].cpu()
            size = int(byte_counts[targets].sum())
        totals += torch.tensor([float(term.sum), float(term.count), size], dtype=torch.float64)
    totals = totals.to(device_of(mesh.world))
    nats, tokens, size = all_reduce_(all_reduce_(totals, mesh.tokens), mesh.pp).tolist()
    if not tokens:
        raise ValueError(f"held-out text must have a token to predict; it has {tokens:.0f}")
    return HeldOut(nats, int(tokens), int(size))
