"""`linear_cross_entropy` and its kin against F.cross_entropy on all logits, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.kernels.loss import (
    cross_entropy_gradient_,
    cross_entropy_partials,
    linear_cross_entropy,
    linear_log_probs,
)
from warploom.kernels.loss.chunks import chunk_tokens
from warploom.kernels.loss.linear import linear_statistics_reference

OPS = torch.ops.warploom


def _inputs(tokens, width, vocabulary, *, dtype=torch.float64, ignored=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, dtype=torch.float64, generator=g).to(dtype)
    weight = torch.randn(vocabulary, width, dtype=torch.float64, generator=g).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=g)
    targets[torch.rand(tokens, generator=g) < ignored] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def _oracle(hidden, weight, targets):
    """Log-probabilities and log-sum-exps by PyTorch, in float64 on the rounded inputs."""
    logits = hidden.double() @ weight.double().t()
    log_probs = -F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    return log_probs, torch.where(targets == -100, 0, logits.logsumexp(-1))


def _assert_gradients(loss, expected, inputs, **tolerance):
    actual = torch.autograd.grad(loss, inputs)
    for a, e in zip(actual, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, e.to(a.dtype), **tolerance)


@pytest.mark.parametrize("chunk", [None, 1, 3, 1000])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_sum_and_gradients_are_those_of_cross_entropy(chunk, ignored):
    hidden, weight, targets = _inputs(13, 7, 37, ignored=ignored)
    total, count = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
    expected = -_oracle(hidden, weight, targets)[0].sum()
    assert count == (targets != -100).sum()
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.tensor(-0.37, dtype=torch.float64)
    _assert_gradients(total * upstream, expected * upstream, (hidden, weight))


@pytest.mark.parametrize("chunk", [None, 4])
def test_z_loss_and_its_gradients(chunk):
    hidden, weight, targets = _inputs(13, 7, 37)
    (total, count), (z, z_count) = linear_cross_entropy(
        hidden, weight, targets, z_loss=True, chunk=chunk
    )
    log_probs, lse = _oracle(hidden, weight, targets)
    assert count == z_count == (targets != -100).sum()
    torch.testing.assert_close(total, -log_probs.sum())
    torch.testing.assert_close(z, lse.square().sum())
    _assert_gradients(
        total * 0.7 + z * 1e-3, -log_probs.sum() * 0.7 + lse.square().sum() * 1e-3, (hidden, weight)
    )
    _assert_gradients(
        linear_cross_entropy(hidden, weight, targets, z_loss=True)[1][0],
        _oracle(hidden, weight, targets)[1].square().sum(),
        (hidden, weight),
    )


@pytest.mark.parametrize("expanded", [False, True])
def test_log_probs_take_any_upstream_gradient(expanded):
    hidden, weight, targets = _inputs(13, 7, 37)
    upstream = torch.randn(1 if expanded else 13, dtype=torch.float64).expand(13)
    log_probs = linear_log_probs(hidden, weight, targets, chunk=4)
    expected = _oracle(hidden, weight, targets)[0]
    torch.testing.assert_close(log_probs, expected)
    assert torch.all(log_probs[targets == -100] == 0)
    actual = torch.autograd.grad(log_probs, (hidden, weight), upstream)
    torch.testing.assert_close(
        actual, torch.autograd.grad(expected, (hidden, weight), upstream), rtol=1e-12, atol=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 20),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 70),
    chunk=st.none() | st.integers(1, 7),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    z_loss=st.booleans(),
)
def test_any_shape(tokens, width, vocabulary, chunk, ignored, z_loss):
    hidden, weight, targets = _inputs(tokens, width, vocabulary, ignored=ignored)
    log_probs, lse = linear_cross_entropy_reference(hidden, weight, targets)
    expected = -log_probs.sum() + z_loss * lse.square().sum()
    result = linear_cross_entropy(hidden, weight, targets, z_loss=z_loss, chunk=chunk)
    total = result[0][0] + result[1][0] if z_loss else result[0]
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    _assert_gradients(total, expected, (hidden, weight), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("z_loss", [False, True])
def test_nothing_trains(z_loss):
    hidden, weight, _ = _inputs(5, 3, 11)
    targets = torch.full((5,), -100)
    pairs = linear_cross_entropy(hidden, weight, targets, z_loss=z_loss)
    for total, count in pairs if z_loss else [pairs]:
        assert total == 0
        assert count == 0
        for gradient in torch.autograd.grad(total * 3, (hidden, weight), retain_graph=True):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_within_twice_that_of_plain_pytorch(dtype):
    hidden, weight, targets = _inputs(300, 64, 501, dtype=dtype, ignored=0.1)
    plain = F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum") / 300
    ours = linear_cross_entropy(hidden, weight, targets, chunk=64)[0] / 300
    exact = -_oracle(hidden, weight, targets)[0].sum() / 300
    assert ours.dtype == torch.float32
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = torch.autograd.grad(-_oracle(*exact_inputs, targets)[0].sum() / 300, exact_inputs)
    assert abs(ours - exact) <= 2 * abs(plain - exact) + 1e-5 * abs(exact)
    for a, b, e in zip(
        torch.autograd.grad(ours, (hidden, weight)),
        torch.autograd.grad(plain, (hidden, weight)),
        truth,
        strict=True,
    ):
        assert a.dtype == dtype
        assert (a - e).abs().max() <= 2 * (b - e).abs().max() + 1e-9
        assert (a - e).abs().mean() <= 1.5 * (b - e).abs().mean() + 1e-9


def test_small_weight_gradients_survive_many_bfloat16_chunks():
    """Every chunk adds 2^-9 of what is there: accumulated in bfloat16, nothing would arrive."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.int64)
    total, _ = linear_cross_entropy(hidden, weight, targets, chunk=1)
    total.backward()
    assert weight.grad.flatten().tolist() == [-256, 256]


