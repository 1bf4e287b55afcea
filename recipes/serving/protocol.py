"""What a body asks for: OpenAI's fields, a few of others, and a refusal for each that is neither.

Beside OpenAI's: `top_k`, `min_p`, `stop_token_ids`, `ignore_eos`, `return_token_ids`, and for chats
`chat_template_kwargs`. A field that would change the text and is not served is refused by its name,
unless it has the value that changes nothing; null is as not given.

Source: https://platform.openai.com/docs/api-reference (completions, chat).
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from ..errors import UserError
from ..rollout import Engine, Sampling
from ..rollout.codec import Codec
from .refusal import Refusal

MOST_LOGPROBS = 20  # likeliest tokens of a position
_MOST_ENTRIES = 2**20  # log-probabilities that an answer may list
_WIDEST = 32  # characters that a token may stand for where no token is as long: some strip spaces
_MOST_STOPS, _LONGEST_STOP = 16, 256
_IDLE = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    | {"prompt_cache_retention", "parallel_tool_calls"}
)  # change no text
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "repetition_penalty": (1,),
        "logit_bias": ({},),
        "echo": (False,),
        "suffix": ("",),
        "best_of": (1,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
    }
)  # values that change no text
_SERVED = frozenset(
    {"model", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "seed"}
    | {"temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "ignore_eos"}
    | {"logprobs", "return_token_ids"}
)
_OWN = (frozenset({"prompt"}), frozenset({"messages", "top_logprobs", "chat_template_kwargs"}))
_TAKEN = ("self", "messages", "add_generation_prompt")  # names that a template's switch cannot have


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a body asks for.

    Attributes:
        chat: Whether it is a chat.
        prompts: Texts or ids; of a chat, its messages alone.
        switches: What else the chat template may use.
        sampling: How each is continued.
        open_ended: Whether nothing but the window ends a text.
        logprobs: Whether log-probabilities are told.
        stream: Whether tokens are told as they come.
        usage: Whether a stream ends with the counts of tokens.
        ids: Whether ids are told.
    """

    chat: bool
    prompts: tuple[Any, ...]
    switches: Mapping[str, Any]
    sampling: Sampling
    open_ended: bool
    logprobs: bool
    stream: bool
    usage: bool
    ids: bool

    @property
    def samples(self) -> int:
        """Texts that are asked for."""
        return len(self.prompts) * self.sampling.n


def read(body: bytes, *, chat: bool, name: str, default: Sampling, most: int) -> Asked:
    """Return what a body asks for.

    Args:
        body: JSON in UTF-8.
        chat: Whether it is one of `/v1/chat/completions`.
        name: The model that is served.
        default: What is not given.
        most: Texts that a request may ask for.

    Raises:
        Refusal: If it asks for what cannot be had.
    """
    said = _object(body)
    _known(said, chat)
    model = said.get("model", name)
    if model != name:
        raise Refusal(
            404,
            f"model must be {name!r}, the one that is served; got {model!r:.80}",
            param="model",
            code="model_not_found",
        )
    stream, options = _flag(said, "stream"), said.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise _wrong(options, "stream_options", 'an object with "include_usage" or nothing')
    if options and not stream:
        raise _wrong(options, "stream_options", "left out where stream is false")
    prompts = _messages(said) if chat else _prompts(said)
    most_tokens = _most_tokens(said)
    logprobs, count = _logprobs(said, chat)
    sampling = _sampling(
        said, default, max_tokens=most_tokens or (1 if chat else 16), logprobs=count
    )
    asked = Asked(
        chat=chat,
        prompts=prompts,
        switches=_switches(said),
        sampling=sampling,
        open_ended=chat and most_tokens is None,
        logprobs=logprobs,
        stream=stream,
        usage=_flag(options, "include_usage"),
        ids=_flag(said, "return_token_ids"),
    )
    if asked.samples > most:
        raise Refusal(
            400,
            f"a request may ask for {most} texts; got {len(prompts)} prompts and n={sampling.n}: "
            f"ask for fewer",
            param="n",
        )
    return asked


def prepare(asked: Asked, engine: Engine, codec: Codec) -> list[tuple[list[int], Sampling]]:
    """Return the ids of each prompt and how it is continued; each draws with a seed of its own.

    Raises:
        Refusal: If the model cannot continue one.
    """
    found: list[tuple[list[int], Sampling]] = []
    for index, prompt in enumerate(asked.prompts):
        how = replace(asked.sampling, seed=_seed(asked.sampling.seed, index))
        if any(not 0 <= i < engine.vocabulary for i in how.stop_ids):
            must = f"ids from 0 to {engine.vocabulary - 1}"
            raise _wrong(how.stop_ids, "stop_token_ids", must)
        try:
            check = partial(_check_length, engine, codec)
            if asked.chat:
                prompt = codec.encode_chat(prompt, check, **asked.switches)
            elif isinstance(prompt, str):
                check(prompt)
                prompt = codec.encode(prompt)
            ids = engine.encode(prompt, how)
        except UserError as error:
            raise Refusal(400, str(error), param="messages" if asked.chat else "prompt") from None
        if asked.open_ended:
            how = replace(how, max_tokens=engine.longest - len(ids))
        found.append((ids, how))
    entries = sum(how.max_tokens * how.n * how.logprobs for _, how in found)
    if entries > _MOST_ENTRIES:
        raise Refusal(
            400,
            f"an answer may list {_MOST_ENTRIES} log-probabilities; this one could have {entries}: "
            f"ask for fewer texts, tokens or likeliest tokens",
            param="top_logprobs" if asked.chat else "logprobs",
        )
    return found


