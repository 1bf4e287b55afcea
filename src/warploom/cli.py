"""The command line, above all layers: `warploom COMMAND ...`.

A command is one row of `COMMANDS`: its words, one line of help, and a function that imports what
it needs when it is called, so that `warploom --help` answers at once. The function parses the
words after its own with tyro and returns the exit code. A user's mistake, `UserError`, is printed
as its one sentence, with exit code 2; any other exception keeps its traceback.
"""

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from warploom import __version__
from warploom.recipes.errors import UserError


@dataclass(frozen=True, slots=True)
class Command:
    """One command."""

    words: str
    """What follows its name, as the help shows it."""
    summary: str
    """What it does, in one line."""
    run: Callable[[list[str]], int]
    """Takes the words after its name and returns the exit code."""


def _doctor(argv: list[str]) -> int:
    from warploom.recipes import doctor

    return doctor.main(argv)


def _train(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(_runs())
        return 0
    if not argv or argv[0].startswith("-"):
        recipes = ", ".join(RECIPES)
        raise UserError(
            f"train needs the run first, as recipe/name, with recipe one of {recipes}; "
            f"got {argv[0] if argv else 'nothing'}: try warploom train pretrain/stdlib --help"
        )
    recipe, slash, name = argv[0].partition("/")
    if not (slash and name):
        raise UserError(f"a run is recipe/name, such as pretrain/stdlib; got {argv[0]!r}")
    if recipe not in RECIPES:
        raise UserError(f"recipe must be one of {', '.join(RECIPES)}{_near(recipe, RECIPES)}")
    return RECIPES[recipe]([name, *argv[1:]])


def _runs() -> str:
    """List every run with the first line of its docstring."""
    from warploom.recipes import pretrain

    runs = {f"pretrain/{name}": make.__doc__ or "" for name, make in pretrain.RUNS.items()}
    width = max(map(len, runs))
    lines = [f"  {name:<{width}}  {text.splitlines()[0]}" for name, text in runs.items()]
    return "\n".join(
        ["usage: warploom train RUN [--FIELD VALUE ...]", "", *lines]
        + ["", "warploom train RUN --help lists the fields of a run."]
    )


def _pretrain(argv: list[str]) -> int:
    from warploom.recipes import pretrain

    return pretrain.main(argv)


def _tokens(argv: list[str]) -> int:
    from warploom.recipes import tokenise

    return tokenise.main(argv)


def _verify(argv: list[str]) -> int:
    from warploom.recipes import verify

    return verify.main(argv)


def _generate(argv: list[str]) -> int:
    from warploom.recipes import generate

    return generate.main(argv)


def _serve(argv: list[str]) -> int:
    from warploom.recipes import serve

    return serve.main(argv)


def _convert(argv: list[str]) -> int:
    from warploom.recipes.convert import command

    return command.main(argv)


def _bench_train(argv: list[str]) -> int:
    from warploom.benchmarks import end_to_end

    return end_to_end.main(argv)


def _bench_kernels(argv: list[str]) -> int:
    from warploom.benchmarks.kernels import command

    return command.main(argv)


def _bench_generate(argv: list[str]) -> int:
    from warploom.benchmarks import generate

    return generate.main(argv)


def _bench_mup(argv: list[str]) -> int:
    from warploom.benchmarks import coordinates

    return coordinates.main(argv)


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "doctor": Command("[--json]", "what this machine has, and what is missing", _doctor),
        "train": Command("RUN [--FIELD VALUE ...]", "train a run, such as pretrain/stdlib", _train),
        "verify": Command("[RUN|FOLDER] --mesh ...", "prove a mesh on CPU processes", _verify),
        "convert": Command("SOURCE TARGET", "weights as a Hugging Face folder", _convert),
        "tokens": Command("train|build|show ...", "a tokenizer or a token store", _tokens),
        "generate": Command("FOLDER [--chat] ...", "text from a model", _generate),
        "serve": Command("FOLDER [--port ...] ...", "a model over HTTP, as OpenAI's", _serve),
        "bench train": Command("[--FLAG VALUE ...]", "time a step against peers", _bench_train),
        "bench generate": Command("[--FLAG VALUE ...]", "time generation", _bench_generate),
        "bench mup": Command("[--FLAG VALUE ...]", "muP's coordinate check", _bench_mup),
        "bench kernels": Command(
            "[--FLAG VALUE ...]", "time operators against peers and the roof", _bench_kernels
        ),
    }
)
"""Every command by its name, of one word or two."""

RECIPES: Mapping[str, Callable[[list[str]], int]] = MappingProxyType({"pretrain": _pretrain})
"""What `warploom train` reaches: a function that takes the name of a run and its overrides."""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after `warploom`; those of the process when None.

    Returns:
        The command's exit code; 2 for a user's mistake.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"warploom {__version__}")
        return 0
    if words[1:] in ([], ["-h"], ["--help"]) and _seconds(words[0]):
        print(usage(words[0]))
        return 0
    try:
        command, rest = _find(words)
        return command.run(rest)
    except UserError as error:
        print(f"warploom: {error}", file=sys.stderr)
        return 2


def usage(first: str = "") -> str:
    """Describe every command, one line each.

    Args:
        first: Where given, only the commands whose names begin with this word.

    Returns:
        The text that `warploom --help` prints, or `warploom bench --help`.
    """
    shown = _seconds(first) or COMMANDS
    rows = [(f"{name} {COMMANDS[name].words}", COMMANDS[name].summary) for name in shown]
    width = max(len(left) for left, _ in rows)
    lines = [f"  {left:<{width}}  {summary}" for left, summary in rows]
    return "\n".join(
        [f"usage: warploom {f'{first} WORD' if first else 'COMMAND'} ...", "", *lines]
        + ["", f"warploom {f'{first} WORD' if first else 'COMMAND'} --help says more."]
    )


def _seconds(first: str) -> dict[str, str]:
    """Return the commands of two words that begin with `first`, and their second words."""
    pairs = [(name, *name.partition(" ")[::2]) for name in COMMANDS]
    return {name: second for name, word, second in pairs if word == first and second}


def _find(words: list[str]) -> tuple[Command, list[str]]:
    """Split the words into the command, whose name has one word or two, and what follows it."""
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return COMMANDS[name], words[length:]
    if seconds := dict.fromkeys(_seconds(words[0]).values()):
        must = f"{words[0]} must be followed by one of {', '.join(seconds)}"
        raise UserError(must + _near(words[1], seconds))
    raise UserError(f"command must be one of {', '.join(COMMANDS)}{_near(words[0], COMMANDS)}")


def _near(word: str, names: Mapping[str, object]) -> str:
    """Close a sentence with what was typed, and the name that was probably meant."""
    close = difflib.get_close_matches(word, names, n=1)
    return f", got {word!r}" + (f": did you mean {close[0]}?" if close else "")


if __name__ == "__main__":
    raise SystemExit(main())
