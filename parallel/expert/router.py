"""The router: which experts serve a token, the losses that balance them, the bias that does.

    load balance   sum over documents of  E / (k n^2)  sum over experts of  counts_e P_e

n tokens of the document, counts_e how often they chose expert e, P_e the sum of their probabilities
of e; the counts have no gradient. A document that is served evenly gives 1; the term's count is the
number of documents. n and counts are summed over all ranks that hold a part of the document (tensor
and context), so that no split of the tokens changes the sum of what the ranks return.

    router z       sum over tokens of  lse(logits)^2                    count: tokens
    bias           += rate sign(mean(load) - load)                      once a step, load over all

The batch-wise balance takes all tokens of a micro-batch as one document: it depends on how the
global batch is cut, and so does a capacity, which is a number of tokens a rank.

Source: Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equations 4 to 6 (load balance);
DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437, equations 17 to 20 (a sequence) and section
2.1.2; Zoph et al. 2022, https://arxiv.org/abs/2202.08906, equation 5 (z); Wang et al. 2024,
https://arxiv.org/abs/2408.15664, algorithm 1 (bias).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from warploom.kernels.library import wide
from warploom.kernels.moe import check_routing, route

from ..checkpoint import Entry
from ..collectives import Group, all_reduce_
from ..initialise import draw_seed, normal_
from ..memory import remembered
from ..sharding import Layout, whole
from ..tensor.product import linear
from .replay import in_backward, record, replayed

DROPS = ("position", "probability")


def count_experts(indices: Tensor, experts: int) -> Tensor:
    """Count how often each expert is chosen `[E]` int64; -1 is none."""
    flat = indices.flatten()
    return torch.bincount(torch.where(flat < 0, experts, flat), minlength=experts + 1)[:experts]


def drop_beyond(
    indices: Tensor, weights: Tensor, experts: int, limit: Tensor | int, by: str
) -> Tensor:
    """Give up choices of an expert beyond `limit`.

    Args:
        indices: `[T, k]` int64; -1 is none.
        weights: `[T, k]`.
        experts: How many there are.
        limit: Tokens that an expert takes.
        by: Which stay: those of the first tokens (`position`), or of the largest weights
            (`probability`; of equal ones the first).

    Returns:
        `[T, k]`, -1 where a choice is given up.
    """
    flat = indices.flatten()
    expert = torch.where(flat < 0, experts, flat)
    preferred = torch.arange(len(flat), device=flat.device)
    if by == "probability":
        preferred = weights.detach().flatten().argsort(descending=True, stable=True)
    order = preferred[expert[preferred].argsort(stable=True)]
    counts = torch.bincount(expert, minlength=experts + 1)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(order)
    place[order] = torch.arange(len(flat), device=flat.device) - first[expert[order]]
    return torch.where(place < limit, flat, -1).view_as(indices)


@dataclass(frozen=True, slots=True)
class Routed:
    """What the router says of T tokens.

    Attributes:
        weights: `[T, k]`, with a gradient.
        indices: `[T, k]` int64; -1 for padding.
        probabilities: `[T, E]`, with a gradient.
        logits: `[T, E]`, with a gradient.
    """

    weights: Tensor
    indices: Tensor
    probabilities: Tensor
    logits: Tensor


class Router(nn.Module):
    """Linear scores of the experts, and the choice of k of them.

    The weight `[E, D]` is whole on every rank; a rank sees its own tokens, so that the gradient is
    partial over the tensor-parallel group; so is that of `linear_bias` `[E]`, which the product may
    have. The other bias, of the choice alone, and the load that it follows are buffers, the bias in
    float32 whatever the model's dtype is. The load counts the tokens of forward passes with
    gradients, once: not those of an evaluation, nor of a recomputation (whose first pass must keep
    gradients on, as torch's checkpoints do with `use_reentrant=False`).

    Args:
        width: Model width D.
        experts: Experts E.
        top_k: Experts a token, k.
        tp_group: The ranks whose tokens differ though their weights are the same.
        score: `softmax`, `sigmoid` or `softmax_after`; see `kernels/moe`.
        groups: Groups of neighbouring experts.
        top_groups: How many of the groups are open to a token.
        group_score: What the groups are chosen by, `top2` or `max`; see `kernels/moe`.
        normalise: Whether the weights of a token sum to `scale`.
        scale: Factor on the weights.
        bias: Whether a bias takes part in the choice; `update_biases` moves it.
        dtype: Of the product; None takes that of the tokens. The scores are in float32 at least.
        linear_bias: Whether the product has a bias that is learned.

    Raises:
        ValueError: If such a routing cannot be.
    """

    bias: Tensor | None
    load: Tensor | None

    def __init__(
        self, width: int, experts: int, top_k: int, *, tp_group: Group, score: str = "softmax",
        groups: int = 1, top_groups: int = 1, group_score: str = "top2", normalise: bool = True,
        scale: float = 1.0, bias: bool = False, dtype: torch.dtype | None = None,
        linear_bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_routing(experts, top_k, score, groups, top_groups, normalise, group_score)
        self.top_k, self.tp_group, self.dtype = top_k, tp_group, dtype
        self.way: dict[str, Any] = {"score": score, "groups": groups, "top_groups": top_groups}
        self.way |= {"group_score": group_score, "normalise": normalise, "scale": scale}
        self.forced = False
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.linear_bias = nn.Parameter(torch.zeros(experts)) if linear_bias else None
        self.register_buffer("bias", torch.zeros(experts) if bias else None)
        count = torch.zeros(experts, dtype=torch.int64)
        self.register_buffer("load", count if bias else None, persistent=False)
        if not self.weight.is_meta:
            normal_(self.weight, self.declare_layouts()["weight"], seed=draw_seed(), std=0.02)

    def declare_layouts(self) -> dict[str, Layout]:
        """Declare the parameters: whole on each rank, their gradients partial over the group."""
        own = self.named_parameters(recurse=False)
        return {name: whole(name, p.shape, partial=(self.tp_group,)) for name, p in own}

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "Router":
        """Move as modules do, but keep the bias in float32, and zero where it had no memory."""
        before = self.bias
        super()._apply(fn, recurse)
        if before is not None and self.bias is not None and self.load is not None:
            if before.is_meta and not self.bias.is_meta:
                before, self.load = torch.zeros_like(self.bias), torch.zeros_like(self.load)
            self.bias = before.to(device=self.bias.device, dtype=torch.float32)
        return self

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Routed:
        """Route tokens `[T, D]`; those that are not `valid` `[T]` go to no expert.

        Raises:
            RuntimeError: If a replayed layer runs again in a backward that does not remember it.
        """
        dtype = self.dtype or x.dtype
        bias = None if self.linear_bias is None else self.linear_bias.to(dtype)
        logits = linear(x.to(dtype), self.weight.to(dtype), bias)
        fresh: list[tuple[Tensor, Tensor, Tensor]] = []

        def choose() -> Tensor:
            chosen = self._replayed(len(x))
            fresh.append(route(logits, self.top_k, bias=self.bias, chosen=chosen, **self.way))
            indices = fresh[0][1]
            if valid is not None:
                indices = indices.masked_fill(~valid.unsqueeze(1), -1)
            if not in_backward():
                record(indices)
                if self.load is not None and torch.is_grad_enabled():
                    self.load += count_experts(indices, len(self.weight))
            return indices

        indices = remembered(choose)
        weights, _, probabilities = (
            fresh[0] if fresh else route(logits, self.top_k, chosen=indices, **self.way)
        )
        return Routed(weights, indices, probabilities, logits)

    def _replayed(self, tokens: int) -> Tensor | None:
        if not in_backward():
            chosen = replayed(tokens, self.top_k)
            self.forced = chosen is not None
            return chosen
        if self.forced:
            raise RuntimeError(
                f"a layer of {len(self.weight)} experts that was replayed ran again in the "
                f"backward, where its recorded experts are not known: recompute with "
                f"warploom.parallel.memory.Recompute"
            )
        return None


def load_balance(
    routed: Routed, documents: Tensor, count: int, tp_group: Group, context_group: Group
) -> Tensor:
    """Return this rank's part of the load-balance sum, 0-dim, with a gradient.

    Args:
        routed: Of this rank's tokens.
        documents: The document of each token `[T]` int64, numbered alike on all ranks that hold
            a part of it; -1 is padding.
        count: How many documents these ranks hold.
        tp_group: Ranks with other tokens of the same documents.
        context_group: Ranks with other tokens of the same documents.
    """
    experts, top_k = routed.probabilities.shape[1], routed.indices.shape[1]

    def counted() -> Tensor:
        """Count choices and, last, tokens of each document `[N, E + 1]`, over all ranks."""
        both = torch.cat([routed.indices, torch.full_like(documents, experts)[:, None]], 1)
        slots = documents.unsqueeze(1) * (experts + 1) + both
        slots = slots.masked_fill((documents.unsqueeze(1) < 0) | (both < 0), -1)
        table = count_experts(slots, count * (experts + 1)).view(count, experts + 1)
        return all_reduce_(all_reduce_(table, context_group), tp_group)

    table = remembered(counted).to(routed.probabilities.dtype)
    tokens = table[:, experts:].clamp(min=1)
    slope = table[:, :experts] * (experts / top_k) / tokens.square()
    part = slope.index_select(0, documents.clamp(min=0)).masked_fill(documents[:, None] < 0, 0.0)
    return (part * routed.probabilities).sum()


def router_z(routed: Routed, valid: Tensor | None) -> Tensor:
    """Return this rank's sum of the squared log-sum-exp of the logits, 0-dim, with a gradient."""
    z = routed.logits.to(wide(routed.logits.dtype)).logsumexp(1).square()
    return z.sum() if valid is None else z.masked_fill(~valid, 0.0).sum()


def _routers(model: nn.Module) -> list[tuple[str, Router, Tensor, Tensor]]:
    return [
        (path, module, module.bias, module.load)
        for path, module in model.named_modules()
        if isinstance(module, Router) and module.bias is not None and module.load is not None
    ]


@torch.no_grad()
def update_biases(model: nn.Module, rate: float, *groups: Group) -> None:
    """Move every bias of the model towards an even load, and forget the load; once a step.

    A collective call over the groups, one all-reduce each.

    Args:
        model: Any module that holds routers with a bias.
        rate: By how much each expert's bias moves; dimensionless, as the scores.
        groups: Ranks that saw other tokens: `mesh.tp` and `mesh.tokens`.
    """
    found = _routers(model)
    if not found:
        return
    loads = torch.cat([load for *_, load in found])
    for group in groups:
        all_reduce_(loads, group)
    for (_, _, bias, load), total in zip(
        found, loads.split([len(load) for *_, load in found]), strict=True
    ):
        # the sign of mean - load, in integers: E load compared with the sum is exact
        bias.add_(torch.sign(total.sum() - total * len(total)).to(bias.dtype), alpha=rate)
        load.zero_()


def bias_entries(model: nn.Module, rename: Callable[[str], str] | None = None) -> list[Entry]:
    """List the biases for a checkpoint, as `buffer/<path>.bias`.

    Args:
        model: Any module that holds routers.
        rename: From the name by module path to the name in the unsharded model.
    """
    rename = rename or (lambda name: name)
    return [
        Entry("buffer", bias, whole(rename(f"{path}.bias" if path else "bias"), bias.shape))
        for path, _, bias, _ in _routers(model)
    ]
