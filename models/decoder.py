"""A decoder-only language model, dense or of experts, sharded over every axis of a mesh.

    embedding -> L x (norm, attention, norm, feed-forward) -> norm -> head

Between the blocks a rank holds T/R of its flat tokens. A block hands on what it adds and the stream
it is to be added to, apart: the next norm adds them in the kernel that normalises.

    axis        what a rank of it holds
    tp          T/R tokens between the blocks; heads, features and vocabulary within them
    cp          its share of the tokens of each micro-batch (`sequences.py`)
    pp          its stages (`stages.py`): blocks, and at the ends the embedding and the head
    ep, etp     its experts, and its slice of each

Shapes: B batch, S sequence, T the tokens of a context-parallel rank, D width, V vocabulary, L
layers, R tensor-parallel ranks.

Source: Touvron et al. 2023, https://arxiv.org/abs/2302.13971, section 2.2; Radford et al. 2019,
"Language Models are Unsupervised Multitask Learners", section 2.3 (residual projections start
1/sqrt(2 L) smaller).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from warploom.kernels.gemm import Fp8Recipe
from warploom.parallel import sharding
from warploom.parallel.checkpoint import Entry
from warploom.parallel.collectives import gather
from warploom.parallel.context import unshard
from warploom.parallel.expert import bias_entries, update_biases
from warploom.parallel.initialise import normal_
from warploom.parallel.memory import Recompute
from warploom.parallel.mesh import Degrees, Mesh
from warploom.parallel.step import Term
from warploom.parallel.tensor import VocabEmbedding, VocabHead, scale_entries, update_scales

from .architecture import Architecture, Experts
from .batch import IGNORED, Batch
from .block import Block, Sums
from .embedding import LearnedPositions
from .fits import check
from .mup import initial_scale
from .norm import RMSNorm, block_norm
from .predict import Prediction, predict, targets_ahead
from .sequences import Sequences, sequences
from .stages import Stages

__all__ = ["IGNORED", "Architecture", "Decoder", "Experts"]

INIT_STD = 0.02
Lengths = Tensor | Sequence[int] | None


class Decoder(nn.Module):
    """Decoder-only language model; `Decoder.create` also draws its weights.

    Memory of the parameters is allocated but not written: call `initialise`, or load into it.

    Args:
        architecture: Sizes.
        mesh: Groups of ranks; `None` for one rank.
        names: From a logical name here (`blocks.0.attention.qkv.q.weight`) to the one that
            `layouts` gives; by default the same.
        recompute: What runs again in the backward pass: `none`, `full` (whole blocks, of which only
            the input is kept), `selective`, or operators; see `parallel/memory`.
        fp8: How the projections of attention and of dense feed-forwards are rounded to FP8; `None`
            multiplies in `dtype`, as embedding, head, norms, routers and experts always do.
        z_loss: Weight of the term sum(lse^2); 0 leaves the term out.
        context: How attention crosses context-parallel ranks, `ring` or `all_gather`.
        balance: How tokens are dealt to context-parallel ranks: `zigzag`, `document` or
            `contiguous`.
        stages: Which blocks are on which pipeline stage and rank; by default one stage a rank.
        dtype: Of parameters and activations.
        device: Where the parameters are; `meta` allocates nothing.

    Raises:
        TypeError: If `mesh`, `dtype` or `fp8` is of another kind, such as a name.
        ValueError: If a degree of the mesh does not divide what it splits, `recompute` is unknown,
            `z_loss` is negative, or a rank's widths do not fit `fp8`.
    """

    embedding: VocabEmbedding
    positions: LearnedPositions | None
    norm: RMSNorm
    head: VocabHead

    def __init__(
        self, architecture: Architecture, *, mesh: Mesh | None = None,
        names: Callable[[str], str] | None = None, recompute: str = "none",
        fp8: Fp8Recipe | None = None, z_loss: float = 0.0, context: str = "ring",
        balance: str = "zigzag", stages: Stages | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value, kind, such in (
            ("mesh", mesh, Mesh, "Mesh.build('tp2')"),
            ("dtype", dtype, torch.dtype, "torch.bfloat16"),
            ("fp8", fp8, Fp8Recipe, "Fp8Recipe(scaling='block')"),
        ):
            if not isinstance(value, kind | None):
                raise TypeError(f"{name} must be a {kind.__name__}, such as {such}; got {value!r}")
        if z_loss < 0:
            raise ValueError(f"z_loss must be at least 0; got {z_loss}")
        a = architecture
        check(a, Degrees() if mesh is None else mesh.degrees)
        pp = 1 if mesh is None else mesh.degree("pp")
        self.architecture, self.mesh, self.names = architecture, mesh, names
        self.recompute = Recompute.parse(recompute)
        self.z_loss, self.balance = z_loss, balance
        self.stages = Stages.deal(a.layers, range(pp)) if stages is None else stages
        self.held = self.stages.on(0 if mesh is None else mesh.coordinate("pp"))
        self.size = 1 if mesh is None else mesh.degree("tp")
        self._made: WeakKeyDictionary[Batch, Sequences] = WeakKeyDictionary()
        with torch.device("meta"):
            self._build(context, fp8)
        self.to(dtype=dtype).to_empty(device=device)
        if a.tied and hasattr(self, "embedding") and hasattr(self, "head"):
            self.head.weight = self.embedding.weight  # a new device makes two parameters of one

    def _build(self, context: str, fp8: Fp8Recipe | None) -> None:
        """Make the modules of this rank's stages; a rank lacks what is on other stages."""
        a, mesh = self.architecture, self.mesh
        group = None if mesh is None else mesh.tp
        place = self.stages.placement
        shared, last = a.tied or a.predict > 0, self.stages.last in self.held
        if shared and place[0] != place[-1] and {place[0], place[-1]} != {0, max(place)}:
            raise ValueError(
                f"a tied embedding, or one beside multi-token prediction, must be on the first and "
                f"the last pipeline rank, or both ends on one; stages 0 and {self.stages.last} are "
                f"on ranks {place[0]} and {place[-1]}"
            )
        if 0 in self.held or (last and a.predict):
            self.embedding = VocabEmbedding(a.vocabulary, a.width, group=group)
            learned = a.positions == "learned"
            self.positions = (
                LearnedPositions(a.max_positions, a.width, group=group) if learned else None
            )
        numbers = sorted(n for stage in self.held for n in self.stages.blocks(stage))
        how: dict[str, Any] = {"mesh": mesh, "context": context, "fp8": fp8}
        how["recompute"] = self.recompute
        made = {str(n): Block(a, n, **how) for n in numbers}
        for n in range(a.layers, a.layers + a.predict) if last else ():
            made[str(n)] = Prediction(a, n, **how)
        self.blocks = nn.ModuleDict(made)
        if last:
            self.norm = block_norm(a, group=group)
            tied = self.embedding if a.tied and hasattr(self, "embedding") else None
            softcap = a.logit_softcap or None
            self.head = VocabHead(a.vocabulary, a.width, group=group, tied=tied, softcap=softcap)

    @classmethod
    def create(cls, architecture: Architecture, *, seed: int = 0, **options: Any) -> "Decoder":
        """Build a decoder and draw its weights; `options` are those of the class."""
        return cls(architecture, **options).initialise(seed)

    def layouts(self) -> dict[str, sharding.Layout]:
        """Return how each parameter is made of logical tensors, by path."""
        names = self.names or (lambda name: name)
        return self._tie(sharding.layouts(self, lambda name: names(self._logical(name))))

    def logical_layouts(self) -> dict[str, sharding.Layout]:
        """Return the same with the names that logical tensors have in this module."""
        return self._tie(sharding.layouts(self, self._logical))

    def _logical(self, name: str) -> str:
        """Name the head's weight as the embedding's where they are one."""
        tied = self.architecture.tied and name == "head.weight"
        return "embedding.weight" if tied else name

    def _tie(self, made: dict[str, sharding.Layout]) -> dict[str, sharding.Layout]:
        """Have the gradients of a weight that both end stages hold summed over both."""
        a, place = self.architecture, self.stages.placement
        shared = {"embedding.weight", "positions.weight"} if a.predict else set()
        shared |= {"embedding.weight", "head.weight"} if a.tied else set()
        if self.mesh is not None and place[0] != place[-1]:
            for path in shared & made.keys():
                partial = (*made[path].partial, self.mesh.ends)
                made[path] = replace(made[path], partial=partial)
        return made

    @torch.no_grad()
    def initialise(self, seed: int) -> "Decoder":
        """Draw every weight from N(0, 0.02), residual projections 1/sqrt(2 L) smaller.

        Scales of norms are 1, biases and sinks 0; with muP hidden matrices are smaller (`mup.py`).

        The values depend on the seed and the logical names alone: on no mesh, and not on `names`.
        """
        made = self.logical_layouts()
        residual = (2 * self.architecture.layers) ** -0.5
        for path, parameter in self.named_parameters():
            owner, _, name = path.rpartition(".")
            if parameter.dim() == 1:
                initial = getattr(self.get_submodule(owner), "initial", None)
                parameter.copy_(torch.as_tensor(0.0 if initial is None else initial(name)))
                continue
            std = INIT_STD * initial_scale(self.architecture, self._logical(path), parameter)
            normal_(parameter, made[path], seed=seed, std=std * residual if _adds(path) else std)
        return self

    def forward(self, tokens: Tensor, document_lengths: Lengths = None) -> Tensor:
        """Return the logits of every position, on every tensor- and context-parallel rank.

        Args:
            tokens: Ids `[B, S]`, int64, equal on all tensor- and context-parallel ranks.
            document_lengths: Lengths `[N]` of packed documents, int32 or a list; see `Batch`.

        Returns:
            `[B, S, V]` in the dtype of the parameters.

        Raises:
            ValueError: If S is longer than the positions, or the documents do not fit the rows.
            RuntimeError: If the model is split into pipeline stages.
        """
        self._refuse_stages("forward")
        return self.infer(0, None, tokens, document_lengths)

    def infer(
        self, stage: int, x: Tensor | None, tokens: Tensor, document_lengths: Lengths = None
    ) -> Tensor:
        """Run one pipeline stage without targets.

        Args:
            stage: Its number, from 0.
            x: What the stage before gave `[T/R, D]`; `None` for the first.
            tokens: As for `forward`, on every stage.
            document_lengths: As for `forward`.

        Returns:
            The stream for the next stage `[T/R, D]`; from the last, the logits, as `forward`.
        """
        where = self._sequences(tokens, document_lengths)
        hidden, _ = self._stage(stage, x, tokens, where)
        if stage < self.stages.last:
            return hidden
        logits: Tensor = self.head(hidden)
        if where.split is None:
            return logits[: tokens.numel()].view(*tokens.shape, -1)
        assert self.mesh is not None
        return unshard(logits, where.split, group=self.mesh.cp).view(*tokens.shape, -1)

    def loss(self, batch: Batch) -> tuple[Term, ...]:
        """Return the summed cross-entropy of the trained positions, and what else is asked.

        Never forms `[T, V]`. Sums are in nats; nothing is divided. Under context parallelism the
        sums are those of this rank's tokens. Beside `language_model` there is `z_loss`, and for
        experts `load_balance` and `router_z`, where their weights are not 0, and of each further
        token that is predicted `multi_token_prediction`, from the second with its number.

        Raises:
            ValueError: As `forward`, or if the targets' shape differs from the tokens'.
            RuntimeError: If the model is split into pipeline stages.
        """
        self._refuse_stages("loss")
        return self.stage(0, None, batch)[1]

    def stage(
        self, stage: int, x: Tensor | None, batch: Batch
    ) -> tuple[Tensor | None, tuple[Term, ...]]:
        """Run one pipeline stage that this rank holds.

        Args:
            stage: Its number, from 0.
            x: What the stage before gave `[T/R, D]`; `None` for the first.
            batch: The whole micro-batch, on every stage.

        Returns:
            The stream for the next stage `[T/R, D]`, `None` from the last; and the loss terms that
            arise in this stage.

        Raises:
            ValueError: If the targets' shape differs from the tokens', or as `forward`.
        """
        if batch.targets.shape != batch.tokens.shape:
            raise ValueError(
                f"targets must have the shape of tokens {tuple(batch.tokens.shape)}; "
                f"got {tuple(batch.targets.shape)}"
            )
        where = self._sequences_of(batch)
        y, sums = self._stage(stage, x, batch.tokens, where)
        further = self._predict(y, batch, where, sums) if stage == self.stages.last else []
        counts, weights = self.counts(batch) if sums else {}, self._weights()
        terms = [Term(name, total, counts[name], weights[name]) for name, total in sums.items()]
        if stage < self.stages.last:
            return y, tuple(terms)
        targets = where.cut(batch.targets.flatten(), IGNORED)
        pairs = self.head.loss(y, targets, z_loss=self.z_loss > 0)
        for name, (total, count) in zip(("language_model", "z_loss"), pairs, strict=False):
            terms.insert(len(terms) - len(sums), Term(name, total, count, weights[name]))
        names = self._further()
        terms += [Term(n, *pair, weights[n]) for n, pair in zip(names, further, strict=True)]
        return None, tuple(terms)

    def _further(self) -> list[str]:
        """Name the terms of the further tokens that are predicted."""
        numbers = range(1, self.architecture.predict + 1)
        return ["multi_token_prediction" + (f"_{n}" if n > 1 else "") for n in numbers]

    def _predict(
        self, hidden: Tensor, batch: Batch, where: Sequences, sums: Sums
    ) -> list[tuple[Tensor, Tensor]]:
        """Return sum and count of the cross-entropy of each further token; add to routers' sums."""
        a, pairs = self.architecture, []
        blocks: list[Any] = [self.blocks[str(a.layers + n)] for n in range(a.predict)]
        run, given = partial(self.recompute.run, "block"), (hidden, batch, where)
        depths = predict(run, blocks, self._embed, self._scaled, *given)
        targets = targets_ahead(batch, where, a.predict)
        for (y, found), wanted in zip(depths, targets, strict=True):
            pairs.append(self.head.loss(y, wanted)[0])
            _accumulate(sums, found)
        return pairs

    def _refuse_stages(self, what: str) -> None:
        if self.stages.last:
            raise RuntimeError(
                f"a model of {self.stages.last + 1} pipeline stages has no {what} of its own: run "
                f"its stages with parallel.pipeline.execute, or give the step a schedule"
            )

    def boundary(self, stage: int, batch: Batch) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of what `stage` hands to the next."""
        tokens = len(self._sequences_of(batch).documents)
        dtype = next(self.parameters()).dtype
        return (tokens // self.size, self.architecture.width), dtype

    def _weights(self) -> dict[str, float]:
        """Return the weight of each term that this model has."""
        weights = {"language_model": 1.0}
        if self.z_loss > 0:
            weights["z_loss"] = self.z_loss
        experts = self.architecture.experts
        if experts is not None:
            named = {"load_balance": experts.balance, "router_z": experts.router_z}
            weights |= {name: weight for name, weight in named.items() if weight > 0}
        a = self.architecture
        return weights | {name: a.predict_weight / a.predict for name in self._further()}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return this rank's share of the counts of all terms, 0-dim, without a forward pass.

        Tokens that train (`language_model`, `z_loss`), documents (`load_balance`, which the first
        context-parallel rank counts), tokens (`router_z`), and tokens that train further ahead.
        """
        where = self._sequences_of(batch)
        trained = (where.cut(batch.targets.flatten(), IGNORED) != IGNORED).sum()
        first = self.mesh is None or self.mesh.coordinate("cp") == 0
        found = {
            "language_model": trained,
            "z_loss": trained,
            "load_balance": torch.tensor(where.count if first else 0),
            "router_z": (where.documents >= 0).sum(),
        }
        ahead = targets_ahead(batch, where, self.architecture.predict)
        found |= {n: (t != IGNORED).sum() for n, t in zip(self._further(), ahead, strict=True)}
        return {name: found[name] for name in self._weights()}

    def after_step(self, mesh: Mesh) -> None:
        """Move the routers' balancing biases and FP8's delayed scales by what the step has seen.

        A collective call.
        """
        update_scales(self, mesh.tp, mesh.tokens)
        experts = self.architecture.experts
        if experts is not None and experts.bias_rate > 0:
            update_biases(self, experts.bias_rate, mesh.tp, mesh.tokens)

    def buffer_entries(self) -> list[Entry]:
        """List what a checkpoint keeps beside parameters: routers' biases, FP8's delayed scales."""
        return bias_entries(self) + scale_entries(self)

    def _stage(
        self, stage: int, x: Tensor | None, tokens: Tensor, where: Sequences
    ) -> tuple[Tensor, Sums]:
        """Run the blocks of a stage: its stream, normalised by the last, and the routers' sums."""
        sums: Sums = {}
        stream: Tensor | None = None
        added = self._embed(where.cut(tokens.flatten(), 0), where) if x is None else x
        for number in self.stages.blocks(stage):
            block = self.blocks[str(number)]
            if "block" in self.recompute.operators:
                added, stream = _plus(added, stream), None
            added, stream, found = self.recompute.run("block", block, added, stream, where)
            _accumulate(sums, found)
        if stage < self.stages.last:
            return _plus(added, stream), sums
        return self._scaled(self.norm.add(added, stream)[0]), sums

    def _scaled(self, hidden: Tensor) -> Tensor:
        """Scale what the head takes, and so the logits."""
        scale = self.architecture.logit_scale / self.architecture.multiple
        return hidden if scale == 1 else hidden * scale

    def _embed(self, ids: Tensor, where: Sequences) -> Tensor:
        """Map ids `[T]` to the first stream `[T/R, D]`."""
        x: Tensor = self.embedding(ids)
        if self.architecture.embedding_scale != 1:  # rounded as the weights are
            x = x * float(torch.tensor(self.architecture.embedding_scale, dtype=x.dtype))
        return x if self.positions is None else x + self.positions(where.positions)

    def advance(self, tokens: Tensor, where: Sequences) -> Tensor:
        """Run new tokens of cached sequences through the model; their keys and values are kept.

        Args:
            tokens: Ids `[N]`, int64, sequence after sequence, equal on all tensor-parallel ranks.
            where: What `Cache.step` says of them.

        Returns:
            Normalised hidden states `[N, D]`, on every tensor-parallel rank, for `logits`.

        Raises:
            RuntimeError: If the model is split into pipeline stages.
        """
        self._refuse_stages("advance")
        hidden, _ = self._stage(0, None, tokens, where)
        group = None if self.mesh is None else self.mesh.tp
        whole: Tensor = gather(hidden, group)
        return whole[: len(tokens)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states `[M, D]` of `advance` to logits `[M, V]`, on every rank."""
        return self.head.project(hidden)

    def _sequences_of(self, batch: Batch) -> Sequences:
        if (known := self._made.get(batch)) is not None:
            return known
        made = self._sequences(batch.tokens, batch.document_lengths)
        if torch.is_grad_enabled():  # batches that evaluate live on, and would keep their tables
            self._made[batch] = made
        return made

    def _sequences(self, tokens: Tensor, lengths: Lengths) -> Sequences:
        rows, length = tokens.shape
        return sequences(
            (rows, length),
            None if lengths is None else torch.as_tensor(lengths, dtype=torch.int32),
            self.architecture, mesh=self.mesh, balance=self.balance, device=tokens.device,
        )  # fmt: skip


def _accumulate(sums: Sums, found: Sums) -> None:
    for name, value in found.items():
        sums[name] = sums[name] + value if name in sums else value


def _plus(added: Tensor, stream: Tensor | None) -> Tensor:
    return added if stream is None else added + stream


def _adds(path: str) -> bool:
    """Whether a weight writes into the residual stream."""
    return path.endswith(
        ("attention.out.weight", "attention.out_proj.weight", "feed_forward.down.weight")
        + ("shared.down.weight", "experts.down")
    )
