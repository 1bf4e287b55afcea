"""How well a vocabulary fits a text: characters and bytes a token, common words in one token."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from .tokenizer import Tokenizer

_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Counts:
    """Sizes of a set of documents; tokens without BOS and EOS."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.documents + other.documents,
            self.characters + other.characters,
            self.bytes + other.bytes,
            self.tokens + other.tokens,
        )


@dataclass(frozen=True)
class FertilityReport:
    """How a tokenizer cuts a sample.

    Attributes:
        by_type: Sizes by file suffix ("" for none).
        total: Sizes of all of them.
        common_words: Number of the commonest words looked at.
        single_token_words: Share of them, in 0 .. 1, that are one token alone or behind a space.
        lossless: Whether every document came back from its ids byte for byte.
    """

    by_type: dict[str, Counts]
    total: Counts
    common_words: int
    single_token_words: float
    lossless: bool

    def table(self) -> str:
        """Return the report as aligned text."""
        lines = [f"{'type':<10}{'documents':>10}{'bytes':>14}{'char/token':>12}{'byte/token':>12}"]
        for suffix, c in [*sorted(self.by_type.items()), ("all", self.total)]:
            tokens = max(c.tokens, 1)
            lines.append(
                f"{suffix or '(none)':<10}{c.documents:>10}{c.bytes:>14}"
                f"{c.characters / tokens:>12.3f}{c.bytes / tokens:>12.3f}"
            )
        share = f"{100 * self.single_token_words:.1f} %"
        lines.append(f"{share} of the {self.common_words} commonest words are one token")
        lines.append("round trip: " + ("lossless" if self.lossless else "NOT lossless"))
        return "\n".join(lines)


def file_type(name: str) -> str:
    """Return the suffix that a document's name is counted under; a record's is its file's."""
    return PurePosixPath(name.partition("#")[0]).suffix


def measure_fertility(
    tokenizer: Tokenizer, documents: Iterable[tuple[str, str]], *, words: int = 1000
) -> FertilityReport:
    """Encode a sample, decode it again, and count.

    Args:
        tokenizer: What to judge.
        documents: Names and texts; kept in no memory.
        words: How many of the commonest words to look at.
    """
    by_type: dict[str, Counts] = {}
    seen: Counter[str] = Counter()
    lossless = True
    for name, text in documents:
        ids = tokenizer.encode(text)
        data = text.encode()
        lossless &= tokenizer.decode_bytes(ids) == data
        suffix = file_type(name)
        one = Counts(1, len(text), len(data), len(ids))
        by_type[suffix] = by_type.get(suffix, Counts()) + one
        seen.update(_WORD.findall(text))
    common = sorted(seen, key=lambda word: (-seen[word], word))[:words]
    alone = tokenizer.encode_batch(common)
    behind_space = tokenizer.encode_batch([f" {word}" for word in common])
    single = sum(min(len(a), len(b)) == 1 for a, b in zip(alone, behind_space, strict=True))
    return FertilityReport(
        by_type=by_type,
        total=sum(by_type.values(), Counts()),
        common_words=len(common),
        single_token_words=single / max(len(common), 1),
        lossless=lossless,
    )
