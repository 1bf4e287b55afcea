"""FP8 products beyond the common tests: exact integers, layouts of scales, refusals."""

import re

import pytest
import torch
import torch.nn.functional as F
from tests.kernels import launches as gate
from tests.kernels import test_must as must
from tests.kernels.specimen import check, item
from tests.kernels.specimens.fp8 import E4M3, E5M2, MORE, SPECIMENS
from tests.kernels.test_must import DEVICES, INTERPRETED
from torch.nn.functional import ScalingType

from warploom.kernels import backends
from warploom.kernels.gemm import fp8, fp8_gemm, fp8_torch
from warploom.kernels.quant import Fp8, Mx, fp8_quantize, mx_quantize

SCALINGS = ("tensor", "row", "tile", "block", "mx")
TAILS = (1, 7, 16, 31, 33, 63, 64, 65, 100, 127, 128, 129, 200, 300)
# What cuBLASLt was seen to drop: the end of a long K that is no multiple of 64.
LONG = ((16, 64, 4112), (64, 128, 8208), (128, 16, 2096), (64, 64, 528))
ON = [*DEVICES, pytest.param("cuda", "torch", marks=pytest.mark.gpu)]
ON += [] if INTERPRETED else [("cpu", "torch")]
on = pytest.mark.parametrize(("device", "backend"), ON)
plain = pytest.mark.skipif(INTERPRETED, reason="has nothing to interpret")


