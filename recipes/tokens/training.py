"""Train a byte-level BPE vocabulary on text.

The split pattern is GPT-4's (`cl100k_base`); digits are cut in one of three ways. The training is
deterministic: the same texts in the same order give the same vocabulary on any number of threads.

Source: Sennrich et al., Neural Machine Translation of Rare Words with Subword Units (2016),
algorithm 1; the pattern as `tiktoken` publishes it; digits in threes from the right after Singh
and Strouse, Tokenization counts (2024).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from ..errors import UserError
from .special import BOS, EOS, PAD, SPECIAL_TOKENS
from .tokenizer import Tokenizer

Digits = Literal["three", "one", "triples-from-the-right"]

_DIGITS: dict[str, str] = {
    "three": r"\p{N}{1,3}",
    "one": r"\p{N}",
    "triples-from-the-right": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
}
_RUN_OF_DIGITS = r"\p{N}{1,300}"  # bounds the look-ahead's cost; a longer run is cut every 300


@dataclass(frozen=True, kw_only=True)
class BPE:
    """What a vocabulary is trained to.

    Attributes:
        vocabulary: Number of ids, the 256 bytes and the special tokens included.
        digits: How a number is cut: "three" (up to three digits from the left, as GPT-4), "one",
            or "triples-from-the-right" (1|234|567).
        sample_bytes: At most this much text is learned from. The trainer counts pairs in 32 bits;
            the default keeps every count far below that, and its memory below about 10 GB.
    """

    vocabulary: int = 4096
    digits: Digits = "three"
    sample_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        least = 256 + len(SPECIAL_TOKENS)
        if self.vocabulary < least:
            raise UserError(
                f"vocabulary ({self.vocabulary}) must be at least {least}: 256 bytes and "
                f"{len(SPECIAL_TOKENS)} special tokens"
            )
        if self.digits not in get_args(Digits):
            raise UserError(f"digits ({self.digits!r}) must be one of {', '.join(_DIGITS)}")
        if not 0 < self.sample_bytes <= 1 << 31:
            raise UserError(f"sample_bytes ({self.sample_bytes}) must lie in 1 .. {1 << 31}")


def train_bpe(texts: Iterable[str], recipe: BPE) -> Tokenizer:
    """Train a vocabulary.

    Args:
        texts: Documents, read once.
        recipe: Size, digit mode, and how much text to learn from (whole documents, in order, until
            `recipe.sample_bytes` are full: hand in a mixed sample when there is more).

    Returns:
        A tokenizer with exactly `recipe.vocabulary` ids, the special tokens last.

    Raises:
        UserError: If the text is too little for that many tokens.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer(recipe.digits)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_until(texts, recipe.sample_bytes), trainer)
    found = backend.get_vocab_size() + len(SPECIAL_TOKENS)
    if found < recipe.vocabulary:
        raise UserError(
            f"a vocabulary of {recipe.vocabulary} needs more text: these documents give only "
            f"{found} tokens; ask for at most {found}, or give more text"
        )
    backend.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL_TOKENS])
    bos = backend.token_to_id(BOS)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    specification: dict[str, Any] = json.loads(backend.to_str())
    return Tokenizer(specification, {"bos": BOS, "eos": EOS, "pad": PAD})


def _pre_tokenizer(digits: Digits) -> Any:
    """Cut text into the pieces that merges never cross."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|"
        + _DIGITS[digits]
        + r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    patterns = [pattern]
    if digits == "triples-from-the-right":
        patterns.insert(0, _RUN_OF_DIGITS)
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), "isolated") for p in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _until(texts: Iterable[str], limit: int) -> Iterable[str]:
    """Yield documents while they fit into `limit` bytes; a first one that is longer is cut."""
    left = limit
    for text in texts:
        size = len(text.encode())
        if size > left and left < limit:
            return
        yield text if size <= left else text.encode()[:left].decode("utf-8", errors="ignore")
        left -= size
        if left <= 0:
            return
