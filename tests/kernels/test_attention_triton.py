"""The Triton code of flash attention, interpreted, compiled, and on a GPU.

The oracle is a softmax over all scores in float64 with a mask from positions. Triton reads
TRITON_INTERPRET when it is imported, so the interpreter runs in a process of its own: the tests
named `interpreted` below, which `test_interpreted.py` starts, and which skip otherwise. They take
float32 in larger tiles than a GPU would, because the interpreter pays by the tile.
"""

import dataclasses
import re

import pytest
import torch
from tests.kernels.specimen import item

from warploom.kernels.attention.scores import Packed, Scores
from warploom.kernels.backends import interpreted

pytest.importorskip("triton")

from warploom.kernels.attention import flash_backward_triton, flash_triton  # noqa: E402

OPS = ("flash_attention", "flash_attention_varlen")
SIZES = [(64, 64), (128, 128), (192, 128), (256, 256)]
in_interpreter = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(interpreted(), reason="the interpreter does not compile")


@pytest.fixture
def tiles(monkeypatch):
    """Take tiles of 64 queries and 32 keys, whatever the dtype."""
    chosen = [{"M": 64, "N": 32, "num_warps": 4, "num_stages": 1}]
    for module in (flash_triton, flash_backward_triton):
        monkeypatch.setattr(module, "candidates", lambda first, walked: chosen)


