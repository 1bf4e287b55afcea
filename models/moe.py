"""The routed feed-forward block of a decoder: the layer of `parallel/expert`, by its sizes.

Source: Jiang et al. 2024, https://arxiv.org/abs/2401.04088, section 2.1 (experts in every block).
"""

from torch import Tensor

from warploom.parallel.collectives import place
from warploom.parallel.expert import MoE
from warploom.parallel.mesh import Mesh

from .architecture import Experts
from .sequences import Sequences


def routed_feed_forward(width: int, experts: Experts, *, mesh: Mesh | None) -> MoE:
    """Build the layer of experts of one block.

    Args:
        width: Model width D.
        experts: Sizes and routing.
        mesh: Groups of ranks; `None` for one rank.

    Raises:
        ValueError: If ep does not divide the experts, or etp their width.
    """
    return MoE(
        width, experts.hidden, experts.count, experts.top_k,
        group=None if mesh is None else mesh.ep, etp_group=None if mesh is None else mesh.etp,
        tp_group=None if mesh is None else mesh.tp, context_group=None if mesh is None else mesh.cp,
        score=experts.score, groups=experts.groups, top_groups=experts.top_groups,
        group_score=experts.group_score, normalise=experts.normalise, scale=experts.scale,
        bias=experts.bias_rate > 0 or experts.score == "sigmoid", shared=experts.shared or 0,
        balance="sequence" if experts.balance > 0 else None, z_loss=experts.router_z > 0,
        router_bias=experts.router_bias, shared_gate=experts.shared_gate, expert_bias=experts.bias,
        clamp=experts.clamp,
    )  # fmt: skip


def route_and_serve(
    layer: MoE, x: Tensor, sequences: Sequences
) -> tuple[Tensor, dict[str, Tensor]]:
    """Serve the tokens `[T/R, D]` of a block, and return the sums of the losses by name."""
    rank, size = place(layer.tp_group)
    documents = sequences.documents.chunk(size)[rank]
    y, sums = layer(x, documents, sequences.count)
    return y, sums
