"""The Gemma 3 family (text): a Gemma 2 with norms of queries and keys for soft-caps.

Five blocks with a window, whose rotary positions have a base of their own and are not stretched,
and one without.

Source: Gemma Team 2025, https://arxiv.org/abs/2503.19786, section 2 and table 1.
"""

from dataclasses import replace
from typing import Any

from warploom.kernels.rope import Linear

from ..architecture import Architecture
from . import gemma2
from .family import Config, Family

_PLAIN: dict[str, Any] = {**gemma2.PLAIN, "qk_norm": "head"}
_PATTERN = "sliding_window_pattern"


def _kinds(config: Config) -> list[str]:
    return gemma2.alternate(config, config.get(f"_{_PATTERN}") or config.get(_PATTERN, 6))


FAMILY = Family(
    model_type="gemma3_text",
    class_name="Gemma3ForCausalLM",
    fields=gemma2.FIELDS,
    names=gemma2.NAMES,
    defaults={
        **gemma2.DEFAULTS,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "layer_types": _kinds,
    },
    always=_PLAIN,
    fixed={**gemma2.FIXED, "attn_logit_softcapping": ((None,), "scores would have a bound")},
    ignored=(f"_{_PATTERN}", _PATTERN),
    rope="by_kind",
    unused=("<image_soft_token>",),
    read=gemma2.read_scales,
    write=lambda architecture: gemma2.write_scales(replace(architecture, softcap=0.0)),
)


def _gemma3(*sizes: int, **outer: Any) -> Architecture:
    given: dict[str, Any] = {"vocabulary": 262_208, "max_positions": 131_072, "window": 1024}
    given |= {"rope_scaling": Linear(8.0), "rope_base": 1e6, "sliding_rope_base": 1e4, **outer}
    return gemma2.gemma(*sizes, **given, kinds=("sliding",) * 5 + ("full",), qk_norm="head")


def tiny() -> Architecture:
    """Return a Gemma 3 of a fifth of a million parameters, with a window of 16."""
    outer = {"head_dim": 16, "vocabulary": 256, "max_positions": 512, "window": 16}
    return _gemma3(6, 64, 4, 2, 128, **outer, attention_scale=0.25)


def gemma3_1b() -> Architecture:
    """Return Gemma 3 1B: 999,885,952 parameters, tied embeddings."""
    outer = {"vocabulary": 262_144, "max_positions": 32_768, "rope_scaling": None, "window": 512}
    return _gemma3(26, 1152, 4, 1, 6912, **outer)


def gemma3_4b() -> Architecture:
    """Return Gemma 3 4B without its vision: 3,880,263,168 parameters, tied embeddings."""
    return _gemma3(34, 2560, 8, 4, 10240)


def gemma3_12b() -> Architecture:
    """Return Gemma 3 12B without its vision: 11,766,034,176 parameters, tied embeddings."""
    return _gemma3(48, 3840, 16, 8, 15360)


def gemma3_27b() -> Architecture:
    """Return Gemma 3 27B without its vision: 27,009,346,304 parameters, tied embeddings."""
    return _gemma3(62, 5376, 32, 16, 21504, head_dim=128, attention_scale=168**-0.5)
