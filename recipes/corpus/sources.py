"""Text in: files of folders and records of JSONL(.gz), streamed in one order, skips counted.

A document belongs to the held-out part by a hash of its key alone: the file's path below its
folder, or a record's text. Files that join or leave change nobody else's side.
"""

import fnmatch
import gzip
import hashlib
import json
import os
import stat
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError

_JSONL = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        name: Path below its folder; a record's is `path#line`.
        key: What decides its side of the split.
        text: The text, exactly as it decodes from UTF-8.
    """

    name: str
    key: str
    text: str


@dataclass
class Skips:
    """What was left out, by reason, with the first names of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one file or record."""
        self.counts[reason] += 1
        names = self.examples.setdefault(reason, [])
        if len(names) < 3:
            names.append(name)

    def __str__(self) -> str:
        parts = []
        for reason, count in sorted(self.counts.items()):
            names = ", ".join(self.examples[reason])
            more = ", ..." if count > len(self.examples[reason]) else ""
            parts.append(f"{count} {reason} ({names}{more})")
        return "; ".join(parts) or "none"


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where text comes from.

    Attributes:
        paths: Folders and files. Files that end in .jsonl or .jsonl.gz hold one JSON object a line;
            every other file is one document.
        suffixes: Files of folders must end in one of these; none given takes all.
        exclude: Patterns of `fnmatch`. One without a slash is held against the name of the file and
            of each folder on the way; one with a slash against the path below the folder.
        text_field: The field of a JSON object that holds the text.
    """

    paths: tuple[str, ...]
    suffixes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    text_field: str = "text"

    def files(self, skips: Skips | None = None) -> list[tuple[str, Path]]:
        """List the chosen files: names below their folder and paths, sorted in each of `paths`.

        Raises:
            UserError: If one of `paths` does not exist.
        """
        found: list[tuple[str, Path]] = []
        for given in self.paths:
            root = Path(given)
            if root.is_dir():
                found += self._walk(root, skips or Skips())
            elif root.exists():
                found.append((root.name, root))
            else:
                raise UserError(f"corpus path {given} must be a folder or a file; there is none")
        return found

    def _walk(self, root: Path, skips: Skips) -> list[tuple[str, Path]]:
        def refused(error: OSError) -> None:
            skips.add("unreadable", str(error.filename))

        found = []
        for folder, folders, names in os.walk(root, onerror=refused):
            below = Path(folder).relative_to(root)
            folders[:] = [f for f in folders if not self._excluded((below / f).as_posix())]
            for name in names:
                relative = (below / name).as_posix()
                chosen = not self.suffixes or name.endswith(self.suffixes)
                if chosen and not self._excluded(relative):
                    found.append((relative, Path(folder, name)))
        return sorted(found)

    def _excluded(self, relative: str) -> bool:
        name = relative.rpartition("/")[2]
        return any(
            fnmatch.fnmatchcase(relative if "/" in pattern else name, pattern)
            for pattern in self.exclude
        )

    def listing(self) -> tuple[str, int]:
        """Return a cheap fingerprint (settings; name, size, inode and times a file), and the bytes.

        An equal fingerprint means that no file was written, added or removed since. A different one
        proves nothing: `documents` must then be read to see whether the text is another.
        """
        what: list[object] = [self.suffixes, self.exclude, self.text_field]
        size = 0
        for name, path in self.files():
            try:
                s = path.stat()
            except OSError:
                what.append([name, None])
                continue
            what.append([name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns])
            size += s.st_size * (4 if name.endswith(".gz") else 1)
        return hashlib.sha256(json.dumps(what).encode()).hexdigest(), size

    def documents(self, skips: Skips) -> Iterator[Document]:
        """Yield every document in the fixed order; what is left out is counted in `skips`.

        Raises:
            UserError: If a path does not exist, or at the end if no document was left.
        """
        count = 0
        for name, path in self.files(skips):
            reader = self._records if name.endswith(_JSONL) else _whole_file
            try:
                if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block for ever
                    skips.add("not a regular file", name)
                    continue
                for document in reader(name, path, skips):
                    count += 1
                    yield document
            except (OSError, EOFError, zlib.error):
                skips.add("unreadable", name)
        if not count:
            raise UserError(
                f"the corpus {', '.join(self.paths)} must hold a document of UTF-8 text; skipped: "
                f"{skips}; suffixes: {', '.join(self.suffixes) or 'all'}; check path and suffixes"
            )

    def _records(self, name: str, path: Path, skips: Skips) -> Iterator[Document]:
        opener = gzip.open if name.endswith(".gz") else open
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{name}#{number}"
                if not line.strip():
                    continue
                try:
                    decoded = line.decode("utf-8").removeprefix("\ufeff" if number == 1 else "")
                    text = json.loads(decoded)[self.text_field]
                    text.encode()  # fails on half a surrogate pair, which an escape can spell
                except UnicodeError:
                    skips.add("not UTF-8", where)
                except (ValueError, RecursionError):
                    skips.add("not JSON", where)
                except (KeyError, TypeError, IndexError, AttributeError):
                    skips.add(f"without text in field {self.text_field!r}", where)
                else:
                    if text.strip():
                        yield Document(where, text, text)
                    else:
                        skips.add("empty", where)


def _whole_file(name: str, path: Path, skips: Skips) -> Iterator[Document]:
    data = path.read_bytes()
    if not data.strip():
        skips.add("empty", name)
    elif b"\0" in data[:8192]:
        skips.add("binary", name)
    else:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            skips.add("not UTF-8", name)
        else:
            yield Document(name, name, text)


def is_held_out(key: str, fraction: float) -> bool:
    """Say whether a document belongs to the held-out part: a pure function of its key.

    Args:
        key: The document's key.
        fraction: Share of documents to hold out, in 0 .. 1. A document that is held out at one
            fraction is held out at every larger one.
    """
    digest = hashlib.sha256(b"held-out\0" + key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def stdlib_sources() -> TextSource:
    """Return Python's own library sources without tests and installed packages: about 13 MB."""
    tests = ("test", "tests", "idle_test", "*_test", "test_*.py")
    installed = ("site-packages", "dist-packages", "__pycache__")
    folder = sysconfig.get_path("stdlib")
    return TextSource(paths=(folder,), suffixes=(".py",), exclude=tests + installed)
