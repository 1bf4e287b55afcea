"""Who owns which page of the cache, and which pages hold a beginning that others may share.

A page has owners, the sequences that read it. A full page can be found by what it holds: its digest
is the hash of the digest of the page before it and of its own ids, so that equal digests mean equal
beginnings, whoever computed them. A page without owners that can be found stays until its place is
needed; the one that was given back first goes first.

Source: Kwon et al. 2023, https://arxiv.org/abs/2309.06180, section 4.4.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class Pages:
    """The pages of a cache.

    Args:
        count: Number of pages.
        size: Tokens of a page.
        shared: Whether full pages can be found.

    Attributes:
        count: Number of pages.
        size: Tokens of a page.
    """

    def __init__(self, count: int, size: int, *, shared: bool = True) -> None:
        self.count, self.size, self.shared = count, size, shared
        self.forget()

    def forget(self) -> None:
        """Take every page from its owners, and find none again."""
        self._owners = [0] * self.count
        self._unused = [*reversed(range(self.count))]
        self._idle: OrderedDict[int, None] = OrderedDict()  # without owners, and can be found
        self._page: dict[bytes, int] = {}
        self._digest: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._unused) + len(self._idle)

    def owners(self, page: int) -> int:
        """Return the number of owners of a page."""
        return self._owners[page]

    def take(self) -> int:
        """Return a page for one owner; there must be a free one."""
        if self._unused:
            page = self._unused.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page[self._digest.pop(page)]
        self._owners[page] = 1
        return page

    def share(self, pages: Sequence[int]) -> None:
        """Add an owner to each page."""
        for page in pages:
            self._idle.pop(page, None)
            self._owners[page] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """Take an owner from each page; of a sequence's idle pages the last goes first."""
        for page in reversed(pages):
            self._owners[page] -= 1
            if not self._owners[page]:
                if page in self._digest:
                    self._idle[page] = None
                else:
                    self._unused.append(page)

    def publish(self, page: int, digest: bytes) -> None:
        """Let a full page be found, unless another one that holds the same can be."""
        if self.shared and digest not in self._page:
            self._page[digest], self._digest[page] = page, digest

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Return the pages of the longest beginning that is there, and become their owner."""
        found = []
        for digest in digests:
            if (page := self._page.get(digest)) is None:
                break
            found.append(page)
        self.share(found)
        return found

    def extend(self, digests: list[bytes], ids: Sequence[int]) -> None:
        """Append the digests of the full pages of `ids` that are not in the list."""
        if self.shared:
            for first in range(len(digests) * self.size, len(ids) - self.size + 1, self.size):
                own = array("q", ids[first : first + self.size]).tobytes()
                before = digests[-1] if digests else b""
                digests.append(hashlib.sha256(before + own).digest())