def test_a_fine_upstream_scalar_is_not_rounded_to_the_input_dtype():
    hidden, weight, targets = _inputs(6, 4, 9, dtype=torch.bfloat16, ignored=0)
    total, _ = linear_cross_entropy(hidden, weight, targets)
    (unit,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(total, hidden, torch.tensor(1.00390625))  # 1 + 2^-8
    assert torch.equal(scaled, (unit.float() * 1.00390625).bfloat16())
    assert not torch.equal(scaled, unit)  # what an upstream of 1, rounded, would give


def test_backward_twice_gives_the_same_gradients():
    hidden, weight, targets = _inputs(9, 5, 21)
    for output in (
        linear_cross_entropy(hidden, weight, targets)[0],
        linear_log_probs(hidden, weight, targets).sum(),
    ):
        first = torch.autograd.grad(output, (hidden, weight), retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(output, (hidden, weight))))


@pytest.mark.parametrize("needs", ["hidden", "weight"])
@pytest.mark.parametrize("z_loss", [False, True])
def test_one_of_the_inputs_may_be_frozen(needs, z_loss):
    hidden, weight, targets = _inputs(9, 5, 21)
    exact = -_oracle(hidden, weight, targets)[0].sum()
    chosen = hidden if needs == "hidden" else weight
    (expected,) = torch.autograd.grad(exact, chosen)
    (weight if needs == "hidden" else hidden).requires_grad_(False)
    result = linear_cross_entropy(hidden, weight, targets, z_loss=z_loss)
    (actual,) = torch.autograd.grad((result[0] if z_loss else result)[0], chosen)
    torch.testing.assert_close(actual, expected)


def test_evaluation_computes_no_gradient(monkeypatch):
    hidden, weight, targets = _inputs(9, 5, 21)
    expected = linear_cross_entropy(hidden, weight, targets)[0]
    monkeypatch.setattr("warploom.kernels.loss.linear.nll_and_gradient_", None)  # must not be met
    with torch.no_grad():
        total, _ = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(total, expected)
    assert not total.requires_grad


@pytest.mark.parametrize("value", [1e4, -1e4, 3e38])
@pytest.mark.parametrize("z_loss", [False, True])
def test_huge_logits(value, z_loss):
    hidden = torch.tensor([[1.0, 0.0], [0.5, 1.0]], requires_grad=True)
    weight = torch.tensor([[value, 0.0], [0.0, 1.0], [0.0, -1.0]], requires_grad=True)
    result = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), z_loss=z_loss)
    total = (result[0] if z_loss else result)[0]
    expected = -_oracle(hidden, weight, torch.tensor([0, 1]))[0].sum()
    torch.testing.assert_close(total, expected.float())
    _assert_gradients(total, expected, (hidden, weight))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("z_loss", [False, True])
