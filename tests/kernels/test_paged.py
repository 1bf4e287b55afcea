"""`paged_attention` against attention to the same keys, gathered by hand."""

import pytest
import torch
from tests.kernels.specimen import item

from warploom.kernels.attention import flash_attention, paged_attention

BACKENDS = ["reference", "torch"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
OPS = ("paged_attention",)


def _case(queries, lengths, *, page=4, width=8, values=8, dtype=torch.float64, heads=4, kv_heads=2):
    """Draw pages in random order, some of nobody (NaN), tables with rubbish behind their end."""
    g = torch.Generator().manual_seed(0)
    needed = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(needed) + 3, generator=g).int()
    k, v = (
        torch.randn(len(order), page, kv_heads, w, dtype=torch.float64, generator=g).to(dtype)
        for w in (width, values)
    )
    tables = torch.full((len(lengths), max([*needed, 1]) + 1), 10**6, dtype=torch.int32)
    used = 0
    for n, count in enumerate(needed):
        tables[n, :count] = order[used : used + count]
        used += count
    k[order[used:]] = v[order[used:]] = torch.nan
    for n, length in enumerate(lengths):  # and the rows of a last page behind its last key
        if length % page:
            k[tables[n, needed[n] - 1], length % page :] = torch.nan
            v[tables[n, needed[n] - 1], length % page :] = torch.nan
    q = torch.randn(sum(queries), heads, width, dtype=torch.float64, generator=g).to(dtype)
    cu = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    return q, k, v, tables, torch.tensor(lengths, dtype=torch.int32), cu


def _oracle(q, k, v, tables, lengths, cu, **options):
    parts = []
    for n, length in enumerate(lengths.tolist()):
        at = [(tables[n, j // k.shape[1]], j % k.shape[1]) for j in range(length)]
        keys, values = (
            torch.stack([x[p, r] for p, r in at])[None] if at else x[:1, :0] for x in (k, v)
        )
        rows = q[None, cu[n] : cu[n + 1]]
        parts.append(
            flash_attention(rows, keys, values, **options, return_lse=True, backend="reference")
        )
    return torch.cat([o[0] for o, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)


@item("values", "zero and odd sizes", "NaN and inf", ops=OPS)
@each_backend
@pytest.mark.parametrize("options", [{}, {"window": (5, 0), "softcap": 1.2}, {"causal": False}])
@pytest.mark.parametrize(
    ("queries", "lengths"),
    [
        ([1, 1, 1], [7, 1, 16]),  # decoding
        ([5, 3], [5, 9]),  # a prompt, and a chunk of one
        ([1, 0, 6, 1], [12, 0, 30, 4]),  # both, and nobody
        ([0], [9]),
    ],
)
def test_pages_give_what_the_keys_in_order_give(backend, options, queries, lengths):
    """Pages of nobody, and rows behind the last key, hold NaN."""
    case = _case(queries, lengths, values=5)
    sinks = torch.linspace(-1, 1, 4).double() if "window" in options else None
    actual = paged_attention(*case, **options, sinks=sinks, return_lse=True, backend=backend)
    torch.testing.assert_close(actual, _oracle(*case, **options, sinks=sinks))


@item("layout", ops=OPS)
@each_backend
def test_pages_of_any_layout(backend):
    q, k, v, *where = _case([2, 4], [9, 6])
    expected = paged_attention(q, k, v, *where, backend=backend)
    k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (k, v))
    q = q.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(paged_attention(q, k, v, *where, backend=backend), expected)


@item("no_grad, autocast", "opcheck", "torch.compile", "second derivative", ops=OPS)
def test_no_gradient_is_promised():
    q, *rest = _case([2, 4], [9, 6], dtype=torch.float32)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient: call it under torch.no_grad"):
        paged_attention(q, *rest)
    with torch.no_grad():
        expected = paged_attention(q, *rest)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(paged_attention(q, *rest), expected)
    q = q.detach()
    compiled = torch.compile(paged_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, *rest), expected)
    options = (0.3, -1, 0, 0.0, "torch")
    torch.library.opcheck(torch.ops.warploom.paged_attention_forward.default, (q, *rest, *options))


@item("bad input", ops=OPS)
def test_bad_pages_are_refused_in_words():
    q, k, v, tables, lengths, cu = _case([2, 4], [9, 6])
    for wrong, message in (
        ({"lengths": lengths + 40}, "sequence 0 has 2 queries, room for 16 keys and length 49"),
        ({"lengths": lengths - 8}, "sequence 0 has 2 queries, .* and length 1"),
        ({"lengths": lengths.long()}, r"lengths int32 \[2\]"),
        ({"tables": tables + 100}, "must name pages from 0 to 7, sequence 0 has"),
        ({"tables": tables[:1]}, r"tables must be int32 \[2, pages\]"),
        ({"cu_seqlens": cu + 1}, "must start at 0, got 1"),
        ({"k_pages": k[0]}, r"k_pages \[P, page, G, K\]"),
        ({"k_pages": k[:, :0], "v_pages": v[:, :0]}, "a page must hold at least one key, got"),
        ({"v_pages": v[:, :2]}, "k and v must have one shape but for the head dimension"),
        ({"window": (-3, 0)}, "window must be"),
    ):
        arguments = {"q_THK": q, "k_pages": k, "v_pages": v, "tables": tables, "lengths": lengths}
        with pytest.raises(ValueError, match=message):
            paged_attention(**{**arguments, "cu_seqlens": cu, **wrong})


@item("determinism", "batch invariance", ops=OPS)
@each_backend
def test_a_sequence_does_not_depend_on_its_company(backend):
    q, k, v, tables, lengths, cu = _case([1, 5, 2], [9, 40, 2], dtype=torch.float32)
    together = paged_attention(q, k, v, tables, lengths, cu, return_lse=True, backend=backend)
    for n in range(3):
        rows = slice(int(cu[n]), int(cu[n + 1]))
        where = tables[n : n + 1], lengths[n : n + 1], cu[n : n + 2] - cu[n]
        out, lse = paged_attention(q[rows], k, v, *where, return_lse=True, backend=backend)
        assert torch.equal(out, together[0][rows])
        assert torch.equal(lse, together[1][:, rows])


@item("streams and graphs", "determinism", ops=OPS)
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_on_a_gpu_and_in_a_captured_graph(backend):
    """Triton reads tables and lengths on the device: a replayed graph sees other ones."""
    case = _case([1, 3, 1], [900, 300, 64], page=16, width=64, values=64)
    expected = _oracle(*case)[0]
    case = [x.to("cuda", torch.bfloat16 if x.is_floating_point() else None) for x in case]
    first = paged_attention(*case, backend=backend)
    torch.testing.assert_close(first.double().cpu(), expected, rtol=0.02, atol=0.02)
    for _ in range(100):
        assert torch.equal(paged_attention(*case, backend=backend), first)
    if backend == "triton":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = paged_attention(*case, backend=backend)
        case[4] -= torch.tensor([40, 0, 3], device="cuda", dtype=torch.int32)
        graph.replay()
        assert torch.equal(captured, paged_attention(*case, backend=backend))
