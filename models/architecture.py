"""Sizes of a decoder: what is known before anything is built."""

from dataclasses import dataclass, fields
from typing import Any, Literal


def _check_sizes(sizes: Any, what: str) -> None:
    wrong = [f.name for f in fields(sizes) if f.type is int and getattr(sizes, f.name) < 1]
    if wrong:
        found = ", ".join(f"{name}={getattr(sizes, name)}" for name in wrong)
        raise ValueError(f"sizes of {what} must be at least 1; got {found}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """Feed-forward blocks that are mixtures of experts.

    Attributes:
        count: Experts E of a layer.
        top_k: Experts of a token.
        hidden: Feed-forward width of one expert.
        shared: Feed-forward width of the experts that every token visits; `None` for none.
        dense_layers: First layers that keep a dense feed-forward block; `None` for none.
        score: How logits become weights: `softmax` over all experts, `sigmoid` of each, or
            `softmax_after`, over the chosen ones.
        groups: Groups of experts of which `top_groups` may be chosen from.
        top_groups: Groups that a token may visit.
        normalise: Whether the weights of a token's experts are made to sum to `scale`.
        scale: Multiplies the weights.
        balance: Weight of the load-balancing loss, defined per document.
        router_z: Weight of the routers' mean squared log-partition.
        bias_rate: Step of the balancing bias after each optimizer step; 0 for no bias.

    Raises:
        ValueError: If a size is not positive, or the routing is impossible.
    """

    count: int
    top_k: int
    hidden: int
    shared: int | None = None
    dense_layers: int | None = None
    score: Literal["softmax", "sigmoid", "softmax_after"] = "softmax"
    groups: int = 1
    top_groups: int = 1
    normalise: bool = True
    scale: float = 1.0
    balance: float = 0.0
    router_z: float = 0.0
    bias_rate: float = 0.0

    def __post_init__(self) -> None:
        _check_sizes(self, "experts")
        if self.top_k > self.count:
            raise ValueError(
                f"top_k ({self.top_k}) must be at most the number of experts ({self.count})"
            )
        for name in ("balance", "router_z", "bias_rate"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"experts.{name} must be at least 0 and finite; got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Sizes of a decoder.

    Attributes:
        layers: Blocks L.
        width: Model width D.
        heads: Query heads H.
        kv_heads: Key/value heads G.
        head_dim: Head dimension K.
        hidden: Feed-forward width F.
        vocabulary: Vocabulary V.
        max_positions: Longest sequence.
        rope_base: Base of the rotary frequencies.
        norm_eps: Epsilon of every norm.
        qk_norm: Whether each query and key head is normalised before its rotation.
        tied: Whether the head uses the embedding's weight.
        experts: Mixture of experts instead of dense feed-forward blocks; `None` for a dense model.

    Raises:
        ValueError: If a size, base or epsilon is not positive, `kv_heads` does not divide `heads`,
            or `head_dim` is odd.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    max_positions: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tied: bool = False
    experts: Experts | None = None

    def __post_init__(self) -> None:
        _check_sizes(self, "an architecture")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be divisible by kv_heads ({self.kv_heads})"
            )
        for name in ("rope_base", "norm_eps"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite; got {value}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions; got {self.head_dim}")

    def routed(self, layer: int) -> Experts | None:
        """Return the experts of a layer; `None` where its feed-forward block is dense."""
        dense = 0 if self.experts is None else self.experts.dense_layers or 0
        return None if layer < dense else self.experts
