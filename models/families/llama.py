"""The Llama family: its sizes, its names at Hugging Face, and its config.json.

Source: Touvron et al. 2023, https://arxiv.org/abs/2307.09288, table 1; Grattafiori et al. 2024,
https://arxiv.org/abs/2407.21783, table 3 (release 3.0: rotary positions are not scaled); Allal et
al. 2025, https://arxiv.org/abs/2502.02737 (SmolLM2).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..architecture import Architecture

MODEL_TYPE = "llama"
CLASS_NAME = "LlamaForCausalLM"

_OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.qkv.q": "self_attn.q_proj",
    "attention.qkv.k": "self_attn.k_proj",
    "attention.qkv.v": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate_up.gate": "mlp.gate_proj",
    "feed_forward.gate_up.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}


def rename(name: str) -> str:
    """Map a logical name of `Decoder`, such as `blocks.0.attention.qkv.q.weight`, to the Hub's.

    Raises:
        KeyError: If `Decoder` has no such name.
    """
    if name in _OUTER:
        return _OUTER[name]
    _, layer, rest = name.split(".", 2)
    module, leaf = rest.rsplit(".", 1)
    return f"model.layers.{layer}.{_BLOCK[module]}.{leaf}"


def writes(architecture: Architecture) -> bool:
    """Say whether a config.json of this family can describe an architecture."""
    return architecture.experts is None and not architecture.qk_norm


def unsupported(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json whose values `Decoder` cannot honour."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    allowed: dict[str, tuple[Any, ...]] = {
        "hidden_act": (None, "silu", "swish"),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "attention_dropout": (None, 0, 0.0),
        "partial_rotary_factor": (None, 1, 1.0),
        "rope_interleaved": (None, False),
        "quantization_config": (None,),
        "use_sliding_window": (None, False),
    }
    found = {k: config[k] for k, values in allowed.items() if config.get(k) not in values}
    if rope_type != "default" or rope.get("partial_rotary_factor", 1) != 1:
        found["rope_parameters" if config.get("rope_parameters") else "rope_scaling"] = dict(rope)
    kinds = [kind for kind in config.get("layer_types") or () if kind != "full_attention"]
    return {**found, "layer_types": kinds} if kinds else found


def read(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture that a config.json describes; `KeyError` if a size is missing."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads = config["num_attention_heads"]
    return Architecture(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        hidden=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        max_positions=config.get("max_position_embeddings", 2048),
        rope_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", False),
    )


def write(architecture: Architecture) -> dict[str, Any]:
    """Return the fields of a config.json that transformers 4 and 5 both read."""
    a = architecture
    return {
        "architectures": [CLASS_NAME],
        "model_type": MODEL_TYPE,
        "num_hidden_layers": a.layers,
        "hidden_size": a.width,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "intermediate_size": a.hidden,
        "vocab_size": a.vocabulary,
        "max_position_embeddings": a.max_positions,
        "rope_theta": a.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": a.rope_base},
        "rms_norm_eps": a.norm_eps,
        "tie_word_embeddings": a.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _llama(
    layers: int, width: int, heads: int, kv_heads: int, hidden: int, **outer: Any
) -> Architecture:
    sizes: dict[str, Any] = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads}
    return Architecture(**sizes, **outer, head_dim=width // heads, hidden=hidden)


def tiny() -> Architecture:
    """Return a model of a tenth of a million parameters, for tests and for a first look."""
    return _llama(2, 64, 4, 2, 160, vocabulary=256, max_positions=512, tied=True)


def llama2_7b() -> Architecture:
    """Return Llama 2 7B: 6,738,415,616 parameters."""
    return _llama(32, 4096, 32, 32, 11008, vocabulary=32_000, max_positions=4096)


def llama3_8b() -> Architecture:
    """Return Llama 3 8B: 8,030,261,248 parameters."""
    outer = {"vocabulary": 128_256, "max_positions": 8192, "rope_base": 500_000.0}
    return _llama(32, 4096, 32, 8, 14336, **outer)


def llama3_70b() -> Architecture:
    """Return Llama 3 70B: 70,553,706,496 parameters."""
    return replace(llama3_8b(), layers=80, width=8192, heads=64, hidden=28672)


def smollm2_135m() -> Architecture:
    """Return SmolLM2 135M: 134,515,008 parameters, tied embeddings."""
    outer = {"vocabulary": 49_152, "max_positions": 8192, "rope_base": 100_000.0}
    return _llama(30, 576, 9, 3, 1536, **outer, tied=True)
