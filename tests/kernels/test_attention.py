"""`flash_attention` and its packed form against explicit softmax attention in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.kernels.attention import documents, flash_attention, flash_attention_varlen, sdpa

BACKENDS = ["reference", "torch"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _oracle(q, k, v, *, causal=True, scale=None):
    """Attend with all scores, heads repeated, in float64 on the rounded inputs; BSHK."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = torch.where(seen, scores, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def _packed_oracle(q, k, v, bounds, **kwargs):
    parts = [
        _oracle(*(x[None, a:b] for x in (q, k, v)), **kwargs)
        for a, b in zip(bounds, bounds[1:], strict=False)
        if b > a
    ]
    return torch.cat([o[0] for o, _ in parts]), torch.cat([lse[0] for _, lse in parts], -1)


def _qkv(*shape, heads=6, kv_heads=2, width=16, dtype=torch.float64, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(*shape, heads + 2 * kv_heads, width, dtype=torch.float64, generator=g)
    qkv = qkv.to(device, dtype).requires_grad_()
    return qkv, qkv.split([heads, kv_heads, kv_heads], -2)  # views with strides, as a model has


def _cu(bounds, device="cpu"):
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def _assert_same(actual, expected, inputs, tolerance=1e-12):
    """Compare out, lse and the gradients through both, upstream random."""
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, dtype=torch.float64, generator=g) for x in expected]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)
    for chosen in (slice(0, 1), slice(1, 2), slice(0, 2)):  # out alone, lse alone, both
        a, e = (
            torch.autograd.grad(x[chosen], inputs, upstream[chosen], retain_graph=True)
            for x in (actual, expected)
        )
        torch.testing.assert_close(a, e, rtol=tolerance, atol=10 * tolerance)


@each_backend
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 63, 64, 65])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (8, 2), (3, 1)])
def test_output_lse_and_gradients(backend, causal, length, heads, kv_heads):
    qkv, (q, k, v) = _qkv(2, length, heads=heads, kv_heads=kv_heads)
    actual = flash_attention(q, k, v, causal=causal, return_lse=True, backend=backend)
    _assert_same(actual, _oracle(q, k, v, causal=causal), [qkv])


@each_backend
@pytest.mark.parametrize("width", [16, 20, 64, 80, 96, 128, 1])
def test_head_dimensions_and_scale(backend, width):
    qkv, (q, k, v) = _qkv(1, 70, heads=2, kv_heads=1, width=width)
    actual = flash_attention(q, k, v, scale=0.3, return_lse=True, backend=backend)
    _assert_same(actual, _oracle(q, k, v, scale=0.3), [qkv])


@each_backend
def test_other_lengths_of_keys_without_a_mask(backend):
    qkv, (q, _, _) = _qkv(2, 5)
    other, (_, k, v) = _qkv(2, 70, seed=1)
    actual = flash_attention(q, k, v, causal=False, return_lse=True, backend=backend)
    _assert_same(actual, _oracle(q, k, v, causal=False), [qkv, other])


