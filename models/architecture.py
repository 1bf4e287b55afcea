"""Sizes and choices of a decoder: what is known before anything is built."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

from warploom.kernels.rope import DynamicNtk, Linear, Llama3, NtkAware, Yarn

Kind = Literal["full", "sliding", "ssm"]
"""What mixes the tokens of a block: attention to all before, to a window of them, or a state."""
Scaling = Linear | NtkAware | DynamicNtk | Yarn | Llama3


_POSITIVE = (
    *("rope_base", "sliding_rope_base", "norm_eps", "attention_scale", "window", "mup_base"),
    *("embedding_scale", "residual_scale", "logit_scale"),
)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated kind; a bool is no number."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(x, get_args(kind)[0]) for x in value)
    if get_args(kind):
        return any(_fits(value, one) for one in get_args(kind))
    known = isinstance(value, int | float if kind is float else kind)
    return known and isinstance(value, bool) == (kind is bool)


def _check_sizes(sizes: Any, what: str) -> None:
    for f in fields(sizes):
        if not _fits(value := getattr(sizes, f.name), f.type):
            kind = f.type.__name__ if isinstance(f.type, type) else f.type
            raise ValueError(f"{f.name} of {what} must be {kind}; got {value!r}")
    sized = [f.name for f in fields(sizes) if f.type is int and f.default != 0]
    wrong = [name for name in sized if getattr(sizes, name) < 1]
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
        bias_rate: Step of the balancing bias after each optimizer step; 0 for no bias, or one that
            does not move where the score is `sigmoid`.
        group_score: How a group's experts make the score that it is chosen by: the `top2` added,
            or the `max`.
        shared_gate: Whether the shared experts' output is weighted by a sigmoid of the token.
        router_bias: Whether the router's product has a bias that is learned.
        bias: Whether the experts' products have biases.
        clamp: Where gate and up are cut off, for (up + 1) gate sigmoid(1.702 gate) instead of
            SwiGLU; `None` for SwiGLU.

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
    group_score: Literal["top2", "max"] = "top2"
    shared_gate: bool = False
    router_bias: bool = False
    bias: bool = False
    clamp: float | None = None

    def __post_init__(self) -> None:
        _check_sizes(self, "experts")
        if self.shared_gate and self.shared is None:
            raise ValueError(f"experts.shared must be given where it has a gate; got {self.shared}")
        if self.top_k > self.count:
            raise ValueError(
                f"top_k ({self.top_k}) must be at most the number of experts ({self.count})"
            )
        for name in ("balance", "router_z", "bias_rate"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"experts.{name} must be at least 0 and finite; got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Latent:
    """Attention whose keys and values come from one small vector a token (MLA).

    Attributes:
        keys: Width of the vector that keys and values are made from.
        queries: Width of the one that queries are made from; `None` makes them from the stream.
        rotated: Dimensions of a head that rotate; those of the key are shared by all heads. The
            others of `Architecture.head_dim` do not rotate.
        values: Dimensions of a head's value.

    Raises:
        ValueError: If a size is not positive.
    """

    keys: int
    queries: int | None
    rotated: int
    values: int

    def __post_init__(self) -> None:
        _check_sizes(self, "latent attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class StateSpace:
    """Blocks that mix tokens by a state (Mamba-2).

    Attributes:
        heads: Heads of the state.
        head_dim: Dimensions of a head.
        state: Dimensions N of the state of each.
        groups: Groups of heads that share what writes and reads their states.
        convolution: Tokens that the causal convolution sees.

    Raises:
        ValueError: If a size is not positive, or `groups` does not divide `heads`.
    """

    heads: int
    head_dim: int
    state: int
    groups: int = 1
    convolution: int = 4

    def __post_init__(self) -> None:
        _check_sizes(self, "a state-space block")
        if self.heads % self.groups:
            raise ValueError(
                f"ssm.heads ({self.heads}) must be divisible by ssm.groups ({self.groups})"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Sizes and choices of a decoder.

    Attributes:
        layers: Blocks L.
        width: Model width D.
        heads: Query heads H.
        kv_heads: Key/value heads G.
        head_dim: Head dimension K.
        hidden: Feed-forward width F.
        vocabulary: Vocabulary V.
        max_positions: Longest sequence.
        kinds: What mixes the tokens of each block, repeated until there are L; none for `full`.
        positions: `rotary`; `learned`, a vector a position that is added to the embedding; or
            `none`.
        rope_base: Base of the rotary frequencies.
        rope_scaling: How the angles are stretched; `None` leaves them.
        rope_dim: Dimensions of a head that rotate; `None` for all.
        sliding_rope_base: Base in blocks with a window, which are not stretched; `None` treats them
            as the others.
        norm: `rms`; `rms_plus_one`, whose scale is 1 + weight; or `layer`, with a bias.
        norm_at: Where a block normalises: `before` attention and feed-forward, `after`, or `both`.
        norm_eps: Epsilon of every norm.
        qk_norm: Whether queries and keys are normalised before the rotation: each `head`, or all
            heads together (`full`); `None` for not.
        activation: `swiglu`, `geglu`, or without a gate `gelu` or `relu2`; GELU is the tanh form.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether attention's output projection has one.
        mlp_bias: Whether the products of a dense feed-forward have one.
        attention_scale: Multiplies the scores; `None` for 1 / sqrt(K), with muP for 8 / K.
        window: Keys that a query of a `sliding` block sees, itself included.
        softcap: Bound c of the attention scores, c tanh(score / c); 0 for none.
        sinks: Whether each head has a learned score that takes its share of the softmax.
        embedding_scale: Multiplies the embedding's output.
        residual_scale: Multiplies what attention and feed-forward add to the stream.
        logit_scale: Multiplies the logits.
        logit_softcap: Bound of the logits, as `softcap`; 0 for none.
        tied: Whether the head uses the embedding's weight.
        experts: Mixture of experts instead of dense feed-forward blocks; `None` for a dense model.
        latent: Multi-head latent attention; `None` for grouped queries.
        ssm: Sizes of `ssm` blocks; `None` where there are none.
        predict: Further tokens that are predicted at each position while training, each by a block
            of its own.
        predict_weight: Weight of their loss, shared by all of them.
        mup_base: Width at which the maximal-update parametrisation changes nothing (see `mup.py`);
            `None` for the standard one.

    Raises:
        ValueError: If a size, base, scale or epsilon is not positive, `kv_heads` does not divide
            `heads`, rotated dimensions are odd or too few to be stretched, or choices contradict
            each other.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    max_positions: int
    kinds: tuple[Kind, ...] = ()
    positions: Literal["rotary", "learned", "none"] = "rotary"
    rope_base: float = 10_000.0
    rope_scaling: Scaling | None = None
    rope_dim: int | None = None
    sliding_rope_base: float | None = None
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    norm_at: Literal["before", "after", "both"] = "before"
    norm_eps: float = 1e-5
    qk_norm: Literal["head", "full"] | None = None
    activation: Literal["swiglu", "geglu", "gelu", "relu2"] = "swiglu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float | None = None
    window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    tied: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    ssm: StateSpace | None = None
    predict: int = 0
    predict_weight: float = 0.3
    mup_base: int | None = None

    def __post_init__(self) -> None:
        _check_sizes(self, "an architecture")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be divisible by kv_heads ({self.kv_heads})"
            )
        for name in _POSITIVE:
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite; got {value}")
        for name in ("softcap", "logit_softcap", "predict", "predict_weight"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite; got {value}")
        if self.rotated > self.head_dim:
            raise ValueError(
                f"the dimensions that rotate ({self.rotated}) must be at most head_dim "
                f"({self.head_dim})"
            )
        least = 4 if isinstance(self.rope_scaling, NtkAware | DynamicNtk) else 2
        if self.positions == "rotary" and (self.rotated % 2 or self.rotated < least):
            name = "head_dim" if self.rotated == self.head_dim else "rope_dim"
            scaled = f" and {type(self.rope_scaling).__name__}" if self.rope_scaling else ""
            raise ValueError(
                f"{name} must be even and at least {least} for rotary positions{scaled}; got "
                f"{self.rotated}"
            )
        if isinstance(self.rope_scaling, Yarn) and self.rope_base <= 1:
            raise ValueError(f"rope_base must be above 1 with Yarn; got {self.rope_base}")
        for kind, field in (("sliding", "window"), ("ssm", "ssm")):
            if (kind in self.kinds) != (getattr(self, field) is not None):
                raise ValueError(
                    f"kinds {self.kinds} and {field} ({getattr(self, field)}) contradict each "
                    f"other: {field} is given where some blocks are {kind}, and only there"
                )

    @property
    def multiple(self) -> float:
        """How many times wider this is than where muP changes nothing; 1 without muP."""
        return self.width / (self.mup_base or self.width)

    @property
    def rotated(self) -> int:
        """Dimensions of a head that rotate."""
        if self.latent is not None:
            return self.latent.rotated
        return self.head_dim if self.rope_dim is None else self.rope_dim

    def kind(self, layer: int) -> Kind:
        """Return what mixes the tokens of a layer."""
        return self.kinds[layer % len(self.kinds)] if self.kinds else "full"

    def routed(self, layer: int) -> Experts | None:
        """Return the experts of a layer; `None` where its feed-forward block is dense."""
        dense = 0 if self.experts is None else self.experts.dense_layers or 0
        return None if layer < dense else self.experts
