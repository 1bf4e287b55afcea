"""The device code of csrc in the emulator: what a GPU would compute, but not how fast.

The kernels' own source runs, launches and plans included, against the same oracles as on a GPU.
It cannot show what nvcc makes of the source, nor races that a fiber's turn hides.
"""

import pytest
import torch
from tests.csrc.emulated import install
from tests.kernels import test_must as must
from tests.kernels.specimen import Draw, check, compute, specimens

from warploom.kernels import native
from warploom.kernels.norm import rms_norm, rms_norm_reference

SPECIMENS = [s for s in specimens() if "cuda" in s.backends]
every = pytest.mark.parametrize("s", SPECIMENS, ids=str)
NARROW = (torch.float16, torch.bfloat16)
# A row of one group of lanes, of several; all pieces, some; one block to a row; walked over.
WIDTHS = (8, 64, 96, 128, 264, 512, 1000, 1032, 4096, 5120)


@pytest.fixture
def emulated(monkeypatch, pytestconfig):
    return install(monkeypatch, pytestconfig.cache.mkdir("csrc"))


@every
def test_values_and_gradients_against_float64(s, emulated):
    for rows, width in s.shapes:
        for dtype in (torch.float32, *NARROW):
            check(s, rows, width, dtype, "cuda")


@every
@pytest.mark.parametrize("width", WIDTHS)
def test_every_way_to_cut_a_row(s, width, emulated):
    before = emulated.packs.value
    for dtype in (torch.float32, *NARROW):
        check(s, 11 if width < 4096 else 5, width, dtype, "cuda")
    assert emulated.packs.value > before


@every
@pytest.mark.parametrize(("width", "dtype"), [(8196, torch.float32), (16392, torch.bfloat16)])
def test_rows_that_do_not_fit_are_walked_over(s, width, dtype, emulated):
    check(s, 3, width, dtype, "cuda")


GUARD = 64  # elements


class _Guarded:
    """A tensor `[rows, width]` with a gap after each row, NaN around it and in its gaps."""

    def __init__(self, rows, width, dtype, *, gap=0, shift=0, fill=False):
        self.begin, self.stride = GUARD + shift, width + gap
        self.memory = torch.full((rows * self.stride + 3 * GUARD,), float("nan"), dtype=dtype)
        size = (rows, width)
        self.view = self.memory.as_strided(size, (self.stride, 1), self.begin)
        if fill:
            self.view.copy_(Draw(dtype)(*size, seed=shift + gap))
        self.at = self.view.data_ptr()

    def untouched(self):
        rest = self.memory.clone()
        rest.as_strided(self.view.shape, self.view.stride(), self.begin).fill_(float("nan"))
        return bool(rest.isnan().all()) and not bool(self.view.isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize(("shift", "gap"), [(0, 0), (0, 8), (1, 0), (0, 3), (1, 3)])
@pytest.mark.parametrize("width", [40, 65, 520])
def test_nothing_is_written_beside_the_outputs(width, shift, gap, dtype, emulated):
    """Strided and misaligned inputs, misaligned outputs; every element of an output is written."""
    rows, kind, place = 5, {"shift": shift}, (native.code(dtype),) * 2
    x, residual, dy, dh = (
        _Guarded(rows, width, dtype, gap=gap, fill=True, **kind) for _ in range(4)
    )
    weight = _Guarded(1, width, dtype, fill=True, **kind)
    y, h, dx = (_Guarded(rows, width, dtype, **kind) for _ in range(3))
    dweight, rstd = _Guarded(1, width, dtype, **kind), _Guarded(1, rows, torch.float32)
    parts = emulated.rms_norm_parts(rows, width, place[0], 1)
    shares = _Guarded(parts, width, torch.float32)
    before, sizes = emulated.packs.value, (rows, width)
    inputs = (x.at, residual.at, weight.at, y.at, h.at, rstd.at)
    strides = (x.stride, residual.stride)
    assert not emulated.rms_norm_forward(*inputs, *sizes, *strides, 1e-6, *place, 0, 0)
    inputs = (dy.at, dh.at, h.at, weight.at, rstd.at, dx.at, dweight.at, shares.at)
    strides = (dy.stride, dh.stride, h.stride)
    assert not emulated.rms_norm_backward(*inputs, *sizes, *strides, parts, *place, place[0], 0, 0)
    assert all(out.untouched() for out in (y, h, dx, dweight, rstd))
    assert (emulated.packs.value > before) == (not shift and gap % 8 == 0 and width % 8 == 0)
    want, h_want = rms_norm_reference(x.view, weight.view[0], residual=residual.view)
    torch.testing.assert_close(h.view, h_want, rtol=0, atol=0)
    torch.testing.assert_close(y.view, want)


def test_the_weight_may_have_any_type(emulated):
    for dtype in (torch.float32, *NARROW):
        for other in (torch.float32, *NARROW):
            x = Draw(dtype)(7, 64).requires_grad_()
            weight = Draw(other)(64, seed=1).requires_grad_()
            got = [
                *compute(lambda *xs: rms_norm(*xs, backend="cuda"), (x, weight)),
                *compute(lambda *xs: rms_norm(*xs, backend="reference"), (x, weight)),
            ]
            for mine, theirs in zip(got[:3], got[3:], strict=True):
                assert mine.dtype == theirs.dtype
                torch.testing.assert_close(mine, theirs)


@every
def test_any_layout(s, emulated):
    must.test_any_layout(s, "cpu", "cuda")


@every
def test_upstream_gradients_of_any_kind(s, emulated):
    must.test_upstream_gradients_of_any_kind(s, "cpu", "cuda")


@every
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_poisons_its_row_alone(s, poison, emulated):
    must.test_a_poisoned_row_poisons_its_row_alone(s, "cpu", "cuda", poison)
