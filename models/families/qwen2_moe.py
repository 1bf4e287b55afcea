"""The Qwen2-MoE family: many small experts, beside one that serves every token through a gate.

Queries, keys and values have biases. A token's weights are the softmax over all experts, and do not
sum to 1. The balancing loss is weighted as in `mixtral`.

Source: Yang et al. 2024, https://arxiv.org/abs/2407.10671, section 2.2.2 and table 1.
"""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ..architecture import Architecture, Experts
from . import llama, mixtral
from .family import Family

_SHARED = "model.layers.*.mlp.shared_expert"
FIELDS = MappingProxyType(
    {
        **llama.FIELDS,
        "num_experts": "experts.count",
        "num_experts_per_tok": "experts.top_k",
        "moe_intermediate_size": "experts.hidden",
        "norm_topk_prob": "experts.normalise",
    }
)
NAMES = MappingProxyType(
    {
        **llama.NAMES,
        "blocks.*.feed_forward.router": "model.layers.*.mlp.gate",
        **{
            f"blocks.*.feed_forward.experts.*.{part}": f"model.layers.*.mlp.experts.*.{part}_proj"
            for part in ("gate", "up", "down")
        },
    }
)
DEFAULTS = MappingProxyType(
    {
        **llama.DEFAULTS,
        **mixtral.BALANCE,
        "max_position_embeddings": 32_768,
        "norm_topk_prob": False,
        "num_experts": lambda config: config["num_local_experts"],  # as transformers 5 writes
    }
)
FIXED = MappingProxyType(
    {
        **llama.SILU,
        "decoder_sparse_step": ((1,), "some blocks would be dense"),
        "mlp_only_layers": (([],), "these blocks would be dense"),
        "use_sliding_window": ((False,), "blocks would have a window"),
    }
)
IGNORED = ("max_window_layers", "num_local_experts", "sliding_window")

FAMILY = Family(
    model_type="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    fields={**FIELDS, "qkv_bias": "qkv_bias", "shared_expert_intermediate_size": "experts.shared"},
    names={
        **NAMES,
        "blocks.*.feed_forward.shared.gate_up.gate": f"{_SHARED}.gate_proj",
        "blocks.*.feed_forward.shared.gate_up.up": f"{_SHARED}.up_proj",
        "blocks.*.feed_forward.shared.down": f"{_SHARED}.down_proj",
        "blocks.*.feed_forward.shared_gate": f"{_SHARED}_gate",
    },
    defaults={**DEFAULTS, "qkv_bias": True, "shared_expert_intermediate_size": 5632},
    always={"experts.shared_gate": True},
    fixed=FIXED,
    ignored=IGNORED,
    read=mixtral.read_balance,
    write=mixtral.write_balance,
)


def tiny() -> Architecture:
    """Return the tiny Llama with four experts, two of them for each token, and a shared one."""
    experts = Experts(count=4, top_k=2, hidden=48, shared=64, shared_gate=True, normalise=False)
    return replace(llama.tiny(), tied=False, qkv_bias=True, experts=experts)


def qwen1_5_moe_a2_7b() -> Architecture:
    """Return Qwen1.5-MoE A2.7B: 14,315,784,192 parameters, 2.7 billion of them for a token."""
    experts = Experts(
        count=60, top_k=4, hidden=1408, shared=5632, shared_gate=True, normalise=False
    )
    outer: dict[str, Any] = {"vocabulary": 151_936, "max_positions": 8192, "norm_eps": 1e-6}
    outer |= {"rope_base": 1e6, "qkv_bias": True, "experts": experts}
    return llama.sized(24, 2048, 16, 16, 5632, **outer)


def qwen2_57b_a14b() -> Architecture:
    """Return Qwen2 57B-A14B: 57,408,658,944 parameters, 14.2 billion of them for a token."""
    sizes: dict[str, Any] = {"layers": 28, "width": 3584, "heads": 28, "kv_heads": 4}
    experts = Experts(
        count=64, top_k=8, hidden=2560, shared=20_480, shared_gate=True, normalise=False
    )
    outer: dict[str, Any] = {"hidden": 18_944, "max_positions": 131_072, "experts": experts}
    return replace(qwen1_5_moe_a2_7b(), **sizes, **outer)
