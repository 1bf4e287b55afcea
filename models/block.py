"""One block of a decoder: attention and feed-forward, each behind a norm."""

from torch import Tensor, nn

from warploom.kernels.gemm import Fp8Recipe
from warploom.parallel.expert import MoE
from warploom.parallel.memory import Recompute
from warploom.parallel.mesh import Mesh

from .architecture import Architecture
from .attention import Attention
from .feed_forward import FeedForward
from .moe import route_and_serve, routed_feed_forward
from .norm import RMSNorm
from .sequences import Sequences

Sums = dict[str, Tensor]


NOTHING = Recompute()


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    Args:
        architecture: Sizes.
        layer: Number of the block in the model: decides whether its feed-forward is routed.
        mesh: Groups of ranks; `None` for one rank.
        context: How attention crosses context-parallel ranks, `ring` or `all_gather`.
        recompute: Which operators run again in the backward pass.
        fp8: How the projections of attention and of a dense feed-forward are rounded to FP8; norms,
            the router and all experts stay in the model's dtype.
    """

    def __init__(
        self,
        architecture: Architecture,
        layer: int,
        *,
        mesh: Mesh | None,
        context: str = "ring",
        recompute: Recompute = NOTHING,
        fp8: Fp8Recipe | None = None,
    ) -> None:
        super().__init__()
        a = architecture
        self.recompute = recompute
        group = None if mesh is None else mesh.tp
        self.attention_norm = RMSNorm(a.width, eps=a.norm_eps, group=group)
        self.attention = Attention(
            a.width,
            a.heads,
            a.kv_heads,
            a.head_dim,
            group=group,
            ring=None if mesh is None else mesh.ring,
            ulysses=None if mesh is None else mesh.ulysses,
            context=context,
            qk_norm=a.qk_norm,
            norm_eps=a.norm_eps,
            fp8=fp8,
        )
        self.feed_forward_norm = RMSNorm(a.width, eps=a.norm_eps, group=group)
        experts = a.routed(layer)
        self.feed_forward: FeedForward | MoE
        if experts is None:
            self.feed_forward = FeedForward(a.width, a.hidden, group=group, fp8=fp8)
        else:
            self.feed_forward = routed_feed_forward(a.width, experts, mesh=mesh)

    def forward(
        self, added: Tensor, stream: Tensor | None, sequences: Sequences
    ) -> tuple[Tensor, Tensor, Sums]:
        """Map what the last block adds, and the stream, to the same of this block.

        Args:
            added: `[T/R, D]`, not yet in the stream.
            stream: Residual stream `[T/R, D]`; `None` at the start of a stage.
            sequences: Where the sequences lie in the T tokens.

        Returns:
            What this block adds, the stream, and the sums of the routers' losses by name.
        """
        added, stream = self._attend(added, stream, sequences)
        if isinstance(self.feed_forward, MoE):
            h, stream = self.feed_forward_norm.add(added, stream)
            run = self.recompute.run
            y, sums = run("moe", route_and_serve, self.feed_forward, h, sequences)
            return y, stream, sums
        return *self._feed(added, stream), {}

    def _attend(
        self, added: Tensor, stream: Tensor | None, sequences: Sequences
    ) -> tuple[Tensor, Tensor]:
        if not self.recompute.operators & {"norm", "attention"}:
            h, stream = self.attention_norm.add(added, stream)
            return self.attention(h, sequences), stream
        qkv, stream = self.recompute.run("norm", self._into_attention, added, stream)
        mixed = self.recompute.run("attention", self.attention.mix, qkv, sequences)
        return self.attention.out(mixed), stream

    def _feed(self, added: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        if "feed_forward" in self.recompute.operators:
            return self.recompute.run("feed_forward", self._gated, added, stream)
        if "norm" not in self.recompute.operators:
            return self._gated(added, stream)
        assert isinstance(self.feed_forward, FeedForward)
        gate_up, stream = self.recompute.run("norm", self._into_feed_forward, added, stream)
        return self.feed_forward.leave(gate_up), stream

    def _into_attention(self, added: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        h, stream = self.attention_norm.add(added, stream)
        return self.attention.qkv(h), stream

    def _into_feed_forward(self, added: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.feed_forward, FeedForward)
        h, stream = self.feed_forward_norm.add(added, stream)
        return self.feed_forward.gate_up(h), stream

    def _gated(self, added: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        h, stream = self.feed_forward_norm.add(added, stream)
        return self.feed_forward(h), stream
