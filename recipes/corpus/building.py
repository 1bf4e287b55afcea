"""From text to a token store: train the vocabulary if need be, tokenise, split, keep.

A store is reused when text, tokenizer and held-out fraction are the ones it was built from, and
only then; anything else is refused in words, or rebuilt when the caller says so.
"""

import errno
import hashlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from ..errors import StoppedError, UserError
from ..tokens.fertility import Counts, file_type
from ..tokens.lock import one_at_a_time
from ..tokens.store import (
    FORMAT,
    SPLITS,
    SplitWriter,
    TokenStore,
    open_store,
    recover,
    replacing,
    store_dtype,
    write_json,
)
from ..tokens.tokenizer import Tokenizer
from ..tokens.training import BPE, train_bpe
from .sources import Document, Skips, TextSource, is_held_out

logger = logging.getLogger(__name__)

_BATCH_CHARACTERS = 4_000_000  # encoded at once, on all cores


def prepare_store(
    folder: str | Path,
    source: TextSource,
    tokenizer: Tokenizer | BPE,
    *,
    held_out: float = 0.05,
    changed: Literal["refuse", "rebuild"] = "refuse",
    verify: bool = True,
    wait_s: float = 3600.0,
) -> TokenStore:
    """Open the store of this text, tokenizer and split; build it first if there is none.

    Several processes may call it at once: one builds, the others wait and open.

    Args:
        folder: Where the store lies or shall lie.
        source: The text.
        tokenizer: A finished tokenizer, or what to train one to (on the documents that are not
            held out). Either way the store keeps its own copy.
        held_out: Share of documents that are held out, in 0 .. 1.
        changed: If a store of other text, tokenizer or split lies there: refuse, because a run that
            resumes would read other batches, or build anew.
        verify: Hash the files of a store that was there.
        wait_s: How long to wait for another process, in seconds.

    Raises:
        UserError: If no text is left, a split is empty, the vocabulary is too large for the text,
            the store is damaged or of something else and `changed` is "refuse", `folder` holds
            other files, or it lies where its own files would be read as text.
        StoppedError: If another process builds longer than `wait_s`, or the disk is full.
    """
    if not 0 <= held_out < 1:
        raise UserError(f"held_out ({held_out}) must be a share in 0 .. 1, 1 excluded")
    folder = Path(folder).resolve()
    _check_place(folder, source)
    what = f"token store {folder}"
    with one_at_a_time(folder.with_name(f".{folder.name}.lock"), wait_s=wait_s, what=what):
        recover(folder)
        listing, size = source.listing()
        if (folder / "manifest.json").exists():
            try:
                return _reuse(folder, source, tokenizer, held_out, listing, verify)
            except UserError as error:
                if changed == "refuse":
                    raise
                logger.warning("%s: building it anew", error)
        try:
            _build(folder, source, tokenizer, held_out, listing, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StoppedError(
                    f"{what} cannot be written ({error.strerror}): it needs about {size} bytes; "
                    "free them and start again, nothing was left behind"
                ) from error
            raise
        return open_store(folder, verify=False)


def _check_place(folder: Path, source: TextSource) -> None:
    if folder.exists() and not (folder / "manifest.json").exists() and any(folder.iterdir()):
        raise UserError(f"{folder} must be a token store, empty, or new: it holds other files")
    if not source.suffixes or ".json".endswith(source.suffixes):
        for path in source.paths:
            if folder.is_relative_to(Path(path).resolve()):
                raise UserError(
                    f"token store {folder} must not lie in its own text {path}, whose suffixes "
                    "would take its files in: choose another folder, or name suffixes"
                )


def _reuse(
    folder: Path,
    source: TextSource,
    tokenizer: Tokenizer | BPE,
    held_out: float,
    listing: str,
    verify: bool,
) -> TokenStore:
    store = open_store(folder, verify=verify)
    difference = _difference(store, source, tokenizer, held_out, listing)
    if difference is not None:
        raise UserError(
            f"token store {folder} was built from {difference}; choose another folder, remove the "
            'store, or build it anew (changed="rebuild"; a run that resumes would read other text)'
        )
    return open_store(folder, verify=False)  # whose listing may be a newer one


def _difference(
    store: TokenStore, source: TextSource, tokenizer: Tokenizer | BPE, held_out: float, listing: str
) -> str | None:
    """Say in what the store differs from what is asked for; `None` if in nothing."""
    manifest = store.manifest
    asked = _recipe(tokenizer)
    if isinstance(tokenizer, Tokenizer):
        if manifest["tokenizer"] != tokenizer.fingerprint:
            return f"another tokenizer ({manifest['tokenizer'][:12]}, {manifest['vocabulary']} ids)"
    elif manifest["recipe"] != asked:
        return f"another tokenizer recipe ({manifest['recipe']}, asked for {asked})"
    if manifest["held_out"] != held_out:
        return f"another held-out share ({manifest['held_out']}, asked for {held_out})"
    if manifest["listing"] == listing:
        return None
    content = _Content()
    skips = Skips()
    for document in source.documents(skips):
        content.add(document)
    if content.digest(skips) == manifest["content"]:  # touched or moved, but the same text
        write_json(store.folder / "manifest.json", manifest | {"listing": listing})
        return None
    documents = sum(manifest["splits"][s]["documents"] for s in SPLITS)
    size = sum(manifest["splits"][s]["bytes"] for s in SPLITS)
    return (
        f"other text ({documents} documents, {size} bytes; now {content.documents} documents, "
        f"{content.bytes} bytes)"
    )


def _recipe(tokenizer: Tokenizer | BPE) -> dict[str, Any] | None:
    return asdict(tokenizer) if isinstance(tokenizer, BPE) else None


class _Content:
    """A running hash over names and texts."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.documents, self.bytes = 0, 0

    def add(self, document: Document) -> int:
        """Take a document in; return its size in bytes."""
        data = document.text.encode()
        self._hash.update(document.name.encode("utf-8", "surrogateescape") + b"\0")
        self._hash.update(hashlib.sha256(data).digest())
        self.documents, self.bytes = self.documents + 1, self.bytes + len(data)
        return len(data)

    def digest(self, skips: Skips) -> str:
        """Return the hash, with what was skipped."""
        final = self._hash.copy()
        final.update(str(skips).encode("utf-8", "surrogateescape"))
        return final.hexdigest()


def _build(
    folder: Path,
    source: TextSource,
    tokenizer: Tokenizer | BPE,
    held_out: float,
    listing: str,
    size: int,
) -> None:
    recipe = _recipe(tokenizer)
    if isinstance(tokenizer, BPE):
        with _progress("training the tokenizer", size) as advance:
            texts = _training_sample(source, held_out, tokenizer.sample_bytes / max(size, 1))
            tokenizer = train_bpe(_counted(texts, advance), tokenizer)
    with replacing(folder) as partial:
        tokenizer.save(partial / "tokenizer")
        dtype = store_dtype(tokenizer.vocabulary)
        writers = {split: SplitWriter(partial, split, dtype) for split in SPLITS}
        try:
            with _progress("tokenising", size) as advance:
                content, skips, types = _tokenise(source, tokenizer, held_out, writers, advance)
        except BaseException:
            for writer in writers.values():
                writer.abandon()
            raise
        splits = {split: writer.close() for split, writer in writers.items()}
        _check_splits(splits, held_out)
        manifest = {
            "version": FORMAT,
            "vocabulary": tokenizer.vocabulary,
            "dtype": dtype,
            "tokenizer": tokenizer.fingerprint,
            "recipe": recipe,
            "held_out": held_out,
            "listing": listing,
            "content": content.digest(skips),
            "sources": asdict(source),
            "splits": splits,
            "file_types": {suffix: asdict(counts) for suffix, counts in sorted(types.items())},
            "skipped": dict(sorted(skips.counts.items())),
            "skipped_examples": skips.examples,
        }
        write_json(partial / "manifest.json", manifest)
    if skips.counts:
        logger.warning("token store %s: skipped %s", folder, skips)
    counts = {split: (splits[split]["documents"], splits[split]["tokens"]) for split in SPLITS}
    logger.info("token store %s: documents and tokens %s", folder, counts)


def _check_splits(splits: dict[str, dict[str, Any]], held_out: float) -> None:
    documents = {split: splits[split]["documents"] for split in SPLITS}
    if not documents["train"] or (held_out > 0 and not documents["heldout"]):
        raise UserError(
            f"both sides of the split must get a document: held_out={held_out} gave "
            f"{documents['train']} to train and {documents['heldout']} held out; the split is by "
            "file, so give more files (or records), or another held_out; 0 holds out none"
        )


def _training_sample(source: TextSource, held_out: float, share: float) -> Iterator[str]:
    """Yield the documents to learn a vocabulary from: an even sample when there is too much."""
    for document in source.documents(Skips()):
        if is_held_out(document.key, held_out):
            continue
        if share >= 1 or is_held_out("sample\0" + document.key, share):
            yield document.text


def _tokenise(
    source: TextSource,
    tokenizer: Tokenizer,
    held_out: float,
    writers: dict[str, SplitWriter],
    advance: Callable[[int], None],
) -> tuple[_Content, Skips, dict[str, Counts]]:
    content, skips, types = _Content(), Skips(), dict[str, Counts]()
    for documents in _batches(source.documents(skips)):
        encoded = tokenizer.encode_batch([document.text for document in documents])
        for document, ids in zip(documents, encoded, strict=True):
            size = content.add(document)
            suffix = file_type(document.name)
            one = Counts(1, len(document.text), size, len(ids))
            types[suffix] = types.get(suffix, Counts()) + one
            split = "heldout" if is_held_out(document.key, held_out) else "train"
            writers[split].add(tokenizer.document(ids), size)
            advance(size)
    return content, skips, types


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _counted(texts: Iterator[str], advance: Callable[[int], None]) -> Iterator[str]:
    for text in texts:
        advance(len(text))
        yield text


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that takes bytes done; a bar on a terminal, a line in the log elsewhere."""
    if not sys.stderr.isatty():
        logger.info("%s: about %d bytes of text", title, total)
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)
