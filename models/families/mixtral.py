"""The Mixtral family: a Llama whose feed-forward blocks are mixtures of experts.

A token's two experts are weighted by the softmax over their two logits. The balancing loss here is
per document and 1 when perfectly balanced, that of `transformers` per batch and `top_k`: the weight
`balance` is `router_aux_loss_coef` x `top_k`, where `output_router_logits` says that it is wanted.

Source: Jiang et al. 2024, https://arxiv.org/abs/2401.04088, table 1 and section 2.1.
"""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ..architecture import Architecture, Experts
from . import llama
from .family import Family
from .fields import Config

_EXPERT = "model.layers.*.block_sparse_moe.experts.*"


def read_balance(config: Config) -> dict[str, Any]:
    """Return the weight of the balancing loss, 0 where it is not wanted."""
    weight = config["router_aux_loss_coef"] * config["num_experts_per_tok"]
    return {"experts.balance": weight if config["output_router_logits"] else 0.0}


def write_balance(architecture: Architecture) -> dict[str, Any]:
    """Say the same in fields of config.json."""
    assert architecture.experts is not None
    balance, top_k = architecture.experts.balance, architecture.experts.top_k
    weight = {"router_aux_loss_coef": balance / top_k} if balance else {}
    return {"output_router_logits": balance > 0, **weight}


BALANCE = MappingProxyType({"router_aux_loss_coef": 0.001, "output_router_logits": False})
FAMILY = Family(
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    fields={
        **llama.FIELDS,
        "intermediate_size": "hidden experts.hidden",
        "num_local_experts": "experts.count",
        "num_experts_per_tok": "experts.top_k",
    },
    names={
        **llama.NAMES,
        "blocks.*.feed_forward.router": "model.layers.*.block_sparse_moe.gate",
        "blocks.*.feed_forward.experts.*.gate": f"{_EXPERT}.w1",
        "blocks.*.feed_forward.experts.*.up": f"{_EXPERT}.w3",
        "blocks.*.feed_forward.experts.*.down": f"{_EXPERT}.w2",
    },
    defaults={
        **llama.DEFAULTS,
        **BALANCE,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    always={"experts.score": "softmax_after"},
    fixed={
        **llama.SILU,
        "sliding_window": ((None,), "every block would have a window"),
        "router_jitter_noise": ((0.0,), "routers would see noise while training"),
    },
    read=read_balance,
    write=write_balance,
)


def tiny() -> Architecture:
    """Return the tiny Llama with four experts, two of them for each token."""
    experts = Experts(count=4, top_k=2, hidden=160, score="softmax_after", balance=0.02)
    return replace(llama.tiny(), tied=False, experts=experts)


def mixtral_8x7b() -> Architecture:
    """Return Mixtral 8x7B: 46,702,792,704 parameters, 12.9 billion of them for a token."""
    return Architecture(
        layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, hidden=14336, vocabulary=32_000,
        max_positions=32_768, rope_base=1e6,
        experts=Experts(count=8, top_k=2, hidden=14336, score="softmax_after", balance=0.02),
    )  # fmt: skip
