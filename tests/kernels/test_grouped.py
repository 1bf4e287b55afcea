"""Grouped matrix products: exact integers, experts without rows, rows of nobody, PyTorch's own.

Tests over `backends` run on the reference and on PyTorch's kernel here, on Triton in the
interpreter and on a GPU.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.specimen import item
from tests.kernels.test_must import DEVICES, INTERPRETED

from warploom.kernels.gemm import (
    grouped,
    grouped_gemm,
    grouped_gemm_reference,
    grouped_gemm_weight_gradient,
)

BACKENDS = [d for d in DEVICES if getattr(d, "values", d)[1] in ("reference", "triton")]
if not INTERPRETED:
    BACKENDS += [("cpu", "torch"), pytest.param("cuda", "torch", marks=pytest.mark.gpu)]
backends = pytest.mark.parametrize(("device", "backend"), BACKENDS)
LOADS = {  # rows of each expert, and how many belong to nobody
    "first": ([0, 0, 9, 40], 3),
    "middle": ([5, 0, 0, 60], 0),
    "last": ([17, 3, 20, 0], 5),
    "all": ([0, 0, 0, 0], 7),
    "all but one": ([0, 0, 131, 0], 1),
    "none": ([1, 128, 65, 2], 2),
    "fewer rows than experts": ([0, 0, 0, 1], 0),
}


def _narrow(device, backend):
    """Name the dtypes of 16 bits that serve; the interpreter has no products of bfloat16."""
    if backend == "torch":
        return [torch.bfloat16]
    interpreted = (device, backend) == ("cpu", "triton")
    return [torch.float16, *([] if interpreted else [torch.bfloat16])]


def _randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _integers(*shape, dtype, device, most=1, seed=0):
    """Draw small integers; of 16 bits, so few of them that a sum is exact."""
    drawn = torch.randint(
        -most, most + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64
    )
    return drawn.to(device, dtype)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 3), st.integers(1, 4))
def test_values_and_gradients(counts, rest, width):
    total, experts = sum(counts), len(counts)
    x, counts = _randn(total + rest, width), torch.tensor(counts)
    x[total:] = torch.nan
    x.requires_grad_()
    weight = _randn(experts, 3, width, seed=1).requires_grad_()
    dy = _randn(total + rest, 3, seed=2)
    dy[total:] = torch.nan
    y = grouped_gemm(x, weight, counts)
    assert y[total:].isnan().all(), "rows beyond the counts are not written"
    expert = torch.arange(experts).repeat_interleave(counts)
    want = torch.einsum("md,mfd->mf", x[:total], weight[expert])
    torch.testing.assert_close(y[:total], want, atol=1e-12, rtol=0)
    torch.testing.assert_close(grouped_gemm_reference(x, weight, counts)[:total], want)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    wanted = torch.autograd.grad(want, (x, weight), dy[:total])
    torch.testing.assert_close(dx[:total], wanted[0][:total], atol=1e-12, rtol=0)
    assert not dx[total:].any()
    torch.testing.assert_close(dweight, wanted[1], atol=1e-12, rtol=0)
    alone = grouped_gemm_weight_gradient(dy, x.detach(), counts)
    assert torch.equal(alone, dweight)
    assert not grouped_gemm(x, weight, counts, zero_rest=True)[total:].any()


def test_gradcheck():
    x, weight = _randn(5, 3).requires_grad_(), _randn(3, 2, 3).requires_grad_()
    counts = torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(lambda x, w: grouped_gemm(x, w, counts), (x, weight))


@item("values", "empty experts", ops=("grouped_gemm",))
@backends
@pytest.mark.parametrize("load", LOADS)
def test_small_integers_are_exact(device, backend, load):
    """Bit for bit, with tails of every dimension; poisoned rows of nobody are never read."""
    counts, rest = LOADS[load]
    total, counts = sum(counts), torch.tensor(counts, device=device)
    single = [torch.float32] * (load == "none" and backend != "torch")
    for dtype in (*_narrow(device, backend), *single):
        x = _integers(total + rest, 72, dtype=dtype, device=device)
        weight = _integers(4, 136, 72, dtype=dtype, device=device, seed=1)
        dy = _integers(total + rest, 136, dtype=dtype, device=device, seed=2)
        x[total:], dy[total:] = torch.nan, torch.nan
        x.requires_grad_()
        weight.requires_grad_()
        y = grouped_gemm(x, weight, counts, backend=backend)
        dx, dweight = torch.autograd.grad(y, (x, weight), dy)
        if device == "cpu":
            assert y[total:].isnan().all(), "rows of nobody were written"
        assert not dx[total:].any()
        assert not dweight[counts == 0].any()
        zeroed = grouped_gemm(x, weight, counts, zero_rest=True, backend=backend)
        assert not zeroed[total:].any()
        expert = torch.arange(4, device=device).repeat_interleave(counts)
        exact = [t.detach().double() for t in (x[:total], weight, dy[:total])]
        masks = torch.nn.functional.one_hot(expert, 4).double()
        wanted = (
            torch.einsum("md,mfd->mf", exact[0], exact[1][expert]),
            torch.einsum("mf,mfd->md", exact[2], exact[1][expert]),
            torch.einsum("me,mf,md->efd", masks, exact[2], exact[0]),
        )
        for got, want in zip((y[:total], dx[:total], dweight), wanted, strict=True):
            assert want.abs().max() < 256 if want.numel() else True
            assert torch.equal(got.double(), want)


@item("values", ops=("grouped_gemm",))
@backends
@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exact_sums_up_to_2_to_the_24(device, backend, large):
    """Added to a float32 buffer the whole sum is seen, where no rounding hides a lost tail."""
    if backend == "torch":
        pytest.skip("its sums are rounded to bfloat16")
    dtype = _narrow(device, backend)[-1]
    counts = torch.tensor([0, 999, 0, 70] if large else [0, 150, 0, 7], device=device)
    total = int(counts.sum())
    x = _integers(total + 2, 33, dtype=dtype, device=device, most=120)
    dy = _integers(total + 2, 20, dtype=dtype, device=device, most=120, seed=1)
    x[total:] = torch.nan
    into = _integers(4, 20, 33, dtype=torch.float32, device=device, most=1000, seed=2)
    start = 0
    want = into.double()
    for e, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        want[e] += dy[rows].double().t() @ x[rows].double()
        start += count
    assert want.abs().max() < 2**24
    got = grouped_gemm_weight_gradient(dy, x, counts, into=into, backend=backend)
    assert got is into
    assert torch.equal(got.double(), want)


@item("NaN and inf", ops=("grouped_gemm",))
@backends
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_poisons_itself_and_its_experts_gradient_alone(device, backend, poison):
    counts = torch.tensor([4, 0, 70, 6], device=device)
    dtype = _narrow(device, backend)[-1]
    draw = lambda *shape, seed: _randn(*shape, seed=seed).to(device, dtype)  # noqa: E731
    x, weight, dy = draw(80, 72, seed=0), draw(4, 40, 72, seed=1), draw(80, 40, seed=2)
    results = []
    for value in (0.5, poison):
        x[30] = value
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = grouped_gemm(*leaves, counts, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    (y, dx, dweight), (bad_y, bad_dx, bad_dweight) = results
    others = torch.arange(80, device=device) != 30
    assert not bad_y[30].isfinite().any()
    assert torch.equal(bad_y[others], y[others])
    assert torch.equal(bad_dx, dx)
    assert not bad_dweight[2].isfinite().any()
    assert torch.equal(bad_dweight[[0, 1, 3]], dweight[[0, 1, 3]])


@pytest.mark.skipif(not INTERPRETED, reason="runs the Triton kernels")
@pytest.mark.parametrize(
    "counts",
    [[3, -5, 4], [9, 0, 9], [0, 0, 40], [-1, -1, -1]],
    ids=lambda counts: f"{counts}-cpu-triton",
)
def test_on_a_gpu_counts_that_lie_stay_inside(counts):
    """There they are not looked at: a negative one is 0, and rows end where the tensor ends."""
    from warploom.kernels.gemm import grouped_triton as triton

    left, kept = 10, []
    for count in counts:
        kept.append(min(max(count, 0), left))
        left -= kept[-1]
    x, weight, dy = (_randn(*s).float() for s in ((10, 5), (3, 7, 5), (10, 7)))
    given, meant = torch.tensor(counts), torch.tensor(kept)
    y = triton.forward(triton.Rows(x), weight, given, True)
    torch.testing.assert_close(y, grouped_gemm(x, weight, meant, zero_rest=True))
    dweight = triton.weight_gradient(triton.Rows(dy), triton.Rows(x), given)
    torch.testing.assert_close(dweight, grouped_gemm_weight_gradient(dy, x, meant))


class Stand:
    """PyTorch's kernel as it is at its worst, and what it was called with."""

    def __init__(self):
        self.called = []

    def __call__(self, a, b, *, offs):
        self.called.append((a, b, offs))
        ends = [0, *offs.tolist()]
        groups = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
        if b.dim() == 3:
            out = a.new_full((a.shape[0], b.shape[2]), float("nan"))
            for rows, right in zip(groups, b, strict=True):
                out[rows] = a[rows] @ right
            return out
        out = a.new_full((len(groups), a.shape[0], b.shape[1]), float("nan"))
        for e, rows in enumerate(groups):
            if rows.start < rows.stop:
                out[e] = a[:, rows] @ b[rows]
        return out


