"""The scan of a state-space layer and its convolution: against a plain loop, over documents."""

import pytest
import torch
import torch.nn.functional as F

from warploom.kernels.ssm import causal_convolution, silu, softplus, state_space_scan

H, G, P, M, W = 4, 2, 3, 5, 4
LENGTHS = (1, 9, 2, 30, 0, 7)
TOKENS, COUNT = sum(LENGTHS), len(LENGTHS)


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(dtype=torch.float64, tokens=TOKENS, count=COUNT):
    x, b, c = (draw(tokens, *s, seed=i) for i, s in enumerate(((H, P), (G, M), (G, M))))
    dt, a = draw(tokens, H, seed=3).abs(), -draw(H, seed=4).exp()
    start = draw(count, H, P, M, seed=5)
    return [t.to(dtype).requires_grad_() for t in (x, dt, a, b, c, start)]


def loop(x, dt, a, b, c, start, lengths):
    """Compute by the definition, one token and one head after the other."""
    ys, last, at = [], [], 0
    for n, length in enumerate(lengths):
        states = list(start[n])
        for t in range(at, at + length):
            for h in range(H):
                g = h // (H // G)
                states[h] = torch.exp(dt[t, h] * a[h]) * states[h] + dt[t, h] * torch.outer(
                    x[t, h], b[t, g]
                )
                ys.append(states[h] @ c[t, g])
        last.append(torch.stack(states))
        at += length
    return torch.stack(ys).view(at, H, P), torch.stack(last)


