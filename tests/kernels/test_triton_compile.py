"""Every shipped configuration compiles for sm_90 and sm_100: no spill, fits, wide accesses."""

import pytest
from tests.kernels import cross_compile as cross

pytest.importorskip("triton", reason="needs the package triton")

# (width, dtype, capability): these in the default run, the others by `make test-all`
_QUICK = {(576, "bf16", 90), (4096, "bf16", 100)}
_WIDTHS = (64, 128, 129, 576, 1000, 4096, 8192, 16384)


def _cases():
    for width in _WIDTHS:
        for dtype in ("fp16", "bf16", "fp32"):
            for capability in cross.CAPABILITIES:
                case = (width, dtype, capability)
                yield pytest.param(*case, marks=[] if case in _QUICK else pytest.mark.slow)


def _check(report, *, wide=True):
    assert report.spilled == 0, f"{report.spilled} bytes spilled, {report.registers} registers"
    assert report.shared <= cross.SHARED_LIMIT
    if wide:
        loads, stores = cross.vector_accesses(report.ptx)
        assert loads, "no 16-byte load"
        assert stores, "no 16-byte store"


def _int(n):
    return "i32:16" if n % 16 == 0 else "i32"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("width", "dtype", "capability"), [*_cases()])
def test_rms_norm(width, dtype, capability, fused):
    from warploom.kernels.norm import rms_triton as device

    chosen = device.configuration(width)
    warps = chosen.pop("num_warps")
    x, n, wide = f"*{dtype}:16", _int(width), width % 16 == 0
    forward = [x, x, x, x, x, "*fp32:16", "i32", n, n, n, "fp32"]
    constants = {"FUSED": fused, **chosen}
    _check(
        cross.cross_compile(device.forward_kernel, forward, constants, capability, num_warps=warps),
        wide=wide,
    )
    backward = [x, x, x, x, "*fp32:16", x, "*fp32:16", "i32", n, n, n, n]
    _check(
        cross.cross_compile(
            device.backward_kernel,
            backward,
            constants | {"KEPT": width <= device.KEEP},
            capability,
            num_warps=warps,
        ),
        wide=wide,
    )


@pytest.mark.parametrize("capability", cross.CAPABILITIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_rms_norm_shares(dtype, capability):
    from warploom.kernels.norm import rms_triton as device

    types = ["*fp32:16", f"*{dtype}:16", "i32", "i32:16"]
    constants = {"SHARES": 64, "COLUMNS": 32}
    _check(cross.cross_compile(device.shares_kernel, types, constants, capability), wide=False)


@pytest.mark.parametrize("capability", cross.CAPABILITIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_rms_norm_columns(dtype, capability):
    from warploom.kernels.norm import rms_triton as device

    chosen = dict(device.COLUMN_TILE)
    warps = chosen.pop("num_warps")
    x, n = f"*{dtype}:16", "i32:16"
    types = [x, x, "*fp32:16", "*fp32:16", "i32", n, n, n]
    report = cross.cross_compile(device.column_kernel, types, chosen, capability, num_warps=warps)
    assert cross.vector_accesses(report.ptx)[0], "no 16-byte load"
    _check(report, wide=False)


@pytest.mark.parametrize(("width", "dtype", "capability"), [*_cases()])
def test_swiglu(width, dtype, capability):
    from warploom.kernels.activation import glu_triton as device

    chosen = device.configuration(width)
    warps = chosen.pop("num_warps")
    x, n = f"*{dtype}:16", _int(width)
    # 4 warps of a narrow block hold fewer than 16 bytes a thread
    wide = width % 16 == 0 and chosen["BLOCK"] * (4 if dtype == "fp32" else 2) >= warps * 512
    for kernel, types in (
        (device.forward_kernel, [x, x, n, "i32", n]),
        (device.backward_kernel, [x, x, x, n, "i32", n, n]),
    ):
        _check(cross.cross_compile(kernel, types, chosen, capability, num_warps=warps), wide=wide)


@pytest.mark.parametrize("capability", cross.CAPABILITIES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        (9, 64, "bf16"),
        *(
            pytest.param(h, k, d, marks=pytest.mark.slow)
            for h in (1, 32, 128)
            for k in (64, 80, 96, 128, 192, 256)
            for d in ("fp16", "bf16", "fp32")
        ),
    ],
)
def test_rotary(heads, head_dim, dtype, capability):
    from warploom.kernels.rope import rotate_triton as device

    chosen = device.configuration(heads, head_dim)
    warps = chosen.pop("num_warps")
    x = f"*{dtype}:16"
    types = [x, x, "*fp32:16", "*fp32:16", x, x, "i32", "i32", _int(head_dim // 2)]
    types += ["i32:16"] * 4 + [_int(head_dim // 2)] * 2 + ["fp32"]
    report = cross.cross_compile(device.turn_kernel, types, chosen, capability, num_warps=warps)
    _check(report, wide=head_dim % 32 == 0 and chosen["HEADS"] * chosen["PAIRS"] >= 1024)


def test_a_kernel_that_spills_is_seen():
    """The gate itself: a row of 8192 in one warp cannot stay in registers."""
    from warploom.kernels.norm import rms_triton as device

    x = "*bf16:16"
    types = [x, x, x, x, x, "*fp32:16", "i32", "i32:16", "i32:16", "i32:16", "fp32"]
    constants = {"FUSED": False, "ROWS": 1, "BLOCK": 8192}
    report = cross.cross_compile(device.forward_kernel, types, constants, 90, num_warps=1)
    assert report.spilled > 0