def _draw(queries, keys, heads=2, groups=1, size=16, value=None, batch=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(queries + 1000 * keys + size)
    value = size if value is None else value
    shapes = (queries, heads, size), (keys, groups, size), (keys, groups, value)
    shapes += ((queries, heads, value),)
    lead = (batch,) if batch else ()
    q, k, v, dout = (torch.randn(*lead, *shape, generator=g).to(dtype) for shape in shapes)
    return q, k, v, dout, torch.randn(*lead, heads, queries, generator=g)


def _oracle(q, k, v, dout, dlse, scores):
    """Return out, lse, dq, dk and dv of a dense call, in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    share = q.shape[2] // k.shape[2]
    wide_k, wide_v = (x.repeat_interleave(share, 2) for x in (k, v))
    s = torch.einsum("bshk,buhk->bhsu", q, wide_k) * scores.scale
    if scores.softcap:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    queries, keys = q.shape[1], k.shape[1]
    offset = keys - queries if scores.offset is None else scores.offset
    distance = torch.arange(queries)[:, None] + offset - torch.arange(keys)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if scores.left >= 0:
        seen &= distance <= scores.left
    if scores.right >= 0:
        seen &= distance >= -scores.right
    lit = seen.any(1)  # queries that see a key
    lse = torch.logsumexp(s.masked_fill(~seen, -torch.inf)[:, :, lit], -1)
    p = torch.where(seen[lit], torch.exp(s[:, :, lit] - lse[..., None]), 0.0)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    out[:, lit] = torch.einsum("bhsu,buhl->bshl", p, wide_v)
    total = (out * dout).sum() + (lse * dlse[:, :, lit]).sum() + 0 * (q.sum() + k.sum() + v.sum())
    gradients = torch.autograd.grad(total, (q, k, v))
    whole = torch.full((q.shape[0], q.shape[2], queries), -torch.inf, dtype=torch.float64)
    whole[:, :, lit] = lse.detach()
    return out.detach(), whole, *gradients


def _run(tensors, scores, packed=None):
    q, k, v, dout, dlse = tensors
    out, lse = flash_triton.forward(q, k, v, packed, scores)
    saved = q, k, v, out, lse
    return out, lse, *flash_backward_triton.backward(dout, dlse, *saved, packed, scores)


def _assert_right(tensors, scores, share=2e-5):
    """Hold errors to a share of the largest value, or of 1."""
    found, expected = _run(tensors, scores), _oracle(*tensors, scores)
    for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        top = float(e[e.isfinite()].abs().max()) if e.isfinite().any() else 1.0
        near = {"rtol": 0.0, "atol": share * max(top, 1.0)}
        torch.testing.assert_close(a.double(), e, msg=lambda m, n=name: f"{n}: {m}", **near)


MASKS = {
    "full": Scores(scale=0.3),
    "causal": Scores(scale=0.3, right=0),
    "window": Scores(scale=0.3, left=20, right=3),
    "own": Scores(scale=0.3, left=0, right=0),
    "far": Scores(scale=0.3, left=2**31 - 1, right=2**31 - 1, offset=-30),
    "ahead": Scores(scale=0.3, right=5, offset=40),
    "empty": Scores(scale=0.3, left=9, right=0, offset=-30),
    "beyond": Scores(scale=0.3, left=9, right=9, offset=500),
    "cap": Scores(scale=0.3, right=0, softcap=2.0),
}
LENGTHS = [(1, 1), (1, 129), (63, 64), (65, 127), (128, 63), (129, 129), (64, 1), (0, 5), (5, 0)]
SOME = [("window", 65, 127), ("causal", 128, 63), ("empty", 63, 64), ("cap", 63, 64)]
SOME += [("full", 1, 129), ("full", 64, 1), ("causal", 0, 5), ("causal", 5, 0), ("ahead", 63, 64)]
SOME += [("far", 65, 127), ("full", 65, 127)]


def _cases():
    for name in MASKS:
        for queries, keys in LENGTHS:
            marks = [] if (name, queries, keys) in SOME else [pytest.mark.slow]
            yield pytest.param(name, queries, keys, marks=marks)


@item("values", "zero and odd sizes", ops=OPS)
@in_interpreter
@pytest.mark.parametrize(("mask", "queries", "keys"), [*_cases()])
def test_interpreted_masks(tiles, mask, queries, keys):
    _assert_right(_draw(queries, keys, 1), MASKS[mask])


@in_interpreter
@pytest.mark.parametrize("offset", [2**31 - 3, -(2**31), 2**40])
def test_interpreted_offsets_beyond_32_bits(tiles, offset):
    """Only the distance of an offset and a window counts: sums of positions fit 32 bits."""
    for left, right in ((-1, 0), (abs(offset) + 5, -1), (-1, abs(offset) - 30)):
        scores = Scores(scale=0.25, left=left, right=right, offset=offset)
        _assert_right(_draw(20, 40), scores)


SLOW = pytest.mark.slow


@in_interpreter
@pytest.mark.parametrize(
    ("size", "value"),
    [(80, 80), (192, 128)]
    + [pytest.param(*s, marks=SLOW) for s in ((1, 1), (64, 64), (96, 96), (128, 128), (256, 256))],
)
@pytest.mark.parametrize("mask", ["causal", pytest.param("cap", marks=SLOW)])
def test_interpreted_head_sizes(tiles, size, value, mask):
    """Whole tiles too, with the last row of a tensor: what pads it lies outside."""
    scores = Scores(scale=size**-0.5, right=0, softcap=MASKS[mask].softcap)
    _assert_right(_draw(65, 33, 1, 1, size, value), scores)
    _assert_right(_draw(64, 32, 1, 1, size, value), dataclasses.replace(scores, right=-1))


@in_interpreter
@pytest.mark.parametrize(("heads", "groups"), [(8, 2), pytest.param(8, 1, marks=SLOW)])
def test_interpreted_grouped_heads(tiles, heads, groups):
    """With values of another size, so that no distance of theirs is one of the keys."""
    _assert_right(_draw(9, 20, heads, groups, value=24, batch=2), MASKS["window"])


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_interpreted_in_the_tiles_of_a_gpu(dtype):
    """The interpreter has no products of bfloat16."""
    rows, share = (20, 2e-5) if dtype == torch.float32 else (140, 0.02)
    _assert_right(_draw(rows, rows, 1, 1, 64, dtype=dtype), MASKS["causal"], share)


@item("NaN and inf", ops=OPS)
@in_interpreter
def test_interpreted_a_query_without_keys_takes_no_gradient(tiles):
    """Not even NaN, which is what a sum of weights from log-sum-exps of -inf gives."""
    q, k, v, dout, dlse = _draw(63, 64, 1)
    blind = torch.arange(63) + MASKS["empty"].offset < 0
    _assert_right((q, k, v, dout, dlse.masked_fill(blind, torch.nan)), MASKS["empty"])


@item("NaN and inf", ops=OPS)
@in_interpreter
def test_interpreted_far_below_zero(tiles):
    """A log-sum-exp of -1000 is no reason for a weight of 0 or infinity."""
    q, k, v, dout, dlse = _draw(20, 40)
    q, k = q.abs() + 1, -k.abs() - 1
    tensors = q, k, v, dout, dlse
    scores = Scores(scale=20.0, right=0)
    assert _run(tensors, scores)[1].max() < -88.7
    _assert_right(tensors, scores, share=1e-3)
    huge = torch.full_like(q, 3e38), torch.full_like(k, -3e38), v  # all products are -inf
    out, lse = flash_triton.forward(*huge, None, scores)
    assert not out.isnan().any()
    assert (lse == -torch.inf).all()
    nan = torch.full_like(dlse, torch.nan)
    gradients = flash_backward_triton.backward(dout, nan, *huge, out, lse, None, scores)
    assert not any(g.any() for g in gradients), "nothing was weighed"


@item("layout", "upstream gradients", ops=OPS)
@in_interpreter
def test_interpreted_strides(tiles):
    q, k, v, dout, dlse = tensors = _draw(20, 40, 2, 1)
    expected = _run(tensors, MASKS["causal"])
    across = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout)]
    every = [x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v, dout)]
    for form in (across, every):
        for a, e in zip(_run((*form, dlse), MASKS["causal"]), expected, strict=True):
            assert torch.equal(a, e)
    out, lse = (x.repeat_interleave(2, -1)[..., ::2] for x in expected[:2])
    saved = q, k, v, out.transpose(1, 2).contiguous().transpose(1, 2), lse
    gradients = flash_backward_triton.backward(dout, dlse, *saved, None, MASKS["causal"])
    assert all(map(torch.equal, gradients, expected[2:]))
    ones = torch.tensor(1.0).expand_as(dout), torch.tensor(0.5).expand_as(dlse)
    plain = tuple(x.contiguous() for x in ones)
    for a, e in zip(
        _run((q, k, v, *ones), MASKS["causal"]),
        _run((q, k, v, *plain), MASKS["causal"]),
        strict=True,
    ):
        assert torch.equal(a, e)
    without = _run((q, k, v, dout, None), MASKS["causal"])
    zero = _run((q, k, v, dout, torch.zeros_like(dlse)), MASKS["causal"])
    assert all(map(torch.equal, without, zero))


DOCUMENTS = ([0, 1, 65, 3, 0, 0, 40, 5, 0], [0, 3, 63, 5, 7, 0, 40, 0, 2])


def _packed(queries, keys, **more):
    cu_q, cu_k = (
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (queries, keys)
    )
    tensors = _draw(sum(queries), sum(keys), batch=0, **more)
    return tensors, Packed(cu_q, cu_k, None, None)


def _alone(tensors, packed, n):
    q, k, v, dout, dlse = tensors
    rows, columns = (slice(int(cu[n]), int(cu[n + 1])) for cu in packed[:2])
    dense = q[rows], k[columns], v[columns], dout[rows], dlse[:, rows]
    return tuple(x[None] for x in dense), rows, columns


@item("determinism", "batch invariance", ops=OPS)
@in_interpreter
@pytest.mark.parametrize(
    "mask", ["window", *(pytest.param(m, marks=SLOW) for m in MASKS if m != "window")]
)
def test_interpreted_documents_have_the_bits_that_they_have_alone(tiles, mask):
    scores = MASKS[mask]
    tensors, packed = _packed(*DOCUMENTS, heads=1, value=8)
    out, lse, dq, dk, dv = first = _run(tensors, scores, packed)
    again = _run(tensors, scores, packed)
    assert all(map(torch.equal, first, again))
    for n in range(len(DOCUMENTS[0])):
        dense, rows, columns = _alone(tensors, packed, n)
        found = out[rows], lse[:, rows], dq[rows], dk[columns], dv[columns]
        for name, a, e in zip("olqkv", found, _run(dense, scores), strict=True):
            assert torch.equal(a, e[0]), f"document {n}, {name}"


@item("NaN and inf", ops=OPS)
@in_interpreter
@pytest.mark.parametrize("spoilt", ["q", "k", "v", "dout"])
def test_interpreted_a_nan_stays_in_its_document(tiles, spoilt):
    tensors, packed = _packed([30, 37, 20], [30, 37, 20], heads=1)
    clean = _run(tensors, MASKS["causal"], packed)
    tensors["qkv".find(spoilt) if spoilt != "dout" else 3][30:67] = torch.nan
    dirty = _run(tensors, MASKS["causal"], packed)
    for i, (a, e) in enumerate(zip(dirty, clean, strict=True)):
        a, e = (x.t() if i == 1 else x for x in (a, e))
        assert torch.equal(a[:30], e[:30])
        assert torch.equal(a[67:], e[67:])
    assert dirty[2][30:67].isnan().any()


@in_interpreter
def test_interpreted_many_documents_make_few_tiles():
    """A thousand short documents: a tile each, and at most one more than there are rows / M."""
    cu = torch.arange(0, 32_001, 32, dtype=torch.int32)
    packed = Packed(cu, cu, None, None)
    (_, _, document, at), most, documents = flash_triton.place(packed, False, 32_000, 128, cu)
    assert documents == 1000
    assert int(at[-1]) == 1000
    assert most <= 32_000 // 128 + 1000
    assert document[:1000].tolist() == [*range(1000)]
    assert (document[1000:] == 1000).all()
    cu = torch.tensor([0, 128, 0, 1, 129, 256]).cumsum(0).to(torch.int32)
    (_, _, document, at), most, _ = flash_triton.place(
        Packed(cu, cu, None, None), True, 514, 128, cu
    )
    assert at.tolist() == [0, 1, 1, 2, 4, 6]
    assert document.tolist() == [0, 2, 3, 3, 4, 4, *[5] * (most - 6)]


def _compiled(size, value, dtype, capability, scores, packed=False):
    """Compile what a call launches; yield each kernel's report and intermediate code."""
    from tests.kernels import launches as gate

    q, k, v, dout, dlse = (
        torch.empty_like(x) for x in _draw(512, 512, 4, 2, size, value, 0 if packed else 1, dtype)
    )
    cu = torch.tensor([0, 200, 512], dtype=torch.int32)
    with gate.recorded() as found:
        _run((q, k, v, dout, dlse), scores, Packed(cu, cu, None, None) if packed else None)
    for launch in found:
        report = gate.compile_for(launch, capability)
        made = launch.kernel.run(*launch.args, grid=(1, 1, 1), warmup=True, **launch.options)
        yield report, made.asm["ttgir"]


def _shapes():
    for capability in (90, 100):
        for size, value in SIZES:
            for mask in ("causal", "full", "window", "cap"):
                for dtype in (torch.bfloat16, torch.float32):
                    some = (capability, size, mask, dtype) == (90, 128, "causal", torch.bfloat16)
                    yield pytest.param(
                        size, value, dtype, capability, mask, marks=() if some else SLOW
                    )


@item("fits sm_90 and sm_100", ops=OPS)
@compiled
@pytest.mark.parametrize(("size", "value", "dtype", "capability", "mask"), [*_shapes()])
def test_fits_and_multiplies_from_shared_memory(size, value, dtype, capability, mask):
    from tests.kernels.launches import products_from_registers

    for report, ttgir in _compiled(size, value, dtype, capability, MASKS[mask], mask == "full"):
        assert report.stack <= 8, f"{report.name}: {report.stack} bytes of stack"
        assert report.shared <= 227 * 1024, f"{report.name}: {report.shared} bytes"
        assert not products_from_registers(report.ptx), report.name
        if dtype == torch.bfloat16 and capability == 90:
            products = report.ptx.count("wgmma.mma_async")
            assert products >= 2 * (size // 16), f"{report.name}: {products} wgmma"
            # What Triton 3.4 to 3.7.0 miscompiles: a transposed tensor in registers.
            assert not re.search(r"tt\.trans [^\n]*tensor", ttgir), report.name
        if dtype == torch.bfloat16 and capability == 100:
            assert "tcgen05.mma" in report.ptx, report.name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("size", "value"), [(80, 80), *SIZES])
@pytest.mark.parametrize("mask", MASKS)
def test_on_a_gpu(dtype, size, value, mask):
    scores = MASKS[mask]
    for queries, keys in ((129, 257), (1000, 1000), (300, 64)):
        tensors = _draw(queries, keys, 4, 2, size, value, dtype=dtype)
        found = _run([x.cuda() for x in tensors], scores)
        expected = _oracle(*tensors, scores)
        for a, e in zip(found, expected, strict=True):
            top = float(e[e.isfinite()].abs().max()) if e.isfinite().any() else 1.0
            near = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(a.double().cpu(), e, rtol=0, atol=near * max(top, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
def test_on_a_gpu_documents_have_the_bits_that_they_have_alone(mask):
    tensors, packed = _packed(*DOCUMENTS, heads=4, groups=2, size=64, dtype=torch.bfloat16)
    tensors, packed = (
        [x.cuda() for x in tensors],
        Packed(packed.q.cuda(), packed.k.cuda(), None, None),
    )
    out, lse, dq, dk, dv = first = _run(tensors, MASKS[mask], packed)
    for _ in range(100):
        assert all(map(torch.equal, first, _run(tensors, MASKS[mask], packed)))
    for n in range(len(DOCUMENTS[0])):
        dense, rows, columns = _alone(tensors, packed, n)
        found = out[rows], lse[:, rows], dq[rows], dk[columns], dv[columns]
        assert all(map(torch.equal, found, (e[0] for e in _run(dense, MASKS[mask]))))
