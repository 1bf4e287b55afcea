"""The Triton code of paged attention, interpreted and compiled; see `test_attention_triton.py`.

The oracle gathers the pages of a sequence and takes a softmax in float64, masked by positions.
"""

import re

import pytest
import torch
from tests.kernels.specimen import item

from warploom.kernels.attention.scores import Scores
from warploom.kernels.backends import interpreted

pytest.importorskip("triton")

from warploom.kernels.attention import paged_triton  # noqa: E402

OPS = ("paged_attention",)
SLOW = pytest.mark.slow
in_interpreter = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(interpreted(), reason="the interpreter does not compile")

MASKS = {
    "causal": Scores(scale=0.3, right=0),
    "full": Scores(scale=0.3),
    "window": Scores(scale=0.3, left=20, right=0),
    "cap": Scores(scale=0.3, right=0, softcap=2.0),
}
# Queries and keys of each sequence.
DECODE = ([1, 1, 1, 0, 1], [1, 70, 150, 9, 64])
PREFILL = ([33, 1, 0, 20], [33, 70, 0, 65])
BESIDE = ([33], [50])  # the last query of the first tile sees one key of the second tile of keys


@pytest.fixture
def small(monkeypatch):
    """Split from 64 keys on, and take tiles that the interpreter is done with soon."""
    monkeypatch.setattr(paged_triton, "_PART", 64)
    chosen = [{"M": 32, "N": 32, "num_warps": 4, "num_stages": 1}]
    monkeypatch.setattr(paged_triton, "candidates", lambda first, walked: chosen)


