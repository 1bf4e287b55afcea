"""What an engine's texts look like to OpenAI's clients, whole and in chunks.

Beside OpenAI's fields, with `return_token_ids`: `token_ids` of each choice, and `prompt_token_ids`,
of a choice of a completion and of a chat as a whole.

Source: https://platform.openai.com/docs/api-reference (completions, chat).
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..rollout import Completion, Event
from ..rollout.codec import Codec
from ..rollout.sampling import Token
from .protocol import Asked

_LEAST = -9999.0  # stands for the logarithm of 0, which JSON has no word for


class Answer:
    """The answer to one request.

    Args:
        asked: What was asked for.
        prompts: Ids of each prompt.
        name: The model's.
        codec: Spells ids.
    """

    def __init__(
        self, asked: Asked, prompts: Sequence[Sequence[int]], name: str, codec: Codec
    ) -> None:
        self.asked, self.prompts, self.name, self.codec = asked, prompts, name, codec
        self.id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._offsets: dict[int, int] = {}  # characters of the tokens that were told, by choice
        self._drawn = 0
        self._found: dict[int, int] = {}  # tokens of each prompt that were in pages

    def whole(self, completions: Sequence[tuple[int, Completion]]) -> dict[str, Any]:
        """Return the answer from the texts and their numbers."""
        choices = []
        for choice, ended in sorted(completions, key=lambda one: one[0]):
            self._count(choice, ended)
            said: dict[str, Any] = {"index": choice}
            if self.asked.chat:
                said["message"] = {"role": "assistant", "content": ended.text, "refusal": None}
            else:
                said["text"] = ended.text
            said["logprobs"] = self._logprobs(choice, ended.tokens)
            said["finish_reason"] = ended.finish_reason
            choices.append(said | self._ids(choice, ended.ids, first=True))
        answer = self._envelope(choices, chunk=False) | {"usage": self._usage()}
        return answer | self._prompt()

    def chunk(self, choice: int, event: Event) -> dict[str, Any] | None:
        """Return what a stream says of an event; `None` for nothing."""
        ended, first = event.completion, choice not in self._offsets
        if ended is not None:
            self._count(choice, ended)
        tokens = () if event.token is None else (event.token,)
        told = self.asked.logprobs or self.asked.ids
        if not (first or event.text or ended is not None or told):
            return None
        said: dict[str, Any] = {"index": choice}
        if self.asked.chat:
            said["delta"] = ({"role": "assistant"} if first else {}) | {"content": event.text}
        else:
            said["text"] = event.text
        said["logprobs"] = self._logprobs(choice, tokens)
        said["finish_reason"] = None if ended is None else ended.finish_reason
        self._offsets.setdefault(choice, 0)
        said |= self._ids(choice, [token.id for token in tokens], first=first)
        chunk = self._envelope([said], chunk=True)
        return chunk | (self._prompt() if first else {})

    def last(self) -> dict[str, Any]:
        """Return the chunk that tells the counts of tokens."""
        return self._envelope([], chunk=True) | {"usage": self._usage()}

    def _envelope(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion" if self.asked.chat else "text_completion"
        said = {
            "id": self.id,
            "object": f"{kind}.chunk" if chunk and self.asked.chat else kind,
            "created": self.created,
            "model": self.name,
            "choices": choices,
        }
        return said | ({"usage": None} if chunk and self.asked.usage else {})

    def _count(self, choice: int, ended: Completion) -> None:
        self._drawn += len(ended.ids)
        if not ended.sample:
            self._found[choice] = ended.found

    def _usage(self) -> dict[str, Any]:
        given = sum(map(len, self.prompts))
        return {
            "prompt_tokens": given,
            "completion_tokens": self._drawn,
            "total_tokens": given + self._drawn,
            "prompt_tokens_details": {"cached_tokens": sum(self._found.values())},
        }

    def _prompt(self) -> dict[str, Any]:
        told = self.asked.ids and self.asked.chat
        return {"prompt_token_ids": list(self.prompts[0])} if told else {}

    def _ids(self, choice: int, ids: Sequence[int], *, first: bool) -> dict[str, Any]:
        """Return what is told of ids; those of the prompt once."""
        said: dict[str, Any] = {"token_ids": list(ids)} if self.asked.ids else {}
        if self.asked.ids and first and not self.asked.chat:
            said["prompt_token_ids"] = list(self.prompts[choice // self.asked.sampling.n])
        return said

    def _logprobs(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        if self.asked.chat:
            return {"content": [self._listed(token) for token in tokens], "refusal": None}
        said: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": []}
        tops: list[dict[str, float]] = []
        for token in tokens:
            offset, spelling = self._offsets.get(choice, 0), self.codec.spell(token.id)
            said["tokens"].append(spelling)
            said["token_logprobs"].append(max(token.logprob, _LEAST))
            said["text_offset"].append(offset)
            self._offsets[choice] = offset + len(spelling)
            top: dict[str, float] = {}
            for i, logprob in token.top:
                name = self.codec.spell(i)
                top[f"token_id:{i}" if name in top else name] = max(logprob, _LEAST)
            tops.append(top)
        return said | {"top_logprobs": tops if self.asked.sampling.logprobs else None}

    def _listed(self, token: Token) -> dict[str, Any]:
        top = [self._spelt(i, logprob) for i, logprob in token.top]
        return self._spelt(token.id, token.logprob) | {"top_logprobs": top}

    def _spelt(self, token: int, logprob: float) -> dict[str, Any]:
        spelling = self.codec.spell(token)
        broken = (
            "\N{REPLACEMENT CHARACTER}" in spelling
        )  # bytes that are no character by themselves
        raw = None if broken else list(spelling.encode())
        return {"token": spelling, "logprob": max(logprob, _LEAST), "bytes": raw}
