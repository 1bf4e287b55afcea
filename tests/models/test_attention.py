"""Attention with fewer key/value heads than ranks: output, dX and every dW of the unsharded one."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from tests.parallel.test_tensor_linear import draw, gradients, near, slices
from torch.distributed import ProcessGroup

from warploom.models.architecture import Architecture
from warploom.models.attention import Attention
from warploom.models.sequences import Sequences
from warploom.parallel.sharding import layouts

T, D, H, K = 16, 8, 4, 4
SIZES = Architecture(
    layers=1, width=D, heads=H, kv_heads=H, head_dim=K, hidden=8, vocabulary=8, max_positions=16
)
OPTIONS = (
    {},
    {"qk_norm": "head", "qkv_bias": True, "out_bias": True, "softcap": 2.0},
    {"qk_norm": "full", "attention_scale": 0.7, "sinks": True},
    {"qk_norm": "head", "norm": "rms_plus_one", "kinds": ("sliding",), "window": 3, "sinks": True},
    {"qk_norm": "full", "positions": "none"},
)


def _attention(group, kv_heads, options):
    torch.manual_seed(0)
    a = replace(SIZES, kv_heads=kv_heads, **options)
    layer = Attention(a, "sliding" if a.window else "full", group=group).double()
    with torch.no_grad():
        for path, layout in layouts(layer).items():
            for piece in layout.pieces:
                values = draw(*piece.shape, seed=len(piece.name))
                piece.of_local(layer.get_parameter(path)).copy_(piece.of_logical(values) / 4 + 0.1)
    return layer


def _equals_unsharded():
    group = None if dist.get_world_size() == 1 else dist.group.WORLD
    angles = torch.arange(T // 2).double()[:, None] * torch.tensor([1.0, 0.1]).double()
    angles = torch.cat((angles, angles))
    sequences = Sequences(
        batch=2,
        angles=dict.fromkeys(("full", "sliding"), (angles.cos(), angles.sin())),
        positions=torch.arange(T // 2).repeat(2),
        documents=torch.arange(2).repeat_interleave(T // 2),
        count=2,
    )
    for kv_heads in (1, 2, 4):
        for options in OPTIONS:
            alone, model = _attention(None, kv_heads, options), _attention(group, kv_heads, options)
            x, dy = draw(T, D, seed=1), draw(T, D, seed=2)
            whole = x.clone().requires_grad_()
            local = slices(x, group, 0).clone().requires_grad_()
            want, got = alone(whole, sequences), model(local, sequences)
            near(got, slices(want.detach(), group, 0), "output")
            want.backward(dy)
            got.backward(slices(dy, group, 0))
            near(local.grad, slices(whole.grad, group, 0), "dx")
            found, expected = gradients(model, group), gradients(alone, None)
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                near(found[name], gradient, f"{kv_heads} heads, {options}: d{name}")


@pytest.mark.parametrize("size", [2, 4])
def test_attention_with_few_key_heads_equals_unsharded(pool, size):
    pool(size, _equals_unsharded)


def test_heads_that_fit_no_way_get_one_sentence():
    with pytest.raises(
        ValueError,
        match=r"tp \(4\) must divide heads \(18\), and divide or be a multiple of kv_heads \(6\): "
        r"tp3 and tp6 do",
    ):
        Attention(replace(SIZES, heads=18, kv_heads=6), group=ProcessGroup(0, 4))
