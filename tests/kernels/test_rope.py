"""rotary and its tables: oracle transformers' Llama, GPT-J and ROPE_INIT_FUNCTIONS; in place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.specimen import check, specimens

from warploom.kernels.rope import DynamicNtk, Linear, Llama3, NtkAware, Yarn, rotary, rotary_tables

SPECIMENS = {s.name: s for s in specimens()}


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 40),
    width=st.integers(1, 70),
    name=st.sampled_from(["rotary", "rotary_interleaved", "rotary_partial", "rotary_in_place"]),
)
def test_any_shape(tokens, width, name):
    check(SPECIMENS[name], tokens, width, torch.float32)


def _config(head_dim, base, kind="default", **scaling):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": kind, "rope_theta": base, **scaling},
    )


def _theirs(positions, *config, **scaling):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(_config(*config, **scaling))(torch.zeros(1), positions[None])


@pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 128])
@pytest.mark.parametrize("base", [1e4, 5e5])
def test_tables_are_those_of_transformers_bit_for_bit(head_dim, base):
    positions = torch.cat([torch.arange(300), torch.tensor([0, 7, 131071])])
    cos, sin = rotary_tables(positions, head_dim, base=base)
    their_cos, their_sin = _theirs(positions, head_dim, base)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, their_cos[0, :, : head_dim // 2])
    assert torch.equal(sin, their_sin[0, :, : head_dim // 2])


_YARN = {"factor": 40.0, "original_max_position_embeddings": 4096}
_LLAMA = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SCALINGS = [
    (Linear(4.0), "linear", {"factor": 4.0}),
    (DynamicNtk(2.0, 8192, 20000), "dynamic", {"factor": 2.0}),
    (DynamicNtk(2.0, 8192, 100), "dynamic", {"factor": 2.0}),
    (Yarn(40.0, 4096), "yarn", _YARN),
    (Yarn(1.0, 4096), "yarn", {**_YARN, "factor": 1.0}),
    (Yarn(40.0, 4096, attention_factor=0.7), "yarn", {**_YARN, "attention_factor": 0.7}),
    (
        Yarn(40.0, 4096, beta_fast=20, mscale=1.0, mscale_all_dim=0.5, truncate=False),
        "yarn",
        {**_YARN, "beta_fast": 20, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
    ),
    (Llama3(8.0, 1.0, 4.0, 8192), "llama3", {"factor": 8.0, **_LLAMA}),
]


@pytest.mark.parametrize(("ours", "kind", "theirs"), SCALINGS)
@pytest.mark.parametrize("head_dim", [4, 64, 80, 128])
@pytest.mark.parametrize("base", [1e4, 5e5])
def test_scalings_are_those_of_transformers_bit_for_bit(ours, kind, theirs, head_dim, base):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config, cpu = _config(head_dim, base, kind, **theirs), torch.device("cpu")
    length = getattr(ours, "length", None)
    frequencies, attention = ROPE_INIT_FUNCTIONS[kind](config, cpu, seq_len=length)
    assert torch.equal(ours.frequencies(head_dim, base, cpu), frequencies)
    assert ours.attention == attention
    positions = torch.tensor([0, 3, 8000])
    cos, sin = rotary_tables(positions, head_dim, base=base, scaling=ours)
    if kind != "dynamic":
        their_cos, their_sin = _theirs(positions, head_dim, base, kind=kind, **theirs)
        assert torch.equal(cos, their_cos[0, :, : head_dim // 2])
        assert torch.equal(sin, their_sin[0, :, : head_dim // 2])


def test_ntk_slows_the_slowest_pair_by_the_factor_and_leaves_the_fastest():
    cpu = torch.device("cpu")
    plain, slowed = (Linear(1.0), NtkAware(4.0))
    ratio = plain.frequencies(64, 1e4, cpu) / slowed.frequencies(64, 1e4, cpu)
    torch.testing.assert_close(ratio[[0, -1]], torch.tensor([1.0, 4.0]), rtol=1e-5, atol=0)
    assert torch.equal(
        NtkAware(3.0).frequencies(64, 1e4, cpu), DynamicNtk(2.0, 100, 200).frequencies(64, 1e4, cpu)
    )


def _compare(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    upstream = tuple(torch.randn_like(t) for t in ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(theirs, inputs, upstream),
        rtol=1e-6,
        atol=1e-6,
    )


def test_transformers_agrees():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    positions = torch.arange(9)
    q = torch.randn(9, 4, 16, requires_grad=True)
    k = torch.randn(9, 2, 16, requires_grad=True)
    ours = rotary(q, k, *rotary_tables(positions, 16, base=1e4))
    theirs = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], *_theirs(positions, 16, 1e4)
    )
    _compare(ours, tuple(t[0].transpose(0, 1) for t in theirs), (q, k))


def test_gptj_agrees_on_interleaved_pairs_of_a_part_of_a_head():
    from transformers.models.gptj.modeling_gptj import (
        apply_rotary_pos_emb,
        create_sinusoidal_positions,
    )

    q = torch.randn(9, 4, 16, requires_grad=True)
    k = torch.randn(9, 2, 16, requires_grad=True)
    ours = rotary(q, k, *rotary_tables(torch.arange(9), 6, base=1e4), interleaved=True)
    sin, cos = create_sinusoidal_positions(9, 6)[None].chunk(2, -1)
    theirs = tuple(
        torch.cat([apply_rotary_pos_emb(x[None, ..., :6], sin, cos)[0], x[..., 6:]], -1)
        for x in (q, k)
    )
    _compare(ours, theirs, (q, k))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradcheck_to_the_second_order(interleaved, inplace):
    q = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    k = torch.randn(3, 1, 7, dtype=torch.float64, requires_grad=True)
    tables = rotary_tables(torch.tensor([0, 5, 2]), 4, base=10.0)

    def turn(q, k):
        return rotary(q * 1, k * 1, *tables, interleaved=interleaved, inplace=inplace)

    assert torch.autograd.gradcheck(turn, (q, k))
    assert torch.autograd.gradgradcheck(turn, (q, k))


def test_in_place_in_slices_of_a_fused_projection():
    """The projection itself is turned, its history goes on, and a second backward is the same."""
    leaf = torch.randn(7, 6, 8, requires_grad=True)
    tables = rotary_tables(torch.arange(7), 8, base=1e4)
    fused = leaf * 2
    q, k, version = fused[:, :3], fused[:, 3:5], fused._version
    out = rotary(q, k, *tables, inplace=True)
    assert out[0] is q
    assert out[1] is k
    assert fused._version > version
    copied = leaf * 2
    want = torch.cat([*rotary(copied[:, :3], copied[:, 3:5], *tables), copied[:, 5:]], 1)
    assert torch.equal(fused, want)
    dy = torch.randn_like(want)
    (expected,) = torch.autograd.grad(want, leaf, dy)
    kept = dy.clone()
    for _ in range(2):
        (got,) = torch.autograd.grad(fused, leaf, dy, retain_graph=True)
        assert torch.equal(got, expected)
    assert torch.equal(dy, kept)


def test_in_place_is_refused_where_autograd_must():
    leaf = torch.randn(4, 3, 8, requires_grad=True)
    tables = rotary_tables(torch.arange(4), 8, base=1e4)
    free = torch.randn(4, 1, 8)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        rotary(leaf, free, *tables, inplace=True)
    with pytest.raises(RuntimeError, match="a function that returns multiple views"):
        rotary((leaf * 1).split(2, 1)[0], free, *tables, inplace=True)
    x = leaf * 1
    squared = x.square()
    rotary(x, free, *tables, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(squared.sum(), leaf)
    with pytest.raises(ValueError, match=r"expanded .* \[4, 2, 8\] has strides \[8, 0, 1\]"):
        rotary(free.expand(4, 2, 8), free, *tables, inplace=True)
    with torch.no_grad():
        version = leaf._version
        rotary(leaf, free, *tables, inplace=True)
    assert leaf._version > version


def test_in_place_inside_a_compiled_function():
    leaf, k = torch.randn(4, 3, 8, requires_grad=True), torch.randn(4, 1, 8)
    tables = rotary_tables(torch.arange(4), 8, base=1e4)

    def fn(leaf, k):
        fused = leaf * 2
        rotary(fused[:, :2], k, *tables, inplace=True)
        return fused.square()

    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    ours, theirs = k.clone(), k.clone()
    got, want = compiled(leaf, ours), fn(leaf, theirs)
    torch.testing.assert_close(got, want)
    assert torch.equal(ours, theirs)
    dy = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaf, dy), torch.autograd.grad(want, leaf, dy)
    )


def test_a_rotation_keeps_lengths_and_depends_on_distance_only():
    q, k = (torch.randn(1, 1, 16, dtype=torch.float64).expand(20, 1, 16) for _ in range(2))
    turned, other = rotary(q, k, *rotary_tables(torch.arange(20), 16, base=1e4))
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=0)
    scores = torch.einsum("shk,thk->st", turned, other)
    for distance in (0, 3, -5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)


def test_only_the_tables_are_saved():
    q, k = torch.randn(4, 2, 8, requires_grad=True), torch.randn(4, 1, 8)
    tables = rotary_tables(torch.arange(4), 8, base=1e4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotary(q, k, *tables)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in tables]


def test_errors_say_what_was_found():
    q, k = torch.randn(4, 2, 8), torch.randn(4, 1, 8)
    cos, sin = rotary_tables(torch.arange(4), 8, base=1e4)
    with pytest.raises(ValueError, match=r"got \[4, 2, 8\] and \[4, 1, 6\]"):
        rotary(q, k[..., :6], cos, sin)
    with pytest.raises(ValueError, match=r"\[4, J\] with J from 1 to 4, got \[3, 4\]"):
        rotary(q, k, cos[:3], sin[:3])
    with pytest.raises(ValueError, match=r"J from 1 to 3, got \[4, 4\]"):
        rotary(q[..., :7], k[..., :7], cos, sin)
    with pytest.raises(ValueError, match=r"got torch.float32 and torch.float64"):
        rotary(q, k.double(), cos, sin)
    with pytest.raises(ValueError, match=r"detached"):
        rotary(q, k, cos.clone().requires_grad_(), sin)
    with pytest.raises(ValueError, match=r"q must be \[T, H, K\], got \[2, 8\]"):
        rotary(q[0], k, cos, sin)
    positions = torch.arange(4)
    with pytest.raises(ValueError, match=r"even and positive, got 7"):
        rotary_tables(positions, 7, base=1e4)
    with pytest.raises(ValueError, match=r"integers, got torch.float32"):
        rotary_tables(torch.ones(4), 8, base=1e4)
    with pytest.raises(ValueError, match=r"head_dim above 2, got 2"):
        rotary_tables(positions, 2, base=1e4, scaling=NtkAware(2.0))
    with pytest.raises(ValueError, match=r"base must be above 1 and finite, got 0.5"):
        rotary_tables(positions, 8, base=0.5, scaling=Yarn(2.0, 64))
    with pytest.raises(ValueError, match=r"Linear: factor must be at least 1 .* got 0.5"):
        Linear(0.5)
    with pytest.raises(ValueError, match=r"DynamicNtk: length must be positive, got 0"):
        DynamicNtk(2.0, 64, 0)
    with pytest.raises(ValueError, match=r"beta_fast \(1\) must be at least beta_slow \(2\)"):
        Yarn(2.0, 64, beta_fast=1, beta_slow=2)
    with pytest.raises(ValueError, match=r"high \(1\) must be above low \(4\)"):
        Llama3(8.0, 4, 1, 64)