@pytest.mark.parametrize("options", [{"chunk": 4}, {"chunk": 1}, {}, {"sequential": True}], ids=str)
def test_the_scan_is_the_recurrence_with_every_gradient(options):
    want, got = inputs(), inputs()
    expected = loop(*want, LENGTHS)
    *front, start = got
    found = state_space_scan(*front, bounds(LENGTHS), initial_NHPM=start, **options)
    upstream = [draw(*t.shape, seed=7) for t in expected]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    torch.autograd.backward(expected, upstream)
    torch.autograd.backward(found, upstream)
    for name, p, q in zip(("x", "dt", "a", "b", "c", "start"), got, want, strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-11, rtol=0, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("sequential", [False, True])
def test_float32_is_as_exact_as_float32_and_strong_decay_stays_finite(sequential):
    exact = inputs()
    rounded = [t.detach().float() for t in exact]
    for scale in (1.0, 1000.0):  # exp(-1000) between neighbours
        front, start = exact[:5], exact[5]
        front[2] = exact[2].detach() * scale
        want, _ = state_space_scan(*front, bounds(LENGTHS), initial_NHPM=start)
        mine = [*rounded[:2], (rounded[2] * scale).requires_grad_(), *rounded[3:5]]
        got, last = state_space_scan(
            *mine, bounds(LENGTHS), initial_NHPM=rounded[5], sequential=sequential, chunk=8
        )
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
        got.square().sum().backward()
        assert mine[2].grad.isfinite().all()
        assert last.dtype == torch.float32
    rounded[0][4], rounded[1][4] = 0, 1e4  # what comes after a reset is not lost in its size
    front = [t.double() for t in rounded[:5]]
    want, _ = state_space_scan(*front, bounds((TOKENS,)))
    got, _ = state_space_scan(*rounded[:5], bounds((TOKENS,)), sequential=sequential)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    half = [t.bfloat16() for t in rounded[:5]]
    y, last = state_space_scan(*half, bounds(LENGTHS))
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32


@pytest.mark.parametrize("sequential", [False, True])
def test_a_sequence_goes_on_from_where_it_was_cut_and_neighbours_change_nothing(sequential):
    *front, start = (t.detach().float() for t in inputs(tokens=40, count=1))
    scan = {"sequential": sequential, "chunk": 8}
    a, rest = front[2], [front[i] for i in (0, 1, 3, 4)]

    def run(low, high, state, lengths=None):
        x, dt, b, c = (t[low:high] for t in rest)
        return state_space_scan(
            x, dt, a, b, c, bounds(lengths or (high - low,)), initial_NHPM=state, **scan
        )

    whole, last = run(0, 40, start)
    ys, state = [], start
    for low, high in ((0, 13), (13, 14), (14, 15), (15, 33), (33, 40)):
        y, state = run(low, high, state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)
    packed, _ = run(0, 40, torch.cat([torch.full_like(start, torch.nan), start]), (13, 27))
    assert packed[:13].isnan().all()
    assert packed[13:].isfinite().all()
    if sequential:
        assert torch.equal(torch.cat(ys), whole)
        assert torch.equal(state, last)
        alone, _ = run(13, 40, start)
        assert torch.equal(packed[13:], alone)


def test_the_convolution_is_torchs_of_each_document():
    x, weight, bias = draw(TOKENS, 6), draw(6, W, seed=1), draw(6, seed=2)
    before = draw(COUNT, 6, W - 1, seed=3)
    mine = [t.clone().requires_grad_() for t in (x, weight, bias, before)]
    theirs = [t.clone().requires_grad_() for t in (x, weight, bias, before)]
    y, last = causal_convolution(*mine[:3], bounds(LENGTHS), initial_NCW=mine[3])
    parts, ends, at = [], [], 0
    for n, length in enumerate(LENGTHS):
        row = torch.cat([theirs[3][n], theirs[0][at : at + length].t()], 1)
        ends.append(row[:, row.shape[1] - W + 1 :])
        if length:
            parts.append(F.conv1d(row[None], theirs[1][:, None], theirs[2], groups=6)[0].t())
        at += length
    torch.testing.assert_close(y, torch.cat(parts))
    torch.testing.assert_close(last, torch.stack(ends))
    dy, dlast = draw(*y.shape, seed=8), draw(*last.shape, seed=9)
    torch.autograd.backward((y, last), (dy, dlast))
    torch.autograd.backward((torch.cat(parts), torch.stack(ends)), (dy, dlast))
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    alone, _ = causal_convolution(x, weight, bias, bounds(LENGTHS))
    zeros, _ = causal_convolution(
        x, weight, bias, bounds(LENGTHS), initial_NCW=torch.zeros_like(before)
    )
    assert torch.equal(alone, zeros)


def test_activations_have_the_same_bits_wherever_a_value_lies():
    x = draw(1037, dtype=torch.float32) * 40
    for mine, theirs in ((silu, F.silu), (softplus, F.softplus)):
        torch.testing.assert_close(mine(x), theirs(x), atol=1e-6, rtol=1e-6)
        assert torch.equal(mine(x), torch.cat([mine(part) for part in x.split(3)]))
        p = (x * 100).requires_grad_()
        mine(p).sum().backward()
        assert p.grad.isfinite().all()


def test_shapes_that_do_not_fit_get_one_sentence():
    x, dt, a, b, c, start = inputs()
    cu = bounds(LENGTHS)
    with pytest.raises(ValueError, match=r"G dividing H, and chunk at least 1; got \[49, 4, 3\]"):
        state_space_scan(x, dt, a, b[:, :1], c, cu)
    with pytest.raises(ValueError, match=r"initial must be \[6, 4, 3, 5\]; got \[5, 4, 3, 5\]"):
        state_space_scan(x, dt, a, b, c, cu, initial_NHPM=start[1:])
    with pytest.raises(ValueError, match=r"must be \[T, C\], \[C, W\] and \[C\]; got \[49, 4\]"):
        causal_convolution(dt, draw(3, W), draw(3), cu)
    with pytest.raises(ValueError, match=r"initial must be \[6, 4, 3\] for 6 documents"):
        causal_convolution(dt, draw(4, W), draw(4), cu, initial_NCW=draw(6, 3, 4))
