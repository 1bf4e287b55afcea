"""Families of models: sizes, names at Hugging Face, and the reading and writing of config.json.

Each is a module with its `FAMILY` and one function a size.
"""

from ..architecture import Architecture

from . import bamba, deepseek_v2, deepseek_v3, gemma2, gemma3, gpt2, gpt_oss, llama  # isort: skip
from . import mixtral, olmo2, qwen2, qwen2_moe, qwen3, qwen3_moe  # isort: skip
from .family import Family

__all__ = ["Family", "of_architecture", "of_model_type"]

_DENSE = (llama, qwen2, qwen3, gpt2, gemma2, gemma3, olmo2, bamba)
_ROUTED = (mixtral, qwen2_moe, qwen3_moe, gpt_oss, deepseek_v2, deepseek_v3)
_FAMILIES: tuple[Family, ...] = tuple(module.FAMILY for module in (*_DENSE, *_ROUTED))


def of_model_type(model_type: str) -> Family:
    """Return the family whose config.json says `model_type`.

    Raises:
        ValueError: If no family here has that type.
    """
    known = {family.model_type: family for family in _FAMILIES}
    if model_type not in known:
        raise ValueError(f"model_type must be one of {', '.join(known)}; got {model_type!r}")
    return known[model_type]


def of_architecture(architecture: Architecture) -> Family:
    """Return the family under whose name a model of this architecture is saved.

    Raises:
        ValueError: If no family's config.json can describe it.
    """
    unsaid = {family.model_type: family.cannot_say(architecture) for family in _FAMILIES}
    other = {family.model_type: len(family.has_other_parts(architecture)) for family in _FAMILIES}
    nearest = min(unsaid, key=lambda name: (other[name], len(unsaid[name])))
    if unsaid[nearest]:
        raise ValueError(
            f"an architecture must be that of a family that is saved for transformers "
            f"({', '.join(unsaid)}); the nearest is {nearest}, whose config.json cannot say "
            f"{', '.join(unsaid[nearest])}"
        )
    return of_model_type(nearest)
