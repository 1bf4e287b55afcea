"""The norms beside transformers and torch; what is quantised bit for bit; two dtypes; autocast."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.specimen import check, item, specimens

from warploom.kernels import backends
from warploom.kernels.norm import layer_norm, layer_norm_fp8, qk_norm_rotary, rms_norm, rms_norm_fp8
from warploom.kernels.quant import fp8_quantize
from warploom.kernels.rope import rotary_tables

SPECIMENS = {s.name: s for s in specimens()}
_FUSED = {"rms_norm": (rms_norm, rms_norm_fp8), "layer_norm": (layer_norm, layer_norm_fp8)}
SERVED = "triton" if backends.interpreted() else "reference"


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 40),
    width=st.integers(2, 70),
    name=st.sampled_from(["rms_norm", "rms_norm_residual", "layer_norm", "qk_norm_rotary"]),
)
def test_any_shape(tokens, width, name):
    if name == "layer_norm":  # of two features it leaves the signs: its gradient is what cancels
        width = max(width, 3)
    check(SPECIMENS[name], tokens, width, torch.float32, SERVED)


def test_gradcheck():
    x, r = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(rms_norm, (x, w))
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, residual=r, eps=0.1), (x, w, r))
    assert torch.autograd.gradcheck(layer_norm, (x, w, b))
    assert torch.autograd.gradcheck(lambda x, w, r: layer_norm(x, w, residual=r), (x, w, r))


def test_gradcheck_of_heads():
    q, k = (torch.randn(3, n, 6, dtype=torch.float64, requires_grad=True) for n in (2, 1))
    weights = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    tables = rotary_tables(torch.tensor([0, 5, 2]), 6, base=10.0)
    assert torch.autograd.gradcheck(lambda *a: qk_norm_rotary(*a, *tables), (q, k, *weights))


@item("values", ops=("rms_norm",))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_agrees(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    torch.nn.init.normal_(theirs.weight)
    x = torch.randn(2, 9, 64).to(dtype).requires_grad_()
    dy = torch.randn_like(x)
    ours = rms_norm(x, theirs.weight, eps=1e-5)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(ours, theirs(x), **tolerance)
    expected = torch.autograd.grad(theirs(x), (x, theirs.weight), dy)
    if dtype == torch.float32:
        torch.testing.assert_close(
            torch.autograd.grad(ours, (x, theirs.weight), dy), expected, **tolerance
        )


@item("values", "layout", ops=("qk_norm_rotary",))
def test_qwen3_agrees_on_views_of_a_fused_projection():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    q_norm, k_norm = Qwen3RMSNorm(16, eps=1e-6), Qwen3RMSNorm(16, eps=1e-6)
    for norm in (q_norm, k_norm):
        torch.nn.init.normal_(norm.weight)
    cos, sin = rotary_tables(torch.arange(9), 16, base=1e6)
    fused = torch.randn(9, 8 * 16, requires_grad=True)
    q, k, _ = fused.view(9, 8, 16).split([4, 2, 2], 1)
    ours = qk_norm_rotary(q, k, q_norm.weight, k_norm.weight, cos, sin, backend=SERVED)
    theirs = apply_rotary_pos_emb(
        q_norm(q).transpose(0, 1)[None],
        k_norm(k).transpose(0, 1)[None],
        *(torch.cat([t, t], -1)[None] for t in (cos, sin)),
    )
    theirs = tuple(t[0].transpose(0, 1) for t in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    inputs, dy = (fused, q_norm.weight, k_norm.weight), [torch.randn_like(t) for t in ours]
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, dy),
        torch.autograd.grad(theirs, inputs, dy),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_of_a_large_mean_is_that_of_torch(bias):
    """A variance from a difference of squares would be 0 or less here."""
    x = (torch.randn(7, 300, dtype=torch.float64) + 1e4).float()
    w, b = torch.randn(300), torch.randn(300) if bias else None
    y = layer_norm(x, w, b, backend=SERVED)
    exact = F.layer_norm(x.double(), (300,), w.double(), None if b is None else b.double())
    error = (y - F.layer_norm(x, (300,), w, b)).abs().max()
    assert (y - exact).abs().max() <= 5e-3 + error


def test_the_rounded_sum_is_normalised():
    x = torch.full((1, 4), 256.0, dtype=torch.bfloat16)
    residual = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)  # 257 rounds to 256
    y, h = rms_norm(x, torch.ones(4, dtype=torch.bfloat16), residual=residual)
    assert torch.equal(h, x)
    assert torch.equal(y, torch.ones_like(y))


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_only_the_sum_is_used(norm):
    x, r = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    w = torch.ones(3, requires_grad=True)
    _, h = norm(x, w, residual=r)
    dh = torch.randn(2, 3)
    dx, dr, dw = torch.autograd.grad(h, (x, r, w), dh, allow_unused=True)
    assert torch.equal(dx, dh)
    assert torch.equal(dr, dh)
    assert dw is None


def _saved(fn):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fn()
    return [(tuple(t.shape), t.dtype) for t in saved]


def test_what_is_saved():
    """The sum, the weight and one or two numbers a row: not y, and no codes."""
    x = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
    w = torch.ones(16, dtype=torch.bfloat16, requires_grad=True)
    kept = [((8, 16), torch.bfloat16), ((16,), torch.bfloat16), ((8,), torch.float32)]
    assert _saved(lambda: rms_norm(x, w)) == kept
    assert _saved(lambda: rms_norm_fp8(x, w)) == kept
    assert _saved(lambda: layer_norm(x, w)) == [*kept, kept[-1]]


def test_of_heads_the_views_themselves_are_saved():
    fused = torch.randn(4, 4, 8, requires_grad=True)
    w, tables = torch.ones(8), rotary_tables(torch.arange(4), 8, base=1e4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qk_norm_rotary(fused[:, :3], fused[:, 3:], w, w, *tables)
    assert len(saved) == 6
    assert [t.untyped_storage().data_ptr() for t in saved[:2]] == [fused.data_ptr()] * 2


def _codes(q):
    """Return the bits of each code; a NaN has any sign."""
    return q.data.view(torch.uint8).masked_fill(q.data.float().isnan(), 127)


@pytest.mark.parametrize("scaling", ["row", "block"])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_codes_are_those_of_the_float32_result(name, dtype, power_of_two, scaling):
    """Bit for bit; for 16-bit inputs before the rounding of y."""
    norm, fused = _FUSED[name]
    x, w, r = torch.randn(5, 300).to(dtype), torch.randn(300).to(dtype), torch.randn(5, 300)
    r = r.to(dtype)
    x[1], x[2, 7] = 0, float("nan")
    form = {"scaling": scaling, "power_of_two": power_of_two}
    got, h = fused(x, w, residual=r, backend=SERVED, **form)
    unfused = norm(h.float(), w.float(), backend=SERVED)
    want = fp8_quantize(unfused, **form)
    assert torch.equal(_codes(got), _codes(want))
    assert torch.equal(got.scale.isnan(), want.scale.isnan())
    assert torch.equal(got.scale.nan_to_num(), want.scale.nan_to_num())
    assert got.carrier.dtype == dtype


def test_the_gradient_of_codes_is_that_of_the_norm():
    x, w = torch.randn(5, 12, requires_grad=True), torch.randn(12, requires_grad=True)
    dy, dh, r = (torch.randn(5, 12) for _ in range(3))
    y, h = rms_norm_fp8(x, w, residual=r)
    got = torch.autograd.grad((y.dequantize(), h), (x, w), (dy, dh))
    want = torch.autograd.grad(rms_norm(x, w, residual=r), (x, w), (dy, dh))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_the_sum_of_two_dtypes_has_the_wider_one(norm, dtypes):
    x, r = (torch.randn(4, 8).to(dtype).requires_grad_() for dtype in dtypes)
    w = torch.randn(8, requires_grad=True)
    y, h = norm(x, w, residual=r)
    assert y.dtype == x.dtype
    assert h.dtype == torch.float32
    assert torch.equal(h, x + r)
    assert torch.equal(y, norm(x.float() + r.float(), w).to(x.dtype))
    dx, dr = torch.autograd.grad((y.sum(), h.sum()), (x, r))
    assert (dx.dtype, dr.dtype) == dtypes


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def test_a_decoder_under_autocast_is_that_of_transformers(tmp_path):
    """Weights and residual stream in float32, products in bfloat16."""
    from warploom.models import hf

    theirs = _llama()
    theirs.save_pretrained(tmp_path)
    ours = hf.load(tmp_path, mesh=None, dtype=torch.float32)
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    exact = theirs(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(tokens), theirs(tokens).logits
    allowed = (want - exact).abs()
    error = (got - exact).abs()
    assert error.max() <= 2 * allowed.max()
    assert error.mean() <= 1.5 * allowed.mean()
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@item("bad input", ops=("rms_norm", "layer_norm", "qk_norm_rotary"))
def test_errors_say_what_was_found():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"weight has shape \[3\], x has \[2, 8\]"):
        rms_norm(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"x must be .* got torch.int64"):
        rms_norm(torch.ones(2, 8, dtype=torch.int64), torch.ones(8))
    with pytest.raises(ValueError, match=r"residual must have .* got \[8\]"):
        rms_norm(x, torch.ones(8), residual=torch.ones(8))
    with pytest.raises(ValueError, match=r"weight has shape \[0\]"):
        rms_norm(torch.ones(2, 0), torch.ones(0))
    with pytest.raises(ValueError, match=r"layer_norm: bias has shape \[7\], weight has \[8\]"):
        layer_norm(x, torch.ones(8), torch.ones(7))
    with pytest.raises(ValueError, match=r"layer_norm: eps .* got -1"):
        layer_norm(x, torch.ones(8), eps=-1)
    with pytest.raises(ValueError, match=r"rms_norm_fp8: scaling must be row or block, got 'tile'"):
        rms_norm_fp8(x, torch.ones(8), scaling="tile")
    q, tables = torch.randn(2, 3, 8), rotary_tables(torch.arange(2), 4, base=1e4)
    with pytest.raises(ValueError, match=r"must have 8 / 2 columns, got 2: for partial rotary"):
        qk_norm_rotary(q, q, torch.ones(8), torch.ones(8), *tables)
    with pytest.raises(ValueError, match=r"qk_norm_rotary: weight has shape \[6\]"):
        qk_norm_rotary(q, q, torch.ones(8), torch.ones(6), *tables)


def test_rows_that_are_too_wide_for_triton_are_refused():
    if SERVED != "triton":
        pytest.skip("needs TRITON_INTERPRET=1")
    with pytest.raises(RuntimeError, match="widths to 16384, x has 16385: use"):
        rms_norm(torch.ones(1, 16385), torch.ones(16385), backend="triton")
