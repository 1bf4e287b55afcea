"""Latent attention against plain PyTorch, head by head, and its shards against the whole."""

import pytest
import torch
import torch.distributed as dist
from tests.parallel.test_tensor_linear import draw, gradients, near, slices
from torch.distributed import ProcessGroup

from warploom.kernels.rope import rotary_tables
from warploom.models.architecture import Architecture, Latent
from warploom.models.latent import LatentAttention
from warploom.models.sequences import Sequences
from warploom.parallel.sharding import layouts

T, D, H, N, P, L, C = 16, 10, 4, 6, 4, 5, 7
LENGTHS = (9, 7)


def _architecture(queries=3, scale=0.4, window=None):
    return Architecture(
        kinds=("sliding",) if window else (), window=window,
        layers=1, width=D, heads=H, kv_heads=H, head_dim=N + P, hidden=8, vocabulary=8,
        max_positions=64, attention_scale=scale,
        latent=Latent(keys=C, queries=queries, rotated=P, values=L),
    )  # fmt: skip


def _layer(group, **options):
    torch.manual_seed(0)
    made = _architecture(**options)
    layer = LatentAttention(made, made.kind(0), 0, group=group).double()
    generator = torch.Generator().manual_seed(5)
    made = layouts(layer)
    with torch.no_grad():
        for path, p in layer.named_parameters():
            (piece,) = made[path].pieces
            logical = torch.randn(piece.shape, generator=generator, dtype=torch.float64)
            p.copy_(piece.of_logical(logical))
    return layer


def _sequences():
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    cos, sin = (t.double() for t in rotary_tables(positions, P, base=100.0))
    ends = torch.tensor([0, LENGTHS[0], T], dtype=torch.int32)
    documents = torch.arange(2).repeat_interleave(torch.tensor(LENGTHS))
    angles, longest = dict.fromkeys(("full", "sliding"), (cos, sin)), max(LENGTHS)
    return Sequences(1, angles, positions, documents, 2, cu_seqlens=ends, max_seqlen=longest)


def _turn(x_TP, turns_TJ):
    """Multiply neighbours, as one complex number, by that of their angle."""
    turned = torch.view_as_complex(x_TP.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(turned * turns_TJ).flatten(-2)


def _rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _plain(w, x, turns_TJ, scale, window=T):
    """Latent attention by the equations, one document and one head after the other."""
    if "q.weight" in w:
        q = x @ w["q.weight"].T
    else:
        q = _rms(x @ w["q_down.weight"].T, w["q_norm.weight"]) @ w["q_up.weight"].T
    down = x @ w["kv_down.weight"].T
    kv = _rms(down[:, :C], w["kv_norm.weight"]) @ w["kv_up.weight"].T
    shared = _turn(down[:, C:], turns_TJ)
    heads = []
    for h in range(H):
        qh, kh = q[:, h * (N + P) :][:, : N + P], kv[:, h * (N + L) :][:, : N + L]
        qh = torch.cat((qh[:, :N], _turn(qh[:, N:], turns_TJ)), -1)
        keys, values, out, start = torch.cat((kh[:, :N], shared), -1), kh[:, N:], [], 0
        for n in LENGTHS:
            part = slice(start, start := start + n)
            hidden = (torch.ones(n, n).triu(1) + torch.ones(n, n).tril(-window)).bool()
            scores = (qh[part] @ keys[part].T * scale).masked_fill(hidden, -torch.inf)
            out.append(scores.softmax(-1) @ values[part])
        heads.append(torch.cat(out))
    return torch.cat(heads, -1) @ w["out.weight"].T


@pytest.mark.parametrize("queries", [3, None])
@pytest.mark.parametrize(("scale", "window"), [(0.4, None), (None, 3)])
def test_output_and_gradients_equal_the_equations(queries, scale, window):
    layer = _layer(None, queries=queries, scale=scale, window=window)
    sequences = _sequences()
    own = dict(layer.named_parameters())
    x, dy = draw(T, D, seed=1), draw(T, D, seed=2)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = {path: p.detach().clone().requires_grad_() for path, p in own.items()}
    turns = torch.complex(*sequences.angles["full"])
    want = _plain(weights, theirs, turns, scale or (N + P) ** -0.5, window or T)
    got = layer(mine, sequences)
    near(got, want, "output")
    got.backward(dy)
    want.backward(dy)
    near(mine.grad, theirs.grad, "dx")
    for path, p in own.items():
        near(p.grad, weights[path].grad, path)


def _equals_unsharded():
    group = None if dist.get_world_size() == 1 else dist.group.WORLD
    for options in ({}, {"queries": None}):
        alone, model = _layer(None, **options), _layer(group, **options)
        x, dy = draw(T, D, seed=1), draw(T, D, seed=2)
        whole = x.clone().requires_grad_()
        local = slices(x, group, 0).clone().requires_grad_()
        sequences = _sequences()
        want, got = alone(whole, sequences), model(local, sequences)
        near(got, slices(want.detach(), group, 0), "output")
        want.backward(dy)
        got.backward(slices(dy, group, 0))
        near(local.grad, slices(whole.grad, group, 0), "dx")
        found, expected = gradients(model, group), gradients(alone, None)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            near(found[name], gradient, f"d{name}")


@pytest.mark.parametrize("size", [2])
def test_shards_equal_the_whole(pool, size):
    pool(size, _equals_unsharded)


def _sums_the_gradient_of_the_shared_key():
    """Weight only what rotates: every rank's heads have a part of its gradient."""
    group = dist.group.WORLD
    alone, model = _layer(None), _layer(group)
    x, sequences = draw(T, D, seed=1), _sequences()
    for layer, tokens, over in ((alone, x, None), (model, slices(x, group, 0), group)):
        with torch.no_grad():  # a key without its still part: the latent has no gradient by keys
            layer.kv_up.weight.view(-1, N + L, C)[:, :N] = 0
        layer(tokens, sequences).backward(slices(draw(T, D, seed=2), over, 0))
    got = gradients(model, group)["kv_down.weight"][C:]
    want = alone.kv_down.weight.grad[C:]
    assert want.abs().max() > 1e-3
    near(got, want)


def test_the_gradient_of_the_rotated_key_is_summed_over_tensor_parallel_heads(pool):
    """A public trainer kept each rank's own part, and diverged after a thousand steps."""
    pool(2, _sums_the_gradient_of_the_shared_key)


def test_heads_that_do_not_divide_get_one_sentence():
    with pytest.raises(ValueError, match=r"tp \(3\) must divide heads \(4\): tp2 and tp4 do"):
        LatentAttention(_architecture(), "full", 0, group=ProcessGroup(0, 3))
