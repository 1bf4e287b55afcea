"""A layer of experts: each token is served by k of E SwiGLU layers that are spread over ranks.

    y = sum over the chosen e of  weight_e expert_e(x)   (+ shared(x), or sigmoid(w x) shared(x))

R tp ranks, P ep ranks, S etp ranks, T tokens of the R ranks together:

                    weight                            input, output    communicates over
    router          [E, D] whole, gradient partial    [T/R, D]         nothing
    dispatch        -                                 -                ep, etp (`dispatch.py`)
    experts         [E/P 2F/S, D], [E/P D, F/S]       [M, D]           nothing
    shared          [2F'/R, D], [D, F'/R]             [T/R, D]         tp (`parallel/tensor`)
    shared gate     [1, D] whole, gradient partial    [T/R, D]         nothing
    losses          -                                 0-dim            tp, and cp for the counts
      not sequence  the same                          [T, D]           tp: own rows in, all out

Every rank of ep x etp brings other tokens. The gradient of an expert's weight is summed over the
ranks that hold the same part of it (`Layout.expert`, `mesh.edp`).

Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, section 2; Dai et al. 2024,
https://arxiv.org/abs/2401.06066, section 3.2 (shared experts).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warploom.kernels.invariant import sigmoid
from warploom.kernels.library import wide

from ..collectives import Group, join, place, reduce, split
from ..initialise import draw_seed, normal_
from ..sharding import Layout, whole
from ..tensor.linear import ColumnLinear, RowLinear
from ..tensor.product import linear, swiglu_linear
from .dispatch import apply_experts
from .experts import Experts
from .router import DROPS, Router, drop_beyond, load_balance, router_z

BALANCES = ("sequence", "batch")


class Shared(nn.Module):
    """The experts that serve every token: one SwiGLU layer over the tensor-parallel group.

    Args:
        width: Model width D.
        hidden: Hidden width of all shared experts together.
        group: The tensor-parallel process group; `None` for one rank.
        sequence_parallel: Whether the tokens are sharded over it.
    """

    def __init__(self, width: int, hidden: int, *, group: Group, sequence_parallel: bool) -> None:
        super().__init__()
        parts = {"gate": hidden, "up": hidden}
        self.gate_up = ColumnLinear(
            width, 2 * hidden, group=group, parts=parts, sequence_parallel=sequence_parallel
        )
        self.down = RowLinear(hidden, width, group=group, sequence_parallel=sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[T/R, D]` (or `[T, D]`) to the same."""
        y: Tensor = self.down(self.gate_up(x), product=swiglu_linear)
        return y


class SharedGate(nn.Module):
    """How much each token takes of the shared experts: the sigmoid of a product.

    Args:
        width: Model width D.
        group: The ranks whose tokens differ though their weights are the same.
    """

    def __init__(self, width: int, *, group: Group) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.empty(1, width))
        if not self.weight.is_meta:
            normal_(self.weight, self.declare_layouts()["weight"], seed=draw_seed(), std=0.02)

    def declare_layouts(self) -> dict[str, Layout]:
        """Declare the weight: whole on each rank, its gradient partial over the group."""
        return {"weight": whole("weight", self.weight.shape, partial=(self.group,))}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Weigh the shared experts' result `y` of tokens `x`, both `[T/R, D]`."""
        z = linear(x, self.weight)
        return y * sigmoid(z.to(wide(z.dtype))).to(y.dtype)


def _check_options(
    balance: str | None, capacity: float | None, drop: str, chunks: int, shared: int, gate: bool
) -> None:
    if balance is not None and balance not in BALANCES:
        raise ValueError(f"balance must be one of {', '.join(BALANCES)} or None, got {balance!r}")
    if capacity is not None and not 0 < capacity < float("inf"):
        raise ValueError(
            f"capacity must be above 0 and finite, or None for no limit; got {capacity}"
        )
    if drop not in DROPS:
        raise ValueError(f"drop must be one of {', '.join(DROPS)}, got {drop!r}")
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    if shared < gate:
        above = ", above 0 where they have a gate" if gate else ""
        raise ValueError(
            f"shared must be the hidden width of the shared experts{above}, got {shared}"
        )


