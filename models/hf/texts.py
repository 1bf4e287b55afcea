"""What is in a folder beside tensors: config.json, the tokenizer, the settings of generation."""

import shutil
from pathlib import Path

from ..architecture import Architecture
from ..families import of_architecture, of_model_type
from .files import read_json, write_json

_TOKENIZER = ("*token*.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.*")


def architecture(folder: str | Path) -> Architecture:
    """Read the architecture of a folder's config.json.

    Raises:
        FileNotFoundError: If there is no config.json.
        ValueError: If no family has its `model_type`, a field is missing, or fields are there that
            cannot be honoured; all of them are named, with what they would change.
    """
    config = read_json(Path(folder) / "config.json")
    try:
        return of_model_type(str(config.get("model_type", ""))).architecture(config)
    except KeyError as error:
        raise ValueError(f"{folder}/config.json must have {error.args[0]!r}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/config.json: {error}") from None


def check_tokenizer(folder: Path, made: Architecture) -> None:
    """Compare the ids of a folder's tokenizer.json, where there is one, with the vocabulary.

    Raises:
        ValueError: If an id is outside of it.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    read, unused = read_json(path), of_architecture(made).unused
    try:
        known = read.get("model", {}).get("vocab") or {}
        ids = list(known.values()) if isinstance(known, dict) else [len(known) - 1]
        ids += [t["id"] for t in read.get("added_tokens", ()) if t["content"] not in unused]
        most = int(max(ids, default=-1))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must describe a tokenizer: {error!r}") from None
    if most >= made.vocabulary:
        raise ValueError(
            f"{path} has ids up to {most}, which must be below the vocabulary of the model "
            f"({made.vocabulary}): it is the tokenizer of another model, or the embedding was not "
            "made larger for its new tokens"
        )


def tokenizer_files(folder: Path) -> list[Path]:
    """List what of a folder belongs to its tokenizer."""
    return sorted({p for glob in _TOKENIZER for p in folder.glob(glob) if p.is_file()})


def special_ids(tokenizer: Path) -> dict[str, int]:
    """Return `bos_token_id` and `eos_token_id`, as far as a tokenizer's files name them."""
    config, vocabulary = tokenizer / "tokenizer_config.json", tokenizer / "tokenizer.json"
    if not (config.exists() and vocabulary.exists()):
        return {}
    added = {t["content"]: t["id"] for t in read_json(vocabulary).get("added_tokens", ())}
    named = read_json(config)
    said = {f"{key}_id": named.get(key) for key in ("bos_token", "eos_token")}
    texts = {key: t.get("content") if isinstance(t, dict) else t for key, t in said.items()}
    return {key: added[text] for key, text in texts.items() if text in added}


def copy_texts(source: Path, folder: Path) -> None:
    """Copy the tokenizer, its chat template and generation_config.json, as far as they are there.

    Without a generation_config.json, one is written that says the tokenizer's end of text.
    """
    for path in tokenizer_files(source):
        shutil.copyfile(path, folder / path.name)
    given, special = source / "generation_config.json", special_ids(source)
    if given.exists():
        shutil.copyfile(given, folder / given.name)
    elif "eos_token_id" in special:
        write_json(folder / given.name, special)
