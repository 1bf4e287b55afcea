"""The DeepSeek-V2 family: latent attention, and experts in groups of which a token visits few.

A group is chosen by its best expert, and the weights of a token's experts do not sum to 1. Where
YaRN's `mscale_all_dim` is given, the scores are multiplied by its square. The weight of the
balancing loss, per sequence, is the `aux_loss_alpha` of the authors' code; `transformers` has none.

Source: DeepSeek-AI 2024, https://arxiv.org/abs/2405.04434, sections 2 and 3.1, appendix B.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from warploom.kernels.rope import Yarn

from ..architecture import Architecture, Experts, Latent
from . import llama
from .family import Family
from .fields import Config

_LAYER = "model.layers.*"
NAMES = MappingProxyType(
    {
        **{k: v for k, v in llama.NAMES.items() if ".qkv." not in k and ".k_norm" not in k},
        "blocks.*.attention.q": f"{_LAYER}.self_attn.q_proj",
        "blocks.*.attention.q_down": f"{_LAYER}.self_attn.q_a_proj",
        "blocks.*.attention.q_norm": f"{_LAYER}.self_attn.q_a_layernorm",
        "blocks.*.attention.q_up": f"{_LAYER}.self_attn.q_b_proj",
        "blocks.*.attention.kv_down": f"{_LAYER}.self_attn.kv_a_proj_with_mqa",
        "blocks.*.attention.kv_norm": f"{_LAYER}.self_attn.kv_a_layernorm",
        "blocks.*.attention.kv_up": f"{_LAYER}.self_attn.kv_b_proj",
        "blocks.*.feed_forward.router": f"{_LAYER}.mlp.gate",
        "blocks.*.feed_forward.router.bias": f"{_LAYER}.mlp.gate.e_score_correction_bias",
        "blocks.*.feed_forward.experts.*.gate": f"{_LAYER}.mlp.experts.*.gate_proj",
        "blocks.*.feed_forward.experts.*.up": f"{_LAYER}.mlp.experts.*.up_proj",
        "blocks.*.feed_forward.experts.*.down": f"{_LAYER}.mlp.experts.*.down_proj",
        "blocks.*.feed_forward.shared.gate_up.gate": f"{_LAYER}.mlp.shared_experts.gate_proj",
        "blocks.*.feed_forward.shared.gate_up.up": f"{_LAYER}.mlp.shared_experts.up_proj",
        "blocks.*.feed_forward.shared.down": f"{_LAYER}.mlp.shared_experts.down_proj",
    }
)
FIELDS = MappingProxyType(
    {
        **{k: v for k, v in llama.FIELDS.items() if k not in ("head_dim", "num_key_value_heads")},
        "num_attention_heads": "heads kv_heads",
        "q_lora_rank": "latent.queries",
        "kv_lora_rank": "latent.keys",
        "qk_rope_head_dim": "latent.rotated",
        "v_head_dim": "latent.values",
        "n_routed_experts": "experts.count",
        "num_experts_per_tok": "experts.top_k",
        "moe_intermediate_size": "experts.hidden",
        "routed_scaling_factor": "experts.scale",
        "first_k_dense_replace": "experts.dense_layers",
    }
)
DEFAULTS = MappingProxyType(
    {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "q_lora_rank": None,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
    }
)
FIXED = MappingProxyType(
    {
        **llama.SILU,
        "attention_bias": ((False,), "the projections of attention would have biases"),
        "moe_layer_freq": ((1,), "some blocks after the first would be dense"),
    }
)
IGNORED = ("ep_size", "head_dim", "output_router_logits", "qk_head_dim")


def score_scale(head_dim: int, rope: Mapping[str, Any]) -> float | None:
    """Return what scores are multiplied by; `None` for 1 / sqrt(head_dim)."""
    if not rope.get("mscale_all_dim"):
        return None
    size = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0
    return float(head_dim**-0.5 * size * size)


def read(config: Config) -> dict[str, Any]:
    """Return what tables cannot say of a head, of shared experts and of the balancing loss."""
    heads, alpha = config["num_attention_heads"], config.get("aux_loss_alpha", 0.0)
    if (found := config.get("num_key_value_heads", heads)) != heads:
        config.refuse("num_key_value_heads", found, f"each of {heads} heads has its own key")
    if not config.get("seq_aux", True) and alpha:
        config.refuse("seq_aux", False, "experts would be balanced over a batch, not a sequence")
    head_dim = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    shared = config.get("n_shared_experts", 0) * config["moe_intermediate_size"]
    return {
        "head_dim": head_dim,
        "attention_scale": score_scale(head_dim, rope),
        "experts.shared": shared or None,
        "experts.balance": alpha,
    }


def write(architecture: Architecture) -> dict[str, Any]:
    """Return the same as fields of config.json."""
    a, latent, experts = architecture, architecture.latent, architecture.experts
    assert latent is not None
    assert experts is not None
    return {
        "num_key_value_heads": a.kv_heads,
        "qk_nope_head_dim": a.head_dim - latent.rotated,
        "n_shared_experts": (experts.shared or 0) // experts.hidden,
        "aux_loss_alpha": experts.balance,
        "seq_aux": True,
    }


def _read(config: Config) -> dict[str, Any]:
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        config.refuse("topk_method", method, "experts would be chosen in another way")
    groups, top_groups = config.get("n_group", 1), config.get("topk_group", 1)
    if method == "greedy" or groups == 1:
        return read(config)
    names = {"groups": groups, "top_groups": top_groups, "group_score": "max"}
    return read(config) | {f"experts.{name}": value for name, value in names.items()}


def _write(architecture: Architecture) -> dict[str, Any]:
    experts = architecture.experts
    assert experts is not None
    return {
        **write(architecture),
        "topk_method": "greedy" if experts.groups == 1 else "group_limited_greedy",
        "n_group": experts.groups,
        "topk_group": experts.top_groups,
    }


FAMILY = Family(
    model_type="deepseek_v2",
    class_name="DeepseekV2ForCausalLM",
    fields=FIELDS,
    names=NAMES,
    defaults=DEFAULTS,
    always={"experts.score": "softmax", "experts.normalise": False},
    fixed={
        **FIXED,
        "mlp_bias": ((False,), "the products of feed-forwards would have biases"),
        "norm_topk_prob": ((False,), "the weights of a token's experts would sum to 1"),
        "scoring_func": (("softmax",), "logits would become weights in another way"),
    },
    ignored=IGNORED,
    read=_read,
    write=_write,
)


def with_yarn(architecture: Architecture, **scaling: Any) -> Architecture:
    """Stretch the rotary positions, and scale the scores accordingly."""
    scale = score_scale(architecture.head_dim, scaling)
    return replace(architecture, rope_scaling=Yarn(**scaling), attention_scale=scale)


def _deepseek(
    layers: int, width: int, heads: int, queries: int | None, hidden: int, experts: Experts
) -> Architecture:
    sizes: dict[str, Any] = {"layers": layers, "width": width, "heads": heads, "kv_heads": heads}
    latent = Latent(keys=512, queries=queries, rotated=64, values=128)
    outer: dict[str, Any] = {"vocabulary": 102_400, "max_positions": 163_840, "norm_eps": 1e-6}
    outer |= {"hidden": hidden, "head_dim": 192, "latent": latent, "experts": experts}
    made = Architecture(**sizes, **outer)
    return with_yarn(made, factor=40.0, original=4096, mscale=0.707, mscale_all_dim=0.707)


def tiny() -> Architecture:
    """Return two small blocks, the second of eight experts in four groups."""
    experts = Experts(
        count=8, top_k=2, hidden=24, shared=48, dense_layers=1, normalise=False, scale=4.0,
        groups=4, top_groups=2, group_score="max", balance=0.001,
    )  # fmt: skip
    latent = Latent(keys=24, queries=32, rotated=8, values=12)
    made = Architecture(
        layers=2, width=64, heads=4, kv_heads=4, head_dim=24, hidden=160, vocabulary=256,
        max_positions=512, norm_eps=1e-6, latent=latent, experts=experts,
    )  # fmt: skip
    return with_yarn(made, factor=8.0, original=64, mscale=0.707, mscale_all_dim=0.707)


def deepseek_v2() -> Architecture:
    """Return DeepSeek-V2: 235,741,434,880 parameters, 21 billion of them for a token."""
    experts = Experts(
        count=160, top_k=6, hidden=1536, shared=2 * 1536, dense_layers=1, normalise=False,
        scale=16.0, groups=8, top_groups=3, group_score="max", balance=0.001,
    )  # fmt: skip
    return _deepseek(60, 5120, 128, 1536, 12288, experts)


def deepseek_v2_lite() -> Architecture:
    """Return DeepSeek-V2-Lite: 15,706,484,224 parameters, 2.7 billion of them for a token."""
    experts = Experts(
        count=64, top_k=6, hidden=1408, shared=2 * 1408, dense_layers=1, normalise=False,
        balance=0.001,
    )  # fmt: skip
    return _deepseek(27, 2048, 16, None, 10944, experts)
