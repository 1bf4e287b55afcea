"""Byte-level BPE: text to ids and back, without loss.

Two views of one vocabulary: the plain one, which encodes and knows no special token, so that text
which spells `<|eos|>` stays text; and the one that is saved, which names the special tokens for
`transformers`. `Tokenizer.document` alone decides where BOS and EOS stand.

Source: byte-level alphabet and merges as in GPT-2 (Radford et al., 2019), section 2.2; encoded by
the `tokenizers` library.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from ..errors import UserError
from ..files import read_json

_ROLES = ("bos", "eos", "pad")


def byte_alphabet() -> dict[str, int]:
    """Return the 256 printable characters that stand for the bytes in a byte-level vocabulary."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in set(kept)]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(moved)}


class Tokenizer:
    """A byte-level BPE vocabulary with its special tokens.

    Args:
        specification: The content of a `tokenizer.json`.
        roles: The spelling of the `bos`, `eos` and `pad` tokens; `eos` must be there.
        name: What error messages call it.

    Raises:
        UserError: If the tokenizer is not byte-level BPE, if a role names no token of it, or if
            text can produce a special token.

    Attributes:
        vocabulary: Number of ids V, special tokens included.
        special: Ids of the special tokens by spelling.
        bos: Id that opens a document, or `None`.
        eos: Id that closes a document.
        pad: Id of padding, never `eos`, or `None` where the tokenizer has no such token.
        fingerprint: SHA-256 over everything that decides which ids a text gets.
    """

    def __init__(
        self, specification: dict[str, Any], roles: dict[str, str], *, name: str = "tokenizer"
    ) -> None:
        _check_kind(specification, name)
        self._specification = specification
        self._roles = {role: roles[role] for role in _ROLES if role in roles}
        self._plain = _plain(specification, name)
        added = specification["added_tokens"]
        self.special: dict[str, int] = {t["content"]: t["id"] for t in added if t["special"]}
        vocabulary = specification["model"]["vocab"]
        ids = {**vocabulary, **{t["content"]: t["id"] for t in added}}
        for role, spelling in self._roles.items():
            if spelling not in ids:
                raise UserError(f"{name}: the {role} token {spelling!r} is not in the vocabulary")
        if "eos" not in self._roles:
            raise UserError(f"{name} must name an eos token; its configuration names none")
        self.vocabulary: int = max(ids.values()) + 1
        self.eos: int = ids[self._roles["eos"]]
        self.bos: int | None = ids.get(self._roles.get("bos", ""))
        pad = ids.get(self._roles.get("pad", ""))
        self.pad: int | None = None if pad == self.eos else pad
        self.fingerprint: str = _fingerprint(specification, self._roles)
        self._bytes = _bytes_of_ids(self.vocabulary, vocabulary, added)
        _check_text_stays_text(self, name)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read a Hugging Face tokenizer folder.

        Args:
            folder: Holds `tokenizer.json` and `tokenizer_config.json` or `special_tokens_map.json`.

        Raises:
            UserError: If a file is missing or is not JSON, or the tokenizer is not byte-level BPE.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").exists():
            raise UserError(f"{folder} must hold tokenizer.json; there is none")
        specification = read_json(folder / "tokenizer.json")
        named = read_json(folder / "special_tokens_map.json", missing={})
        named |= read_json(folder / "tokenizer_config.json", missing={})
        roles = {}
        for role in _ROLES:
            token = named.get(f"{role}_token")
            spelling = token.get("content") if isinstance(token, dict) else token
            if spelling:
                roles[role] = str(spelling)
        return cls(specification, roles, name=str(folder))

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

        `transformers.AutoTokenizer` loads the folder; called on a text, it puts BOS before it, as
        the documents of training had it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        roles = {f"{role}_token": spelling for role, spelling in self._roles.items()}
        others = [s for s in self.special if s not in self._roles.values()]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
            **roles,
            "additional_special_tokens": others,
        }
        files = {
            "tokenizer.json": self._specification,
            "tokenizer_config.json": config,
            "special_tokens_map.json": {**roles, "additional_special_tokens": others},
        }
        for file, content in files.items():
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            (folder / file).write_text(text, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`: no BOS, no EOS, never a special token."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, encoded on all cores; else as `encode`."""
        encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [e.ids for e in encoded]

    def document(self, ids: Iterable[int]) -> list[int]:
        """Frame the ids of a text as a document: BOS (where there is one), the ids, EOS.

        Every token of the text is then the target of a position, the first one too. Nothing else
        in the library adds BOS or EOS.
        """
        return [*(() if self.bos is None else (self.bos,)), *ids, self.eos]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes that the ids stand for; special tokens stand for none.

        Raises:
            UserError: If an id is outside the vocabulary.
        """
        ids, table = list(ids), self._bytes
        if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise UserError(f"ids to decode must lie in 0 .. {self.vocabulary - 1}")
        return b"".join([table[i] for i in ids])

    def decode(self, ids: Iterable[int], *, show_special: bool = False) -> str:
        """Return the text of the ids; bytes that are not UTF-8 show as U+FFFD.

        Args:
            ids: Ids of the vocabulary.
            show_special: Spell special tokens instead of leaving them out.
        """
        if not show_special:
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        spellings = {i: s.encode() for s, i in self.special.items()}
        parts = [spellings.get(i) or self.decode_bytes([i]) for i in ids]
        return b"".join(parts).decode("utf-8", errors="replace")

    def byte_counts(self) -> np.ndarray:
        """Return how many bytes of text each id stands for: `[V]` int64, 0 for special tokens.

        The divisor of bits a byte: summed over the held-out targets it is the held-out text's size.
        """
        return np.array([len(b) for b in self._bytes], dtype=np.int64)


def _check_kind(specification: dict[str, Any], name: str) -> None:
    kind = (specification.get("model") or {}).get("type")
    step = specification.get("pre_tokenizer") or {}
    steps = [s.get("type") for s in step.get("pretokenizers", [step])]
    if kind != "BPE" or "ByteLevel" not in steps:
        raise UserError(
            f"{name} must be byte-level BPE, so that no text is lost; found model {kind} with "
            f"pre-tokenizers {steps}: train one with `train_bpe`, or take one of that kind"
        )


def _plain(specification: dict[str, Any], name: str) -> Backend:
    """Build the view that encodes: no special token, no BOS template, no truncation or padding."""
    kept = [t for t in specification["added_tokens"] if not t["special"]]
    stripped = {"added_tokens": kept, "post_processor": None, "truncation": None, "padding": None}
    plain = Backend.from_str(json.dumps({**specification, **stripped}))
    for token in kept:
        if plain.token_to_id(token["content"]) != token["id"]:
            raise UserError(
                f"{name}: added token {token['content']!r} has id {token['id']}, behind special "
                "tokens that text may not produce; mark it special, or give it an id before them"
            )
    return plain


def _bytes_of_ids(size: int, vocabulary: dict[str, int], added: list[Any]) -> list[bytes]:
    alphabet = byte_alphabet()
    table = [b""] * size
    for spelling, i in vocabulary.items():
        if all(c in alphabet for c in spelling):
            table[i] = bytes(alphabet[c] for c in spelling)
        else:
            table[i] = spelling.encode()
    for token in added:
        table[token["id"]] = b"" if token["special"] else token["content"].encode()
    return table


def _check_text_stays_text(tokenizer: Tokenizer, name: str) -> None:
    special = set(tokenizer.special.values())
    for spelling in tokenizer.special:
        if special & set(tokenizer.encode(f"a{spelling} {spelling}")):
            raise UserError(f"{name}: text that spells {spelling!r} would become a special token")


def _fingerprint(specification: dict[str, Any], roles: dict[str, str]) -> str:
    """Hash what decides the ids, however the file is formatted and whichever release wrote it."""
    model = specification["model"]
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    what = {
        "vocab": sorted(model["vocab"].items(), key=lambda item: int(item[1])),
        "merges": merges,
        "ignore_merges": model.get("ignore_merges", False),
        "normalizer": specification.get("normalizer"),
        "pre_tokenizer": specification["pre_tokenizer"],
        "added": [[t["content"], t["id"], t["special"]] for t in specification["added_tokens"]],
        "roles": roles,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
