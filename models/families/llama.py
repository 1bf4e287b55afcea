"""The Llama family: its sizes, its names at Hugging Face, and its config.json.

Source: Touvron et al. 2023, https://arxiv.org/abs/2307.09288, table 1; Grattafiori et al. 2024,
https://arxiv.org/abs/2407.21783, table 3 (releases 3.1 to 3.3 stretch rotary positions); Allal et
al. 2025, https://arxiv.org/abs/2502.02737 (SmolLM2).
"""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from warploom.kernels.rope import Llama3

from ..architecture import Architecture
from .family import Family

SILU = MappingProxyType(
    {"hidden_act": (("silu", "swish"), "the feed-forward would use another activation")}
)
FIELDS = MappingProxyType(
    {
        "num_hidden_layers": "layers",
        "hidden_size": "width",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "head_dim": "head_dim",
        "intermediate_size": "hidden",
        "vocab_size": "vocabulary",
        "max_position_embeddings": "max_positions",
        "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tied",
    }
)
DEFAULTS = MappingProxyType(
    {
        "num_key_value_heads": lambda config: config["num_attention_heads"],
        "head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
    }
)
NAMES = MappingProxyType(
    {
        "embedding": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "blocks.*.attention_norm": "model.layers.*.input_layernorm",
        "blocks.*.attention.qkv.q": "model.layers.*.self_attn.q_proj",
        "blocks.*.attention.qkv.k": "model.layers.*.self_attn.k_proj",
        "blocks.*.attention.qkv.v": "model.layers.*.self_attn.v_proj",
        "blocks.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
        "blocks.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
        "blocks.*.attention.out": "model.layers.*.self_attn.o_proj",
        "blocks.*.feed_forward_norm": "model.layers.*.post_attention_layernorm",
        "blocks.*.feed_forward.gate_up.gate": "model.layers.*.mlp.gate_proj",
        "blocks.*.feed_forward.gate_up.up": "model.layers.*.mlp.up_proj",
        "blocks.*.feed_forward.down": "model.layers.*.mlp.down_proj",
    }
)

FAMILY = Family(
    model_type="llama", class_name="LlamaForCausalLM",
    fields={**FIELDS, "attention_bias": "qkv_bias out_bias", "mlp_bias": "mlp_bias"}, names=NAMES,
    defaults=DEFAULTS,
    fixed={**SILU, "rope_interleaved": ((None, False), "neighbours would rotate together")},
)  # fmt: skip


def sized(*sizes: int, **others: Any) -> Architecture:
    """Return an architecture of five sizes; a head is as wide as there is room for."""
    given = dict(zip(("layers", "width", "heads", "kv_heads", "hidden"), sizes, strict=True))
    return Architecture(**{"head_dim": given["width"] // given["heads"], **given, **others})


def tiny() -> Architecture:
    """Return a model of a tenth of a million parameters, for tests and for a first look."""
    return sized(2, 64, 4, 2, 160, vocabulary=256, max_positions=512, tied=True)


def llama2_7b() -> Architecture:
    """Return Llama 2 7B: 6,738,415,616 parameters."""
    return sized(32, 4096, 32, 32, 11008, vocabulary=32_000, max_positions=4096)


def llama2_13b() -> Architecture:
    """Return Llama 2 13B: 13,015,864,320 parameters."""
    return sized(40, 5120, 40, 40, 13824, vocabulary=32_000, max_positions=4096)


def llama2_70b() -> Architecture:
    """Return Llama 2 70B: 68,976,648,192 parameters."""
    return sized(80, 8192, 64, 8, 28672, vocabulary=32_000, max_positions=4096)


def llama3_8b() -> Architecture:
    """Return Llama 3 8B: 8,030,261,248 parameters."""
    outer = {"vocabulary": 128_256, "max_positions": 8192, "rope_base": 500_000.0}
    return sized(32, 4096, 32, 8, 14336, **outer)


def llama3_70b() -> Architecture:
    """Return Llama 3 70B: 70,553,706,496 parameters."""
    return replace(llama3_8b(), layers=80, width=8192, heads=64, hidden=28672)


def _stretched(made: Architecture, factor: float) -> Architecture:
    scaling = Llama3(factor, low=1.0, high=4.0, original=8192)
    return replace(made, max_positions=131_072, rope_scaling=scaling)


def llama3_1_8b() -> Architecture:
    """Return Llama 3.1 8B: 8,030,261,248 parameters."""
    return _stretched(llama3_8b(), 8.0)


def llama3_1_70b() -> Architecture:
    """Return Llama 3.1 70B: 70,553,706,496 parameters."""
    return _stretched(llama3_70b(), 8.0)


def llama3_1_405b() -> Architecture:
    """Return Llama 3.1 405B: 405,853,388,800 parameters."""
    return replace(llama3_1_8b(), layers=126, width=16384, heads=128, hidden=53248)


def llama3_2_1b() -> Architecture:
    """Return Llama 3.2 1B: 1,235,814,400 parameters, tied embeddings."""
    sizes: dict[str, Any] = {"layers": 16, "width": 2048, "head_dim": 64, "hidden": 8192}
    return replace(_stretched(llama3_8b(), 32.0), **sizes, tied=True)


def llama3_2_3b() -> Architecture:
    """Return Llama 3.2 3B: 3,212,749,824 parameters, tied embeddings."""
    sizes: dict[str, Any] = {"layers": 28, "width": 3072, "heads": 24, "hidden": 8192}
    return replace(_stretched(llama3_8b(), 32.0), **sizes, tied=True)


def llama3_3_70b() -> Architecture:
    """Return Llama 3.3 70B: 70,553,706,496 parameters."""
    return llama3_1_70b()


def smollm2_135m() -> Architecture:
    """Return SmolLM2 135M: 134,515,008 parameters, tied embeddings."""
    outer = {"vocabulary": 49_152, "max_positions": 8192, "rope_base": 100_000.0}
    return sized(30, 576, 9, 3, 1536, **outer, tied=True)


def smollm2_360m() -> Architecture:
    """Return SmolLM2 360M: 361,821,120 parameters, tied embeddings."""
    return replace(smollm2_135m(), layers=32, width=960, heads=15, kv_heads=5, hidden=2560)


def smollm2_1_7b() -> Architecture:
    """Return SmolLM2 1.7B: 1,711,376,384 parameters, tied embeddings."""
    sizes: dict[str, Any] = {"width": 2048, "heads": 32, "kv_heads": 32, "hidden": 8192}
    return replace(smollm2_135m(), layers=24, **sizes, rope_base=130_000.0)
