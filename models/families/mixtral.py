"""The Mixtral family: a Llama whose feed-forward blocks are mixtures of experts.

A token's two experts are weighted by the softmax over their two logits. The balancing loss here is
per document and 1 when perfectly balanced, that of `transformers` per batch and `top_k`: the weight
`balance` is `router_aux_loss_coef` x `top_k`, where `output_router_logits` says that it is wanted.

Source: Jiang et al. 2024, https://arxiv.org/abs/2401.04088, table 1 and section 2.1.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..architecture import Architecture, Experts
from . import llama

MODEL_TYPE = "mixtral"
CLASS_NAME = "MixtralForCausalLM"

_WEIGHTS = {"gate": "w1", "up": "w3", "down": "w2"}


def rename(name: str) -> str:
    """Map a logical name of `Decoder` to the Hub's.

    Raises:
        KeyError: If `Decoder` has no such name.
    """
    if ".feed_forward." not in name:
        return llama.rename(name)
    layer, _, inner = name.removeprefix("blocks.").partition(".feed_forward.")
    place = f"model.layers.{layer}.block_sparse_moe"
    if inner == "router.weight":
        return f"{place}.gate.weight"
    _, expert, weight, leaf = inner.split(".")
    return f"{place}.experts.{expert}.{_WEIGHTS[weight]}.{leaf}"


def writes(architecture: Architecture) -> bool:
    """Say whether a config.json of this family can describe an architecture."""
    a, experts = architecture, architecture.experts
    if experts is None or a.qk_norm:
        return False
    as_here = replace(
        Experts(count=experts.count, top_k=experts.top_k, hidden=a.hidden),
        score="softmax_after",
        balance=experts.balance,
    )
    return experts == as_here


def unsupported(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json whose values `Decoder` cannot honour."""
    found: dict[str, Any] = llama.unsupported(config)
    allowed: dict[str, tuple[Any, ...]] = {
        "sliding_window": (None,),
        "router_jitter_noise": (None, 0, 0.0),
    }
    more = {k: config[k] for k, values in allowed.items() if config.get(k) not in values}
    return found | more


def read(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture that a config.json describes.

    Raises:
        KeyError: If a size is missing.
    """
    defaults = {"num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
    given = {**defaults, **config}
    made = llama.read(given)
    wanted = given.get("output_router_logits", False)
    weight = given.get("router_aux_loss_coef", 0.001) * given["num_experts_per_tok"]
    experts = Experts(
        count=given["num_local_experts"],
        top_k=given["num_experts_per_tok"],
        hidden=given["intermediate_size"],
        score="softmax_after",
        balance=weight if wanted else 0.0,
    )
    return replace(made, experts=experts)


def write(architecture: Architecture) -> dict[str, Any]:
    """Return the fields of a config.json that transformers 4 and 5 both read."""
    experts = architecture.experts
    assert experts is not None
    fields = llama.write(architecture)
    del fields["attention_bias"], fields["mlp_bias"]
    routing = {"router_aux_loss_coef": experts.balance / experts.top_k} if experts.balance else {}
    return {
        **fields,
        "architectures": [CLASS_NAME],
        "model_type": MODEL_TYPE,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.top_k,
        "output_router_logits": experts.balance > 0,
        "sliding_window": None,
        **routing,
    }


def tiny() -> Architecture:
    """Return the tiny Llama with four experts, two of them for each token."""
    experts = Experts(count=4, top_k=2, hidden=160, score="softmax_after", balance=0.02)
    return replace(llama.tiny(), tied=False, experts=experts)


def mixtral_8x7b() -> Architecture:
    """Return Mixtral 8x7B: 46,702,792,704 parameters, 12.9 billion of them for a token."""
    return Architecture(
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        hidden=14336,
        vocabulary=32_000,
        max_positions=32_768,
        rope_base=1e6,
        experts=Experts(count=8, top_k=2, hidden=14336, score="softmax_after", balance=0.02),
    )
