"""Every shipped configuration compiles for sm_90 and sm_100, and fits: the gate without a GPU.

A case is a specimen at a size of a real model: its forward and backward as they would be launched.
One case a specimen runs by default, all of them by `make test-all`; Triton keeps what it compiled.
"""

import pytest
import torch
from tests.kernels import launches as gate
from tests.kernels.specimen import item, specimens
from tests.kernels.specimens.optim import LAUNCHES

from warploom.kernels import backends, tuning

pytest.importorskip("triton", reason="needs the package triton")

MANY = tuple(enumerate(LAUNCHES))
STACK = 8  # bytes a thread: a number or two
LONG = 16  # of rows of 16,384 on sm_100: the ptxas of Triton 3.6 halves its registers for one
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHARED_LIMIT = 227 * 1024  # bytes a program may have on sm_90 and sm_100
REGISTERS = 255  # a thread can have no more; what needs more spills, which STACK shows
# Kernels whose bulk is not moved in 16-byte accesses, and why.
NARROW = {
    "rms_triton.column_kernel": "writes a row of shares",
    "fp8_triton.amax_kernel": "writes one number a tile",
    "logits_triton.partials_kernel": "writes three numbers a row",
    "norm_triton.norm_kernel": "writes one number a block",
    "norm_triton.sum_kernel": "adds up a few kilobytes",
    "permutation_triton.rank_kernel": "reads the experts, a few hundred kilobytes",
    "permutation_triton.invert_kernel": "reads the order, a few hundred kilobytes",
    "rms_triton.shares_kernel": "adds up a few kilobytes",
    "grouped_triton.tiles_kernel": "writes three numbers a tile of rows",
}


def _served():
    listed, there = [s for s in specimens() if "triton" in s.backends], backends.available()
    return [s for s in listed if "triton" in there[s.op]]


def _cases():
    for number, s in enumerate(_served()):
        for i, size in enumerate(s.training):
            dtypes = [d for d in _DTYPES if d in s.dtypes]
            for dtype in dtypes:
                for capability in (90, 100):
                    sample = i == 0 and dtype == dtypes[0]
                    sample = sample and capability == (90, 100)[number % 2]
                    marks = [] if sample else [pytest.mark.slow]
                    name = f"{s}-{size[0]}x{size[1]}-{str(dtype)[6:]}-sm{capability}"
                    yield pytest.param(s, *size, dtype, capability, marks=marks, id=name)


@item("fits sm_90 and sm_100")
@pytest.mark.parametrize(("s", "rows", "width", "dtype", "capability"), [*_cases()])
def test_compiles_and_fits(s, rows, width, dtype, capability):
    _fit(gate.launches(s, rows, width, dtype), capability, width % 16 == 0)


@pytest.mark.slow
@item("fits sm_90 and sm_100")
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("s", _served(), ids=str)
def test_every_configuration_that_a_search_may_find_fits(s, capability):
    dtype = next(d for d in _DTYPES if d in s.dtypes)
    for size in s.training:
        for pick in range(1, tuning.MOST):
            _fit(gate.launches(s, *size, dtype, pick), capability, wide=False)


@item("fits sm_90 and sm_100", ops=("adamw", "global_norm", "newton_schulz"))
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize(
    "call", [pytest.param(c, marks=[] if n in (1, 4) else pytest.mark.slow) for n, c in MANY]
)
def test_operators_on_many_tensors_fit(call, capability):
    with gate.recorded() as found:
        call()
    _fit(found, capability, wide=False)


def _fit(found, capability, wide):
    assert found, "nothing was launched"
    for launch in found:
        report = gate.compile_for(launch, capability)
        about = f"{report.name} {launch.options}"
        long = capability == 100 and launch.options.get("BLOCK", 0) >= 16384
        most = LONG if long else STACK
        assert report.stack <= most, f"{about}: {report.stack} bytes of stack: it spills"
        assert report.registers <= REGISTERS, about
        assert report.shared <= SHARED_LIMIT, f"{about}: {report.shared} bytes of shared memory"
        assert not gate.narrow_products(report.ttir), about
        assert not gate.products_from_registers(report.ptx), f"{about}: see kernels/toolchain.py"
        if report.name not in NARROW and wide:
            loads, stores = gate.wide_accesses(launch, report.ptx)
            assert loads, f"{about}: no 16-byte load"
            assert stores, f"{about}: no 16-byte store"


@item("more than 2^31 elements")
@pytest.mark.parametrize("s", [s for s in _served() if s.huge], ids=str)
def test_more_than_2_to_the_31_elements_need_64_bits(s):
    """At a size that overflows 32 bits (of memory that is reserved, not touched)."""
    width = max(width for _, width in s.training)
    for launch in gate.launches(s, 2**31 // width + 1, width, torch.bfloat16):
        report = gate.compile_for(launch, 90)
        assert not gate.narrow_products(report.ttir), report.name


def _broken(kernel, *args, **options):
    with gate.recorded() as found:
        kernel[(1,)](*args, **options)
    return gate.compile_for(found[0], 90)


def test_a_kernel_that_spills_is_seen():
    """The gate itself: a row of 8192 in one warp cannot stay in registers."""
    from warploom.kernels.norm import rms_triton

    x, n = torch.empty(16, 8192, dtype=torch.bfloat16), torch.empty(16)
    args = (x, x, x[0], x, x, n, 16, 8192, 8192, 8192, 1e-6)
    report = _broken(rms_triton.forward_kernel, *args, FUSED=False, ROWS=1, BLOCK=8192, num_warps=1)
    assert report.stack > LONG


def test_a_narrow_product_is_seen():
    ttir = """
    %row = tt.get_program_id x : i32
    %off = arith.muli %row, %stride : i32
    %wide = arith.extsi %off : i32 to i64
    %at = tt.addptr %x, %wide : !tt.ptr<f32>, i64
    """
    assert gate.narrow_products(ttir) == ["%off = arith.muli %row, %stride : i32"]
    assert not gate.narrow_products(ttir.replace(" : i32\n    %wide", " : i64\n    %wide"))
    constant = "%tile = arith.constant 64 : i32" + ttir.replace("%stride", "%tile")
    assert not gate.narrow_products(constant)
    assert gate.narrow_products("tt.func public @k(%n: i64) {" + constant)
