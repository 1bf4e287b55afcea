"""The batch-invariant mode: bits that do not depend on company, chunks or pages."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.kernels.activation import geglu, swiglu, swiglu_linear
from warploom.kernels.attention import (
    flash_attention,
    flash_attention_varlen,
    merge,
    paged_attention,
)
from warploom.kernels.backends import choose
from warploom.kernels.gemm import grouped_gemm
from warploom.kernels.invariant import batch_invariant, gelu, invariant, linear, sigmoid
from warploom.kernels.loss import linear_log_probs
from warploom.kernels.moe import route
from warploom.kernels.norm import layer_norm, rms_norm
from warploom.kernels.quant import fp8_quantize
from warploom.kernels.rope import rotary

both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
PARTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def _draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _rows(f, x, cuts):
    """Assert that rows in parts, at other places, are the rows of the whole."""
    with batch_invariant():
        whole = f(x)
        for a, b in itertools.pairwise([0, *itertools.accumulate(cuts)]):
            assert torch.equal(f(x[a:b]), whole[a:b]), (a, b)
            assert torch.equal(f(x[a:b].flip(0).contiguous()).flip(0), whole[a:b]), (a, b)


def test_the_mode_ends_with_its_context():
    assert not invariant()
    with batch_invariant():
        assert invariant()
        with batch_invariant():
            assert invariant()
        assert invariant()
    assert not invariant()


@both
@given(cuts=PARTS, width=st.integers(1, 700), features=st.integers(1, 200))
@settings(max_examples=25, deadline=None)
def test_a_row_of_a_product_is_its_own(dtype, cuts, width, features):
    weight = _draw(features, width, dtype=dtype, seed=1)
    _rows(lambda x: linear(x, weight), _draw(sum(cuts), width, dtype=dtype), cuts)


@both
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("sizes", [(576, 960), (1536, 576), (4096, 24), (576, 4000)])
def test_of_the_widths_of_models_too(dtype, threads, sizes):
    weight, before = _draw(*sizes[::-1], dtype=dtype, seed=1), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cuts = [1, 2, 3, 7, 16, 1, 33, 64, 170]
        _rows(lambda x: linear(x, weight), _draw(sum(cuts), sizes[0], dtype=dtype), cuts)
    finally:
        torch.set_num_threads(before)


def test_without_the_mode_it_is_not():
    x, weight = _draw(64, 576), _draw(300, 576, seed=1)
    if torch.equal(linear(x[:1], weight), linear(x, weight)[:1]):
        pytest.skip("this machine's products are invariant by themselves")


def test_products_are_right_and_have_their_gradients():
    x, weight, bias = _draw(3, 5, 40), _draw(30, 40, seed=1), _draw(30, seed=2)
    dy, found = _draw(3, 5, 30, seed=3), []
    for mode in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        if mode:
            with batch_invariant():
                y = linear(*leaves)
        else:
            y = linear(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, dy)])
    torch.testing.assert_close(found[1], found[0])


@both
@given(cuts=PARTS, width=st.integers(1, 150))
@settings(max_examples=12, deadline=None)
def test_rows_of_the_other_operators_are_their_own(dtype, cuts, width):
    rows, n = sum(cuts), 2 * width
    weight, x = _draw(n, dtype=dtype, seed=1), _draw(rows, n, dtype=dtype)
    down, score = _draw(5, width, dtype=dtype, seed=2), ("softmax", "sigmoid", "softmax_after")
    sharp = 4 * x
    for f in (
        lambda x: rms_norm(x, weight),
        lambda x: layer_norm(x, weight, weight),
        swiglu,
        geglu,
        lambda x: geglu(x, approximate="none"),
        gelu,
        sigmoid,
        lambda x: swiglu_linear(x, down),
        *(lambda x, s=s: route(x, 1, score=s)[0] for s in score),
    ):
        _rows(f, sharp, cuts)
    angles, at = _draw(rows, width, seed=4), torch.arange(rows, dtype=torch.float32)[:, None]

    def turn(x):
        place = x[:, -1].long()
        heads = x[:, None, :n].to(dtype)
        return rotary(heads, heads, angles[place].cos(), angles[place].sin())[0]

    _rows(turn, torch.cat([x.float(), at], 1), cuts)


def test_the_mode_gives_what_the_operators_specify():
    x = _draw(7, 64)
    for f in (swiglu, geglu, lambda x: geglu(x, approximate="none"), gelu, sigmoid):
        with batch_invariant():
            found = f(x)
        torch.testing.assert_close(found, f(x))


@both
@given(cuts=PARTS, experts=st.integers(1, 4))
@settings(max_examples=8, deadline=None)
def test_experts_do_not_see_how_many_rows_they_have(dtype, cuts, experts):
    weight, x = _draw(experts, 37, 64, dtype=dtype, seed=1), _draw(sum(cuts), 64, dtype=dtype)
    for e in range(experts):

        def serve(x, e=e):
            counts = torch.zeros(experts, dtype=torch.int64)
            counts[e] = len(x)
            return grouped_gemm(x, weight, counts)

        _rows(serve, x, cuts)


@both
@pytest.mark.parametrize("entropy", [False, True])
def test_log_probabilities_of_a_token_are_its_own(dtype, entropy):
    hidden, weight = _draw(90, 48, dtype=dtype), _draw(40_000, 48, dtype=dtype, seed=1)
    targets = torch.randint(40_000, (90,), generator=torch.Generator().manual_seed(2))

    def log_probs(at):
        found = linear_log_probs(hidden[at], weight, targets[at], entropy=entropy)
        return torch.stack(found, -1) if entropy else found

    _rows(log_probs, torch.arange(90), [1, 2, 1, 30, 5, 51])
    plain = log_probs(torch.arange(90))
    with batch_invariant():
        torch.testing.assert_close(log_probs(torch.arange(90)), plain)


CASES = [
    {},
    {"window": (5, 0)},
    {"window": (300, 0), "softcap": 1.5},
    {"sinks": True, "scale": 0.3},
]


@both
@pytest.mark.parametrize("options", CASES)
@given(
    lengths=st.lists(st.integers(1, 60) | st.integers(250, 600), min_size=1, max_size=3),
    page=st.sampled_from([1, 3, 16, 64]),
    heads=st.sampled_from([(1, 1), (2, 2), (6, 2), (4, 1)]),
    widths=st.sampled_from([(8, 8), (16, 5), (24, 40)]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=6, deadline=None)
def test_attention_is_the_same_from_pages_in_chunks_and_whole(
    dtype, options, lengths, page, heads, widths, seed
):
    g = torch.Generator().manual_seed(seed)
    total, needed = sum(lengths), [-(-n // page) for n in lengths]
    q, k, v = (
        torch.randn(total, n, w, generator=g).to(dtype)
        for n, w in ((heads[0], widths[0]), (heads[1], widths[0]), (heads[1], widths[1]))
    )
    options = options | (
        {"sinks": torch.randn(heads[0], generator=g)} if "sinks" in options else {}
    )
    cu = [0, *itertools.accumulate(lengths)]
    order = torch.randperm(sum(needed) + 2, generator=g).int()
    k_pages, v_pages = (
        torch.full((len(order), page, *x.shape[1:]), torch.nan, dtype=dtype) for x in (k, v)
    )
    tables, used = torch.zeros(len(lengths), max(needed), dtype=torch.int32), 0
    for n, count in enumerate(needed):
        tables[n, :count] = order[used : used + count]
        used += count
        j = torch.arange(lengths[n])
        for pages, x in ((k_pages, k), (v_pages, v)):
            pages[tables[n, j // page].long(), j % page] = x[cu[n] + j]
    with batch_invariant():
        whole = flash_attention_varlen(q, k, v, torch.tensor(cu, dtype=torch.int32), **options)
        for n, (a, b) in enumerate(itertools.pairwise(cu)):
            alone = flash_attention(*(x[None, a:b] for x in (q, k, v)), **options)[0]
            assert torch.equal(alone, whole[a:b]), n
        done = [0] * len(lengths)
        while live := [n for n, at in enumerate(done) if at < lengths[n]]:
            some = [n for n in live if torch.rand((), generator=g) < 0.7] or live[:1]
            counts = [
                min(1 + int(200 * torch.rand((), generator=g) ** 3), lengths[n] - done[n])
                for n in some
            ]
            rows = [
                torch.arange(cu[n] + done[n], cu[n] + done[n] + c)
                for n, c in zip(some, counts, strict=True)
            ]
            for n, c in zip(some, counts, strict=True):
                done[n] += c
            at = torch.tensor([done[n] for n in some], dtype=torch.int32)
            bounds = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
            paged = paged_attention(
                q[torch.cat(rows)], k_pages, v_pages, tables[some], at, bounds, **options
            )
            assert torch.equal(paged, whole[torch.cat(rows)]), (some, counts, done)


@pytest.mark.parametrize("options", [*CASES[:3], {"causal": False}, {"offset": 3}, {"offset": -4}])
@pytest.mark.parametrize("queries", [1, 7, 300])
def test_attention_is_right_and_has_its_gradients(options, queries):
    shapes = ((2, queries, 4, 8), (2, 290, 2, 8), (2, 290, 2, 6))
    inputs = [_draw(*shape, seed=n) for n, shape in enumerate(shapes)]
    dout, dlse, found = _draw(2, queries, 4, 6, seed=4), _draw(2, 4, queries, seed=5), []
    for mode in (False, True):
        leaves = [t.clone().requires_grad_() for t in inputs]
        if mode:
            with batch_invariant():
                out, lse = flash_attention(*leaves, **options, return_lse=True)
        else:
            out, lse = flash_attention(*leaves, **options, return_lse=True, backend="reference")
        lost = lse == -torch.inf
        loss = (out * dout).sum() + lse.masked_fill(lost, 0).mul(dlse).sum()
        found.append([out, lse, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=1e-4)


def test_what_the_mode_does_not_serve_is_refused():
    x = _draw(4, 16)
    part, lse = _draw(1, 4, 2, 8), _draw(1, 2, 4)
    with batch_invariant():
        for wrong in (
            lambda: linear(x.double(), x.double()),
            lambda: linear(x.to("meta"), x.to("meta")),
            lambda: choose("rms_norm", torch.device("cuda"), torch.float32),
            lambda: swiglu(x, backend="triton"),
            lambda: merge(part, lse, part, lse),
            lambda: flash_attention(*3 * [_draw(1, 4, 2, 8).double()]),
            lambda: fp8_quantize(x),
        ):
            with pytest.raises(RuntimeError, match=r"batch_invariant\(\) serves float32"):
                wrong()


def test_what_was_compiled_before_is_invariant_too():
    weight, x = _draw(300, 576, seed=1), _draw(20, 576)
    compiled = torch.compile(lambda x: linear(x, weight), fullgraph=True, backend="eager")
    compiled(x)
    _rows(compiled, x, [1, 2, 17])
