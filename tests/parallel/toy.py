"""A small model of every kind of parameter, as a step's and a parity proof's subject."""

from dataclasses import replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from warploom.parallel.collectives import gather, reduce, scatter
from warploom.parallel.optimizer import AdamW, Muon
from warploom.parallel.parity import Subject
from warploom.parallel.sharding import Layout, Piece, layouts, rows, whole
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


def fill(parameter, layout, seed=7):
    """Fill a parameter from its logical tensors, whose values depend on their names alone."""
    with torch.no_grad():
        parameter.zero_()
        for piece in layout.pieces:
            g = torch.Generator().manual_seed(seed + sum(map(ord, piece.name)))
            logical = torch.randn(piece.shape, generator=g, dtype=torch.float64) * 0.5
            piece.of_local(parameter).copy_(piece.of_logical(logical))


class Gate(nn.Module):
    """Scales by one of two rows that R ranks share out: with R > 2, several hold the same one.

    Stands for key and value heads that are fewer than the ranks.
    """

    HEADS = 2

    def __init__(self, width, group):
        super().__init__()
        self.group, self.width = group, width
        self.ranks = 1 if group is None else group.size()
        rank = 0 if group is None else group.rank()
        held = max(self.HEADS // self.ranks, 1)
        self.first = rank * self.HEADS // self.ranks
        self.weight = nn.Parameter(torch.empty(held, width, dtype=torch.float64))

    def declare_layouts(self):
        shape = (self.HEADS, self.width)
        held = self.weight.shape[0]
        piece = rows("weight", shape, self.first, self.first + held)
        spread = ((self.group, ("weight",)),) if self.ranks > self.HEADS else ()
        return {"weight": Layout(tuple(self.weight.shape), (piece,), spread=spread)}

    def forward(self, x):
        """Map all tokens `[T, D]` to the sum over heads, each rank's part of the work."""
        mine = self.weight.tanh().sum(0)
        share = self.weight.shape[0] * self.ranks // self.HEADS  # ranks that do the same head
        return x * mine / share


class Experts(nn.Module):
    """Matrices `[E, D, D]` of which each rank of ep holds some; a token picks one by its value.

    Every rank gathers the tokens of ep and etp, works on those that are its experts', and sums; a
    rank of etp holds a slice of the input features.
    """

    def __init__(self, experts, width, mesh):
        super().__init__()
        self.mesh, self.count = mesh, experts
        ranks, rank = mesh.degree("ep"), mesh.coordinate("ep")
        self.held = experts // ranks
        self.first = rank * self.held
        part = width // mesh.degree("etp")
        self.start = mesh.coordinate("etp") * part
        self.weight = nn.Parameter(torch.empty(self.held, width, part, dtype=torch.float64))

    def declare_layouts(self):
        held, width, part = self.weight.shape
        own = (
            (self.first, self.first + held, 1),
            (0, width, 1),
            (self.start, self.start + part, 1),
        )
        piece = Piece("weight", (self.count, width, width), own, (0, 0, 0))
        return {"weight": Layout(tuple(self.weight.shape), (piece,), expert=True)}

    def forward(self, x):
        x = gather(gather(x, self.mesh.etp), self.mesh.ep)
        chosen = (x.detach().sum(1) * 10).floor().long() % self.count
        y = torch.zeros_like(x)
        own = x[:, self.start : self.start + self.weight.shape[2]]
        for e in range(self.held):
            mask = (chosen == self.first + e).to(x.dtype)[:, None]
            y = y + mask * (own @ self.weight[e].t())
        return scatter(scatter(y, self.mesh.ep), self.mesh.etp)


class Block(nn.Module):
    """Fused column and row products, a gate whose rows are spread, a partial scale, experts."""

    def __init__(self, mesh, width=6):
        super().__init__()
        self.mesh = mesh
        self.scale = nn.Parameter(torch.empty(width, dtype=torch.float64))
        self.gate = Gate(width, mesh.tp)
        self.up = ColumnLinear(width, 16, parts={"a": 8, "b": 8}, bias=True, group=mesh.tp)
        self.down = RowLinear(8, width, bias=True, group=mesh.tp)
        self.experts = Experts(4, width, mesh)

    def declare_layouts(self):
        partial = () if self.mesh.tp is None else (self.mesh.tp,)
        return {"scale": whole("scale", self.scale.shape, partial=partial)}

    def forward(self, x):
        x = x * self.scale.tanh()
        a, b = self.up(x).chunk(2, dim=-1)
        x = x + self.down(a.tanh() * b)
        x = x + scatter(self.gate(gather(x, self.mesh.tp)), self.mesh.tp)
        return x + self.experts(x)


class Stack(nn.Module):
    """Embedding, blocks (the units), and a tied head, in pipeline stages of equal blocks."""

    def __init__(self, mesh, *, blocks=2, width=6, recompute=False, placement=(0,)):
        super().__init__()
        self.mesh, self.recompute = mesh, recompute
        self.last = len(placement) - 1
        held = [s for s, rank in enumerate(placement) if rank == mesh.coordinate("pp")]
        self.stage_of = {n: n * len(placement) // blocks for n in range(blocks)}
        numbers = [n for n, stage in self.stage_of.items() if stage in held]
        self.embedding = VocabEmbedding(11, width, group=mesh.tp) if 0 in held else None
        self.blocks = nn.ModuleDict({str(n): Block(mesh, width) for n in numbers})
        if self.last in held:
            self.head = VocabHead(11, width, group=mesh.tp, tied=self.embedding)
        self.double()
        if self.last in held and self.embedding is not None:
            self.head.weight = self.embedding.weight
        self.made = layouts(self, lambda name: name.replace("head.", "embedding."))
        for path in ("embedding.weight", "head.weight"):
            if path in self.made and mesh.ends is not None and placement[0] != placement[-1]:
                self.made[path] = replace(self.made[path], partial=(mesh.ends,))
        for path, parameter in self.named_parameters():
            fill(parameter, self.made[path])

    def counts(self, batch):
        own = self._part(batch[1])
        return {"language_model": (own != -100).sum(), "size": own.numel()}

    def _part(self, x):
        return x.chunk(self.mesh.degree("cp"))[self.mesh.coordinate("cp")]

    def boundary(self, stage, batch):
        tokens = batch[0].numel() // self.mesh.degree("cp") // self.mesh.degree("tp")
        return (tokens, 6), torch.float64

    def stage(self, stage, x, batch):
        tokens, targets = map(self._part, batch)
        if stage == 0:
            x = self.embedding(tokens)
        terms = []
        for number, block in self.blocks.items():
            if self.stage_of[int(number)] != stage:
                continue
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
            size = reduce(x.square().sum(), self.mesh.tp)
            terms.append(Term("size", size, tokens.numel(), 0.01))
        if stage < self.last:
            return x, terms
        ((total, count),) = self.head.loss(x, targets)
        return None, [*terms, Term("language_model", total, count)]

    def loss(self, batch):
        return self.stage(0, None, batch)[1]


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


def hidden(path, parameter):
    """Choose the matrices of the blocks for Muon."""
    return path.startswith("blocks.") and parameter.dim() > 1


def stack(mesh, *, zero=1, micro=2, muon=False, offload=False, rows=12, schedule=None, **kwargs):
    """Return a subject of a `Stack`; its 12 rows make 3 micro-batches on 1, 2 or 4 ranks."""
    if schedule is not None:
        kwargs["placement"] = schedule.placement
    model = Stack(mesh, **kwargs)
    parameters = dict(model.named_parameters())
    more = {"hidden": hidden} if muon else {}
    optimizer = (Muon if muon else AdamW)(parameters, model.made, mesh, offload=offload, **more)
    return Subject(
        model=model,
        layouts=model.made,
        optimizer=optimizer,
        batches=lambda step: split(global_batch(step, rows), mesh, micro),
        zero=zero,
        schedule=schedule,
    )
