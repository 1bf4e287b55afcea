"""What an engine hands out: texts, what each step did, and its counts."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .sampling import Token

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Completion:
    """One text.

    Attributes:
        request: Number that `Engine.add` gave.
        sample: Number of the sample of this request, from 0.
        prompt_ids: Ids of the prompt.
        ids: Ids that were drawn, what ended the text with them.
        text: Their text, cut before what ended it; empty without a tokenizer.
        tokens: What is known of each id: see `Token`.
        finish_reason: `stop` for an end of text, a stop id or string; `length` at `max_tokens` or
            the end of the model's window; `cancelled`.
        found: Tokens of the prompt whose keys and values another request had left.
    """

    request: int
    sample: int
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    found: int

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Log-probability of each id in nats under the model, at temperature 1."""
        return tuple(token.logprob for token in self.tokens)

    @property
    def sampling_logprobs(self) -> tuple[float, ...]:
        """Log-probability of each id under the distribution that it was drawn from."""
        return tuple(token.sampling_logprob for token in self.tokens)

    @property
    def kept(self) -> tuple[Tensor | None, ...]:
        """Ids that could be drawn at each position, with `Sampling.kept`; `None` for all."""
        return tuple(token.kept for token in self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Event:
    """What a step did to one sample.

    Attributes:
        request: Number that `Engine.add` gave.
        sample: Number of the sample of this request, from 0.
        token: The token that was drawn; `None` where the sample was cancelled.
        text: Text that is certain now and was not before.
        completion: The whole, when it has ended.
    """

    request: int
    sample: int
    token: Token | None
    text: str
    completion: Completion | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """Counts of an engine.

    Attributes:
        running: Samples that have pages.
        waiting: Samples that have none.
        pages: Pages of the cache.
        pages_free: Pages that a sample could take.
        steps: Passes of the model.
        prompt_tokens: Tokens of prompts, counted for each sample.
        tokens: Tokens that were drawn.
        found_tokens: Tokens of prompts that were in pages already, and were not computed.
        put_back: How many times a sample lost its pages to an older one.
    """

    running: int
    waiting: int
    pages: int
    pages_free: int
    steps: int
    prompt_tokens: int
    tokens: int
    found_tokens: int
    put_back: int
