"""One block of a decoder: attention and feed-forward, with a norm before or after each, or both.

before    stream += f(norm(stream))
after     stream += norm(f(stream))
both      stream += norm(f(norm(stream)))
"""

from typing import Any

from torch import Tensor, nn

from warploom.kernels.gemm import Fp8Recipe
from warploom.parallel.expert import MoE
from warploom.parallel.memory import Recompute
from warploom.parallel.mesh import Mesh

from .architecture import Architecture
from .attention import Attention
from .feed_forward import FeedForward
from .latent import LatentAttention
from .moe import route_and_serve, routed_feed_forward
from .norm import RMSNorm, block_norm
from .sequences import Sequences
from .ssm import StateSpaceMixer

Sums = dict[str, Tensor]
Mixer = Attention | LatentAttention | StateSpaceMixer


NOTHING = Recompute()


class Block(nn.Module):
    """Attention (or what mixes tokens in its place) and feed-forward, added to the stream.

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
        self, architecture: Architecture, layer: int, *, mesh: Mesh | None, context: str = "ring",
        recompute: Recompute = NOTHING, fp8: Fp8Recipe | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        a = architecture
        self.recompute, self.residual_scale = recompute, a.residual_scale
        group = None if mesh is None else mesh.tp
        before, after = a.norm_at != "after", a.norm_at != "before"
        self.attention_norm = block_norm(a, group=group) if before else None
        kinds: dict[str, type[Mixer]] = {"ssm": StateSpaceMixer}
        usual = Attention if a.latent is None else LatentAttention
        self.attention: Mixer = kinds.get(a.kind(layer), usual)(
            a, a.kind(layer), layer, group=group, ring=None if mesh is None else mesh.ring,
            ulysses=None if mesh is None else mesh.ulysses, context=context, fp8=fp8,
        )  # fmt: skip
        self.attention_post_norm = block_norm(a, group=group) if after else None
        self.feed_forward_norm = block_norm(a, group=group) if before else None
        experts = a.routed(layer)
        self.feed_forward: FeedForward | MoE
        if experts is None:
            how: dict[str, Any] = {"activation": a.activation, "bias": a.mlp_bias}
            self.feed_forward = FeedForward(a.width, a.hidden, group=group, **how, fp8=fp8)
        else:
            self.feed_forward = routed_feed_forward(a.width, experts, mesh=mesh)
        self.feed_forward_post_norm = block_norm(a, group=group) if after else None

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
        added = self._leave(added, self.attention_post_norm)
        sums: Sums = {}
        if isinstance(self.feed_forward, MoE):
            h, stream = _enter(self.feed_forward_norm, added, stream)
            run = self.recompute.run
            added, sums = run("moe", route_and_serve, self.feed_forward, h, sequences)
        else:
            added, stream = self._feed(added, stream)
        return self._leave(added, self.feed_forward_post_norm), stream, sums

    def _leave(self, y: Tensor, norm: RMSNorm | None) -> Tensor:
        """Normalise and scale what attention or feed-forward adds to the stream."""
        y = y if norm is None else norm(y)
        return y if self.residual_scale == 1 else y * self.residual_scale

    def _attend(
        self, added: Tensor, stream: Tensor | None, sequences: Sequences
    ) -> tuple[Tensor, Tensor]:
        mixer = self.attention
        if not self.recompute.operators & {"norm", "attention"}:
            h, stream = _enter(self.attention_norm, added, stream)
            return mixer(h, sequences), stream
        run = self.recompute.run
        parts, stream = run("norm", self._into_attention, added, stream, sequences)
        return mixer.out(run("attention", mixer.mix, *parts, sequences)), stream

    def _feed(self, added: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        if "feed_forward" in self.recompute.operators:
            return self.recompute.run("feed_forward", self._gated, added, stream)
        if "norm" not in self.recompute.operators:
            return self._gated(added, stream)
        assert isinstance(self.feed_forward, FeedForward)
        gate_up, stream = self.recompute.run("norm", self._into_feed_forward, added, stream)
        return self.feed_forward.leave(gate_up), stream

    def _into_attention(
        self, added: Tensor, stream: Tensor | None, sequences: Sequences
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        h, stream = _enter(self.attention_norm, added, stream)
        return self.attention.into(h, sequences), stream

    def _into_feed_forward(self, added: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.feed_forward, FeedForward)
        h, stream = _enter(self.feed_forward_norm, added, stream)
        return self.feed_forward.gate_up(h), stream

    def _gated(self, added: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        h, stream = _enter(self.feed_forward_norm, added, stream)
        return self.feed_forward(h), stream


def _enter(norm: RMSNorm | None, added: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add to the stream, and return it normalised and as it is."""
    if norm is not None:
        return norm.add(added, stream)
    total = added if stream is None else added + stream
    return total, total
