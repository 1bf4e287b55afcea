"""Ids become text as they come, and text ends before a stop string."""

from collections.abc import Callable, Sequence

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are not UTF-8


class TextStream:
    """The text of one sample.

    What may still change is held back: bytes that are not a whole character yet, and what may be
    the beginning of a stop string.

    Args:
        decode: From ids to text, special tokens left out.
        stop: Strings that end the text.

    Attributes:
        text: What was handed out.
        stopped: Whether a stop string was met.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode, self.stop = decode, tuple(stop)
        self.text, self.stopped = "", False
        self._ids: list[int] = []
        self._first = self._read = 0  # ids that give the neighbours their context, and are read
        self._held = ""

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain now."""
        self._ids.append(token)
        new = self._new()
        if new.endswith(_BROKEN):
            return ""
        if new:
            self._first = self._read
        self._read = len(self._ids)
        return self._hand_out(new)

    def close(self) -> str:
        """Return what was held back; there are no more tokens."""
        new = "" if self.stopped else self._new()
        self._first = self._read = len(self._ids)
        shown = self._hand_out(new)
        rest, self._held = self._held, ""
        self.text += rest
        return shown + rest

    def _new(self) -> str:
        """Return the text of the ids that are not read yet, where they stand."""
        before = self.decode(self._ids[self._first : self._read])
        return self.decode(self._ids[self._first :])[len(before) :]

    def _hand_out(self, new: str) -> str:
        held = self._held + new
        found = [at for s in self.stop if (at := held.find(s)) >= 0]
        if found:
            self.stopped, shown, self._held = True, held[: min(found)], ""
        else:
            most = max(map(len, self.stop), default=1) - 1
            sizes = range(min(most, len(held)), 0, -1)
            keep = next((n for n in sizes if any(s.startswith(held[-n:]) for s in self.stop)), 0)
            shown, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += shown
        return shown