@each_backend
@pytest.mark.parametrize("varlen", [False, True])
def test_any_layout_of_inputs_and_upstream(backend, varlen):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 40, h, 33, dtype=torch.float64, generator=g).permute(0, 3, 2, 1)[..., ::2]
        for h in (4, 2, 2)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert q.stride(-1) != 1
    expected, _ = _oracle(q, k, v)
    if varlen:
        length = q.shape[1]
        flat = (x.flatten(0, 1) for x in (q, k, v))
        actual = flash_attention_varlen(*flat, _cu([0, length, 2 * length]), backend=backend)
        actual = actual.unflatten(0, (2, length))
    else:
        actual = flash_attention(q, k, v, backend=backend)
    dense = torch.randn(expected.shape, dtype=torch.float64, generator=g)
    for upstream in (
        dense,
        dense.transpose(1, 3).contiguous().transpose(1, 3),  # strides in the last dimension
        dense[:, :1, :, :1].expand_as(dense),
        torch.ones((), dtype=torch.float64).expand_as(dense),  # what .sum().backward() passes
    ):
        a, e = (
            torch.autograd.grad(x, inputs, upstream, retain_graph=True) for x in (actual, expected)
        )
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@each_backend
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "bounds",
    [
        [0, 200],
        [0, 100, 200],  # two of a length: one call
        [0, 1, 64, 127, 200],
        [0, 0, 3, 3, 3, 10, 75, 80, 140, 200, 200],  # empty documents everywhere
        [0, 7, 14, 21, 121, 128, 190, 200],
    ],
)
def test_packed_documents_are_separate_documents(backend, causal, bounds):
    qkv, (q, k, v) = _qkv(200)
    actual = flash_attention_varlen(
        q, k, v, _cu(bounds), causal=causal, return_lse=True, backend=backend
    )
    _assert_same(actual, _packed_oracle(q, k, v, bounds, causal=causal), [qkv])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 80), max_size=12),
    causal=st.booleans(),
    ratio=st.sampled_from([1, 3, 4]),
    backend=st.sampled_from(BACKENDS),
)
def test_any_documents(lengths, causal, ratio, backend):
    bounds = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
    qkv, (q, k, v) = _qkv(bounds[-1], heads=2 * ratio, kv_heads=2, width=8)
    actual = flash_attention_varlen(
        q, k, v, _cu(bounds), causal=causal, return_lse=True, backend=backend
    )
    assert actual[0].shape == q.shape
    if bounds[-1]:
        _assert_same(actual, _packed_oracle(q, k, v, bounds, causal=causal), [qkv])


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.sampled_from([0, 1, 2, 5, 63, 64, 65]), max_size=40))
def test_the_plan_holds_every_document_once_and_collects_short_ones(lengths):
    bounds = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
    batches = documents.plan(bounds, [3 * n for n in bounds])
    x = torch.arange(3 * bounds[-1])
    met = [(q[0].item(), len(q)) for b in batches for q in b.queries.take(x)]
    assert sorted(met) == [(a, n) for a, n in zip(bounds, lengths, strict=False) if n]
    for batch in batches:
        rows = batch.queries.take(x)
        assert (batch.keys.take(x)[:, ::3] == 3 * rows).all()
        copy = torch.zeros_like(x)
        batch.queries.put(copy, rows)
        assert (copy[rows] == rows).all()
        assert copy.count_nonzero() == rows.count_nonzero()
    short = [b.queries.length for b in batches if 3 * b.queries.length < 64]
    assert len(short) == len(set(short))  # a call a length


def test_rows_of_one_document_each_are_one_call_without_a_copy():
    bounds = [0, 512, 1024, 1536, 2048]
    (batch,) = documents.plan(bounds, bounds)
    x = torch.empty(2048, 3)
    assert batch.keys.take(x).shape == (4, 512, 3)
    assert batch.keys.take(x).data_ptr() == x.data_ptr()


