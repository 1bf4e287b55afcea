"""Attention with fewer key/value heads than ranks: output, dX and every dW of the unsharded one."""

import pytest
import torch
import torch.distributed as dist
from tests.parallel.test_tensor_linear import draw, gradients, near, slices
from torch.distributed import ProcessGroup

from warploom.models.attention import Attention
from warploom.models.sequences import Sequences

T, D, H, K = 16, 8, 4, 4


def _attention(group, kv_heads, qk_norm):
    torch.manual_seed(0)
    layer = Attention(D, H, kv_heads, K, group=group, qk_norm=qk_norm).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(8)
    return layer


def _equals_unsharded():
    group = None if dist.get_world_size() == 1 else dist.group.WORLD
    angles = torch.arange(T // 2).double()[:, None] * torch.tensor([1.0, 0.1]).double()
    angles = torch.cat((angles, angles))
    sequences = Sequences(
        2, angles.cos(), angles.sin(), torch.arange(2).repeat_interleave(T // 2), 2
    )
    for kv_heads in (1, 2, 4):
        for qk_norm in ("head", None):
            alone = _attention(None, kv_heads, qk_norm)
            model = _attention(group, kv_heads, qk_norm)
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
                near(found[name], gradient, f"{kv_heads} heads: d{name}")


@pytest.mark.parametrize("size", [2, 4])
def test_attention_with_few_key_heads_equals_unsharded(pool, size):
    pool(size, _equals_unsharded)


def test_heads_that_fit_no_way_get_one_sentence():
    with pytest.raises(
        ValueError, match=r"size \(3\) must divide heads \(6\), and divide kv_heads \(2\) or"
    ):
        Attention(D, 6, 2, K, group=ProcessGroup(0, 3))
