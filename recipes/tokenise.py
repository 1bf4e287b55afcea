"""`warploom tokens`: a tokenizer and a token store out of text, and what they hold.

    warploom tokens train tokenizers/mine --text src docs --suffixes .py .md --vocabulary 8192
    warploom tokens build stores/mine --text src docs --suffixes .py .md --vocabulary 8192
    warploom tokens build stores/mine --text corpus.jsonl.gz --tokenizer tokenizers/mine
    warploom tokens show stores/mine

needs text in UTF-8: folders, files, or JSON lines with a field that holds the text; writes a
folder under a temporary name and renames it
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from warploom.recipes.corpus import Skips, TextSource, prepare_store
from warploom.recipes.errors import UserError, unboxed
from warploom.recipes.tokens import (
    BPE,
    Tokenizer,
    TokenStore,
    measure_fertility,
    open_store,
    train_bpe,
)


@dataclass(frozen=True, kw_only=True)
class _Text:
    text: tuple[str, ...]
    """Folders and files; .jsonl and .jsonl.gz hold one JSON object a line."""
    suffixes: tuple[str, ...] = ()
    """Files of folders must end in one of these; none given takes all."""
    exclude: tuple[str, ...] = ()
    """Patterns of names, or of paths below a folder, that are left out."""
    text_field: str = "text"
    """The field of a JSON object that holds the text."""

    @property
    def source(self) -> TextSource:
        return TextSource(
            paths=self.text,
            suffixes=self.suffixes,
            exclude=self.exclude,
            text_field=self.text_field,
        )


@dataclass(frozen=True, kw_only=True)
class Train(_Text):
    """Train a byte-level BPE tokenizer, and say how it cuts the text."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Where the tokenizer is written."""
    bpe: Annotated[BPE, tyro.conf.OmitArgPrefixes] = field(default_factory=BPE)


@dataclass(frozen=True, kw_only=True)
class Build(_Text):
    """Build a token store; one of the same text, tokenizer and split that is there is kept."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Where the store is written."""
    tokenizer: Path | None = None
    """A tokenizer's folder; without it one is trained on the text that is not held out."""
    bpe: Annotated[BPE, tyro.conf.OmitArgPrefixes] = field(default_factory=BPE)
    held_out: float = 0.05
    """Share of the documents that are held out, in 0 .. 1."""
    rebuild: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace a store of other text, tokenizer or split instead of refusing."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """Verify a token store's hashes, and say what is in it."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A finished store."""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Words after `warploom tokens`; those of the process when None.

    Returns:
        Exit code 0.

    Raises:
        UserError: If there is no text, the vocabulary is too large for it, a folder to be written
            holds something else, or a store is damaged.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with unboxed():
        command = tyro.cli(Train | Build | Show, prog="warploom tokens", args=argv)
    if isinstance(command, Train):
        _train(command)
    elif isinstance(command, Build):
        _show(_build(command))
    else:
        _show(open_store(command.folder))
    return 0


def _train(command: Train) -> None:
    if command.folder.exists() or command.folder.is_symlink():
        raise UserError(f"tokenizer folder {command.folder} must be new, and it exists: choose one")
    skips = Skips()
    tokenizer = train_bpe((d.text for d in command.source.documents(skips)), command.bpe)
    tokenizer.save(command.folder)
    sample = ((d.name, d.text) for d in command.source.documents(Skips()))
    print(measure_fertility(tokenizer, sample).table())
    print(f"skipped: {skips}")


def _build(command: Build) -> TokenStore:
    tokenizer = command.bpe if command.tokenizer is None else Tokenizer.load(command.tokenizer)
    return prepare_store(
        command.folder,
        command.source,
        tokenizer,
        held_out=command.held_out,
        changed="rebuild" if command.rebuild else "refuse",
    )


def _show(store: TokenStore) -> None:
    table = Table("split", "documents", "tokens", "bytes", "bytes/token")
    for name, split in (("train", store.train), ("heldout", store.heldout)):
        tokens = len(split.ids)
        sizes = (split.documents, tokens, split.bytes, f"{split.bytes / max(tokens, 1):.3f}")
        table.add_row(name, *(str(size) for size in sizes))
    Console().print(table)
    print(f"{store.manifest['vocabulary']} ids, tokenizer {store.manifest['tokenizer'][:12]}")
    print(f"skipped: {store.manifest['skipped'] or 'none'}")
