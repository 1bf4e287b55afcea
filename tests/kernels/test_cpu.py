"""The C++ operators of generation against the operators that train, for every kind of vector."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from warploom.kernels import cpu
from warploom.kernels.activation import swiglu_linear
from warploom.kernels.attention import Decoding, paged_attention
from warploom.kernels.invariant import batch_invariant, linear, plain
from warploom.kernels.norm import rms_norm
from warploom.kernels.rope import rotary, rotary_tables

built = pytest.mark.skipif(cpu.missing() is not None, reason="warploom._cpu is not built")
LANES = [] if cpu.missing() else cpu.operators().lanes()


@pytest.fixture(params=LANES)
def lanes(request, monkeypatch):
    """Vectors of so many floats, whatever the processor has best."""
    monkeypatch.setattr(cpu, "lanes", lambda: request.param)
    monkeypatch.setattr("warploom.kernels.attention.paged.lanes", lambda: request.param)
    return request.param


def _pair(run):
    """Run outside of inference mode and in it."""
    with torch.no_grad():
        want = run()
    with torch.inference_mode():
        return want, run()


def test_the_module_is_built_where_a_compiler_is():
    assert cpu.missing() is None or shutil.which("c++") is None, cpu.missing()


def test_without_the_module_the_operators_that_train_serve(monkeypatch):
    monkeypatch.setattr(cpu, "operators", lambda: "No module named 'warploom._cpu': install")
    cpu.lanes.cache_clear()
    try:
        assert "install" in cpu.missing()
        with torch.inference_mode():
            assert not plain(torch.zeros(2))
            assert linear(torch.ones(4, 16), torch.ones(2, 16)).tolist() == [[16.0, 16.0]] * 4
    finally:
        cpu.lanes.cache_clear()


@built
def test_they_serve_float32_on_the_cpu_without_gradient_or_mode():
    x = torch.zeros(2)
    assert not plain(x)
    with torch.inference_mode():
        assert plain(x)
        assert not plain(x, x.double())
        assert not plain(x.bfloat16())
        assert not plain(x.to("meta"))
        with batch_invariant():
            assert not plain(x)
        with torch.autocast("cpu"):
            assert not plain(x)
        with FakeTensorMode():
            assert not plain(torch.zeros(2))
            assert linear(torch.ones(4, 16), torch.ones(2, 16)).shape == (4, 2)


def test_products_of_few_rows(lanes):
    g = torch.Generator().manual_seed(lanes)
    for width, columns in ((16, 5), (400, 49), (1536, 100)):  # a strip is 48, a cut 384
        w, b = torch.randn(columns, width, generator=g), torch.randn(columns, generator=g)
        for rows in (1, 2, 3, 8, 11, 16, 24, 25):
            x = torch.randn(rows, 2, width, generator=g)
            assert cpu.serves_linear(x[:, 0], w, b) == (2 < rows < 25)
            for bias in (b, None):
                got = cpu.linear(x[:, 0], w, bias)
                want = F.linear(x[:, 0].double(), w.double(), None if bias is None else b.double())
                torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(
                *_pair(lambda x=x, w=w: linear(x[:, 1], w)), atol=1e-4, rtol=1e-5
            )
    assert not cpu.serves_linear(torch.zeros(4, 18), torch.zeros(2, 18), None)
    assert not cpu.serves_linear(torch.zeros(4, 16), torch.zeros(16, 2).t(), None)


def test_a_product_shares_its_columns_among_threads(lanes):
    x, w = torch.randn(9, 256), torch.randn(1001, 256)
    threads = torch.get_num_threads()
    try:
        alone = cpu.linear(x, w, None)
        torch.set_num_threads(3)
        assert torch.equal(cpu.linear(x, w, None), alone)
    finally:
        torch.set_num_threads(threads)


def test_a_row_has_the_same_bits_in_any_company(lanes):
    x, w = torch.randn(24, 400), torch.randn(50, 400)
    whole = cpu.linear(x, w, None)
    for first, count in ((0, 3), (5, 8), (11, 13)):
        assert torch.equal(cpu.linear(x[first:][:count], w, None), whole[first:][:count])


def test_what_does_not_lie_row_by_row_is_served_as_in_training(lanes):
    x, w, many = torch.randn(4, 16), torch.randn(6, 16), torch.arange(2.0, 34.0)
    for bias in (many[:12:2], many[:1].expand(6), many[:1]):
        torch.testing.assert_close(*_pair(lambda bias=bias: linear(x, w, bias)))
    torch.testing.assert_close(*_pair(lambda: linear(x, w[0])))
    torch.testing.assert_close(*_pair(lambda: linear(x[:, :0], w[:, :0], many[:6])))
    torch.testing.assert_close(*_pair(lambda: swiglu_linear(x[:, :0], w[:, :0])))
    for scale in (many[::2], many[:1].expand(16)):
        torch.testing.assert_close(*_pair(lambda scale=scale: rms_norm(x, scale)))


@built
@pytest.mark.parametrize(
    ("run", "error"),
    [
        (lambda x, w: linear(x[:, :8], w), RuntimeError),
        (lambda x, w: linear(x, w, w[0, :5]), RuntimeError),
        (lambda x, w: linear(x, w, w[:, 0].double()), RuntimeError),
        (lambda x, w: rms_norm(x, w[0], residual=x[0]), ValueError),
        (lambda x, w: rms_norm(x, w[0], residual=x[:2]), ValueError),
        (lambda x, w: rms_norm(x, w[0], eps=-1.0), ValueError),
        (lambda x, w: rms_norm(x[:, :0], w[0, :0]), ValueError),
    ],
)
def test_what_does_not_fit_is_refused_as_in_training(run, error):
    x, w = torch.randn(4, 16), torch.randn(6, 16)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(error):
            run(x, w)


@pytest.mark.parametrize("rows", [1, 5])
def test_norm_rotation_and_activation(rows, lanes):
    g = torch.Generator().manual_seed(rows)
    for width in (5, 48, 576):
        x, residual = torch.randn(2, rows, width, generator=g)
        w = torch.randn(width, generator=g)
        for options in ({}, {"residual": residual}):
            want, got = _pair(lambda o=options, x=x, w=w: rms_norm(x, w, eps=1e-5, **o))
            torch.testing.assert_close(got, want)
    heads = x.view(rows, 9, 64)
    tables = rotary_tables(torch.randint(50, (rows,), generator=g), 64, base=1e4)
    want = rotary(heads[:, :5], heads, *tables)[0]
    torch.testing.assert_close(cpu.rotate(heads[:, :5], *tables), want)


def test_activation_of_large_and_tiny_gates(lanes):
    gate = torch.cat((torch.linspace(-120, 120, 1001), torch.tensor([0.0, -0.0, 1e-30])))
    gate_up = torch.stack((gate, torch.full_like(gate, 3.0))).view(1, -1)
    want = 3 * F.silu(gate.double())
    got = cpu.swiglu(gate_up)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-30)
    assert cpu.swiglu(torch.full((2, 4), torch.nan)).isnan().all()
    assert not cpu.swiglu(torch.tensor([[-3e38, 1.0]])).any()
    down = torch.randn(8, 24)
    x = torch.randn(3, 48)
    torch.testing.assert_close(*_pair(lambda: swiglu_linear(x, down)), atol=1e-5, rtol=1e-5)


def _cache(lengths, page, groups, widths, g):
    """Pages in random order, NaN where no sequence reads; tables with rubbish at their end."""
    used = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(used) + 3, generator=g)
    k, v = (torch.full((len(order), page, groups, width), torch.nan) for width in widths)
    tables = torch.full((len(lengths), max(used) + 1), 10**6, dtype=torch.int32)
    for n, count in enumerate(used):
        tables[n, :count] = order[sum(used[:n]) : sum(used[:n]) + count]
        for j in range(lengths[n] - 1):  # the last is written by the operator
            for x in (k, v):
                x[tables[n, j // page], j % page] = torch.randn(*x.shape[2:], generator=g)
    return k, v, tables


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1), (4, 4)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": (0, 0)},
        {"window": (5, 0), "softcap": 2.0, "scale": 0.3},
        {"sinks": torch.linspace(-2, 3, 8)},
        {"sinks": torch.linspace(-2, 3, 16, dtype=torch.float64)[::2]},
        {"sinks": torch.tensor([0.0, torch.inf] * 4)},
    ],
)
@pytest.mark.parametrize("lengths", [[9], [7, 1, 16, 41], [4, 4]])
def test_decoding_is_attention_to_the_pages(lengths, options, heads, lanes):
    g = torch.Generator().manual_seed(0)
    (heads, groups), widths, page = heads, (32, 48), 4
    options = options | ({"sinks": options["sinks"][:heads]} if "sinks" in options else {})
    k_pages, v_pages, tables = _cache(lengths, page, groups, widths, g)
    counts = torch.tensor(lengths, dtype=torch.int32)
    made = torch.randn(len(lengths), heads + groups, 32, generator=g)
    q, k = made[:, :heads], made[:, heads:]  # views, as attention has them
    v = torch.randn(len(lengths), groups, 48, generator=g)
    decoding = Decoding(tables, counts, len(k_pages), page)
    with torch.inference_mode():
        assert decoding.serves(q, k_pages, v_pages)
        got = decoding.attend(q, k, v, k_pages, v_pages, **options)
    for n, length in enumerate(lengths):
        at = tables[n, (length - 1) // page], (length - 1) % page
        assert torch.equal(k_pages[at], k[n])
        assert torch.equal(v_pages[at], v[n])
    cu = torch.arange(len(lengths) + 1, dtype=torch.int32)
    want = paged_attention(q, k_pages, v_pages, tables, counts, cu, **options)
    torch.testing.assert_close(got, want)
    q[0] = torch.nan
    got = decoding.attend(q, k, v, k_pages, v_pages, **options | {"sinks": None})
    assert got[0].isnan().all()
    assert got[1:].isfinite().all()


def test_threads_share_sequences_and_groups(lanes):
    g = torch.Generator().manual_seed(0)
    lengths = [700, 3, 900]
    k_pages, v_pages, tables = _cache(lengths, 16, 2, (32, 32), g)
    decoding = Decoding(tables, torch.tensor(lengths, dtype=torch.int32), len(k_pages), 16)
    q, k, v = (torch.randn(3, n, 32, generator=g) for n in (6, 2, 2))
    threads = torch.get_num_threads()
    try:
        alone = decoding.attend(q, k, v, k_pages, v_pages)
        torch.set_num_threads(4)
        assert torch.equal(decoding.attend(q, k, v, k_pages, v_pages), alone)
    finally:
        torch.set_num_threads(threads)


def test_tables_are_checked_before_anything_is_read():
    tables, lengths = torch.tensor([[0, 7]], dtype=torch.int32), torch.tensor([6])
    with pytest.raises(ValueError, match="tables must name pages from 0 to 3"):
        Decoding(tables, lengths, 4, 4)
    with pytest.raises(ValueError, match="lengths must count"):
        Decoding(tables, lengths + 3, 8, 4)
