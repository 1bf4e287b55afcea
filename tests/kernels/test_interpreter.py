"""The plugin `interpreter.py` refuses what lies outside of the tensors of a launch."""

import pytest
import torch

from warploom.kernels.backends import interpreted

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")


@triton.jit
def _copy(x, y, wanted, N: tl.constexpr):
    lanes = tl.arange(0, N)
    mask = (lanes < wanted) & (tl.program_id(0) == 0)  # of int32, to the interpreter
    tl.store(y + lanes, tl.load(x + lanes, mask, other=0.0), mask)


@triton.jit
def _add(x, y):
    tl.atomic_add(y + tl.program_id(0), tl.load(x))


def test_interpreted_what_is_inside_passes():
    x, y = torch.randn(5), torch.zeros(8)
    _copy[(1,)](x, y[1:6], 5, 8)
    assert torch.equal(y, torch.nn.functional.pad(x, (1, 2)))
    _copy[(1,)](x, y[:0], 0, 8)
    _add[(8,)](x, y)
    torch.testing.assert_close(y[0], x[0])


LAUNCHES = {
    "load": lambda x, y: _copy[(1,)](x[:5], y, 6, 8),
    "store": lambda x, y: _copy[(1,)](x, y[:5], 6, 8),
    "atomic_rmw": lambda x, y: _add[(6,)](x, y[:5]),
}


@pytest.mark.parametrize("access", LAUNCHES)
def test_interpreted_what_is_outside_is_refused(access):
    """Beyond a view too, whatever its storage holds; masked lanes are no accesses."""
    with pytest.raises(InterpreterError, match=f"{access} of 4 bytes: 1 of . elements lie outside"):
        LAUNCHES[access](torch.randn(8), torch.zeros(8))