def test_a_poisoned_position_stays_in_its_row(poison, z_loss):
    hidden, weight, targets = _inputs(6, 4, 9, ignored=0)
    with torch.no_grad():
        hidden[2, 0] = poison
    log_probs = linear_log_probs(hidden, weight, targets)
    assert log_probs.isnan().tolist() == [False, False, True, False, False, False]
    result = linear_cross_entropy(hidden, weight, targets, z_loss=z_loss)
    (gradient,) = torch.autograd.grad((result[0] if z_loss else result)[0], hidden)
    assert gradient.isnan().any(-1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("z_loss", [False, True])
def test_a_poisoned_position_that_is_ignored_does_nothing(z_loss):
    hidden, weight, targets = _inputs(6, 4, 9, ignored=0)
    with torch.no_grad():
        hidden[2] = float("nan")
    targets[2] = -100
    result = linear_cross_entropy(hidden, weight, targets, z_loss=z_loss)
    total = (result[0] if z_loss else result)[0]
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert all(x.isfinite().all() for x in (total, *gradients))
    assert torch.equal(gradients[0][2], torch.zeros(4, dtype=torch.float64))


def test_strided_inputs():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 26, dtype=torch.float64, generator=g)[:, 1::2].t().requires_grad_()
    weight = torch.randn(5, 31, dtype=torch.float64, generator=g).t().requires_grad_()
    targets = torch.randint(31, (26,), generator=g)[::2]
    total, _ = linear_cross_entropy(hidden, weight, targets, chunk=4)
    _assert_gradients(total, -_oracle(hidden, weight, targets)[0].sum(), (hidden, weight))


@pytest.mark.parametrize("bad", [-1, 9, -101, 1 << 40])
@pytest.mark.parametrize("op", [linear_cross_entropy, linear_log_probs])
def test_a_target_out_of_range_is_refused(op, bad):
    hidden, weight, targets = _inputs(6, 4, 9)
    targets[3] = bad
    with pytest.raises(
        ValueError, match=rf"in \[0, 9\) or the ignore_index, got {bad} at position 3"
    ):
        op(hidden, weight, targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(9, 5, dtype=torch.float64)}, "one width"),
        ({"weight": torch.zeros(0, 4, dtype=torch.float64)}, "a row at least"),
        ({"weight": torch.zeros(9, 4)}, "one floating dtype"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"targets \[T\]"),
        ({"targets": torch.zeros(6)}, "int32 or int64"),
        ({"chunk": 0}, "at least 1 token, got 0"),
    ],
)
def test_bad_arguments_are_refused_in_words(change, message):
    hidden, weight, targets = _inputs(6, 4, 9)
    args = {"hidden": hidden, "weight": weight, "targets": targets, "chunk": None} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(args["hidden"], args["weight"], args["targets"], chunk=args["chunk"])


def test_never_all_logits(monkeypatch):
    """The largest tensor that is made is a chunk of logits, not [T, V]."""
    hidden, weight, targets = _inputs(64, 2, 50, dtype=torch.float32, ignored=0)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(
                x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x)
            )
            return out

    with Watch():
        total = linear_cross_entropy(hidden, weight, targets, chunk=8)[0]
        (_, _), (z, _) = linear_cross_entropy(hidden, weight, targets, chunk=8, z_loss=True)
        (total + z).backward()
    assert max(made) <= 8 * 50