class MoE(nn.Module):
    """Mixture of experts, spread over an expert-parallel and an expert-tensor-parallel group.

    Its parts are `router`, `experts` and, where there are any, `shared`; the logical tensors are
    `router.weight`, `experts.<e>.gate.weight`, `.up.weight`, `.down.weight`.

    Args:
        width: Model width D.
        hidden: Hidden width F of an expert.
        experts: Experts E.
        top_k: Experts a token, k.
        group: The expert-parallel process group; `None` for one rank.
        etp_group: The ranks that hold parts of the same experts; `None` for one.
        tp_group: The tensor-parallel process group, over which the tokens are sharded.
        context_group: The ranks that hold other parts of the same sequences (context parallel).
        sequence_parallel: Whether tokens come sharded over `tp_group`; else all of its ranks bring
            the same tokens, and each routes its share.
        score: `softmax`, `sigmoid` or `softmax_after` the choice.
        groups: Groups of neighbouring experts.
        top_groups: How many of the groups are open to a token.
        group_score: What the groups are chosen by, `top2` or `max`; see `kernels/moe`.
        normalise: Whether the weights of a token sum to `scale`.
        scale: Factor on the weights.
        bias: Whether a bias that `update_biases` moves takes part in the choice.
        shared: Hidden width of the shared experts together; 0 for none.
        balance: Load-balance loss: `sequence`, `batch` (not invariant) or None.
        z_loss: Whether the router's z-loss is returned.
        capacity: Most tokens that an expert takes from a rank, as a multiple of an even share
            (not invariant: what is dropped depends on the split); None drops nothing.
        drop: Which stay: those of the first tokens (`position`) or the largest weights
            (`probability`).
        chunks: Into how many the tokens are cut, so that dispatch and computation overlap.
        router_dtype: Of the router's product; None takes that of the tokens.
        router_bias: Whether the router's product has a bias that is learned, `router.linear_bias`.
        shared_gate: Whether the shared experts are weighted token by token, `shared_gate.weight`.
        expert_bias: Whether the experts' products have biases.
        clamp: Where the experts' gate and up are cut off; see `Experts`.

    Attributes:
        invariant: Whether outputs and losses do not depend on how the global batch is split.

    Raises:
        ValueError: If the groups do not divide the experts or their hidden width, this rank is not
            in one of them, such a routing cannot be, or another value is out of range.
    """

    def __init__(
        self, width: int, hidden: int, experts: int, top_k: int, *, group: Group,
        etp_group: Group = None, tp_group: Group = None, context_group: Group = None,
        sequence_parallel: bool = True, score: str = "softmax", groups: int = 1,
        top_groups: int = 1, group_score: str = "top2", normalise: bool = True,
        scale: float = 1.0, bias: bool = False,
        shared: int = 0, balance: str | None = None, z_loss: bool = False,
        capacity: float | None = None, drop: str = "position", chunks: int = 1,
        router_dtype: torch.dtype | None = None, router_bias: bool = False,
        shared_gate: bool = False, expert_bias: bool = False, clamp: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_options(balance, capacity, drop, chunks, shared, shared_gate)
        for tokens in (tp_group, context_group):
            place(tokens)
        self.width, self.count = width, experts
        self.group, self.etp_group = group, etp_group
        self.tp_group, self.context_group = tp_group, context_group
        self.divided = None if sequence_parallel else tp_group
        self.balance, self.z_loss = balance, z_loss
        self.capacity, self.drop, self.chunks = capacity, drop, chunks
        self.invariant = capacity is None and balance != "batch"
        self.router = Router(
            width, experts, top_k, tp_group=tp_group, score=score, groups=groups,
            top_groups=top_groups, group_score=group_score, normalise=normalise, scale=scale,
            bias=bias, dtype=router_dtype, linear_bias=router_bias,
        )  # fmt: skip
        self.experts = Experts(
            width, hidden, experts, group=group, etp_group=etp_group, bias=expert_bias, clamp=clamp
        )
        self.shared = (
            Shared(width, shared, group=tp_group, sequence_parallel=sequence_parallel)
            if shared
            else None
        )
        different = tp_group if sequence_parallel else None
        self.shared_gate = SharedGate(width, group=different) if shared_gate else None

    def forward(
        self, x: Tensor, documents: Tensor | None = None, count: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Serve tokens by their experts.

        A collective call over all groups, for ranks without tokens too.

        Args:
            x: This rank's tokens `[T, D]`.
            documents: The document of each token `[T]` int64, from 0 to `count` - 1, numbered alike
                on the ranks of `tp_group` and `context_group`; -1 is padding, which no expert
                serves. None makes all tokens of these ranks one document.
            count: How many documents there are.

        Returns:
            y `[T, D]`, and the sums of the losses that were asked for by name, 0-dim, equal on
            all ranks of `tp_group`, to be summed over all ranks that see other tokens:
            `load_balance` (its count: documents; for `batch`, 1 a micro-batch) and `router_z`
            (tokens).

        Raises:
            ValueError: If a shape does not fit.
        """
        if x.dim() != 2 or x.shape[1] != self.width:
            raise ValueError(f"MoE: x must be [tokens, {self.width}], got {[*x.shape]}")
        if count < 1 or (documents is not None and documents.shape != x.shape[:1]):
            found = None if documents is None else [*documents.shape]
            raise ValueError(
                f"MoE: documents must be [{len(x)}] and count at least 1, got {found} and {count}"
            )
        own = x
        if self.divided is not None:
            padding = -len(x) % self.divided.size()
            if padding and documents is None:
                documents = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            own = split(F.pad(x, (0, 0, 0, padding)), self.divided)
            if documents is not None:
                ranks, rank = self.divided.size(), self.divided.rank()
                documents = F.pad(documents, (0, padding), value=-1).chunk(ranks)[rank]
        served, losses = self._serve(own, x, documents, count)
        y = join(served[0], self.divided)[: len(x)] if self.divided is not None else served[0]
        return sum(served[1:], y), losses

    def _serve(
        self, x: Tensor, whole: Tensor, documents: Tensor | None, count: int
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the experts' and the shared experts' results, and the losses.

        Args:
            x: Tokens to route.
            whole: Tokens for the shared experts.
            documents: Of the tokens to route.
            count: How many documents there are.
        """
        valid = None if documents is None else documents >= 0
        routed = self.router(x, valid)
        indices = routed.indices
        if self.capacity is not None:
            tokens = torch.tensor(len(x)) if valid is None else valid.sum()
            limit = torch.ceil(tokens.double() * self.router.top_k * self.capacity / self.count)
            limit = limit.to(x.device)
            indices = drop_beyond(indices, routed.weights, self.count, limit, self.drop)
        results: list[Tensor] = []

        def serve_all() -> None:
            if self.shared is not None:
                y = self.shared(whole)
                results.append(y if self.shared_gate is None else self.shared_gate(whole, y))

        y = apply_experts(
            x, routed.weights, indices, self.count, self.experts, group=self.group,
            etp_group=self.etp_group, chunks=self.chunks, meanwhile=serve_all,
        )  # fmt: skip
        losses: dict[str, Tensor] = {}
        if self.balance is not None:
            if documents is None:
                documents = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            elif self.balance == "batch":
                documents, count = documents.clamp(max=0), 1
            losses["load_balance"] = load_balance(
                routed, documents, count, self.tp_group, self.context_group
            )
        if self.z_loss:
            losses["router_z"] = router_z(routed, valid)
        if losses:
            sums = reduce(torch.stack(list(losses.values())), self.tp_group)
            losses = dict(zip(losses, sums.unbind(), strict=True))
        return [y, *results], losses