def _draw(queries, keys, heads=2, groups=1, size=16, value=None, page=16, dtype=torch.float32):
    """Deal the pages out at random; those that nobody holds, and rows past an end, are NaN."""
    g = torch.Generator().manual_seed(sum(queries) + 100 * sum(keys))
    value = size if value is None else value
    most = max(-(-n // page) for n in keys) + 1
    free = torch.randperm(len(keys) * most, generator=g).to(torch.int32)
    tables = free.view(len(keys), most)
    pages = [torch.randn(len(free), page, groups, w, generator=g) for w in (size, value)]
    for table, n in zip(tables.long(), keys, strict=True):
        spare = torch.arange(most * page).view(most, page) >= n
        for x in pages:
            x[table] = torch.where(spare[..., None, None], torch.nan, x[table])
    q = torch.randn(sum(queries), heads, size, generator=g)
    cu = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    lengths = torch.tensor(keys, dtype=torch.int32)
    return *(x.to(dtype) for x in (q, *pages)), tables, lengths, cu


def _oracle(q, k, v, tables, lengths, cu, scores):
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    lse = torch.full((q.shape[1], len(q)), -torch.inf, dtype=torch.float64)
    for n, keys in enumerate(lengths.tolist()):
        rows = slice(int(cu[n]), int(cu[n + 1]))
        one = q[rows].double()
        own_k, own_v = (x[tables[n].long()].flatten(0, 1)[:keys].double() for x in (k, v))
        own_k, own_v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (own_k, own_v))
        s = torch.einsum("shk,uhk->hsu", one, own_k) * scores.scale
        if scores.softcap:
            s = scores.softcap * torch.tanh(s / scores.softcap)
        distance = torch.arange(len(one))[:, None] + keys - len(one) - torch.arange(keys)
        seen = torch.ones_like(distance, dtype=torch.bool)
        if scores.left >= 0:
            seen &= distance <= scores.left
        if scores.right >= 0:
            seen &= distance >= -scores.right
        s = s.masked_fill(~seen, -torch.inf)
        lse[:, rows] = torch.logsumexp(s, -1)
        p = torch.exp(s - lse[:, rows, None])
        out[rows] = torch.einsum("hsu,uhl->shl", p, own_v)
    return out, lse


def _assert_right(tensors, scores, share=2e-5):
    found, expected = paged_triton.forward(*tensors, scores), _oracle(*tensors, scores)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(
            a.double(), e, rtol=0, atol=share * max(1.0, float(e.abs().max()))
        )
    return found


@item("values", "zero and odd sizes", ops=OPS)
@in_interpreter
@pytest.mark.parametrize(
    ("mask", "call"),
    [
        pytest.param(mask, call, marks=() if mask in some else SLOW)
        for call, some in (
            (DECODE, ("full", "cap")),
            (PREFILL, ("causal", "window")),
            (BESIDE, ("causal",)),
        )
        for mask in MASKS
    ],
)
def test_interpreted_masks(small, mask, call):
    _assert_right(_draw(*call), MASKS[mask])


@pytest.mark.parametrize("keys", [1, 512, 513, 16_384, 16_385, 20_000, 10**6])
def test_parts_hold_every_key_once_and_are_whole_tiles(keys):
    parts, part = paged_triton.parts_of(1, keys)
    assert (parts - 1) * part < keys <= parts * part
    assert parts <= 32
    assert parts == 1 or part % 128 == 0


@in_interpreter
@pytest.mark.parametrize(
    ("size", "value"), [(80, 80), (192, 128), *(pytest.param(n, n, marks=SLOW) for n in (128, 256))]
)
def test_interpreted_head_sizes(small, size, value):
    tensors = _draw([1, 1], [70, 5], 1, 1, size, value)
    _assert_right(tensors, Scores(scale=size**-0.5, right=0))


@in_interpreter
@pytest.mark.parametrize(("heads", "groups"), [(8, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("page", [1, pytest.param(24, marks=SLOW), pytest.param(64, marks=SLOW)])
def test_interpreted_groups_and_pages(small, heads, groups, page):
    """With values of another size, so that no distance of theirs is one of the keys."""
    tensors = _draw([3, 1, 6], [70, 5, 6], heads, groups, value=24, page=page)
    _assert_right(tensors, MASKS["causal"])


@in_interpreter
def test_interpreted_in_the_tiles_of_a_gpu():
    _assert_right(_draw([1, 1], [600, 20], 4, 1, dtype=torch.float16), MASKS["causal"], 5e-3)
    _assert_right(_draw([50], [90], 4, 1, dtype=torch.float16), MASKS["causal"], 5e-3)


@item("layout", ops=OPS)
@in_interpreter
def test_interpreted_strides(small):
    q, k, v, *where = tensors = _draw([2, 1], [70, 40], 4, 2)
    expected = paged_triton.forward(*tensors, MASKS["causal"])
    across = [x.transpose(-2, -3).contiguous().transpose(-2, -3) for x in (q, k, v)]
    every = [x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v)]
    for form in (across, every):
        found = paged_triton.forward(*form, *where, MASKS["causal"])
        assert all(map(torch.equal, found, expected))
    tables, *rest = where
    for view in (tables.repeat(1, 2)[:, : tables.shape[1]], tables.t().contiguous().t()):
        found = paged_triton.forward(q, k, v, view, *rest, MASKS["causal"])
        assert all(map(torch.equal, found, expected))


@item("determinism", "batch invariance", ops=OPS)
@in_interpreter
def test_interpreted_a_sequence_does_not_depend_on_the_others(small):
    q, k, v, tables, lengths, cu = tensors = _draw(*DECODE)
    out, lse = paged_triton.forward(*tensors, MASKS["window"])
    assert all(map(torch.equal, (out, lse), paged_triton.forward(*tensors, MASKS["window"])))
    one = q[2:3], k, v, tables[2:3], lengths[2:3], torch.tensor([0, 1], dtype=torch.int32)
    alone = paged_triton.forward(*one, MASKS["window"])
    assert int(cu[2]) == 2
    assert torch.equal(alone[0], out[2:3])
    assert torch.equal(alone[1], lse[:, 2:3])


@item("NaN and inf", ops=OPS)
@in_interpreter
def test_interpreted_a_nan_stays_in_its_sequence(small):
    q, k, v, tables, *where = tensors = _draw(*DECODE)
    clean = paged_triton.forward(*tensors, MASKS["causal"])
    v = v.clone()
    v[tables[1].long()] = torch.nan
    dirty = paged_triton.forward(q, k, v, tables, *where, MASKS["causal"])
    kept = [0, 2, 3]
    assert torch.equal(clean[0][kept], dirty[0][kept])
    assert dirty[0][1].isnan().all()


@in_interpreter
def test_interpreted_a_table_that_is_full(small):
    """The last page begins a part of its own."""
    q, k, v, tables, *rest = _draw([1], [130])
    _assert_right((q, k, v, tables[:, :9], *rest), MASKS["causal"])


@in_interpreter
def test_interpreted_without_a_key(small):
    q, k, v, tables, lengths, cu = _draw([1, 1], [70, 5])
    out, lse = paged_triton.forward(q, k, v, tables, lengths * 0, cu, MASKS["causal"])
    assert not out.any()
    assert (lse == -torch.inf).all()


def _shapes():
    for capability in (90, 100):
        for size, value in ((64, 64), (128, 128), (192, 128), (256, 256)):
            for queries in (1, 4, 512):
                for dtype in (torch.bfloat16, torch.float32):
                    some = (capability, size, dtype) == (90, 128, torch.bfloat16) and queries == 1
                    marks = () if some else SLOW
                    yield pytest.param(size, value, dtype, capability, queries, marks=marks)


@item("fits sm_90 and sm_100", "more than 2^31 elements", ops=OPS)
@compiled
@pytest.mark.parametrize(("size", "value", "dtype", "capability", "queries"), [*_shapes()])
def test_fits_and_multiplies_from_shared_memory(size, value, dtype, capability, queries):
    from tests.kernels import launches as gate

    q = torch.empty(8 * queries, 16, size, dtype=dtype)
    k, v = (torch.empty(512, 64, 2, w, dtype=dtype) for w in (size, value))
    where = torch.zeros(8, 64, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    cu = torch.arange(0, 8 * queries + 1, queries, dtype=torch.int32)
    with gate.recorded() as found:
        paged_triton.forward(q, k, v, *where, cu, Scores(scale=0.1, right=0))
    assert len(found) == (2 if queries < 512 else 1)
    for launch in found:
        report = gate.compile_for(launch, capability)
        made = launch.kernel.run(*launch.args, grid=(1, 1, 1), warmup=True, **launch.options)
        assert report.stack <= 8, f"{report.name}: {report.stack} bytes of stack"
        assert report.shared <= 227 * 1024, f"{report.name}: {report.shared} bytes"
        assert not gate.products_from_registers(report.ptx), report.name
        assert not gate.narrow_products(report.ttir), report.name
        if dtype == torch.bfloat16 and capability == 90 and "merge" not in report.name:
            assert "wgmma.mma_async" in report.ptx, report.name
            if launch.options["M"] > 32:  # so few rows are multiplied as before Hopper
                assert not re.search(r"tt\.trans [^\n]*tensor", made.asm["ttgir"]), report.name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("size", "value"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_on_a_gpu(dtype, mask, size, value):
    for queries, keys in (DECODE, PREFILL, ([1, 1, 2], [3000, 600, 2])):
        tensors = _draw(queries, keys, 8, 2, size, value, dtype=dtype)
        found = paged_triton.forward(*(x.cuda() for x in tensors), MASKS[mask])
        for a, e in zip(found, _oracle(*tensors, MASKS[mask]), strict=True):
            near = 1e-5 if dtype == torch.float32 else 2e-2
            top = max(1.0, float(e.abs().max()))
            torch.testing.assert_close(a.double().cpu(), e, rtol=0, atol=near * top)
