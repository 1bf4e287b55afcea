"""The tokenizer in a GGUF file, as a tokenizer.json: byte-level BPE, cut as the file says.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "Tokenizer".
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from warploom.models.hf.files import write_json

_CONTROL, _USER = 3, 4  # kinds of tokens that are found in a text before it is cut
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS % digits), "isolated"), _bytes(False)]
    )


_CUTS: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "gpt-2": lambda: _bytes(True),
        "smollm": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), _bytes(True)]
        ),
        "llama-bpe": lambda: _split("{1,3}"),
        "qwen2": lambda: _split(""),
    }
)


def write_tokenizer(
    fields: Mapping[str, Any], path: Path, folder: Path, ids: Mapping[str, int]
) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
        fields: Of the GGUF file.
        path: Its name, for messages.
        folder: Where to.
        ids: `bos_token_id` and others.

    Raises:
        ValueError: If the tokenizer is of a kind that is not known here.
    """
    own = {n.removeprefix("tokenizer.ggml."): value for n, value in fields.items()}
    kind, cut = own.get("model"), own.get("pre", "gpt-2")
    if kind != "gpt2" or cut not in _CUTS:
        raise ValueError(
            f"{path} has a tokenizer of model {kind!r} that cuts as {cut!r}; known are 'gpt2' with "
            f"one of {', '.join(_CUTS)}: pass tokenizer, a folder with the tokenizer.json of this "
            "model"
        )
    tokens: list[str] = own["tokens"]
    merges = [tuple(pair.split(" ")) for pair in own["merges"]]
    made = Tokenizer(models.BPE({text: n for n, text in enumerate(tokens)}, merges))
    made.pre_tokenizer, made.decoder = _CUTS[cut](), decoders.ByteLevel()
    if cut == "qwen2":
        made.normalizer = normalizers.NFC()
    kinds = own.get("token_type") or [1] * len(tokens)
    made.add_tokens(
        [
            AddedToken(text, special=kind == _CONTROL, normalized=False)
            for text, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER)
        ]
    )
    if own.get("add_bos_token", cut == "llama-bpe"):
        bos = tokens[ids["bos_token_id"]]
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, ids["bos_token_id"])],
        )
    made.save(str(folder / "tokenizer.json"))
    named = {name.removesuffix("_id"): tokens[n] for name, n in ids.items()}
    if "unknown_token_id" in own:
        named["unk_token"] = tokens[own["unknown_token_id"]]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields[f"{fields['general.architecture']}.context_length"],
        **named,
    }
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", ids)
