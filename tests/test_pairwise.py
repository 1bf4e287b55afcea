"""The generator of covering arrays."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pairwise import covering, pairs, uncovered


def _all(case):
    return True


def test_four_factors_of_three_levels_take_about_nine_cases():
    factors = {name: (0, 1, 2) for name in "abcd"}
    cases = covering(factors, _all)
    assert uncovered(cases, factors, _all) == []
    assert 9 <= len(cases) <= 13  # nine is the least; the product is 81


def test_a_case_too_few_is_seen():
    factors = {name: (0, 1) for name in "abc"}
    cases = covering(factors, _all)
    assert uncovered(cases[:-1], factors, _all)


def test_given_cases_count():
    factors = {name: (0, 1) for name in "abc"}
    every = [dict(zip("abc", levels, strict=True)) for levels in product((0, 1), repeat=3)]
    assert covering(factors, _all, first=every) == every


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_pair_that_a_legal_case_holds_is_covered(data):
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))
    factors = {f"f{n}": tuple(range(size)) for n, size in enumerate(sizes)}
    every = [dict(zip(factors, c, strict=True)) for c in product(*factors.values())]
    banned = data.draw(st.lists(st.sampled_from(every), max_size=len(every)))

    def legal(case):
        return len(case) < len(factors) or case not in banned

    cases = covering(factors, legal)
    assert all(legal(case) for case in cases)
    held = set().union(*(pairs(case) for case in every if case not in banned))
    assert held <= set().union(*(pairs(case) for case in cases))
    assert cases == covering(factors, legal)