def _fits(x):
    """Whether the kernel for CUDA takes this layout."""
    inner = -1 if x.stride(-1) == 1 else -2
    rest = [stride for dim, stride in enumerate(x.stride()) if dim != x.dim() + inner]
    return x.stride(inner) == 1 and all(s % 8 == 0 for s in rest) and x.data_ptr() % 16 == 0


@pytest.mark.parametrize("layout", ["plain", "odd address", "odd stride", "transposed", "expanded"])
@pytest.mark.parametrize("real", [True, False])
def test_pytorchs_kernel_gets_what_it_takes_and_is_mended(monkeypatch, layout, real):
    """Its stand-in leaves NaN in empty experts' gradients and in rows of nobody, as it may."""
    stand = Stand()
    if not real:
        monkeypatch.setattr(torch.nn.functional, "grouped_mm", stand)
    tensors = [_randn(12, 16).bfloat16(), _randn(4, 24, 16, seed=1).bfloat16()]
    tensors.append(_randn(12, 24, seed=2).bfloat16())
    if layout == "odd address":
        tensors = [
            torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t) for t in tensors
        ]
    if layout == "odd stride":
        tensors = [torch.nn.functional.pad(t, (0, 3))[..., :-3] for t in tensors]
    if layout == "transposed":
        tensors = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    if layout == "expanded":
        tensors[2] = tensors[2].new_ones(()).expand(12, 24)
    x, weight, dy = tensors
    counts = torch.tensor([0, 5, 0, 4])
    results = []
    for backend in ("torch", "reference"):
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = grouped_gemm(*leaves, counts, zero_rest=True, backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
        assert not (got[[0, 2]] if got.dim() == 3 else got[9:]).any()
    if not real:
        forward, dgrad, wgrad = stand.called
        for a, b, ends in stand.called:
            assert ends.dtype == torch.int32
            assert ends.tolist() == [0, 5, 5, 9]
            assert _fits(a)
            assert _fits(b)
        assert forward[0].stride(-1) == dgrad[0].stride(-1) == 1
        assert wgrad[0].stride(0) == 1, "else an expert without rows stops the device"
        assert wgrad[1].stride(1) == 1, "else an expert without rows stops the device"
    if layout == "plain" and not real:
        pairs = (forward[0], x), (dgrad[0], dy), (wgrad[0], dy), (wgrad[1], x)
        pairs += (forward[1], weight), (dgrad[1], weight)
        assert all(a.data_ptr() == b.data_ptr() for a, b in pairs), "read in place"


@pytest.mark.parametrize(
    ("sizes", "dtype", "message"),
    [
        ((2, 8, 16), torch.float16, "needs bfloat16, the tensors are torch.float16"),
        ((2, 12, 16), torch.bfloat16, "widths divisible by 8, got 16 to 12: take 'triton' or"),
        ((2, 8, 4), torch.bfloat16, "widths divisible by 8, got 4 to 8"),
        ((1024, 8, 8), torch.bfloat16, "takes at most 1023 experts, got 1024"),
    ],
)
def test_pytorchs_kernel_is_refused_where_it_would_fail_or_wait(sizes, dtype, message):
    experts, columns, width = sizes
    x, weight = torch.ones(3, width, dtype=dtype), torch.ones(sizes, dtype=dtype)
    counts = torch.zeros(experts, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=f"grouped_gemm: backend 'torch' .*{message}"):
        grouped_gemm(x, weight, counts, backend="torch")
    assert grouped_gemm(x, weight, counts).shape == (3, columns)


@pytest.mark.parametrize(("capability", "served"), [(8, False), (9, True), (10, True), (12, False)])
def test_pytorchs_kernel_waits_on_other_devices(monkeypatch, capability, served):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    lack = grouped._torch_lacks(torch.device("cuda"), torch.bfloat16, (2, 8, 8))
    assert lack == (
        "" if served else f"needs compute capability 9 or 10, the device has {capability}"
    )


class OnCuda:
    """What the choice asks of a tensor."""

    is_cuda, device, dtype = True, torch.device("cuda"), torch.bfloat16

    def __len__(self):
        return 7


@pytest.mark.parametrize(("width", "chosen"), [(8, "torch"), (12, "reference")])
def test_on_cuda_pytorchs_kernel_is_the_default_where_it_can_serve(monkeypatch, width, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(grouped, "choose", lambda *_: "reference")
    x = OnCuda()
    counts = torch.empty(2, dtype=torch.int64, device="meta")
    assert grouped._serve(x, counts, (2, 8, width), None) == chosen
    assert grouped._serve(x, counts, (2, 8, width), "reference") == "reference"


def test_without_rows_widths_or_experts_pytorchs_kernel_is_not_called(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", None)
    for rows, experts, columns, width in ((0, 2, 8, 8), (3, 0, 8, 8), (3, 2, 0, 8), (3, 2, 8, 0)):
        x = torch.ones(rows, width, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.ones(experts, columns, width, dtype=torch.bfloat16, requires_grad=True)
        counts = torch.full((experts,), rows // 2)
        y = grouped_gemm(x, weight, counts, zero_rest=True, backend="torch")
        assert not y.count_nonzero()
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), (x, weight)))


def test_nothing_asks_the_device_for_the_counts():
    """Tensors without storage: to ask for a value is an error."""
    pytest.importorskip("triton", reason="needs the package triton")
    from tests.kernels.launches import recorded

    from warploom.kernels.gemm import grouped_triton as triton

    make = lambda *s: torch.empty(s, dtype=torch.bfloat16, device="meta")  # noqa: E731
    x, weight, dy = make(40, 16), make(3, 8, 16), make(40, 8)
    counts = torch.empty(3, dtype=torch.int64, device="meta")
    assert grouped._torch_forward(x, weight, counts, True).shape == (40, 8)
    assert grouped._torch_weight_gradient(dy, x, counts).shape == (3, 8, 16)
    with recorded() as launched:
        assert triton.forward(triton.Rows(x), weight, counts, True).shape == (40, 8)
        gradient = triton.weight_gradient(triton.Rows(dy), triton.Rows(x), counts)
    assert gradient.shape == (3, 8, 16)
    assert len(launched) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, w: grouped_gemm(x, w, torch.tensor([3, 4])),
            r"counts must be at least 0 and sum to at most the rows \(5\), got \[3, 4\]",
        ),
        (lambda x, w: grouped_gemm(x, w, torch.tensor([3, -1])), r"\(5\), got \[3, -1\]"),
        (
            lambda x, w: grouped_gemm_weight_gradient(x, x, torch.tensor([3, -1])),
            r"\(5\), got \[3, -1\]",
        ),
        (lambda x, w: grouped_gemm(x, w, torch.tensor([3])), r"counts must be \[2\] int64, got"),
        (
            lambda x, w: grouped_gemm(x, w, torch.tensor([3, 1], dtype=torch.int32)),
            r"counts must be \[2\] int64, got \[2\] torch.int32",
        ),
        (lambda x, w: grouped_gemm(x[:, :2], w, torch.tensor([3, 1])), r"got \[5, 2\] and"),
        (lambda x, w: grouped_gemm(x.double(), w, torch.tensor([3, 1])), "have one dtype of .*64"),
        (lambda x, w: grouped_gemm(x.long(), w.long(), torch.tensor([3, 1])), "got torch.int64"),
        (
            lambda x, w: grouped_gemm_weight_gradient(x[:2], x, torch.tensor([3, 1])),
            r"dy must be \[M, F\] and x \[M, D\], got \[2, 3\]",
        ),
        (
            lambda x, w: grouped_gemm_weight_gradient(x, x.double(), torch.tensor([3, 1])),
            "dy and x must have one dtype",
        ),
        (
            lambda x, w: grouped_gemm_weight_gradient(x, x, torch.tensor([3, 1]), into=w),
            r"into must be contiguous, \[2, 3, 3\] torch.float32, got \[2, 4, 3\]",
        ),
    ],
)
def test_errors_say_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(5, 3), torch.ones(2, 4, 3))


@backends
def test_counts_are_looked_at_on_the_cpu_whatever_serves(device, backend):
    if device != "cpu":
        pytest.skip("on CUDA it would wait")
    x, weight = torch.ones(5, 8).bfloat16(), torch.ones(2, 16, 8).bfloat16()
    for counts in ([3, 4], [6, -1]):
        with pytest.raises(ValueError, match=r"grouped_gemm: counts must be at least 0 and sum to"):
            grouped_gemm(x, weight, torch.tensor(counts), backend=backend)


def test_a_weight_gradient_has_none_of_its_own():
    """A main gradient that it is added to keeps no graph of the rows."""
    x, dy, counts = torch.randn(5, 3, requires_grad=True), torch.randn(5, 4), torch.tensor([3, 2])
    into = torch.zeros(2, 4, 3)
    assert not grouped_gemm_weight_gradient(dy, x, counts).requires_grad
    assert not grouped_gemm_weight_gradient(dy, x, counts, into=into).requires_grad
    torch.testing.assert_close(into[1], dy[3:].t() @ x.detach()[3:])


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="grouped_gemm: counts must be a tensor, got list"):
        grouped_gemm(torch.ones(5, 3), torch.ones(2, 4, 3), [3, 2])
