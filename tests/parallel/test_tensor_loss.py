"""Losses over a sharded vocabulary equal those over a whole one: values and every gradient."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from warploom.kernels import loss as kernel
from warploom.parallel.tensor import loss

_CALLS = (
    ("linear_cross_entropy", {}),
    ("linear_cross_entropy", {"label_smoothing": 0.2}),
    ("linear_cross_entropy", {"softcap": 2.0}),
    ("linear_cross_entropy", {"label_smoothing": 0.2, "softcap": 2.0, "z_loss": True}),
    ("linear_log_probs", {}),
    ("linear_log_probs", {"entropy": True, "softcap": 2.0}),
    ("linear_top_k_kl", {}),
    ("linear_top_k_kl", {"direction": "reverse", "softcap": 2.0}),
    ("linear_top_k_kl", {"tail": False}),
)


def _tensors(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return [x for part in found for x in _tensors(part) if x.is_floating_point()]


def _gradients(found, inputs):
    outputs = [x for x in _tensors(found) if x.requires_grad]
    g = torch.Generator().manual_seed(4)
    upstream = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in outputs]
    return torch.autograd.grad(outputs, inputs, upstream)


def _case(tokens, vocabulary):
    g = torch.Generator().manual_seed(3)
    double = {"generator": g, "dtype": torch.float64}
    hidden, weight = torch.randn(tokens, 6, **double), torch.randn(vocabulary, 6, **double)
    targets = torch.randint(vocabulary, (tokens,), generator=g)
    teacher = torch.randn(tokens, vocabulary, **double).log_softmax(-1)
    log_probs, indices = teacher.topk(min(3, vocabulary), -1)
    targets[1::4], indices[1::4] = -100, -100
    hidden[1::4] = torch.nan  # what is ignored does no harm
    return hidden.requires_grad_(), weight, targets, (indices, log_probs)


class _Reductions(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allreduce" in str(func)
        return func(*args, **(kwargs or {}))


def _equal_the_whole(tokens, vocabulary):
    """Three tokens a chunk; two ranks, the last of which has fewer rows, or none."""
    group, rank = dist.group.WORLD, dist.get_rank()
    held = -(-vocabulary // dist.get_world_size())
    mine = slice(min(rank * held, vocabulary), min((rank + 1) * held, vocabulary))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_CHUNK_BYTES", 3 * 4 * held)
        for name, options in _CALLS:
            hidden, weight, targets, teacher = _case(tokens, vocabulary)
            fixed = teacher if "kl" in name else (targets,)
            if "kl" in name and vocabulary <= 3:
                continue
            whole = weight.clone().requires_grad_()
            want = getattr(kernel, name)(hidden, whole, *fixed, **options)
            own = weight[mine].clone().requires_grad_()
            with _Reductions() as seen:
                got = getattr(loss, name)(
                    hidden, own, *fixed, group=group, start=mine.start, **options
                )
            assert seen.count == 2 * max(1, -(-tokens // 3)), name
            for a, b in zip(_tensors(got), _tensors(want), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            dhidden, dweight = _gradients(got, (hidden, own))
            dist.all_reduce(dhidden)
            exact = _gradients(want, (hidden, whole))
            torch.testing.assert_close(dhidden, exact[0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(dweight, exact[1][mine], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("tokens", "vocabulary"), [(8, 11), (5, 1), (0, 4)])
def test_losses_equal_those_of_the_whole_vocabulary(pool, tokens, vocabulary):
    pool(2, _equal_the_whole, tokens, vocabulary)


def _options_are_checked():
    hidden, weight, targets, (indices, log_probs) = _case(4, 9)
    keep = {"group": dist.group.WORLD}
    with pytest.raises(ValueError, match="softcap must be above 0 and finite, or None, got 0"):
        loss.linear_log_probs(hidden, weight, targets, softcap=0, **keep)
    with pytest.raises(ValueError, match="label_smoothing must be from 0 to 1, got 1.5"):
        loss.linear_cross_entropy(hidden, weight, targets, label_smoothing=1.5, **keep)
    with pytest.raises(ValueError, match="direction must be forward or reverse, got 'back'"):
        loss.linear_top_k_kl(hidden, weight, indices, log_probs, direction="back", **keep)


def test_options_are_checked(pool):
    pool(2, _options_are_checked)
