"""The tokenizer of a Hugging Face folder, and the ids that end its texts."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ..errors import UserError
from ..files import read_json
from .chat import Chat
from .verbatim import Verbatim


class Codec:
    """Text to ids and back, as the folder's `tokenizer.json` says.

    Args:
        folder: Holds `tokenizer.json`; `generation_config.json`, `config.json` and
            `tokenizer_config.json` are read where they are there.

    Raises:
        UserError: If there is no `tokenizer.json`, a file is not JSON, or an end of text is not in
            the vocabulary.

    Attributes:
        vocabulary: Number of ids, special tokens included.
        eos: Ids that end a text: those of `generation_config.json`, else of `config.json`, else the
            end of text of `tokenizer_config.json`.
        special: Spelling of each special token that `tokenizer_config.json` names, by its role.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not self.folder.is_dir():
            remedy = "fetch it first"
            if self.folder.is_file():
                remedy = "this is a file; `warploom convert` makes a folder of GGUF"
            raise UserError(f"{self.folder} must be a folder on this machine: {remedy}")
        if not path.is_file():
            raise UserError(f"{self.folder} must hold tokenizer.json; there is none")
        try:
            self._backend: Any = Backend.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise UserError(f"{path} must be a tokenizer that can be read: {error}") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocabulary: int = self._backend.get_vocab_size(with_added_tokens=True)
        self._config = read_json(self.folder / "tokenizer_config.json", missing={})
        named = read_json(self.folder / "special_tokens_map.json", missing={}) | self._config
        self.special = {
            role: str(token["content"] if isinstance(token, dict) else token)
            for role, token in named.items()
            if role.endswith("_token") and isinstance(token, str | dict)
        }
        self.eos = self._ends()
        lists = (x for role, x in named.items() if role.endswith("_tokens") and isinstance(x, list))
        more = {str(t["content"] if isinstance(t, dict) else t) for tokens in lists for t in tokens}
        self._named = {*self.special.values(), *map(self._backend.id_to_token, self.eos), *more}

    def _ends(self) -> frozenset[int]:
        for file in ("generation_config.json", "config.json"):
            ends = read_json(self.folder / file, missing={}).get("eos_token_id")
            if ends is not None:
                return frozenset([ends] if isinstance(ends, int) else ends)
        spelling = self.special.get("eos_token")
        if spelling is None:
            return frozenset()
        end = self._backend.token_to_id(spelling)
        if end is None:
            raise UserError(f"{self.folder}: the end of text {spelling!r} is not in the vocabulary")
        return frozenset([end])

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a text.

        Args:
            text: May spell special tokens.
            special: Whether the tokens that the folder puts around every text are added.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    def spell(self, token: int) -> str:
        """Return the text of one id, a special token's spelling too."""
        text: str = self._backend.decode([token], skip_special_tokens=False)
        return text

    @cached_property
    def widest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._backend.get_vocab()), default=0)

    @cached_property
    def chat(self) -> Chat:
        """The folder's chat template.

        Raises:
            UserError: If there is none, or it cannot be compiled.
        """
        path = self.folder / "chat_template.jinja"
        source = self._config.get("chat_template")
        if path.is_file():
            source = path.read_text(encoding="utf-8")
        elif isinstance(source, list):
            source = {one.get("name"): one.get("template") for one in source}.get("default")
        if not isinstance(source, str):
            raise UserError(
                f"{self.folder} must hold chat_template.jinja, or a chat_template in "
                f"tokenizer_config.json, to be talked to; it has neither: give it plain prompts"
            )
        return Chat(source, self.special)

    @cached_property
    def _verbatim(self) -> Verbatim:
        return Verbatim(self._backend, self._named)

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        check: Callable[[str], None] | None = None,
        /,
        **options: Any,
    ) -> list[int]:
        """Return the ids of a conversation that the model is to answer.

        Special tokens are those of the template; what messages and options spell stays text.

        Args:
            messages: As `Chat.render` has them.
            check: Is called with the text, before that is encoded.
            **options: Of `Chat.render`.

        Raises:
            UserError: As `Chat.render`, and what `check` raises.
        """
        verbatim = self._verbatim
        text = self.chat.render(messages, verbatim.mark, **options)
        if check is not None:
            check(verbatim.unmark(text))
        return verbatim.encode(text)
