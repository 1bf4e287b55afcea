"""The Triton code of the losses on single chunks, interpreted, and on a GPU.

`test_must.py` runs the operators themselves. Triton reads TRITON_INTERPRET when it is imported, so
the interpreter runs in a process of its own: the tests named `interpreted` below, which
`test_interpreted.py` starts, and which skip otherwise.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.specimen import item

from warploom.kernels.backends import interpreted
from warploom.kernels.loss import cross_entropy, cross_entropy_partials, linear_cross_entropy
from warploom.kernels.loss.logits import cross_entropy_gradient_reference, nll_and_gradient_

triton = pytest.importorskip("triton")
in_interpreter = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(interpreted(), reason="the interpreter does not compile")


def _chunk(tokens, vocabulary, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(tokens, vocabulary, generator=g)).to(dtype)
    return logits, torch.randint(-2, vocabulary + 2, (tokens,), generator=g), g


def _assert_chunk(logits, targets, start, g, softcap=None, moments=False):
    """Hold partials and gradient to the reference in float64 on the same, rounded logits."""
    from warploom.kernels.loss.logits_triton import write_gradient

    wide, options = logits.double(), {"softcap": softcap, "moments": moments}
    actual = cross_entropy_partials(logits, targets, start, backend="triton", **options)
    expected = cross_entropy_partials(wide, targets, start, backend="reference", **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e.float(), rtol=1e-5, atol=1e-5)
    lse = expected[0] + expected[1].log()
    upstream = torch.randn(4 if moments else 2, len(lse), generator=g)
    upstream[:, :1] = 0  # a row that nobody asks for
    got, exact = torch.empty_like(logits), torch.empty_like(wide)
    write_gradient(logits, targets, start, lse.float(), upstream, softcap, got)
    cross_entropy_gradient_reference(wide, targets, start, lse, upstream.double(), softcap, exact)
    close = (
        {"rtol": 1e-2, "atol": 1e-3} if logits.dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-5}
    )
    torch.testing.assert_close(got.double(), exact, **close)


@in_interpreter
@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(0, 5),
    vocabulary=st.integers(1, 300),
    start=st.sampled_from([0, 7, -5]),
    softcap=st.sampled_from([None, 2.0]),
    moments=st.booleans(),
)
def test_interpreted_partials_and_gradient(tokens, vocabulary, start, softcap, moments):
    logits, targets, g = _chunk(tokens, vocabulary)
    _assert_chunk(logits, targets + start, start, g, softcap, moments)


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [4096, 4097, 10_001])  # a tile, one more, several
def test_interpreted_several_tiles_a_row(dtype, vocabulary):
    logits, targets, g = _chunk(3, vocabulary, dtype)
    _assert_chunk(logits, targets, 0, g, 5.0, True)


@in_interpreter
def test_interpreted_rows_with_strides():
    logits, targets, _ = _chunk(6, 90)
    for view in (logits[::2, 10:50], logits[:, ::2]):
        a, e = (
            cross_entropy_partials(view, targets[: len(view)].int(), 3, backend=backend)
            for backend in ("triton", "reference")
        )
        torch.testing.assert_close(a, e)


@item("NaN and inf", ops=("cross_entropy", "linear_cross_entropy"))
@in_interpreter
@pytest.mark.parametrize("case", ["nan", "huge", "minus infinity"])
def test_interpreted_rows_stay_apart(case):
    logits, targets, _ = _chunk(3, 5000)
    targets.clamp_(0, 4999)
    value = {"nan": float("nan"), "huge": 1e4, "minus infinity": -torch.inf}[case]
    logits[1, 17 if case != "minus infinity" else slice(None)] = value
    high, total, target = cross_entropy_partials(logits, targets, backend="triton")
    expected = cross_entropy_partials(logits, targets, backend="reference")
    for row in (0, 2):
        torch.testing.assert_close(
            high[row] + total[row].log(), expected[0][row] + expected[1][row].log()
        )
    if case == "nan":
        assert total[1].isnan()
        assert total[[0, 2]].isfinite().all()
    elif case == "minus infinity":
        assert (high[1], total[1]) == (-torch.inf, 0)
    else:
        torch.testing.assert_close((high, total, target), expected)


@in_interpreter
@pytest.mark.parametrize("vocabulary", [33, 50_000])  # in registers, in two walks
@pytest.mark.parametrize(("softcap", "smoothing"), [(None, 0.0), (4.0, 0.2)])
def test_interpreted_ignored_rows_are_zero_whatever_they_hold(vocabulary, softcap, smoothing):
    logits, _, _ = _chunk(4, vocabulary)
    logits[2] = float("nan")
    logits[0, 7] = -torch.inf if not smoothing else -3e4
    targets = torch.tensor([5, vocabulary - 1, -7, -7])
    found = []
    for backend in ("triton", "reference"):
        for gradient in (True, False):
            x = logits.clone()
            loss = nll_and_gradient_(x, targets, -7, softcap, smoothing, gradient, backend)
            found.append((loss, x if gradient else None))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][0][2:].tolist() == [0, 0]
    assert not found[0][1][2:].any()
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-6)


@in_interpreter
def test_interpreted_scaling_in_place():
    x = torch.randn(3, 9000, requires_grad=True)
    targets = torch.tensor([1, 8999, -100])
    for g in (torch.tensor(1.0), torch.tensor(-0.3)):
        pair = []
        for backend in ("triton", "reference"):
            total = cross_entropy(x * 1, targets, inplace=True, backend=backend)[0]
            pair.append(torch.autograd.grad(total, x, g)[0])
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("z_loss", [False, True])
@pytest.mark.parametrize("vocabulary", [1, 1000, 128_256])
def test_on_a_gpu(dtype, z_loss, vocabulary):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 64, generator=g).to("cuda", dtype).requires_grad_()
    weight = torch.randn(vocabulary, 64, generator=g).to("cuda", dtype).requires_grad_()
    targets = torch.randint(vocabulary, (600,), generator=g).cuda()
    targets[::7] = -100
    results = []
    for backend, convert in (("triton", lambda x: x), ("reference", lambda x: x.double())):
        result = linear_cross_entropy(
            convert(hidden), convert(weight), targets, z_loss=z_loss, chunk=256, backend=backend
        )
        total = (result[0][0] + 1e-3 * result[1][0] if z_loss else result[0]) / 500
        results.append((total, *torch.autograd.grad(total, (hidden, weight))))
    for a, e in zip(*results, strict=True):
        assert (a - e).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * e.norm() + 1e-7


@item(
    "more than 2^31 elements",
    ops=("cross_entropy", "linear_cross_entropy", "linear_log_probs", "linear_top_k_kl"),
)
@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_on_a_gpu():
    logits = torch.randn(18_000, 128_256, dtype=torch.bfloat16, device="cuda")
    targets = torch.arange(18_000, device="cuda")
    high, total, _ = cross_entropy_partials(logits, targets, backend="triton")
    exact = logits[-1].double().logsumexp(-1)
    torch.testing.assert_close((high[-1] + total[-1].log()).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [32_000, 128_256])
def test_two_walks_and_one_agree_on_a_gpu(dtype, vocabulary):
    """More rows than run at once: none may read what another has written."""
    logits = torch.randn(600, vocabulary, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (600,), device="cuda")
    total, _ = cross_entropy(logits * 1, targets, inplace=True, backend="triton")
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=0)
    (got,) = torch.autograd.grad(total, logits)
    (want,) = torch.autograd.grad(exact, logits)
    assert (got - want).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * want.norm()
