"""Merged parts must be attention over all keys: output, log-sum-exp and every gradient."""

import pytest
import torch

from warploom.kernels.attention import (
    flash_attention,
    flash_attention_backward,
    flash_attention_varlen,
    merge,
)
from warploom.kernels.attention.merging import merge_reference

F64 = torch.float64


def _draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=g)


def _parts(*batch, tokens=5, heads=3, width=4):
    outs = [_draw(*batch, tokens, heads, width, seed=s) for s in (0, 1)]
    lses = [3 * _draw(*batch, heads, tokens, seed=s) for s in (2, 3)]
    return [x.requires_grad_() for pair in zip(outs, lses, strict=True) for x in pair]


def test_parts_of_the_keys_make_attention_over_all():
    q, k, v = (_draw(2, n, h, 8, seed=s) for s, (n, h) in enumerate([(5, 4), (70, 2), (70, 2)]))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def attend(part):
        return flash_attention(q, k[:, part], v[:, part], causal=False, return_lse=True)

    want = attend(slice(None))
    got = merge(*merge(*attend(slice(0, 1)), *attend(slice(1, 30))), *attend(slice(30, None)))
    for chosen in (slice(0, 1), slice(1, 2), slice(0, 2)):  # out alone, lse alone, both
        upstream = [_draw(*x.shape, seed=9) for x in want[chosen]]
        grads = [
            torch.autograd.grad(x[chosen], inputs, upstream, retain_graph=True) for x in (got, want)
        ]
        torch.testing.assert_close(got[chosen], want[chosen], atol=1e-12, rtol=0)
        torch.testing.assert_close(*grads, atol=1e-12, rtol=0)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_of_both_shapes(batch):
    assert torch.autograd.gradcheck(merge, _parts(*batch))


@pytest.mark.parametrize("which", ["a", "b", "both"])
def test_masked_parts_leave_no_nan(which):
    parts = _parts()
    for at in {"a": (1,), "b": (3,), "both": (1, 3)}[which]:
        parts[at].data[:, 1:3] = -torch.inf
        parts[at - 1].data[1:3] = 0
    out, lse = merge(*parts)
    gradients = torch.autograd.grad((out, lse), parts, (_draw(*out.shape), _draw(*lse.shape)))
    assert all(x.isfinite().all() for x in (out, *gradients))
    if which == "both":
        assert (out[1:3] == 0).all()
        assert (lse[:, 1:3] == -torch.inf).all()
        assert all((x[1:3] == 0).all() for x in gradients[::2])
    else:
        seen = 2 if which == "a" else 0
        torch.testing.assert_close(out[1:3], parts[seen][1:3], atol=0, rtol=0)
        torch.testing.assert_close(lse[:, 1:3], parts[seen + 1][:, 1:3], atol=0, rtol=0)


def test_extreme_log_sum_exps_do_not_overflow():
    parts = _parts()
    parts[1].data += 5000
    out, _ = merge(*parts)
    torch.testing.assert_close(out, parts[0], atol=0, rtol=0)


def test_low_precision_merges_in_the_wider_dtype():
    parts = [x.detach() for x in _parts()]
    a, b = parts[0].to(torch.bfloat16), parts[2].float()
    lses = [x.float() for x in parts[1::2]]
    out, lse = merge(a, lses[0], b, lses[1])
    assert out.dtype == lse.dtype == torch.float32
    want, _ = merge_reference(a.double(), lses[0].double(), b.double(), lses[1].double())
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-6)
    low, _ = merge(a, lses[0], a, lses[1])
    assert low.dtype == torch.bfloat16


def test_opcheck():
    for batch in ((), (2,)):
        parts = _parts(*batch)
        torch.library.opcheck(torch.ops.warploom.attention_merge_forward.default, parts)
        out, lse = (x.detach() for x in merge(*parts))
        part = [x.detach() for x in parts[:2]]
        backward = torch.ops.warploom.attention_merge_backward.default
        torch.library.opcheck(backward, (out, lse, *part, out, lse))


def test_a_block_of_keys_gives_its_share_of_the_gradients():
    q, k, v = (_draw(9, h, 8, seed=s).requires_grad_() for s, h in enumerate((4, 2, 2)))
    cu = torch.tensor([0, 3, 9], dtype=torch.int32)
    out, lse = flash_attention_varlen(q, k, v, cu, return_lse=True)
    dout = _draw(*out.shape, seed=4)
    want = torch.autograd.grad(out, (q, k, v), dout)
    got = flash_attention_backward(dout, q, k, v, out, lse, cu)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    rows = [x.detach()[None] for x in (q, k, v)]
    out, lse = flash_attention(*rows, causal=False, return_lse=True)
    whole = flash_attention_backward(dout[None], *rows, out, lse, causal=False)
    parts = [
        flash_attention_backward(
            dout[None], rows[0], rows[1][:, p], rows[2][:, p], out, lse, causal=False
        )
        for p in (slice(0, 2), slice(2, 9))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], atol=1e-12, rtol=0)
    for one in (1, 2):
        both = torch.cat([p[one] for p in parts], 1)
        torch.testing.assert_close(both, whole[one], atol=1e-12, rtol=0)


def test_bad_shapes_are_refused():
    out_a, lse_a, out_b, lse_b = _parts()
    with pytest.raises(ValueError, match=r"one shape, got \[5, 3, 4\] and \[4, 3, 4\]"):
        merge(out_a, lse_a, out_b[:4], lse_b)
    with pytest.raises(ValueError, match=r"must be \[3, 5\], got \[3, 5\] and \[5, 3\]"):
        merge(out_a, lse_a, out_b, lse_b.t())
    with pytest.raises(TypeError, match="merge: lse_b must be a tensor, got NoneType"):
        merge(out_a, lse_a, out_b, None)
    with pytest.raises(ValueError, match="of floating point, got torch.int64, torch.float64"):
        merge(out_a.long(), lse_a, out_b, lse_b)


def test_there_is_no_second_derivative():
    """Not even a silent one, where the upstream gradient has no graph."""
    parts = _parts()
    with pytest.raises(RuntimeError, match="merge: there is no second derivative"):
        torch.autograd.grad(merge(*parts)[0].sum(), parts, create_graph=True)
