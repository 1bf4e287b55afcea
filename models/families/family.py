"""What a family of models is at the Hub: the fields of its config.json, the names of its tensors.

A family is tables, and two functions where tables do not suffice. A field that is in a config.json
and that nothing here asked for is refused by name: no field is ignored unless it is known to say
nothing about the model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from ..architecture import Architecture, Experts, Kind, Latent, StateSpace
from .fields import EXTRA, Config
from .rope import plain_rope, read_rope, write_rope
from .tensors import rename

__all__ = ["Config", "Family"]

_PARTS = MappingProxyType({"experts": Experts, "latent": Latent, "ssm": StateSpace})
_KINDS: Mapping[str, Kind] = MappingProxyType(
    {"full_attention": "full", "sliding_attention": "sliding"}
)
_DEFAULTS = MappingProxyType({"rope_theta": 10_000.0, "tie_word_embeddings": False})
_TRAINING = ("experts.balance", "experts.router_z", "experts.bias_rate", "predict_weight")
_SAYS_NOTHING = (
    *("_attn_implementation", "_name_or_path", "architectures", "auto_map", "bos_token_id"),
    *("cache_implementation", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label"),
    *("initializer_range", "is_llama_config", "label2id", "model_type", "output_attentions"),
    *("output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict"),
    *("task_specific_params", "tokenizer_class", "torch_dtype", "transformers.js_config"),
    *("transformers_version", "unk_token_id", "unsloth_version", "use_cache"),
)
_FIXED: Mapping[str, tuple[tuple[Any, ...], str]] = MappingProxyType(
    {
        "attention_dropout": ((0.0,), "attention would drop scores while training"),
        "quantization_config": ((None,), "the weights would be quantised"),
        "is_encoder_decoder": ((False,), "there would be an encoder"),
    }
)
_FP8 = MappingProxyType({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]})
Fixed = Mapping[str, tuple[tuple[Any, ...], str]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models at the Hub.

    Attributes:
        model_type: Of config.json.
        class_name: Of the class in `transformers`.
        fields: From a field of config.json to those of `Architecture` that it sets, apart by
            spaces; those of its parts are dotted, as `experts.count`. Null is absent.
        names: From logical names (whole ones, or without `.weight` and `.bias`) to the Hub's, a `*`
            for each number; see `tensors.py`.
        defaults: Values of absent fields, or functions of `Config`. No default: must be there.
        always: Fields of `Architecture` that config.json does not say, dotted as in `fields`.
        fixed: Fields of which only the given values are honoured, with what another would change.
            The first value is written; absent and null are honoured.
        ignored: Fields that say nothing about logits, beside those of every family.
        rope: How rotary positions are said: `whole` heads rotate, or also a part of them
            (`partial`); with another base where there is a window (`by_kind`); or not at all (``).
        read: Fields of `Architecture` that tables cannot say, dotted.
        write: Fields of config.json for the same.
        prefix: Of the Hub's names, where some folders lack it.
        skipped: Ends of the names of tensors that say nothing.
        quantised: Of `quantization_config`, what says that files are read as what they stand for;
            all but the method may be absent.
        unused: Tokens beyond the vocabulary, in tokenizers that other models share.
    """

    model_type: str
    class_name: str
    fields: Mapping[str, str]
    names: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    fixed: Fixed = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    rope: str = "whole"
    read: Callable[[Config], dict[str, Any]] = lambda config: {}
    write: Callable[[Architecture], dict[str, Any]] = lambda architecture: {}
    prefix: str = ""
    skipped: tuple[str, ...] = (".rotary_emb.inv_freq",)
    quantised: Mapping[str, Any] = field(default_factory=lambda: _FP8)
    unused: tuple[str, ...] = ()

    def rename(self, logical: str) -> str:
        """Map a logical name, such as `blocks.0.attention.qkv.q.weight`, to the Hub's.

        Raises:
            KeyError: If the family has no such tensor.
        """
        return rename(self.names, logical)

    @property
    def windowed(self) -> bool:
        """Whether config.json says which blocks have a window."""
        return "window" in self.fields.values()

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        """Return the architecture that a config.json describes.

        Raises:
            KeyError: If a field is missing.
            ValueError: If fields cannot be honoured; all are named, with what they would change.
        """
        said = {**self.quantised, "quant_method": None, **(config.get("quantization_config") or {})}
        if self.quantised.items() <= said.items():
            config = {**config, "quantization_config": None}
        given = Config(config, {**_DEFAULTS, **self.defaults})
        flat = dict(self.always)
        for name, paths in self.fields.items():
            flat |= dict.fromkeys(paths.split(), given[name])
        flat |= self._read_kinds(given, flat) | self.read(given)
        flat |= read_rope(given, self.rope, flat)
        for name, value in (config.get(EXTRA) or {}).items():
            if name not in _TRAINING:
                given.refuse(f"{EXTRA}.{name}", value, "it is no choice of the training")
            flat[name] = value
        for name, (values, would) in {**_FIXED, **self.fixed}.items():
            if given.get(name, values[0]) not in values:
                given.refuse(name, given.get(name), would)
        given.close({*_SAYS_NOTHING, *self.ignored})
        parts = {path.partition(".")[0] for path in flat if "." in path}
        for part in parts:
            own = {p.partition(".")[2]: flat.pop(p) for p in [*flat] if p.startswith(f"{part}.")}
            flat[part] = _PARTS[part](**own)
        return Architecture(**flat)

    def _read_kinds(self, given: Config, flat: Mapping[str, Any]) -> dict[str, Any]:
        kinds = given["layer_types"] if self.windowed else given.get("layer_types", ())
        known = _KINDS if self.windowed else ("full_attention",)
        if wrong := [kind for kind in kinds if kind not in known]:
            given.refuse("layer_types", wrong, "these blocks would mix tokens in another way")
            return {}
        if kinds and len(kinds) != (layers := flat["layers"]):
            given.refuse("layer_types", kinds, f"there are {layers} layers")
        kinds = _pattern([_KINDS[kind] for kind in kinds])
        if not self.windowed:
            return {}
        if "sliding" in kinds and "sliding_window" in given and not given.get("sliding_window"):
            given.refuse("sliding_window", None, "blocks that have a window would have none")
        return {"kinds": kinds, "window": flat["window"] if "sliding" in kinds else None}

    def config(self, architecture: Architecture) -> dict[str, Any]:
        """Return the fields of a config.json, which transformers 4 and 5 both read."""
        a = architecture
        fixed = {name: values[0] for name, (values, _) in {**_FIXED, **self.fixed}.items()}
        found = {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            **{name: value for name, value in fixed.items() if value is not None},
            **{name: _get(a, paths.split()[0]) for name, paths in self.fields.items()},
            **write_rope(a, self.rope),
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if self.windowed:
            names = {ours: theirs for theirs, ours in _KINDS.items()}
            found["layer_types"] = [names[a.kind(layer)] for layer in range(a.layers)]
        found |= self.write(a)
        again = self.architecture(found)
        training = {p: _get(a, p) for p in _TRAINING if _get(a, p) != _get(again, p)}
        if _get(a, "experts.bias_rate") and not _get(again, "experts.bias_rate"):
            del training["experts.bias_rate"]  # this family has no bias: the routing would change
        return found | ({EXTRA: training} if training else {})

    def has_other_parts(self, architecture: Architecture) -> list[str]:
        """Name the parts, such as `ssm`, that the family or the architecture has alone."""
        paths = " ".join([*self.fields.values(), *self.always]).split()
        parts = {path.partition(".")[0] for path in paths if "." in path}
        return [p for p in _PARTS if (p in parts) != (getattr(architecture, p) is not None)]

    def cannot_say(self, architecture: Architecture) -> list[str]:
        """Return what of an architecture config.json cannot describe, as `field=value`."""
        a, names = architecture, self.has_other_parts(architecture)
        if not names:
            ours, theirs = (_canonical(m) for m in (a, self.architecture(self.config(a))))
            fields = Architecture.__dataclass_fields__
            names = [name for name in fields if getattr(ours, name) != getattr(theirs, name)]
        return [f"{name}={getattr(a, name)!r}" for name in names]


def _get(architecture: Architecture, path: str) -> Any:
    part, _, rest = path.rpartition(".")
    return getattr(getattr(architecture, part) if part else architecture, rest, None)


def _pattern(kinds: list[Kind]) -> tuple[Kind, ...]:
    """Return the shortest beginning that repeated gives all kinds; none where all are full."""
    lengths = range(1, len(kinds) + 1)
    fits = (n for n in lengths if all(k == kinds[i % n] for i, k in enumerate(kinds)))
    found = tuple(kinds[: next(fits, 0)])
    return () if found == ("full",) else found


def _canonical(architecture: Architecture) -> Architecture:
    """Choose one of the architectures that compute the same."""
    a = plain_rope(architecture)
    kinds = _pattern([a.kind(layer) for layer in range(a.layers)])
    return replace(a, kinds=kinds) if kinds or a.window is None else a