@each_backend
@pytest.mark.parametrize("bounds", [[0, 90, 200], [0, 30, 60, 200], [0, 20, 50, 200]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_document_never_changes_another(backend, bounds, dtype):
    """Output, lse and gradients of the others stay the same bit for bit; a NaN stays at home."""
    results = []
    for poison in (None, 3.0, float("nan")):
        qkv, _ = _qkv(200, dtype=dtype)
        if poison is not None:
            with torch.no_grad():
                qkv[bounds[1] - 5] = poison
        q, k, v = qkv.split([6, 2, 2], -2)
        out, lse = flash_attention_varlen(q, k, v, _cu(bounds), return_lse=True, backend=backend)
        (gradient,) = torch.autograd.grad(
            (out, lse), qkv, (torch.ones_like(out), torch.ones_like(lse))
        )
        results.append((out.detach(), lse.mT.detach(), gradient))
    first = bounds[1]
    for clean, changed, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert not torch.equal(clean[:first], changed[:first])
        assert torch.equal(clean[first:], changed[first:])
        assert torch.equal(clean[first:], poisoned[first:])
        assert poisoned[first - 1].isnan().any()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_error_is_within_twice_that_of_plain_pytorch(backend, dtype, varlen, kv_heads):
    """Also with 8 query heads a key head, whose gradients PyTorch's own op sums in bfloat16."""
    heads = [8, kv_heads, kv_heads]
    qkv, (q, k, v) = _qkv(1, 300, heads=8, kv_heads=kv_heads, width=64, dtype=dtype)
    exact_qkv = qkv.detach().double().requires_grad_()
    exact, _ = _oracle(*exact_qkv.split(heads, -2))
    plain = _plain(q, k, v)
    if varlen:
        cu = _cu([0, 300])
        ours = flash_attention_varlen(q[0], k[0], v[0], cu, backend=backend)[None]
    else:
        ours = flash_attention(q, k, v, backend=backend)
    upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert ours.dtype == dtype
    _assert_twice(ours, plain, exact)
    _assert_twice(
        torch.autograd.grad(ours, qkv, upstream)[0],
        torch.autograd.grad(plain, qkv, upstream)[0],
        torch.autograd.grad(exact, exact_qkv, upstream.double())[0],
    )


def _plain(q, k, v):
    """Attend in the input's dtype, step by step: the rounding that users of PyTorch live with."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return (torch.where(seen, scores, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def _assert_twice(ours, plain, exact):
    ours, plain = (ours - exact).abs(), (plain - exact).abs()
    assert ours.max() <= 2 * plain.max() + 1e-6
    assert ours.mean() <= 1.5 * plain.mean() + 1e-7


@each_backend
def test_lse_gradient_in_low_precision_keeps_its_remainder(backend):
    """One document of one token: d lse / d q = scale * k exactly, times 1 + 2^-10."""
    qkv, (q, k, v) = _qkv(1, 1, heads=1, kv_heads=1, dtype=torch.bfloat16)
    _, lse = flash_attention(q, k, v, scale=1.0, return_lse=True, backend=backend)
    assert lse.dtype == torch.float32
    upstream = torch.full_like(lse, 1 + 2**-9)
    (gradient,) = torch.autograd.grad(lse, qkv, upstream)
    wanted = (k.float() * (1 + 2**-9)).bfloat16()
    assert torch.equal(gradient[:, :, :1], wanted)
    assert torch.equal(gradient[:, :, 2:], torch.zeros_like(v))


def test_the_columns_that_carry_the_lse_gradient_keep_its_remainder():
    """CUDA multiplies them in bfloat16; on the CPU the backward runs in float32."""
    dout, q, k, v, out = torch.randn(5, 1, 7, 2, 16).bfloat16()
    dlse = torch.randn(1, 7, 2)
    dout_, _, _, v_, out_ = (x.double() for x in sdpa._with_lse(dlse, dout, q, k, v, out))
    dp = (dout_ * v_).sum(-1) - (dout.double() * v.double()).sum(-1)
    torch.testing.assert_close(dp, dlse.double(), rtol=2**-15, atol=0)
    torch.testing.assert_close((dout_ * out_).sum(-1), (dout.double() * out.double()).sum(-1))


def test_an_unused_lse_costs_nothing(monkeypatch):
    qkv, (q, k, v) = _qkv(1, 70)
    monkeypatch.setattr(sdpa, "_with_lse", None)  # must not be met
    flash_attention(q, k, v, return_lse=True, backend="torch")[0].sum().backward()
    assert qkv.grad.isfinite().all()


@each_backend
def test_huge_scores(backend):
    """Rows of the causal mask begin with one score, of either sign: lse far below -88 occurs."""
    qkv, (q, k, v) = _qkv(1, 80, width=16)
    for scale in (30.0, 300.0):
        actual = flash_attention(q, k, v, scale=scale, return_lse=True, backend=backend)
        _assert_same(actual, _oracle(q, k, v, scale=scale), [qkv], 1e-9)


@each_backend
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_tokens(backend, shape):
    qkv, (q, k, v) = _qkv(*shape)
    out, lse = flash_attention(q, k, v, return_lse=True, backend=backend)
    assert out.shape == q.shape
    assert lse.shape == (shape[0], 6, shape[1])
    (gradient,) = torch.autograd.grad((out.sum(), lse.sum()), qkv)
    assert gradient.shape == qkv.shape
    qkv, (q, k, v) = _qkv(0)
    for bounds in ([0], [0, 0, 0]):
        out, lse = flash_attention_varlen(q, k, v, _cu(bounds), return_lse=True, backend=backend)
        assert out.shape == (0, 6, 16)
        assert lse.shape == (6, 0)
        torch.autograd.grad((out.sum(), lse.sum()), qkv)


@each_backend
def test_queries_without_a_key(backend):
    _, (q, _, _) = _qkv(2, 3)
    _, (_, k, v) = _qkv(2, 0)
    out, lse = flash_attention(q, k, v, causal=False, return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@each_backend
def test_backward_twice_and_its_saved_tensors(backend):
    qkv, (q, k, v) = _qkv(1, 70)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.shape) or x, lambda x: x
    ):
        out = flash_attention(q, k, v, backend=backend)
    assert saved == [q.shape, k.shape, v.shape, out.shape, (1, 6, 70)]
    first = torch.autograd.grad(out.sum(), qkv, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.sum(), qkv)[0])


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 20], "must start at 0, got 1"),
        ([0, 12, 8, 20], "must not decrease, got 12 and then 8 at entry 2"),
        ([0, 12, 21], r"must end at the number of tokens \(20\), got 21"),
        ([0, 12], r"must end at the number of tokens \(20\), got 12"),
        ([], "must be int32"),
    ],
)
@each_backend
def test_bad_documents_are_refused_in_words(backend, bounds, message):
    _, (q, k, v) = _qkv(20)
    with pytest.raises(ValueError, match=message):
        flash_attention_varlen(q, k, v, _cu(bounds), backend=backend)


def test_bad_arguments_are_refused_in_words():
    _, (q, k, v) = _qkv(20)
    with pytest.raises(ValueError, match="got torch.int64"):
        flash_attention_varlen(q, k, v, _cu([0, 20]).long())
    with pytest.raises(ValueError, match="must be int32"):
        flash_attention_varlen(q, k, v, _cu([[0, 20]]))
    with pytest.raises(ValueError, match="got 11, document 1 has 12 tokens"):
        flash_attention_varlen(q, k, v, _cu([0, 8, 20]), max_seqlen=11)
    with pytest.raises(ValueError, match="same tokens"):
        flash_attention_varlen(q, k[:5], v[:5], _cu([0, 20]))
    with pytest.raises(ValueError, match=r"heads \(6\) must be a multiple .* \(4\), .*: heads"):
        flash_attention_varlen(q, k.repeat(1, 2, 1), v.repeat(1, 2, 1), _cu([0, 20]))
    with pytest.raises(ValueError, match=r"must be \[B, S, H, K\]"):
        flash_attention(q, k, v)
    with pytest.raises(ValueError, match="head dimension"):
        flash_attention(q[None], k[None, ..., :8], v[None, ..., :8])
    with pytest.raises(
        ValueError, match="must have one dtype of .* got torch.float64, torch.float32"
    ):
        flash_attention(q[None], k[None].float(), v[None])
    with pytest.raises(ValueError, match="one batch size, got 1 and 2"):
        flash_attention(q[None], k[None].repeat(2, 1, 1, 1), v[None].repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="of as many documents, got 1 and 2"):
        flash_attention_varlen(q, k, v, _cu([0, 20]), cu_seqlens_k=_cu([0, 10, 20]))
    with pytest.raises(
        ValueError, match=r"\(cu_seqlens_k\): cu_seqlens must end .* \(20\), got 18"
    ):
        flash_attention_varlen(q, k, v, _cu([0, 20]), cu_seqlens_k=_cu([0, 18]))
    with pytest.raises(TypeError, match="cu_seqlens must be a tensor, got NoneType"):
        flash_attention_varlen(q, k, v, None)
    for window in ((-2, 0), (3,), 4, (1.5, 0), ("3", 0), (1 << 70, 0)):
        with pytest.raises(ValueError, match="window must be .keys before, keys after."):
            flash_attention(q[None], k[None], v[None], window=window)
    with pytest.raises(ValueError, match="softcap must be positive and finite, or None, got 0"):
        flash_attention(q[None], k[None], v[None], softcap=0)
    with pytest.raises(ValueError, match=r"sinks must be floating-point numbers \[6\]"):
        flash_attention(q[None], k[None], v[None], sinks=torch.zeros(2))
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"positive and finite, got {scale}"):
            flash_attention(q[None], k[None], v[None], scale=scale)
    listed = "reference, torch, cudnn, triton, flash_attn, flex"
    with pytest.raises(RuntimeError, match=f"backend 'tiles' is not one of {listed}$"):
        flash_attention(q[None], k[None], v[None], backend="tiles")


@each_backend
def test_gradcheck(backend):
    qkv, _ = _qkv(9, heads=2, kv_heads=1, width=3)

    def run(qkv):
        q, k, v = qkv.split([2, 1, 1], -2)
        return flash_attention_varlen(q, k, v, _cu([0, 4, 9]), return_lse=True, backend=backend)

    assert torch.autograd.gradcheck(run, qkv)


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [None, [0, 90, 90, 91, 300]])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("with_lse", [False, True])
def test_torch_on_a_gpu(bounds, width, with_lse):
    qkv, (q, k, v) = _qkv(
        1, 300, heads=9, kv_heads=3, width=width, dtype=torch.bfloat16, device="cuda"
    )
    exact_qkv = qkv.detach().double().requires_grad_()
    cu = [0, 300] if bounds is None else bounds
    exact = _packed_oracle(*exact_qkv[0].split([9, 3, 3], -2), cu)
    plain = torch.cat(
        [_plain(q[:, a:b], k[:, a:b], v[:, a:b])[0] for a, b in zip(cu, cu[1:], strict=False)]
    )
    if bounds is None:
        out, lse = flash_attention(q, k, v, return_lse=True, backend="torch")
        out, lse = out[0], lse[0]
    else:
        flat = (x[0] for x in (q, k, v))
        out, lse = flash_attention_varlen(*flat, _cu(cu, "cuda"), return_lse=True, backend="torch")
    _assert_twice(out, plain, exact[0])
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(out)
    plain_lse = exact[1].float() if with_lse else None
    a, e = ([out, lse], [exact[0], exact[1]]) if with_lse else ([out], [exact[0]])
    actual = torch.autograd.grad(a, qkv, [upstream, torch.ones_like(lse)][: len(a)])[0]
    wanted = torch.autograd.grad(
        e, exact_qkv, [upstream.double(), torch.ones_like(exact[1])][: len(e)]
    )[0]
    if plain_lse is None:
        _assert_twice(actual, torch.autograd.grad(plain, qkv, upstream)[0], wanted)
    else:
        assert (actual - wanted).norm() <= 0.01 * wanted.norm()


def test_autocast_casts_as_sdpa_does():
    q, k, v = (torch.randn(1, 9, n, 16) for n in (4, 2, 2))
    q.requires_grad_()
    want = flash_attention(*(x.bfloat16() for x in (q, k, v)))
    cu = torch.tensor([0, 9], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flash_attention(q, k.bfloat16(), v), want)
        packed = flash_attention_varlen(q[0], k[0].bfloat16(), v[0], cu)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        theirs = torch.nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True)
    assert packed.dtype == theirs.dtype == torch.bfloat16
    packed.sum().backward()
    assert q.grad.dtype == torch.float32
