"""The OLMo 2 family: a Llama that normalises what its blocks add, and all heads at once.

Source: OLMo Team 2025, https://arxiv.org/abs/2501.00656, section 2.1 and table 3.
"""

from dataclasses import replace
from typing import Any

from ..architecture import Architecture
from . import llama
from .family import Family

_PLAIN: dict[str, Any] = {"norm_at": "after", "qk_norm": "full"}
FAMILY = Family(
    model_type="olmo2",
    class_name="Olmo2ForCausalLM",
    fields={**llama.FIELDS, "attention_bias": "qkv_bias out_bias"},
    names={
        **llama.NAMES,
        "blocks.*.attention_post_norm": "model.layers.*.post_attention_layernorm",
        "blocks.*.feed_forward_post_norm": "model.layers.*.post_feedforward_layernorm",
    },
    defaults={**llama.DEFAULTS, "rms_norm_eps": 1e-5},
    always=_PLAIN,
    fixed=llama.SILU,
)


def tiny() -> Architecture:
    """Return the tiny Llama with OLMo 2's norms."""
    return replace(llama.tiny(), tied=False, **_PLAIN)


def _olmo2(*sizes: int) -> Architecture:
    outer = {"vocabulary": 100_352, "max_positions": 4096, "rope_base": 500_000.0, **_PLAIN}
    return llama.sized(*sizes, **outer, norm_eps=1e-6)


def olmo2_1b() -> Architecture:
    """Return OLMo 2 1B: 1,484,916,736 parameters."""
    return _olmo2(16, 2048, 16, 16, 8192)


def olmo2_7b() -> Architecture:
    """Return OLMo 2 7B: 7,298,617,344 parameters."""
    return _olmo2(32, 4096, 32, 32, 11008)


def olmo2_13b() -> Architecture:
    """Return OLMo 2 13B: 13,716,198,400 parameters."""
    return _olmo2(40, 5120, 40, 40, 13824)


def olmo2_32b() -> Architecture:
    """Return OLMo 2 32B: 32,234,279,936 parameters."""
    return _olmo2(64, 5120, 40, 8, 27648)
