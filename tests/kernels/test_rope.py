"""rotary on the CPU: values, gradients, strides, dtypes; oracle transformers' Llama."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.checks import SHAPES, case, check

from warploom.kernels.rope import rotary, rotary_tables

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [*SHAPES, (3000, 64)])
def test_values_and_gradients(tokens, width, dtype):
    check(case("rotary", tokens, width, dtype))


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(0, 40), width=st.integers(1, 70))
def test_any_shape(tokens, width):
    check(case("rotary", tokens, width, torch.float32))


def _theirs(positions, head_dim, base):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    return LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])


@pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 128])
@pytest.mark.parametrize("base", [1e4, 5e5])
def test_tables_are_those_of_transformers_bit_for_bit(head_dim, base):
    positions = torch.cat([torch.arange(300), torch.tensor([0, 7, 131071])])
    cos, sin = rotary_tables(positions, head_dim, base=base)
    their_cos, their_sin = _theirs(positions, head_dim, base)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, their_cos[0, :, : head_dim // 2])
    assert torch.equal(sin, their_sin[0, :, : head_dim // 2])


def test_transformers_agrees():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    positions = torch.arange(9)
    q = torch.randn(9, 4, 16, requires_grad=True)
    k = torch.randn(9, 2, 16, requires_grad=True)
    ours = rotary(q, k, *rotary_tables(positions, 16, base=1e4))
    theirs = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], *_theirs(positions, 16, 1e4)
    )
    theirs = tuple(t[0].transpose(0, 1) for t in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    upstream = tuple(torch.randn_like(t) for t in ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (q, k), upstream),
        torch.autograd.grad(theirs, (q, k), upstream),
        rtol=1e-6,
        atol=1e-6,
    )


def test_gradcheck():
    q = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(3, 1, 6, dtype=torch.float64, requires_grad=True)
    tables = rotary_tables(torch.tensor([0, 5, 2]), 6, base=10.0)
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, *tables), (q, k))


def test_views_of_a_fused_projection():
    fused = torch.randn(7, 6 * 8, requires_grad=True)
    q, k, v = fused.view(7, 6, 8).split([3, 2, 1], 1)
    tables = rotary_tables(torch.arange(7), 8, base=1e4)
    ours = rotary(q, k, *tables)
    separate = rotary(q.contiguous(), k.contiguous(), *tables)
    assert torch.equal(ours[0], separate[0])
    assert torch.equal(ours[1], separate[1])
    (got,) = torch.autograd.grad((ours[0].sum(), ours[1].sum(), v.sum()), fused, retain_graph=True)
    (want,) = torch.autograd.grad((separate[0].sum(), separate[1].sum(), v.sum()), fused)
    torch.testing.assert_close(got, want)


def test_a_rotation_keeps_lengths_and_depends_on_distance_only():
    q, k = (torch.randn(1, 1, 16, dtype=torch.float64).expand(20, 1, 16) for _ in range(2))
    turned, other = rotary(q, k, *rotary_tables(torch.arange(20), 16, base=1e4))
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=0)
    scores = torch.einsum("shk,thk->st", turned, other)
    for distance in (0, 3, -5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)


def test_a_nan_poisons_its_token_only():
    q, k = torch.randn(4, 2, 8), torch.randn(4, 1, 8)
    q[2, 1, 3] = float("nan")
    turned, other = rotary(q, k, *rotary_tables(torch.arange(4), 8, base=1e4))
    assert turned.isnan().any(2).nonzero().tolist() == [[2, 1]]
    assert not other.isnan().any()


def test_only_the_tables_are_saved():
    q, k = torch.randn(4, 2, 8, requires_grad=True), torch.randn(4, 1, 8)
    tables = rotary_tables(torch.arange(4), 8, base=1e4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotary(q, k, *tables)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in tables]


def test_operator_is_registered_properly():
    q, k = torch.randn(4, 2, 8, requires_grad=True), torch.randn(4, 1, 8, requires_grad=True)
    tables = rotary_tables(torch.arange(4), 8, base=1e4)
    torch.library.opcheck(torch.ops.warploom.rotary_forward, (q, k, *tables, None))
    torch.library.opcheck(
        torch.ops.warploom.rotary_backward, (q.detach(), k.detach(), *tables, None)
    )


def test_compiles_without_a_break():
    q, k = torch.randn(4, 2, 8, requires_grad=True), torch.randn(4, 1, 8, requires_grad=True)
    tables = rotary_tables(torch.arange(4), 8, base=1e4)
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    upstream = (torch.randn(4, 2, 8), torch.randn(4, 1, 8))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(q, k, *tables), (q, k), upstream),
        torch.autograd.grad(rotary(q, k, *tables), (q, k), upstream),
    )


def test_errors_say_what_was_found():
    q, k = torch.randn(4, 2, 8), torch.randn(4, 1, 8)
    cos, sin = rotary_tables(torch.arange(4), 8, base=1e4)
    with pytest.raises(ValueError, match=r"got \[4, 2, 8\] and \[4, 1, 6\]"):
        rotary(q, k[..., :6], cos, sin)
    with pytest.raises(ValueError, match=r"shape \[4, 4\], got \[3, 4\]"):
        rotary(q, k, cos[:3], sin)
    with pytest.raises(ValueError, match=r"got torch.float32 and torch.float64"):
        rotary(q, k.double(), cos, sin)
    with pytest.raises(ValueError, match=r"detached"):
        rotary(q, k, cos.clone().requires_grad_(), sin)
    with pytest.raises(ValueError, match=r"q must be \[T, H, K\], got \[2, 8\]"):
        rotary(q[0], k, cos, sin)
    with pytest.raises(ValueError, match=r"even and positive, got 7"):
        rotary_tables(torch.arange(4), 7, base=1e4)
    with pytest.raises(ValueError, match=r"integers, got torch.float32"):
        rotary_tables(torch.ones(4), 8, base=1e4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [*SHAPES, (5000, 32), (300, 96)])
def test_triton_on_the_device(tokens, width, dtype):
    check(case("rotary", tokens, width, dtype, device="cuda", backend="triton"))
