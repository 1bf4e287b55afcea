"""A small model of every tensor-parallel layer, as a step's and a parity proof's subject."""

import torch
from torch import nn

from warploom.parallel.optimizer import AdamW
from warploom.parallel.parity import Subject
from warploom.parallel.sharding import layouts
from warploom.parallel.step import Term
from warploom.parallel.tensor import ColumnLinear, RowLinear, VocabEmbedding, VocabHead


class ToyModel(nn.Module):
    """Embedding, a gated layer under a norm's scale, and a head with a z-loss."""

    def __init__(self, group=None, *, sequence_parallel=True, z_weight=0.01):
        super().__init__()
        torch.manual_seed(0)
        keep = {"group": group, "sequence_parallel": sequence_parallel}
        self.group = group
        self.z_weight = z_weight
        self.embedding = VocabEmbedding(11, 6, **keep)
        self.up = ColumnLinear(6, 16, parts={"a": 8, "b": 8}, bias=True, **keep)
        self.down = RowLinear(8, 6, bias=True, **keep)
        self.head = VocabHead(11, 6, **keep)
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(20)  # far from linear

    def counts(self, batch):
        count = (batch[1] != -100).sum()
        return {"language_model": count, "z": count}

    def loss(self, batch):
        tokens, targets = batch
        x = self.embedding(tokens)
        a, b = self.up(x).chunk(2, dim=-1)
        pairs = self.head.loss(x + self.down(a.tanh() * b), targets, z_loss=True)
        weights = (("language_model", 1.0), ("z", self.z_weight))
        return tuple(
            Term(name, total, count, weight)
            for (name, weight), (total, count) in zip(weights, pairs, strict=True)
        )


def global_batch(step, rows=8, tokens=8):
    """Return rows with unequal numbers of trained tokens; some rows train nothing."""
    g = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 11, (rows, tokens), generator=g)
    targets = torch.randint(0, 11, (rows, tokens), generator=g)
    for row in range(rows):
        targets[row, : (3 * row) % (tokens + 1)] = -100
    targets[1] = -100
    return ids, targets


def split(batch, mesh, micro):
    """Return this rank's micro-batches of `micro` rows, flattened to tokens."""
    ranks = mesh.degree("dp") * mesh.degree("rep")
    own = mesh.coordinate("dp") + mesh.degree("dp") * mesh.coordinate("rep")
    ids, targets = (x.chunk(ranks)[own] for x in batch)
    return [
        (ids[i : i + micro].flatten(), targets[i : i + micro].flatten())
        for i in range(0, len(ids), micro)
    ]


def subject(mesh, *, micro=2, clip=1.0, **kwargs):
    model = ToyModel(mesh.tp, **kwargs)
    made = layouts(model)
    optimizer = AdamW(dict(model.named_parameters()), made, mesh)
    return Subject(
        model, made, optimizer, lambda step: split(global_batch(step), mesh, micro), clip
    )
