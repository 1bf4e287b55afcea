"""Which samples are computed in the next step, how many tokens of each, and in which pages.

Samples that lack one token come first, whatever the step holds beside them. Then up to `chunk`
tokens of beginnings, oldest first: of those that are being read, then of those that wait. One is
admitted when all its tokens have pages. When pages run out, the youngest sample is put back: its
pages are taken, its tokens stay, and it will be computed again.

The samples of one prompt follow the first of them: they wait until its prompt is computed, and
begin with its pages. A page that is written has one owner: where a last page is shared that is not
full, who writes first copies it.

All of it depends on the calls alone, so that ranks that make the same calls have the same schedule.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .pages import Pages


@dataclass(slots=True, eq=False, kw_only=True)
class Sample:
    """A text that is being continued.

    Attributes:
        number: Its place in the order of arrival.
        ids: The prompt, and what was drawn.
        prompt: Tokens of the prompt.
        leader: The first sample of the same prompt; `None` for that one itself.
        done: Tokens whose keys and values are in pages.
        pages: Where they are.
        slot: Its row of the tables and of the states; -1 while it waits.
        digests: Of its full pages, as far as they were needed.
        found: Tokens of the prompt that were in pages when it was first admitted.
    """

    number: int
    ids: list[int]
    prompt: int
    leader: "Sample | None" = None
    done: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    digests: list[bytes] = field(default_factory=list)
    found: int | None = None

    @property
    def follows(self) -> bool:
        """Whether its prompt is being computed for another sample."""
        first = self.leader
        return first is not None and first.slot >= 0 and first.done < first.prompt


class Scheduler:
    """Samples that wait, samples that run, and their pages.

    Args:
        pages: The pages of the cache.
        slots: Most samples that run at a time.
        longest: Most tokens of a sample.
        chunk: Most tokens of beginnings in a step.
        copy: Copies a page's content to another page.
        copy_slot: Copies a slot's states to another slot.

    Attributes:
        waiting: Samples that have no slot, in the order of arrival.
        running: Samples that have one, in the order of arrival.
        tables: Pages of the sample in each slot `[slots, pages]`, int32.
        put_back: How many times a sample lost its pages.
    """

    def __init__(
        self,
        pages: Pages,
        *,
        slots: int,
        longest: int,
        chunk: int,
        copy: Callable[[int, int], None],
        copy_slot: Callable[[int, int], None],
    ) -> None:
        self.pages, self.chunk = pages, chunk
        self.copy, self.copy_slot = copy, copy_slot
        self.waiting: list[Sample] = []
        self.running: list[Sample] = []
        self.tables = np.zeros((slots, -(-longest // pages.size)), dtype=np.int32)
        self.put_back = 0
        self._slots = [*reversed(range(slots))]

    def add(self, sample: Sample) -> None:
        """Let a sample wait."""
        insort(self.waiting, sample, key=_number)

    def remove(self, sample: Sample) -> None:
        """Forget a sample that has ended; its pages may still be found."""
        if sample.slot < 0:
            self.waiting.remove(sample)
        else:
            self._stop(sample)

    def reset(self) -> None:
        """Let every sample wait, to be computed from its first token: pages hold nothing."""
        for sample in [*self.running]:
            self._put_back(sample)
        self.pages.forget()

    def plan(self) -> list[tuple[Sample, int]]:
        """Choose the samples of the next step and the number of tokens of each.

        They have pages for these tokens, which the step must write before it reads: another sample
        of the same step may have found them.
        """
        planned, budget = [], self.chunk
        for sample in [*self.running]:
            if sample.slot < 0:
                continue  # an older one took its pages
            missing = len(sample.ids) - sample.done
            count = 1 if missing == 1 else min(missing, budget)
            if count and self._has_room(sample, count):
                budget -= count if missing > 1 else 0
                planned.append((sample, count))
        for sample in [*self.waiting]:
            if budget < 1 or not self._slots:
                break
            if sample.follows:
                continue
            if not self._admit(sample):
                break  # nothing that came later overtakes it
            count = min(len(sample.ids) - sample.done, budget)
            budget -= count
            planned.append((sample, count))
            self._publish(sample, count)
        return planned

    def _admit(self, sample: Sample) -> bool:
        """Give a sample a slot, pages that hold its beginning, and pages for the rest."""
        pages, size = self.pages, self.pages.size
        pages.extend(sample.digests, sample.ids)
        found = pages.find(sample.digests[: (len(sample.ids) - 1) // size])
        wanted = -(-len(sample.ids) // size) - len(found)
        if pages.free < wanted:
            pages.give_back(found)
            return False
        self._start(sample, found, len(found) * size)
        for _ in range(wanted):
            self._append(sample, pages.take())
        return True

    def _start(self, sample: Sample, pages: list[int], done: int) -> None:
        self.waiting.remove(sample)
        insort(self.running, sample, key=_number)
        sample.slot, sample.done = self._slots.pop(), done
        if sample.found is None:
            sample.found = done
        for page in pages:
            self._append(sample, page)

    def _append(self, sample: Sample, page: int) -> None:
        self.tables[sample.slot, len(sample.pages)] = page
        sample.pages.append(page)

    def _has_room(self, sample: Sample, count: int) -> bool:
        """Make the pages that take the next tokens its own; `False` where it was put back."""
        last = sample.done // self.pages.size
        shared = last < len(sample.pages) and self.pages.owners(sample.pages[last]) > 1
        while shared or len(sample.pages) * self.pages.size < sample.done + count:
            if not self.pages.free:
                self._put_back(self.running[-1])
                if sample.slot < 0:
                    return False
                shared = shared and self.pages.owners(sample.pages[last]) > 1
            elif shared:
                own, old = self.pages.take(), sample.pages[last]
                self.copy(old, own)
                self.pages.give_back([old])
                sample.pages[last] = self.tables[sample.slot, last] = own
                shared = False
            else:
                self._append(sample, self.pages.take())
        self._publish(sample, count)
        return True

    def _publish(self, sample: Sample, count: int) -> None:
        """Let the pages that the next tokens fill be found."""
        size, done = self.pages.size, sample.done
        self.pages.extend(sample.digests, sample.ids)
        for full in range(done // size, (done + count) // size) if sample.digests else ():
            self.pages.publish(sample.pages[full], sample.digests[full])

    def fork(self, leader: Sample) -> list[Sample]:
        """Start the samples that follow one whose prompt has just been computed.

        As many as there are slots, and pages for their next tokens; the others wait for these.
        """
        started: list[Sample] = []
        if leader.leader is not None or leader.done != leader.prompt:
            return started
        for sample in [s for s in self.waiting if s.leader is leader and len(s.ids) == s.prompt]:
            if not self._slots or self.pages.free <= len(started):
                break
            self.pages.share(leader.pages)
            self._start(sample, leader.pages, leader.done)
            self.copy_slot(leader.slot, sample.slot)
            started.append(sample)
        return started

    def _put_back(self, sample: Sample) -> None:
        self._stop(sample)
        sample.done = 0
        self.put_back += 1
        self.add(sample)

    def _stop(self, sample: Sample) -> None:
        """Take a sample's slot and pages."""
        self.running.remove(sample)
        self.pages.give_back(sample.pages)
        self._slots.append(sample.slot)
        sample.pages, sample.slot = [], -1


def _number(sample: Sample) -> int:
    return sample.number
