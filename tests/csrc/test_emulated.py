"""The device code of csrc in the emulator: what a GPU would compute, but not how fast.

The kernels' own source runs, launches and plans included, against the same oracles as on a GPU.
It cannot show what nvcc makes of the source, nor races that a fiber's turn hides.
"""

import hashlib
import runpy

import pytest
import torch
from tests.csrc.emulated import ROOT, install
from tests.kernels import test_must as must
from tests.kernels.specimen import check, specimens

SPECIMENS = [s for s in specimens() if "cuda" in s.backends]
every = pytest.mark.parametrize("s", SPECIMENS, ids=str)
NARROW = (torch.float16, torch.bfloat16)
# A row of one group of lanes, of several; all pieces, some; one block to a row; walked over.
WIDTHS = (8, 64, 96, 128, 264, 512, 1000, 1032, 4096, 5120)


@pytest.fixture(scope="session")
def digits():
    """Hash of all that the emulator is compiled from."""
    sources = runpy.run_path(str(ROOT / "setup.py"))["source_hash"]()
    emulator = (ROOT / "tests/csrc/emulator.h").read_bytes()
    return hashlib.sha256(sources.encode() + emulator).hexdigest()


@pytest.fixture
def emulated(monkeypatch, pytestconfig, digits):
    return install(monkeypatch, pytestconfig.cache.mkdir("csrc"), digits)


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
        check(s, 11, width, dtype, "cuda")
    assert emulated.packs.value > before


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
