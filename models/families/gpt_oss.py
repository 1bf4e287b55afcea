"""The gpt-oss family: experts with biases and a clamp, windows in every other block, sinks.

Positions are stretched by YaRN. The Hub stacks a layer's experts in one tensor, with the columns of
gate and up in turn; as published it is in MXFP4. The balancing loss is weighted as in `mixtral`.

Source: OpenAI 2025, https://arxiv.org/abs/2508.10925, section 2 and table 1.
"""

from typing import Any

from warploom.kernels.rope import Yarn

from ..architecture import Architecture, Experts
from . import llama, mixtral
from .family import Family
from .fields import Config

_OURS, _THEIRS = "blocks.*.feed_forward", "model.layers.*.mlp"


def _kinds(config: Config) -> list[str]:
    both = ["sliding_attention", "full_attention"] * config["num_hidden_layers"]
    return both[: config["num_hidden_layers"]]


def _write(architecture: Architecture) -> dict[str, Any]:
    """Say the loss; and a window even where no block has one, which transformers wants."""
    window = {"sliding_window": architecture.window or 128}
    return {**mixtral.write_balance(architecture), **window}


FAMILY = Family(
    model_type="gpt_oss",
    class_name="GptOssForCausalLM",
    fields={
        **llama.FIELDS,
        "attention_bias": "qkv_bias out_bias",
        "intermediate_size": "hidden experts.hidden",
        "num_local_experts": "experts.count",
        "num_experts_per_tok": "experts.top_k",
        "sliding_window": "window",
        "swiglu_limit": "experts.clamp",
    },
    names={
        **llama.NAMES,
        "blocks.*.attention.sinks": "model.layers.*.self_attn.sinks",
        f"{_OURS}.router": f"{_THEIRS}.router",
        f"{_OURS}.router.linear_bias": f"{_THEIRS}.router.bias",
        f"{_OURS}.experts.*.gate.weight": f"{_THEIRS}.experts.gate_up_proj[*, :, 0%2].T",
        f"{_OURS}.experts.*.up.weight": f"{_THEIRS}.experts.gate_up_proj[*, :, 1%2].T",
        f"{_OURS}.experts.*.down.weight": f"{_THEIRS}.experts.down_proj[*, :, :].T",
        f"{_OURS}.experts.*.gate.bias": f"{_THEIRS}.experts.gate_up_proj_bias[*, 0%2]",
        f"{_OURS}.experts.*.up.bias": f"{_THEIRS}.experts.gate_up_proj_bias[*, 1%2]",
        f"{_OURS}.experts.*.down.bias": f"{_THEIRS}.experts.down_proj_bias[*, :]",
    },
    defaults={
        **llama.DEFAULTS,
        **mixtral.BALANCE,
        "attention_bias": True,
        "layer_types": _kinds,
        "max_position_embeddings": 131_072,
        "num_experts_per_tok": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
    },
    always={
        "sinks": True,
        "experts.score": "softmax_after",
        "experts.router_bias": True,
        "experts.bias": True,
    },
    fixed={**llama.SILU, "swiglu_alpha": ((1.702,), "the experts' sigmoid would be another")},
    ignored=("experts_per_token", "initial_context_length"),  # what others say too
    quantised={"quant_method": "mxfp4"},
    read=mixtral.read_balance,
    write=_write,
)


def _gpt_oss(layers: int, count: int, top_k: int, yarn: Yarn, **sizes: Any) -> Architecture:
    experts = Experts(
        count=count, top_k=top_k, hidden=sizes["hidden"], score="softmax_after", router_bias=True,
        bias=True, clamp=7.0,
    )  # fmt: skip
    return Architecture(
        layers=layers, **sizes, kinds=("sliding", "full"), rope_base=150_000.0, rope_scaling=yarn,
        qkv_bias=True, out_bias=True, sinks=True, experts=experts,
    )  # fmt: skip


def tiny() -> Architecture:
    """Return a model of two blocks, four experts and a window of eight keys."""
    sizes = {"width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 48, "window": 8}
    yarn = Yarn(original=128, factor=4.0, truncate=False)
    return _gpt_oss(2, 4, 2, yarn, **sizes, vocabulary=256, max_positions=512)


def _published(layers: int, count: int) -> Architecture:
    sizes = {"width": 2880, "heads": 64, "kv_heads": 8, "head_dim": 64, "hidden": 2880}
    yarn = Yarn(original=4096, factor=32.0, truncate=False)
    outer = {"window": 128, "vocabulary": 201_088, "max_positions": 131_072}
    return _gpt_oss(layers, count, 4, yarn, **sizes, **outer)


def gpt_oss_20b() -> Architecture:
    """Return gpt-oss 20B: 20,914,757,184 parameters, 4.2 billion of them for a token."""
    return _published(24, 32)


def gpt_oss_120b() -> Architecture:
    """Return gpt-oss 120B: 116,829,156,672 parameters, 5.7 billion of them for a token."""
    return _published(36, 128)
