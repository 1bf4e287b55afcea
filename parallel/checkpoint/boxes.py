"""Boxes of a logical tensor: one `(start, stop, step)` a dimension, and how they meet.

A box is what a piece or a chunk holds. Steps are positive; a box of a scalar is `()`. Two
progressions `a + i s` and `b + j t` meet in a progression of step lcm(s, t), or not at all.
"""

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np

from ..sharding import Slice

Box = tuple[Slice, ...]


def sizes(box: Box) -> tuple[int, ...]:
    """Return how many indices the box has on each dimension."""
    return tuple(len(range(*cut)) for cut in box)


def _meet(a: Slice, b: Slice) -> Slice | None:
    along_a, along_b = range(*a), range(*b)
    if not along_a or not along_b:
        return None
    common = math.gcd(a[2], b[2])
    if (b[0] - a[0]) % common:
        return None
    step = a[2] // common * b[2]
    turns = (b[0] - a[0]) // common * pow(a[2] // common, -1, b[2] // common) % (b[2] // common)
    first = a[0] + turns * a[2]
    first += max(0, -((first - b[0]) // step)) * step
    last = min(along_a[-1], along_b[-1])
    return None if first > last else (first, last - (last - first) % step + 1, step)


def meet(a: Box, b: Box) -> Box | None:
    """Return the indices that both boxes hold, or `None` where there are none."""
    cuts = [_meet(x, y) for x, y in zip(a, b, strict=True)]
    return None if None in cuts else tuple(cut for cut in cuts if cut is not None)


def within(part: Box, box: Box) -> tuple[slice, ...]:
    """Return where `part` lies in a tensor that holds `box`; `box` must hold all of it."""
    return tuple(
        slice((p[0] - b[0]) // b[2], (range(*p)[-1] - b[0]) // b[2] + 1, p[2] // b[2])
        for p, b in zip(part, box, strict=True)
    )


def uncovered(box: Box, parts: Sequence[Box]) -> int:
    """Count the elements of `box` that lie in none of the `parts` (boxes inside it).

    Parts may overlap. Indices of a dimension that lie in the same cuts are taken together, so that
    what is marked is as small as the number of different cuts, not as the tensor.
    """
    total = math.prod(sizes(box))
    if len(parts) < 2 or total == 0:
        return total - sum(math.prod(sizes(part)) for part in parts)
    inside = [within(part, box) for part in parts]
    counts: list[np.ndarray] = []
    places: list[dict[tuple[int, int, int], np.ndarray]] = []
    for dim, size in enumerate(sizes(box)):
        cuts = sorted({(i[dim].start, i[dim].stop, i[dim].step) for i in inside})
        # a sum of random numbers tells which cuts an index lies in
        marks = np.random.default_rng(dim).integers(1, 1 << 63, len(cuts), dtype=np.uint64)
        label = np.zeros(size, np.uint64)
        for cut, mark in zip(cuts, marks, strict=True):
            label[slice(*cut)] += mark
        _, kind, count = np.unique(label, return_inverse=True, return_counts=True)
        counts.append(count)
        places.append({cut: np.unique(kind[slice(*cut)]) for cut in cuts})
    free = np.ones([len(count) for count in counts], bool)
    for index in inside:
        lines = [at[(i.start, i.stop, i.step)] for at, i in zip(places, index, strict=True)]
        free[np.ix_(*lines)] = False
    elements = reduce(np.multiply.outer, counts, np.ones((), np.int64))
    return int((elements * free).sum())
