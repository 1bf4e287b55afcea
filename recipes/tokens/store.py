"""The token store: ids of documents on disk, memory-mapped, with hashes.

A folder: `manifest.json`, `tokenizer/`, and for each split (`train`, `heldout`) `<split>.ids.bin`
(the documents end to end, little-endian uint16, or uint32 above 65,535 ids) and
`<split>.offsets.bin` (int64 `[documents + 1]`, where each begins). It is written under another name
and renamed when it is whole, so what has the right name is complete.
"""

import builtins
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .tokenizer import Tokenizer

FORMAT = 1
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class TokenSplit:
    """The documents of one side.

    Attributes:
        ids: All tokens `[T]`, uint16 or uint32, memory-mapped; every document as
            `Tokenizer.document` frames it.
        offsets: Where each document begins and the last one ends: `[documents + 1]` int64.
        bytes: Size of the text in UTF-8.
    """

    ids: np.ndarray
    offsets: np.ndarray
    bytes: int

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def text(self, tokenizer: Tokenizer) -> builtins.bytes:
        """Return the text of all documents end to end."""
        return tokenizer.decode_bytes(self.ids.tolist())


@dataclass(frozen=True)
class TokenStore:
    """An open store.

    Attributes:
        folder: Where it lies.
        manifest: What `manifest.json` says.
        train: The documents to train on.
        heldout: The documents held out; has none if the fraction is 0.
    """

    folder: Path
    manifest: dict[str, Any]
    train: TokenSplit
    heldout: TokenSplit

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the store was built with, read from it.

        Raises:
            UserError: If the files of the tokenizer are not the ones that it was built with.
        """
        tokenizer = Tokenizer.load(self.folder / "tokenizer")
        if tokenizer.fingerprint != self.manifest["tokenizer"]:
            raise UserError(
                f"token store {self.folder}: its tokenizer folder was changed after the build "
                f"({tokenizer.fingerprint[:12]}, built with {self.manifest['tokenizer'][:12]}); "
                "remove the store, so that it is built again"
            )
        return tokenizer

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes when any token, document border or id's meaning does."""
        files = {s: self.manifest["splits"][s]["files"] for s in SPLITS}
        what = [FORMAT, self.manifest["tokenizer"], files]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def open_store(
    folder: str | Path, *, tokenizer: Tokenizer | None = None, verify: bool = True
) -> TokenStore:
    """Open a store for reading.

    Args:
        folder: A finished store.
        tokenizer: What the caller is going to use; compared with the store's.
        verify: Hash every file (about a second a GB). Sizes are compared in any case.

    Raises:
        UserError: If there is no store, a file is missing, cut or changed, the format is another,
            or `tokenizer` is not the one the store was built with.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for split in SPLITS:
        for entry in manifest["splits"][split]["files"].values():
            _check_file(folder, entry, verify)
    if tokenizer is not None and tokenizer.fingerprint != manifest["tokenizer"]:
        raise UserError(
            f"token store {folder} was built with tokenizer {manifest['tokenizer'][:12]} "
            f"({manifest['vocabulary']} ids), the given one is {tokenizer.fingerprint[:12]} "
            f"({tokenizer.vocabulary} ids): use {folder / 'tokenizer'}, or build another store"
        )
    return TokenStore(folder, manifest, *(_map_split(folder, manifest, split) for split in SPLITS))


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(f"token store {folder} must hold manifest.json; there is none: build it")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"token store {folder}: manifest.json is damaged ({error}); remove the store"
        ) from None
    if version != FORMAT:
        raise UserError(
            f"token store {folder} has format {version}, this release reads {FORMAT}: remove it, "
            "so that it is built again"
        )
    return manifest


def _check_file(folder: Path, entry: dict[str, Any], verify: bool) -> None:
    path = folder / entry["name"]
    remedy = "remove the store, so that it is built again"
    if not path.exists():
        raise UserError(f"token store {folder}: {entry['name']} is missing; {remedy}")
    if path.stat().st_size != entry["bytes"]:
        raise UserError(
            f"token store {folder}: {entry['name']} must have {entry['bytes']} bytes, it has "
            f"{path.stat().st_size}; {remedy}"
        )
    if verify:
        with path.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != entry["sha256"]:
            raise UserError(
                f"token store {folder}: {entry['name']} was changed after the build (SHA-256 "
                f"{found[:12]}, the manifest has {entry['sha256'][:12]}); {remedy}"
            )


def _map_split(folder: Path, manifest: dict[str, Any], split: str) -> TokenSplit:
    said = manifest["splits"][split]
    kinds = {"ids": np.dtype(manifest["dtype"]), "offsets": np.dtype("<i8")}
    arrays = {}
    for part, kind in kinds.items():
        path = folder / said["files"][part]["name"]
        empty = not said["files"][part]["bytes"]  # an empty file cannot be mapped
        arrays[part] = np.zeros(0, kind) if empty else np.memmap(path, kind, mode="r")
    return TokenSplit(arrays["ids"], arrays["offsets"], said["bytes"])


class SplitWriter:
    """Write one side, document by document; the hashes are taken on the way."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self._names = {part: f"{split}.{part}.bin" for part in ("ids", "offsets")}
        self._files = {part: (folder / name).open("wb") for part, name in self._names.items()}
        self._hashes = {part: hashlib.sha256() for part in self._names}
        self._dtype = np.dtype(dtype)
        self.documents, self.tokens, self.bytes = 0, 0, 0
        self._put("offsets", np.zeros(1, "<i8"))

    def _put(self, part: str, values: np.ndarray) -> None:
        data = values.tobytes()
        self._files[part].write(data)
        self._hashes[part].update(data)

    def add(self, ids: Sequence[int], size: int) -> None:
        """Append a document: its framed ids, and the size of its text in bytes."""
        self._put("ids", np.array(ids, self._dtype))
        self.documents, self.tokens = self.documents + 1, self.tokens + len(ids)
        self.bytes += size
        self._put("offsets", np.array([self.tokens], "<i8"))

    def close(self) -> dict[str, Any]:
        """Bring everything to the disk and return the split's part of the manifest."""
        files = {}
        for part, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            files[part] = {
                "name": self._names[part],
                "bytes": file.tell(),
                "sha256": self._hashes[part].hexdigest(),
            }
            file.close()
        counts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        return {**counts, "files": files}

    def abandon(self) -> None:
        """Close the files without a promise about what they hold."""
        for file in self._files.values():
            file.close()


def store_dtype(vocabulary: int) -> str:
    """Return the type of an id on disk."""
    return "<u2" if vocabulary <= 65535 else "<u4"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file under another name, bring it to the disk, and rename it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a fresh folder to fill; it takes the name `folder` if the block ends well.

    One process at a time; `recover` comes first, for what a killed one may have left.
    """
    partial, old = _beside(folder, "partial"), _beside(folder, "old")
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        _sync_folder(partial)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def recover(folder: Path) -> None:
    """Clear what a killed `replacing` left beside `folder`.

    A half-filled folder is dropped; a store that was moved away to be replaced, but never was,
    comes back.
    """
    partial, old = _beside(folder, "partial"), _beside(folder, "old")
    shutil.rmtree(partial, ignore_errors=True)
    if old.exists():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")
