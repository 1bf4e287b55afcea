"""Norm, clip and Newton-Schulz: against torch, and the edges where others broke."""

import pytest
import torch
from tests.kernels.specimen import Draw, item
from tests.kernels.test_must import INTERPRETED
from tests.kernels.test_optim import State, copies, every, same_bits

from warploom.kernels.optim import (
    clip_by_global_norm_,
    clip_coefficient,
    global_norm,
    newton_schulz,
    plan,
    scale_,
    squared_norm,
)

on_norm = {"ops": ("global_norm",)}


@item("values", **on_norm)
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clip_equals_torch(device, backend, dtype, limit):
    tensors = State("in place", device, backend).gradients(0, dtype)
    leaves = [torch.nn.Parameter(torch.zeros_like(g)) for g in tensors]
    for leaf, g in zip(leaves, tensors, strict=True):
        leaf.grad = g.clone()
    exact = torch.cat([g.double().flatten() for g in tensors]).norm()
    want = torch.nn.utils.clip_grad_norm_(leaves, limit, foreach=False)
    norm, found = clip_by_global_norm_(tensors, limit, backend=backend)
    assert float(norm) == pytest.approx(float(exact), rel=1e-6 if dtype == torch.float32 else 1e-5)
    assert float(norm) == pytest.approx(float(want), rel=2e-2 if dtype != torch.float32 else 1e-6)
    assert float(found) == 0
    unit = 2 * torch.finfo(dtype).eps
    for g, leaf in zip(tensors, leaves, strict=True):
        torch.testing.assert_close(g, leaf.grad, rtol=4 * unit if limit < 1 else 0, atol=0)


@item("values", **on_norm)
@every
def test_the_norm_of_many_numbers(device, backend):
    """A sum of ones in bfloat16 stops at 256; torch's norm on the CPU is 1e-5 off for 2^20."""
    ones = [torch.ones(2**14, device=device, dtype=torch.bfloat16) for _ in range(16)]
    assert float(global_norm(ones, backend=backend)) == 512
    drawn = Draw(torch.float32, device)(2**16 if INTERPRETED else 2**20)
    exact = float(drawn.double().norm())
    assert float(global_norm([drawn], backend=backend)) == pytest.approx(exact, rel=5e-7)
    mixed = [*ones[:3], torch.ones(2**14, device=device)]
    assert float(squared_norm(mixed, backend=backend)) == 2**16


@item("NaN and inf", "zero and odd sizes", **on_norm)
@every
def test_what_is_not_finite_raises_the_flag(device, backend):
    assert float(global_norm([], backend=backend)) == 0
    assert float(global_norm([torch.empty(0, device=device)], backend=backend)) == 0
    for bad in (float("nan"), float("inf"), 1e30):
        tensors = [torch.ones(n, device=device) for n in (3, 2000)]
        tensors[1][1999] = bad
        coefficient, found = clip_coefficient(global_norm(tensors, backend=backend), 1.0)
        assert float(found) == 1
        state = State("masters", device, backend, shapes=((3,), (2000,)))
        before = copies(state.tensors)
        state.call(tensors, scale=coefficient, found_inf=found)
        same_bits(state.tensors, before)


@item("bad input", **on_norm)
@every
def test_norm_and_clip_refuse_in_a_sentence(device, backend):
    x = torch.ones(4, 3, device=device)
    with pytest.raises(RuntimeError, match=r"has no gradient, and tensors\[1\] requires one"):
        global_norm([x, x.clone().requires_grad_()], backend=backend)
    with pytest.raises(ValueError, match=r"^global_norm: .*float64; tensors\[0\] is torch.int64"):
        global_norm([x.long()], backend=backend)
    with pytest.raises(ValueError, match="above 0, got -1"):
        clip_coefficient(x.sum(), -1)
    with pytest.raises(ValueError, match="above 0 and finite, got inf"):
        clip_by_global_norm_([x], float("inf"), backend=backend)
    with pytest.raises(ValueError, match=r"factor must be 0-dim and on .*, got \[1\]"):
        scale_([x], torch.ones(1, device=device), backend=backend)
    made = plan([x]) if backend == "triton" else None
    with pytest.raises(ValueError, match="a plan serves one dtype"):
        squared_norm([x, x.half()], plan=made or plan([x]), backend=backend)
    if backend == "triton":
        with pytest.raises(ValueError, match="share memory"):
            scale_([x, x], x.sum(), backend=backend)
        with pytest.raises(ValueError, match=r"contiguous tensors, tensors\[0\] .* \[1, 3\]"):
            scale_([x.t()], x.sum(), backend=backend)


@item("second derivative", "bad input", ops=("newton_schulz",))
@every
def test_newton_schulz_has_no_gradient(device, backend):
    u = torch.randn(4, 3, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no gradient, and u \[4, 3\] requires one: detach it"):
        newton_schulz(u, backend=backend)
    with torch.no_grad():
        assert newton_schulz(u, backend=backend).shape == u.shape
    for bad, words in (((4,), r"got \[4\]"), ((4, 3), "torch.int64")):
        with pytest.raises(ValueError, match=words):
            newton_schulz(torch.ones(bad, device=device, dtype=torch.int64), backend=backend)


@item("values", ops=("newton_schulz",))
@every
def test_newton_schulz_nears_the_polar_factor(device, backend):
    for shape in ((8, 8), (5, 16), (2, 16, 5)):
        u = Draw(torch.float32, device)(*shape)
        values = torch.linalg.svdvals(newton_schulz(u, backend=backend))
        assert values.min() > 0.6
        assert values.max() < 1.3
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    assert torch.sum(newton_schulz(u, backend=backend) * (left @ right)) > 2 * 5 * 0.85


@item("values", ops=("newton_schulz",))
@every
@pytest.mark.parametrize("n", [3, 70])
def test_the_symmetric_product_is_symmetric_bit_for_bit(device, backend, n):
    if backend != "triton":
        pytest.skip("the reference takes torch's product")
    from warploom.kernels.optim.orthogonal_triton import symmetric

    x = Draw(torch.float32, device)(2, n, 40)
    gram = symmetric(x)
    assert torch.equal(gram, gram.mT)
    torch.testing.assert_close(gram, x @ x.mT, rtol=1e-5, atol=1e-4)
    power = symmetric(gram, add=gram, alpha=2.0, beta=-3.0)
    torch.testing.assert_close(power, 2 * gram @ gram - 3 * gram, rtol=1e-4, atol=1e-2)
