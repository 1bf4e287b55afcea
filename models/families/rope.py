"""Rotary positions in a config.json: the spellings of transformers 4 and 5, and all stretchings.

    transformers 5    "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    transformers 4    "rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}
    older             "rope_scaling": {"type": "linear", "factor": 2.0}

With windows, transformers 5 has such a dictionary for each kind of block, transformers 4 a
`rope_local_base_freq` for those with a window.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from warploom.kernels.rope import DynamicNtk, Linear, Llama3, NtkAware, Yarn

from ..architecture import Architecture, Scaling
from .fields import Config

_ORIGINAL = "original_max_position_embeddings"
_BETWEEN = MappingProxyType({"low_freq_factor": "low", "high_freq_factor": "high"})
_SAME = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
_SCALINGS: Mapping[str, tuple[type[Scaling], Mapping[str, str]]] = MappingProxyType(
    {
        "linear": (Linear, {"factor": "factor"}),
        "dynamic": (DynamicNtk, {"factor": "factor"}),
        "yarn": (Yarn, {"factor": "factor", _ORIGINAL: "original"} | {n: n for n in _SAME}),
        "llama3": (Llama3, {"factor": "factor", _ORIGINAL: "original", **_BETWEEN}),
    }
)


def read_rope(config: Config, rope: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Architecture` that describe rotary positions.

    Args:
        config: The fields; what is found but cannot be honoured is refused there.
        rope: As in `Family`.
        sizes: With `max_positions` and `head_dim`.
    """
    if not rope:
        return {}
    said = {name: config.get(name) for name in ("rope_parameters", "rope_scaling")}
    name = "rope_scaling" if said["rope_scaling"] else "rope_parameters"
    given = {**(said[name] or {})}
    found: dict[str, Any] = {"rope_base": float(config["rope_theta"])}
    if rope == "by_kind":
        local = config.get("rope_local_base_freq", 10_000.0)
        if "full_attention" in given:
            near, given = given.get("sliding_attention") or {}, {**given["full_attention"]}
            local = near.get("rope_theta", local)
            if near.get("rope_type", "default") != "default":
                config.refuse(f"{name}.sliding_attention", near, "blocks with a window stretched")
        found["sliding_rope_base"] = float(local)
    if (own := given.pop("rope_theta", None)) is not None:
        found["rope_base"] = float(own)
    field = "partial_rotary_factor"
    part = _first(given.pop(field, None), config.get(field), 1.0)
    if part != 1 and rope != "partial":
        config.refuse(field, part, "a part of each head would not rotate")
    elif part != 1:
        found["rope_dim"] = int(sizes["head_dim"] * part)
    found["rope_scaling"] = made = _read_scaling(config, name, given, sizes["max_positions"])
    if isinstance(made, DynamicNtk):  # config.json has the length before the stretching
        found["max_positions"] = int(made.factor * made.original)
    return found


def _read_scaling(config: Config, name: str, given: dict[str, Any], most: int) -> Scaling | None:
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if kind != "default" and kind not in _SCALINGS:
        config.refuse(f"{name}.rope_type", kind, "angles would be stretched in another way")
        return None
    made, names = _SCALINGS.get(kind, (None, {}))
    values = {ours: given.pop(theirs, None) for theirs, ours in names.items()}
    for field, value in given.items():
        if value is not None:
            config.refuse(f"{name}.{field}", value, f"no part of the type {kind!r}")
    if made is None:
        return None
    if "original" in values:  # beside the dictionary, as Phi has it, it comes first
        values["original"] = _first(config.get(_ORIGINAL), values["original"], most)
    elif made is DynamicNtk:
        values |= {"original": most, "length": most}
    if values["factor"] is None and made is Yarn:
        values["factor"] = most / max(values["original"], 1)  # Yarn refuses what is below
    if missing := [t for t, ours in names.items() if values[ours] is None and t not in _SAME]:
        raise KeyError(f"{name}.{missing[0]}")
    return made(**{ours: value for ours, value in values.items() if value is not None})


def _first(*values: Any) -> Any:
    """Return the first value that is there; 0 is."""
    return next(value for value in values if value is not None)


def write_rope(architecture: Architecture, rope: str) -> dict[str, Any]:
    """Return the fields of config.json for the same."""
    if not rope:
        return {}
    a = plain_rope(architecture)
    theta, scaling = {"rope_theta": a.rope_base}, a.rope_scaling
    kinds = {made: (kind, names) for kind, (made, names) in _SCALINGS.items()}
    kind, names = ("default", {}) if scaling is None else kinds[type(scaling)]
    values = {theirs: getattr(scaling, ours) for theirs, ours in names.items()}
    own = {
        "rope_type": kind,
        **{name: value for name, value in values.items() if value is not None},
    }
    old: dict[str, Any] = {**theta, **({"rope_scaling": own} if scaling is not None else {})}
    if isinstance(scaling, DynamicNtk):
        old["max_position_embeddings"] = scaling.original
    if rope == "partial":
        part = {"partial_rotary_factor": a.rotated / a.head_dim}
        old, own = {**old, **part}, {**own, **part}
    if rope == "by_kind" and a.sliding_rope_base is not None:
        near = {"rope_type": "default", "rope_theta": a.sliding_rope_base}
        nested = {"full_attention": {**own, **theta}, "sliding_attention": near}
        return {**old, "rope_local_base_freq": a.sliding_rope_base, "rope_parameters": nested}
    return {**old, "rope_parameters": {**own, **theta}}


def plain_rope(architecture: Architecture) -> Architecture:
    """Say NTK-aware scaling, which no config.json can, as the larger base that it is.

    The length of the dynamic one is left to the sequences.
    """
    a, scaling = architecture, architecture.rope_scaling
    if isinstance(scaling, DynamicNtk):
        return replace(a, rope_scaling=replace(scaling, length=scaling.original))
    if not isinstance(scaling, NtkAware):
        return a
    base = a.rope_base * scaling.factor ** (a.rotated / (a.rotated - 2))
    return replace(a, rope_base=base, rope_scaling=None)