def _check_length(engine: Engine, codec: Codec, text: str) -> None:
    """Refuse a text that no tokens could cover, before it is made tokens: that takes long."""
    most = engine.window * max(codec.widest, _WIDEST)
    if len(text) > most:
        raise UserError(
            f"a prompt must fit the window of {engine.window} tokens, {most} characters at most; "
            f"this one has {len(text)}: shorten it"
        )


def _seed(seed: int, index: int) -> int:
    return (seed + index + 2**63) % 2**64 - 2**63


def _wrong(found: Any, name: str, must: str) -> Refusal:
    return Refusal(400, f"{name} must be {must}; got {found!r:.80}", param=name)


def _object(body: bytes) -> dict[str, Any]:
    try:
        said = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body must be JSON in UTF-8: {error}") from None
    if not isinstance(said, dict):
        raise Refusal(400, f"the body must be a JSON object, it is a {type(said).__name__}")
    return {name: value for name, value in said.items() if value is not None}


def _known(said: dict[str, Any], chat: bool) -> None:
    """Refuse what would change the text and is not served."""
    unknown = said.keys() - _SERVED - _OWN[chat] - _IDLE - _NEUTRAL.keys()
    if unknown:
        names = ", ".join(f"{name!r:.80}" for name in sorted(unknown)[:8])
        raise Refusal(400, f"a body may have no field that is not known; got {names}", param=names)
    for name, values in _NEUTRAL.items():
        if name == "best_of" and said.get(name) == said.get("n", 1):
            continue
        if name in said and said[name] not in values:
            raise Refusal(
                400, f"{name} is not served: leave it out; got {said[name]!r:.80}", param=name
            )


def _flag(said: Mapping[str, Any], name: str) -> bool:
    value = said.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(value, name, "true or false")
    return bool(value)


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int for x in value)


def _text(name: str, value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refusal(400, f"{name} must be Unicode text: {error}", param=name) from None
    return value


def _prompts(said: dict[str, Any]) -> tuple[Any, ...]:
    """Return texts, or lists of ids."""
    given = said.get("prompt")
    prompts = [given] if isinstance(given, str) or (given and _integers(given)) else given
    if not isinstance(prompts, list) or not prompts:
        raise _wrong(given, "prompt", "a text, a list of ids, or a list of either")
    for prompt in prompts:
        if isinstance(prompt, str):
            _text("prompt", prompt)
        elif not _integers(prompt):
            raise _wrong(prompt, "prompt", "a text, a list of ids, or a list of either")
    return tuple(prompts)


def _messages(said: dict[str, Any]) -> tuple[Any, ...]:
    """Return the messages as one prompt, contents as text."""
    messages = said.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong(messages, "messages", "a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _wrong(message, "messages", "objects with a role")
    try:
        json.dumps(messages, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError) as error:
        raise Refusal(400, f"messages must be Unicode text: {error}", param="messages") from None
    return ([{**message, "content": _content(message.get("content"))} for message in messages],)


def _content(content: Any) -> str | None:
    """Return what a message says: a text, or parts that are all text, put together."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        kind = isinstance(part, dict) and part.get("type")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _wrong(part, "content", "a text, or a list of parts of type text")
    return "".join(part["text"] for part in parts)


def _switches(said: dict[str, Any]) -> dict[str, Any]:
    switches = said.get("chat_template_kwargs", {})
    if not isinstance(switches, dict) or any(name in _TAKEN for name in switches):
        raise _wrong(switches, "chat_template_kwargs", f"an object without {', '.join(_TAKEN)}")
    return switches


def _most_tokens(said: dict[str, Any]) -> int | None:
    given = {said[n] for n in ("max_tokens", "max_completion_tokens") if _whole(said, n)}
    if len(given) > 1:
        raise _wrong(given, "max_tokens", "the same as max_completion_tokens, or left out")
    return next(iter(given), None)


def _whole(said: dict[str, Any], name: str) -> bool:
    """Whether a count is given; refuse one that is none."""
    value = said.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise _wrong(value, name, "an integer of at least 1")
    return value is not None


def _logprobs(said: dict[str, Any], chat: bool) -> tuple[bool, int]:
    """Return whether log-probabilities are told, and of how many of the likeliest tokens."""
    name = "top_logprobs" if chat else "logprobs"
    told = _flag(said, "logprobs") if chat else name in said
    count = said.get(name, 0)
    if type(count) is not int or not 0 <= count <= MOST_LOGPROBS:
        raise _wrong(count, name, f"an integer from 0 to {MOST_LOGPROBS}")
    if count and not told:
        raise _wrong(count, name, "left out where logprobs is false")
    return told, count


def _sampling(said: dict[str, Any], default: Sampling, **more: int) -> Sampling:
    stop, ids = said.get("stop", []), said.get("stop_token_ids", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise _wrong(stop, "stop", "a text or a list of texts")
    if len(stops) > _MOST_STOPS or max(map(len, stops), default=0) > _LONGEST_STOP:
        raise _wrong(stop, "stop", f"at most {_MOST_STOPS} texts of {_LONGEST_STOP} characters")
    if not _integers(ids) or len(ids) > _LONGEST_STOP:
        raise _wrong(ids, "stop_token_ids", f"a list of at most {_LONGEST_STOP} ids")
    names = {"n", "temperature", "top_p", "top_k", "min_p"} & said.keys()
    given = {name: said[name] for name in names} | more
    given["seed"] = said.get("seed", secrets.randbits(63))
    try:
        return replace(
            default,
            stop=tuple(_text("stop", s) for s in stops),
            stop_ids=tuple(ids),
            ignore_eos=_flag(said, "ignore_eos"),
            **given,
        )
    except UserError as error:
        name = str(error).partition(" ")[0]
        raise Refusal(400, str(error), param=name if name in said else None) from None
