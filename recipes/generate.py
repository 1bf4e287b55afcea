"""`warploom generate`: text from a model, to the terminal as it comes.

    warploom generate FOLDER --prompt "def fib(n):" --max-tokens 64
    warploom generate FOLDER --chat                             talk, line by line; Ctrl-D ends
    warploom generate FOLDER --chat --prompt "Why is the sky blue?" --temperature 0.7 --seed 1
    echo "Once upon a time" | warploom generate FOLDER --n 4
    warploom generate FOLDER --prompt A --prompt B --json       ids and log-probabilities
    warploom generate FOLDER --batch-invariant < prompt.txt     the same bits alone or in company

needs a Hugging Face folder with weights and tokenizer.json; for --chat also its template, and
jinja2. What is not given on the command line is as the folder's generation_config.json says, else
the likeliest token is taken. Exit code 0: done; 1: interrupted; 2: a mistake of the user.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import tyro

from warploom.recipes.errors import UserError, unboxed
from warploom.recipes.rollout import Completion, Engine, Sampling
from warploom.recipes.rollout.codec import Codec
from warploom.recipes.rollout.command import Command, folder_sampling

_MOST = 64  # texts at a time
Prompts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate(Command):
    """Continue text with a model."""

    prompt: Prompts = ()
    """Text to continue; may be given several times. Without one, standard input is read, without
    the end of its last line."""
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Talk: prompts are messages of a user, put into the folder's chat template. Line by line where
    a terminal is read; what a pipe or file holds is one message."""
    system: str = ""
    """With --chat: what the system says first."""
    sampling: Annotated[Sampling, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: Sampling(temperature=0.0, max_tokens=256)
    )
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON object a text: ids, log-probabilities, why it ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Words after `warploom generate`; those of the process when None.

    Returns:
        Exit code.

    Raises:
        UserError: If the folder cannot be read, or a prompt cannot be continued.
    """
    asked = _asked(sys.argv[1:] if argv is None else list(argv))
    codec = Codec(asked.folder)
    speak = _speak(codec, asked) if asked.chat else codec.encode
    talk = asked.chat and not asked.prompt and sys.stdin.isatty()
    prompts = asked.prompt or (() if talk else (_read(),))
    given = [speak(prompt) for prompt in prompts]
    texts = min(max(1, len(given) * asked.sampling.n), _MOST)
    engine = asked.engine(codec, max_sequences=texts)
    try:
        if talk:
            _talk(engine, codec, asked)
        else:
            _continue(engine, given, asked)
    except KeyboardInterrupt:
        print()
        return 1
    return 0


def _read() -> str:
    if sys.stdin.isatty():
        print("text to continue, then Ctrl-D:", file=sys.stderr)
    return sys.stdin.read().removesuffix("\n")


def _asked(words: list[str]) -> Generate:
    """Read the words; the folder that they name gives the defaults of sampling."""
    options: dict[str, Any] = {"prog": "warploom generate", "description": __doc__, "args": words}
    with unboxed():
        asked: Generate = tyro.cli(Generate, **options)
        default = Generate(folder=asked.folder, sampling=folder_sampling(asked.folder))
        asked = tyro.cli(Generate, default=default, **options)
    if asked.system and not asked.chat:
        raise UserError(f"system ({asked.system!r:.40}) is what a chat begins with: add --chat")
    return asked


def _speak(codec: Codec, asked: Generate) -> Callable[[str], list[int]]:
    """Return what makes a prompt of a user's message; refuse a folder without a template."""
    assert codec.chat
    return lambda text: codec.encode_chat([*_system(asked), {"role": "user", "content": text}])


def _system(asked: Generate) -> list[dict[str, str]]:
    return [{"role": "system", "content": asked.system}] if asked.system else []


def _continue(engine: Engine, prompts: list[list[int]], asked: Generate) -> None:
    """Continue prompts: one as it comes, several when all have ended."""
    if len(prompts) == 1 and asked.sampling.n == 1 and not asked.json:
        for text in _stream(engine, prompts[0], asked.sampling):
            print(text, end="", flush=True)
        print()
        return
    for completion in engine.generate(prompts, asked.sampling, progress=True):
        print(_json(completion) if asked.json else completion.text)


def _stream(engine: Engine, prompt: list[int], sampling: Sampling) -> Iterator[str]:
    """Yield a text as it comes; then tell a terminal how fast it came."""
    start, request = time.perf_counter(), engine.add(prompt, sampling)
    tokens = 0
    try:
        while engine.busy:
            for event in engine.step():
                tokens += event.token is not None
                yield event.text
    finally:
        engine.cancel(request)  # where it was interrupted
        while engine.busy:
            engine.step()
    if sys.stderr.isatty():
        taken = time.perf_counter() - start
        print(f"\n[{tokens} tokens, {tokens / taken:.1f} a second]", end="", file=sys.stderr)


def _talk(engine: Engine, codec: Codec, asked: Generate) -> None:
    """Let a person and the model speak in turn, until standard input ends."""
    said = _system(asked)
    while (line := _line()) is not None:
        said.append({"role": "user", "content": line})
        answer = ""
        try:
            for text in _stream(engine, codec.encode_chat(said), asked.sampling):
                answer += text
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            answer += " ..."
        except UserError as error:
            print(error, file=sys.stderr)
            said.pop()
            continue
        print()
        said.append({"role": "assistant", "content": answer})


def _line() -> str | None:
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _json(completion: Completion) -> str:
    """Write a completion as one line."""
    names = [f.name for f in fields(completion) if f.name != "tokens"]
    found = {name: getattr(completion, name) for name in (*names, "logprobs", "sampling_logprobs")}
    tops = [token.top for token in completion.tokens]
    kept = [None if k is None else k.tolist() for k in completion.kept]
    found |= {"top": tops} if any(tops) else {}
    found |= {"kept": kept} if any(k is not None for k in kept) else {}
    return json.dumps(found, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