def integers(rows, width, grouping, seed, dtype=E4M3, device="cpu"):
    """Draw small integers with scales that are powers of two: every product and sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(-4, 5, shape, generator=generator)  # noqa: E731
    codes = draw(rows, width).to(dtype)
    exponents = draw(*fp8.scale_shape(grouping, rows, width)).clamp(-2, 2)
    carrier = torch.zeros((), device=device).expand(rows, width)
    if grouping == "mx":
        scale = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        return Mx(codes.to(device), scale.to(device), carrier)
    return Fp8(codes.to(device), torch.exp2(exponents.float()).to(device), carrier)


def value(q):
    """Multiply out in float64, by the definition."""
    scale, (rows, width) = q.scale.double(), q.data.shape
    if scale.dim() and scale.shape[1] > 1 or isinstance(q, Mx):
        scale = scale.repeat_interleave(32 if isinstance(q, Mx) else 128, 1)[:, :width]
    if scale.dim() and len(scale) != rows:
        scale = scale.repeat_interleave(128, 0)[:rows]
    return q.data.double() * scale


def pair(sizes, scaling, dtype=E4M3, device="cpu"):
    rows, columns, depth = sizes
    a = integers(rows, depth, "block" if scaling == "tile" else scaling, 1, dtype, device)
    return a, integers(columns, depth, scaling, 2, device=device)


def unserved(a, b, scaling, device):
    sizes, types = (len(a.data), len(b.data), a.data.shape[1]), (a.data.dtype, b.data.dtype)
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    rest = torch.float32, torch.device(device), capability
    return fp8_torch.missing(sizes, types, scaling, *rest)


@item("values", "zero and odd sizes", ops=("fp8_gemm",))
@on
@pytest.mark.parametrize("scaling", SCALINGS)
def test_integers_are_exact_whatever_the_tail_of_k(scaling, device, backend):
    tails = TAILS if device == "cpu" else (*TAILS, *(k for _, _, k in LONG))
    sizes = [(5, 3, k) for k in (tails[4:14:4] if INTERPRETED else tails)]
    sizes += [(130, 133, 129), *(LONG if device == "cuda" else ())]
    served = 0
    for m, n, k in sizes:
        fit = (16, 16, 16 * -(-k // 16)) if backend == "torch" and device == "cuda" else (m, n, k)
        a, b = pair(fit if max(m, n) < 16 else (m, n, k), scaling, E5M2, device)
        if backend == "torch" and unserved(a, b, scaling, device):
            continue
        served += 1
        y = fp8_gemm(a, b, dtype=torch.float32, backend=backend)
        assert torch.equal(y.double(), value(a) @ value(b).t()), (m, n, k)
    assert served or (backend == "torch" and scaling in ("tile", "block", "mx"))


@pytest.mark.skipif(not INTERPRETED, reason="runs the Triton kernel")
@item("values", ops=("fp8_gemm",))
@pytest.mark.parametrize("scaling", ["tile"], ids="{}-cpu-triton".format)
def test_any_tiles_give_exact_integers(scaling, monkeypatch):
    """Those that a search may choose, in more than one band of them."""
    from warploom.kernels.gemm import fp8_triton as triton

    a, b = pair((530, 133, 140), scaling, E5M2)
    want = value(a) @ value(b).t()
    some = {
        str(c | {"num_warps": 0, "num_stages": 0}): c for c in triton.configurations(530, scaling)
    }
    some |= {"few rows": triton.configurations(1, scaling)[-1]}
    for chosen in some.values():
        monkeypatch.setattr(triton, "configurations", lambda *_, c=chosen: [c])
        y = fp8_gemm(a, b, dtype=torch.float32, backend="triton")
        assert torch.equal(y.double(), want), chosen


@item("values", ops=("fp8_gemm", "fp8_linear"))
@on
@pytest.mark.parametrize("s", [*MORE, *(SPECIMENS if INTERPRETED else ())], ids=str)
def test_values_of_the_other_scalings(s, device, backend):
    if backend == "torch":
        pytest.skip("its sizes are its own: see the test of integers")
    if backend not in backends.available()[s.op]:
        pytest.skip(f"no {backend}")
    dtypes = [d for d in s.dtypes if backend == "reference" or d != torch.float64]
    for rows, width in s.shapes[-1:] if INTERPRETED else s.shapes:
        for dtype in [torch.float32] if INTERPRETED else dtypes:
            check(s, rows, width, dtype, backend, device)


@item("NaN and inf", ops=("fp8_gemm",))
@on
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_nan_spoils_its_row_alone(scaling, device, backend):
    """That of a tensor too, if its scale is given."""
    if backend == "torch" and (device == "cuda" or scaling not in ("tensor", "row")):
        pytest.skip("served elsewhere")
    x, other = torch.ones(20, 200, device=device), torch.ones(12, 200, device=device)
    x[4, 150] = torch.nan
    if scaling == "mx":
        a, b = mx_quantize(x, dtype=E5M2), mx_quantize(other)
    else:
        of_a = "block" if scaling == "tile" else scaling
        given = torch.full((), 0.5, device=device) if scaling == "tensor" else None
        a = fp8_quantize(x, scaling=of_a, dtype=E5M2, scale=given)
        b = fp8_quantize(other, scaling=scaling, scale=given)
    for first, second, spoilt in ((a, b, 0), (b, a, 1)):
        if scaling == "tile" and spoilt:
            continue  # a tile cannot be the first operand
        y = fp8_gemm(first, second, backend=backend).transpose(0, spoilt)
        assert y[4].isnan().all()
        assert not y[[i for i in range(20) if i != 4]].isnan().any()


@plain
@item("values", ops=("fp8_gemm",))
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_reference_walks_over_blocks_of_both_operands(scaling, monkeypatch):
    a, b = pair((300, 270, 70), scaling)
    whole = fp8_gemm(a, b)
    monkeypatch.setattr(fp8, "_MEMORY", 128 * 70)
    assert torch.equal(fp8_gemm(a, b), whole)
    assert torch.equal(fp8.fp8_gemm_reference(a, b, torch.float32), whole)


class Blas:
    """cuBLASLt as it is documented: reads the memory of the scales, whatever their strides say."""

    def __init__(self):
        self.layouts = []

    def multiply(self, a, b_KN, scale_a, scale_b, dtype):
        assert a.is_contiguous()
        assert b_KN.t().is_contiguous()
        assert not a.storage_offset() % 16
        return (a.double() * scale_a @ (b_KN.double() * scale_b.t())).to(dtype)

    def _memory(self, scale):
        return torch.as_strided(scale, (scale.untyped_storage().nbytes() // scale.itemsize,), (1,))

    def _groups(self, scale, recipe, rows, depth):
        groups, memory = depth // 128, self._memory(scale)
        r, k = torch.meshgrid(torch.arange(rows), torch.arange(depth), indexing="ij")
        if recipe == ScalingType.BlockWise1x128:
            assert scale.shape == (rows, groups)
            assert scale.stride(0) == 1
            assert not rows % 4  # the distance of groups must be a multiple of 16 bytes
            return memory[r + k // 128 * rows].double()
        padded = -(-groups // 4) * 4
        assert scale.shape == (padded, -(-rows // 128))
        assert scale.stride(0) == 1
        return memory[k // 128 + r // 128 * padded].double()

    def scaled_mm(self, a, b, scale_a, recipe_a, scale_b, recipe_b, output_dtype=None, **rest):
        assert not rest.get("use_fast_accum")
        (rows, depth), columns = a.shape, b.shape[1]
        left = self._groups(scale_a, recipe_a, rows, depth)
        return self.multiply(
            a, b, left, self._groups(scale_b, recipe_b, columns, depth), output_dtype
        )

    def _mm(self, a, b, scale_a, scale_b, out_dtype=None, use_fast_accum=True):
        assert not use_fast_accum
        scales = []
        for scale, rows in ((scale_a, a.shape[0]), (scale_b, b.shape[1])):
            memory = self._memory(scale.view(torch.uint8)).view(torch.float8_e8m0fnu)
            down, across = -(-rows // 128), -(-a.shape[1] // 128)
            assert memory.numel() == down * across * 512
            r, g = torch.meshgrid(torch.arange(rows), torch.arange(a.shape[1]) // 32, indexing="ij")
            block = (r // 128 * across + g // 4) * 512
            at = block + r % 32 * 16 + r // 32 % 4 * 4 + g % 4
            scales.append(memory.double()[at])
        return self.multiply(a, b, *scales, out_dtype)


@plain
@item("layout", ops=("fp8_gemm",))
@pytest.mark.parametrize("scaling", ["tile", "block", "mx"])
@pytest.mark.parametrize("groups", [1, 2, 4, 5, 7, 8])
def test_scales_lie_as_cublaslt_reads_them(scaling, groups, monkeypatch):
    """Groups that are no multiple of 4 too: pytorch pull request 166752."""
    blas = Blas()
    monkeypatch.setattr(F, "scaled_mm", blas.scaled_mm)
    monkeypatch.setattr(torch, "_scaled_mm", blas._mm)
    a, b = pair((132, 384, 128 * groups), scaling)
    bytes_ = lambda s: s.view(torch.uint8) if scaling == "mx" else s  # noqa: E731
    operands = a.data, bytes_(a.scale), b.data, bytes_(b.scale)
    y = fp8_torch.gemm(*operands, scaling, torch.float32)
    assert torch.equal(y.double(), value(a) @ value(b).t())


@plain
@item("layout", ops=("fp8_gemm",))
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("groups", [1, 5, 8])
def test_pytorch_itself_accepts_the_layouts(scaling, groups):
    """Its own checks for CUDA, on tensors without storage."""
    operands = []
    for q in pair((132, 384, 128 * groups), scaling):
        scale = q.scale.view(torch.uint8) if scaling == "mx" else q.scale
        operands += [q.data.to("meta"), scale.to("meta")]
    y = fp8_torch.gemm(*operands, scaling, torch.bfloat16)
    assert y.shape == (132, 384)
    assert y.dtype == torch.bfloat16


@item("layout", ops=("fp8_gemm",))
@pytest.mark.parametrize(("device", "backend"), DEVICES)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("depth", [140, 256])
def test_operands_of_any_stride(depth, scaling, device, backend):
    """Rows at distances that are a multiple of 16 bytes too, their elements apart."""
    if backend not in backends.available()["fp8_gemm"]:
        pytest.skip(f"no {backend}")
    a, b = pair((20, 132, depth), scaling, device=device)
    want = fp8_gemm(a, b, backend=backend)
    apart = lambda x: torch.stack([x.view(torch.uint8)] * 2, -1)[..., 0].view(x.dtype)  # noqa: E731
    for q, other, first in ((a, b, True), (b, a, False)):
        strided = q._replace(data=apart(q.data))
        if q.scale.dim():
            strided = strided._replace(scale=q.scale.t().contiguous().t())
        pair_ = (strided, other) if first else (other, strided)
        assert torch.equal(fp8_gemm(*pair_, backend=backend), want)


LIST = (
    must.test_any_layout,
    must.test_upstream_gradients_of_any_kind,
    must.test_repeats_give_the_same_bits,
    must.test_without_gradients_and_under_autocast,
    must.test_a_second_derivative_is_refused,
    must.test_operators_are_registered_properly,
    must.test_compiles_without_a_break_and_for_any_size,
)


@plain
@pytest.mark.slow
@pytest.mark.parametrize("s", MORE, ids=str)
@pytest.mark.parametrize("test", LIST, ids=lambda test: test.__name__)
def test_the_other_scalings_pass_the_list(test, s):
    if s.gradient or test not in (LIST[1], LIST[4]):
        test(s, "cpu", "reference")


@item("fits sm_90 and sm_100", ops=("fp8_gemm", "fp8_linear"))
@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("s", MORE, ids=str)
def test_the_other_scalings_compile_and_fit(s, capability):
    pytest.importorskip("triton")
    for pick in range(4):
        for launch in gate.launches(s, 8192, 4096, torch.bfloat16, pick):
            report = gate.compile_for(launch, capability)
            assert report.stack <= 8, launch.options
            assert report.shared <= 227 * 1024, launch.options
            assert not gate.products_from_registers(report.ptx)
            assert not gate.narrow_products(report.ttir)


@plain
@item("bad input", ops=("fp8_gemm",))
def test_operands_that_do_not_fit_are_refused():
    a, b = pair((5, 3, 200), "block")
    row = integers(5, 200, "row", 1)
    mx = integers(3, 200, "mx", 1)
    cases = [
        (a.data, b, TypeError, "a must be an Fp8 or an Mx, got Tensor: quantise it"),
        (a, b._replace(data=b.data[:, :9]), ValueError, r"got \[5, 200\] and \[3, 9\]"),
        (
            a._replace(data=a.data.float()),
            b,
            ValueError,
            "float8_e4m3fn or float8_e5m2 .* got torch.float32",
        ),
        (a._replace(scale=a.scale.half()), b, ValueError, "scales in torch.float32, .*float16"),
        (a, b._replace(scale=b.scale[:2]), ValueError, r"got \[5, 2\] for a .* and \[2, 2\]"),
        (row, b, ValueError, r"got \[5, 1\] for a \[5, 200\] and \[3, 2\]"),
        (a, mx, ValueError, r"MX twice, got \[5, 2\] .* and \[3, 7\]"),
    ]
    for first, second, kind, text in cases:
        with pytest.raises(kind, match=f"^fp8_gemm: .*{text}"):
            fp8_gemm(first, second)
    with pytest.raises(ValueError, match="dtype must be float16, .*, got torch.int8"):
        fp8_gemm(a, b, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="'cuda' is not one of reference, torch, triton"):
        fp8_gemm(a, b, backend="cuda")
    wants = fp8_quantize(torch.randn(5, 200, requires_grad=True), scaling="block")
    with pytest.raises(
        RuntimeError, match="fp8_gemm: it has no gradient, but a .* take fp8_linear"
    ):
        fp8_gemm(wants, b)
    with torch.no_grad():
        fp8_gemm(wants, b)


@plain
@item("bad input", ops=("fp8_gemm", "fp8_linear"))
def test_devices_and_sizes_that_pytorch_does_not_serve_are_named():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")

    def lack(scaling="tile", sizes=(64, 256, 512), types=(E4M3, E4M3), at=(9, 0), device=cuda,
             dtype=torch.bfloat16):  # fmt: skip
        return fp8_torch.missing(sizes, types, scaling, dtype, device, at)

    assert lack() is None
    assert lack("block") is None
    assert lack("row", at=(8, 9)) is None
    assert lack("mx", at=(10, 0)) is None
    assert lack("tensor", at=None, device=cpu) is None
    for found, text in (
        (lack(sizes=(62, 256, 512)), "M to be a multiple of 4 with scaling 'tile', got .* 62, 256"),
        (lack(sizes=(64, 200, 512)), "N to be a multiple of 128"),
        (lack("block", sizes=(64, 208, 520)), "K to be a multiple of 128"),
        (lack("mx", sizes=(64, 208, 528), at=(10, 0)), "K to be a multiple of 32"),
        (lack("tensor", sizes=(64, 208, 520)), "K to be a multiple of 16 .* backend='triton'"),
        (lack(at=(10, 0)), "9.0 alone, this device has 10.0: take 'triton'"),
        (lack("mx"), "from compute capability 10.0 on, this device has 9.0"),
        (lack(types=(E5M2, E5M2)), "one operand in float8_e5m2, not both"),
        (lack(dtype=torch.float64), "not torch.float64: take backend='reference'"),
        (lack("mx", at=None, device=cpu), "got scaling 'mx' on cpu: take backend='reference'"),
    ):
        assert found is not None
        assert re.search(text, found), found
    without = fp8_torch.device_lack
    assert without((9, 0), "block", None) is None
    assert without((8, 0), "row", "reference") is None
    assert "8.9, this device has 8.0: take bfloat16" in without((8, 0), "row", "torch")
    assert "10.0, this device has 9.0: take scaling 'block'" in without((9, 0), "mx", None)
    with pytest.raises(RuntimeError, match="fp8_gemm: backend 'torch' takes scales of tensors and"):
        fp8_gemm(*pair((16, 16, 256), "block"), backend="torch")
