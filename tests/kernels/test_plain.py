"""The short forms that generation takes in inference mode, against the operators that train."""

import pytest
import torch

from warploom.kernels.activation import swiglu_linear
from warploom.kernels.attention import Decoding, paged_attention
from warploom.kernels.invariant import batch_invariant, linear, plain
from warploom.kernels.norm import rms_norm
from warploom.kernels.rope import rotary, rotary_tables, turn_whole


def _pair(run):
    """Run outside of inference mode and in it."""
    with torch.no_grad():
        want = run()
    with torch.inference_mode():
        return want, run()


def test_short_forms_serve_float32_on_the_cpu_without_gradient_or_mode():
    x = torch.zeros(2)
    assert not plain(x)
    with torch.inference_mode():
        assert plain(x)
        assert not plain(x.double())
        assert not plain(x.to("meta"))
        with batch_invariant():
            assert not plain(x)
        with torch.autocast("cpu"):
            assert not plain(x)


@pytest.mark.parametrize("rows", [1, 3, 4, 16, 17])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_few_rows(rows, bias):
    g = torch.Generator().manual_seed(rows)
    x, w, b = (torch.randn(n, generator=g) for n in ((rows, 2, 24), (40, 24), (40,)))
    for rest in (x[:, 0], x[:, 1:], x[:1].transpose(0, 1)):
        want, got = _pair(lambda rest=rest: linear(rest, w, b if bias else None))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
def test_norm_rotation_and_activation(rows):
    g = torch.Generator().manual_seed(rows)
    x, residual = torch.randn(2, rows, 48, generator=g)
    w = torch.randn(48, generator=g)
    for options in ({}, {"residual": residual}):
        want, got = _pair(lambda options=options: rms_norm(x, w, eps=1e-5, **options))
        torch.testing.assert_close(got, want)
    down = torch.randn(8, 24, generator=g)
    torch.testing.assert_close(*_pair(lambda: swiglu_linear(x, down)), atol=1e-5, rtol=1e-5)
    heads = x.view(rows, 6, 8)
    tables = rotary_tables(torch.randint(50, (rows,), generator=g), 8, base=1e4)
    torch.testing.assert_close(
        turn_whole(heads[:, :5], *tables), rotary(heads[:, :5], heads, *tables)[0]
    )


@pytest.mark.parametrize("left", [-1, 0, 5])
@pytest.mark.parametrize("lengths", [[9], [7, 1, 16, 16], [4, 4]])
@pytest.mark.parametrize("apart", [False, True])
def test_decoding_reads_no_row_of_others(lengths, left, apart, monkeypatch):
    if apart:  # one sequence at a time
        monkeypatch.setattr("warploom.kernels.attention.paged._GATHERED", 1)
    g = torch.Generator().manual_seed(0)
    used = [-(-n // 4) for n in lengths]
    order = torch.arange(20) if apart else torch.randperm(20, generator=g)
    k, v = torch.full((2, 20, 4, 2, 8), torch.nan)
    tables = torch.full((len(lengths), max(used) + 1), 10**6, dtype=torch.int32)
    for n, count in enumerate(used):
        tables[n, :count] = order[sum(used[:n]) : sum(used[:n]) + count]
        for j in range(lengths[n]):
            for x in (k, v):
                x[tables[n, j // 4], j % 4] = torch.randn(2, 8, generator=g)
    q = torch.randn(len(lengths), 6, 8, generator=g)
    cu = torch.arange(len(lengths) + 1, dtype=torch.int32)
    where = tables, torch.tensor(lengths, dtype=torch.int32), cu
    decoding = Decoding(*where, 20, 4)
    options = {"window": (left, 0), "sinks": torch.randn(6, generator=g), "return_lse": True}
    want, got = _pair(lambda: paged_attention(q, k, v, *where, decoding=decoding, **options))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    q[0] = torch.nan
    _, (out, _) = _pair(lambda: paged_attention(q, k, v, *where, decoding=decoding, **options))
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()
    with pytest.raises(ValueError, match="tables must name pages from 0 to 0"):
        Decoding(tables + 1, *where[1:], 1, 4)
