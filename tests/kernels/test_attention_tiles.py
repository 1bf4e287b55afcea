"""Parts of the Triton code of attention by themselves, interpreted: which tiles, and tanh.

A tile too many or tested in vain costs time and no value, and a wrong one is seen only where a
window ends beside the edge of a tile: here every tile is compared with the pairs in it.
"""

import itertools

import pytest
import torch
from tests.kernels.specimen import item

from warploom.kernels.backends import interpreted

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from warploom.kernels.attention.flash_triton import seen_range, tanh  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
OPS = ("flash_attention", "flash_attention_varlen")
M, N = 3, 4  # queries and keys a tile


@triton.jit
def _ranges(cases, found, LEFT: tl.constexpr, RIGHT: tl.constexpr, M, N: tl.constexpr):
    case = cases + tl.program_id(0) * 6
    low, full, clear, high = seen_range(
        tl.load(case), tl.load(case + 1), tl.load(case + 2), tl.load(case + 3), tl.load(case + 4),
        tl.load(case + 5), LEFT, RIGHT, M, N,
    )  # fmt: skip
    to = found + tl.program_id(0) * 4
    tl.store(to, low)
    tl.store(to + 1, full)
    tl.store(to + 2, clear)
    tl.store(to + 3, high)


def _seen(start, queries, keys, offset, left, right):
    """Say which keys of whole tiles the queries of one tile see, pair by pair."""
    rows = torch.arange(start, min(start + M, queries))[:, None] + offset
    columns = torch.arange(-(-keys // N) * N)
    seen = (columns < keys) & (rows == rows)
    if left >= 0:
        seen &= rows - columns <= left
    if right >= 0:
        seen &= columns - rows <= right
    return seen


@item("values", ops=OPS)
@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (2, -1), (1, 0), (0, 3)])
def test_interpreted_every_tile_is_what_its_pairs_are(left, right):
    """From `full` to `clear` all pairs are seen, in the other tiles some, beyond them none."""
    spans = itertools.product(((0, 2), (0, 5), (3, 5)), (1, 7, 8, 13), range(-3, 5))
    cases = [(*rows, keys, offset, left, right) for rows, keys, offset in spans]
    found = torch.zeros(len(cases), 4, dtype=torch.int32)
    given = torch.tensor(cases, dtype=torch.int32)
    _ranges[(len(cases),)](given, found, left >= 0, right >= 0, M, N)
    for case, (low, full, clear, high) in zip(cases, found.tolist(), strict=True):
        seen = _seen(*case)
        some, every = (
            {at for at in range(0, seen.shape[1], N) if how(seen[:, at : at + N])}
            for how in (torch.any, torch.all)
        )
        tested = [
            at if at < full else at + clear - full for at in range(low, high - clear + full, N)
        ]
        walked = [*tested, *range(full, clear, N)]
        assert {*range(full, clear, N)} == every, case
        assert len({*walked}) == len(walked), case
        if some:
            assert {*walked} == {*range(min(some), max(some) + 1, N)}, case


@triton.jit
def _tanh(x, y, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at, tanh(tl.load(x + at)))


@item("values", ops=OPS)
def test_interpreted_tanh_has_small_relative_errors():
    small = torch.logspace(-30, 1.5, 1024)
    x = torch.cat([-small, small])
    y = torch.empty_like(x)
    _tanh[(2,)](x, y, 1024)
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=1e-6, atol=0)
    assert ((1 - y.double() ** 2) >= 0).all()
