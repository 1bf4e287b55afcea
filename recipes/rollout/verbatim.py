"""What people say stays text in a chat, where it spells a special token too.

Before a template is rendered, what messages spell is marked inside the spelling. What the rendered
text still spells is the template's own: it is written as no text can, for a twin of the tokenizer
that knows its special tokens by these spellings alone. Whatever the twin reads beside them, it
reads as the tokenizer would: normalised, merged and cut in the same way.
"""

import json
import re
import secrets
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as Backend


class Verbatim:
    """Marks what messages spell, and encodes the text that a template made of them.

    Args:
        backend: A tokenizer of the `tokenizers` library.
        named: Added tokens that are special beside those which it calls so itself.
    """

    def __init__(self, backend: Any, named: Collection[str | None] = ()) -> None:
        self._backend, secret = backend, secrets.randbits(64)  # nobody can say it
        self._mark = f"|{secret}|"  # which neither JSON nor another case spells in another way
        added = backend.get_added_tokens_decoder().values()
        found = (t.content for t in added if t.special or t.content in named)
        special = sorted(found, key=len, reverse=True)
        self._spelt = {name: f"|{secret}-{n}|" for n, name in enumerate(special)}
        names = "|".join(map(re.escape, special)) or "(?!)"
        self._begins = re.compile(f"(?=(?:{names}))(?s:.)")
        self._starts = frozenset(name[:n] for name in special for n in range(1, len(name)))
        self._longest = max(map(len, self._starts), default=0)
        self._whole = re.compile(f"(?:{names})(?!{re.escape(self._mark)})")

    def mark(self, given: Any) -> Any:
        """Return JSON values that spell no special token without a mark, alone or joined."""
        if isinstance(given, str):
            begun = any(given[-n:] in self._starts for n in range(1, 1 + self._longest))
            text = self._begins.sub(lambda found: found[0] + self._mark, given)
            return text + self._mark if begun else text
        if isinstance(given, Mapping):
            return {self.mark(name): self.mark(value) for name, value in given.items()}
        return [self.mark(value) for value in given] if isinstance(given, list) else given

    def unmark(self, text: str) -> str:
        """Return a text as it was meant."""
        return text.replace(self._mark, "")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text, special tokens where it spells them without a mark."""
        backend = self._backend
        if self._mark in text:
            text = self.unmark(self._whole.sub(lambda found: self._spelt[found[0]], text))
            backend = self._twin
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _twin(self) -> Any:
        """The tokenizer with other spellings of its special tokens, which it reaches by no other.

        Some vocabularies hold these tokens among the others, where merges, or a search for the
        likeliest pieces, would find them in plain text.
        """
        made, spelt = json.loads(self._backend.to_str()), self._spelt
        for token in made["added_tokens"]:
            token["content"] = spelt.get(token["content"], token["content"])
        model, merges = made["model"], made["model"].get("merges", ())
        pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
        kept = [p for p in pairs if not spelt.keys() & {*p, "".join(p)}]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {spelt.get(name, name): n for name, n in model["vocab"].items()}
        else:
            model["vocab"] = [[spelt.get(name, name), score] for name, score in model["vocab"]]
        model |= {"merges": kept} if merges else {}
        model |= {"unk_token": spelt.get(u, u)} if (u := model.get("unk_token")) else {}
        return Backend.from_str(json.dumps(made))