def test_chunks_are_bounded_in_bytes():
    hidden = torch.empty(0, 4)
    assert (
        chunk_tokens(hidden, 49152) * 49152 * 4
        <= 64 << 20
        < (chunk_tokens(hidden, 49152) + 1) * 49152 * 4
    )
    assert chunk_tokens(hidden, 1 << 40) == 1


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_slices_of_the_vocabulary_merge_into_the_whole(parts, ignored):
    hidden, weight, targets = _inputs(11, 5, 53, ignored=ignored)
    logits = (hidden @ weight.t()).detach()
    bounds = [0, *sorted(torch.randperm(52)[: parts - 1].add(1).tolist()), 53]
    slices = [logits[:, a:b].clone() for a, b in zip(bounds, bounds[1:], strict=False)]
    partials = [cross_entropy_partials(x, targets, a) for a, x in zip(bounds, slices, strict=False)]
    high = torch.stack([p[0] for p in partials]).amax(0)
    total = sum(p[1] * (p[0] - high).exp() for p in partials)
    lse, target = high + total.log(), sum(p[2] for p in partials)
    trained = targets != -100
    exact, exact_lse = _oracle(hidden, weight, targets)
    torch.testing.assert_close((target - lse)[trained], exact[trained], rtol=1e-12, atol=1e-12)

    g_nll, g_lse = torch.randn(2, 11, dtype=torch.float64) * trained
    for a, x in zip(bounds, slices, strict=False):
        assert cross_entropy_gradient_(x, targets, a, lse, g_nll, g_lse) is x
    wanted = logits.clone().requires_grad_()
    log_probs = F.log_softmax(wanted, -1).gather(-1, targets.clamp(0)[:, None])[:, 0]
    ((-log_probs * g_nll).sum() + (wanted.logsumexp(-1) * g_lse).sum()).backward()
    torch.testing.assert_close(torch.cat(slices, 1), wanted.grad, rtol=1e-12, atol=1e-12)


def test_gradient_takes_numbers_and_scalars():
    logits = torch.randn(4, 7, dtype=torch.float64)
    targets, lse = torch.tensor([0, 6, 3, 3]), logits.logsumexp(-1)
    wanted = logits.softmax(-1) * 0.75 - F.one_hot(targets, 7) * 0.5
    for g_nll, g_lse in [(0.5, 0.25), (torch.tensor(0.5), torch.tensor(0.25))]:
        actual = cross_entropy_gradient_(logits.clone(), targets, 0, lse, g_nll, g_lse)
        torch.testing.assert_close(actual, wanted)


def test_a_slice_without_columns_or_of_minus_infinity_adds_nothing():
    targets = torch.tensor([3, 8])
    for logits in (torch.empty(2, 0), torch.full((2, 4), -torch.inf)):
        high, total, target = cross_entropy_partials(logits, targets, 10)
        assert high.tolist() == [-torch.inf] * 2
        assert total.tolist() == target.tolist() == [0, 0]
    empty = torch.empty(2, 0)
    assert cross_entropy_gradient_(empty, targets, 10, torch.zeros(2)).shape == (2, 0)


def test_gradient_refuses_what_it_cannot_overwrite():
    with pytest.raises(ValueError, match=r"contiguous, got strides \(1, 3\)"):
        cross_entropy_gradient_(
            torch.zeros(5, 3).t(), torch.zeros(3, dtype=torch.int64), 0, torch.zeros(3)
        )


@pytest.mark.parametrize("z_loss", [False, True])
def test_gradcheck(z_loss):
    hidden, weight, targets = _inputs(5, 3, 7)

    def run(hidden, weight):
        result = linear_cross_entropy(hidden, weight, targets, z_loss=z_loss, chunk=2)
        return (result[0][0], result[1][0]) if z_loss else result[0]

    assert torch.autograd.gradcheck(run, (hidden, weight), nondet_tol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    hidden, weight, targets = _inputs(7, 4, 9, dtype=dtype)
    logits, lse = torch.randn(7, 9, dtype=dtype), torch.randn(7)
    for op, args in [
        (OPS.linear_cross_entropy_forward, (hidden, weight, targets, -100, 3, False, False, None)),
        (OPS.linear_log_probs_forward, (hidden, weight, targets, -100, 3, None)),
        (
            OPS.linear_log_probs_backward,
            (lse, lse, hidden.detach(), weight.detach(), targets, lse, -100, 3, True, True, None),
        ),
        (OPS.cross_entropy_partials, (logits, targets, 0, None)),
        (OPS.cross_entropy_gradient_, (logits, targets, 0, lse, lse, lse, None)),
    ]:
        torch.library.opcheck(op.default, args)


def test_fullgraph():
    hidden, weight, targets = _inputs(7, 4, 9)

    def run(hidden, weight):
        (total, count), (z, _) = linear_cross_entropy(hidden, weight, targets, z_loss=True)
        return (total + z + linear_cross_entropy(hidden, weight, targets)[0]) / count

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight), run(hidden, weight))
    _assert_gradients(compiled(hidden, weight), run(hidden, weight), (hidden, weight))
