"""Covering arrays: few cases in which every legal pair of levels of any two factors occurs.

Greedy and deterministic: each case begins with the first pair that is not covered yet and is
completed, factor by factor, by the level that covers most; a constraint is a predicate over a
partial case, and what it forbids is searched around, so a pair stays uncovered only if no legal
case holds it.

Source: Cohen et al. 1997, https://doi.org/10.1109/32.605761 (AETG).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

Case = dict[str, object]
Legal = Callable[[Case], bool]


def pairs(case: Mapping[str, object]) -> set[tuple[tuple[str, object], tuple[str, object]]]:
    """The pairs of levels in a case, in the order of its factors."""
    return set(combinations(sorted(case.items(), key=lambda item: item[0]), 2))


def covering(
    factors: Mapping[str, Sequence[object]], legal: Legal, *, first: Sequence[Case] = ()
) -> list[Case]:
    """Cases in which every pair of levels occurs that some legal case holds.

    Args:
        factors: Levels (hashable) by factor; earlier levels are chosen where nothing else decides.
        legal: Whether a case, complete or partial, may be completed; it is asked of partial cases
            too, where it may say yes to what it cannot judge yet.
        first: Cases that are taken as they are, and whose pairs count as covered.
    """
    names = sorted(factors)
    open_pairs = {
        ((a, x), (b, y)): None
        for a, b in combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
    }
    found = [dict(case) for case in first]
    for case in found:
        for pair in pairs(case):
            open_pairs.pop(pair, None)
    while open_pairs:
        seed = next(iter(open_pairs))
        case = next(_completed(dict(seed), factors, legal, open_pairs), None)
        if case is None:
            del open_pairs[seed]
            continue
        found.append(case)
        for pair in pairs(case):
            open_pairs.pop(pair, None)
    return found


def _completed(case, factors, legal, open_pairs) -> Iterator[Case]:
    """Complete a case in every legal way, the one that covers most at each factor first."""
    if not legal(case):
        return
    missing = [name for name in factors if name not in case]
    if not missing:
        yield {name: case[name] for name in factors}
        return
    name = missing[0]

    def gain(level):
        return sum(
            (((name, level), item) if name < item[0] else (item, (name, level))) in open_pairs
            for item in case.items()
        )

    for level in sorted(factors[name], key=gain, reverse=True):
        yield from _completed({**case, name: level}, factors, legal, open_pairs)


def uncovered(
    cases: Sequence[Case], factors: Mapping[str, Sequence[object]], legal: Legal
) -> list[tuple]:
    """The pairs that are in no case though some legal case holds them: empty for a covering."""
    seen = set().union(*(pairs(case) for case in cases))
    return [
        ((a, x), (b, y))
        for a, b in combinations(sorted(factors), 2)
        for x in factors[a]
        for y in factors[b]
        if ((a, x), (b, y)) not in seen
        and next(_completed({a: x, b: y}, factors, legal, {}), None) is not None
    ]
