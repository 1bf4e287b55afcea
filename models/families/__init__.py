"""Families of models: sizes, names at Hugging Face, and the reading and writing of config.json.

Each family is a module with `MODEL_TYPE`, `CLASS_NAME`, `rename`, `writes`, `unsupported`, `read`,
`write`, and one function a size.
"""

from types import ModuleType

from ..architecture import Architecture
from . import llama, mixtral, qwen3

_FAMILIES = (llama, qwen3, mixtral)


def of_model_type(model_type: str) -> ModuleType:
    """Return the family whose config.json says `model_type`.

    Raises:
        ValueError: If no family here has that type.
    """
    known = {family.MODEL_TYPE: family for family in _FAMILIES}
    if model_type not in known:
        raise ValueError(f"model_type must be one of {', '.join(known)}; got {model_type!r}")
    return known[model_type]


def of_architecture(architecture: Architecture) -> ModuleType:
    """Return the family under whose name a model of this architecture is saved.

    Raises:
        ValueError: If no family's config.json can describe it.
    """
    for family in _FAMILIES:
        if family.writes(architecture):
            return family
    raise ValueError(
        f"an architecture must be that of a family that is saved for transformers "
        f"({', '.join(family.MODEL_TYPE for family in _FAMILIES)}); none describes "
        f"qk_norm={architecture.qk_norm} with {architecture.experts}"
    )
