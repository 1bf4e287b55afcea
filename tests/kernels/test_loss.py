"""What is special to the losses; `test_must.py` holds the rest against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.specimen import item

from warploom.kernels.loss import (
    cross_entropy,
    cross_entropy_gradient_,
    cross_entropy_partials,
    linear_cross_entropy,
    linear_log_probs,
    linear_top_k_kl,
)
from warploom.kernels.loss.chunks import Gradients, chunk_tokens

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


def _statistics(hidden, weight, targets, softcap):
    """Compute target logit, lse and sum of logits of each position at once; 0 where ignored."""
    z = hidden @ weight.t()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    target = z.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    found = torch.stack((target, z.logsumexp(-1), z.sum(-1)))
    return torch.where(targets == -100, 0, found)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 20),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 70),
    chunk=st.none() | st.integers(1, 7),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    z_loss=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    softcap=st.sampled_from([None, 2.0]),
)
def test_any_shape_and_any_options(
    tokens, width, vocabulary, chunk, ignored, z_loss, smoothing, softcap
):
    hidden, weight, targets = _inputs(tokens, width, vocabulary, ignored=ignored)
    target, lse, total = _statistics(hidden, weight, targets, softcap)
    loss = lse - (1 - smoothing) * target - smoothing / vocabulary * total
    expected = loss.sum() + z_loss * lse.square().sum()
    options = {"z_loss": z_loss, "label_smoothing": smoothing, "softcap": softcap}
    result = linear_cross_entropy(hidden, weight, targets, chunk=chunk, **options)
    total = result[0][0] + result[1][0] if z_loss else result[0]
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    _assert_gradients(total, expected, (hidden, weight), rtol=1e-11, atol=1e-11)


@item("zero and odd sizes", ops=("linear_cross_entropy",))
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


def test_small_weight_gradients_survive_many_bfloat16_chunks():
    """Every chunk adds 2^-9 of what is there: accumulated in bfloat16, nothing would arrive."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.int64)
    total, _ = linear_cross_entropy(hidden, weight, targets, chunk=1)
    total.backward()
    assert weight.grad.flatten().tolist() == [-256, 256]


@item("upstream gradients", ops=("linear_cross_entropy",))
def test_a_fine_upstream_scalar_is_not_rounded_to_the_input_dtype():
    hidden, weight, targets = _inputs(6, 4, 9, dtype=torch.bfloat16, ignored=0)
    total, _ = linear_cross_entropy(hidden, weight, targets)
    (unit,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(total, hidden, torch.tensor(1.00390625))  # 1 + 2^-8
    assert torch.equal(scaled, (unit.float() * 1.00390625).bfloat16())
    assert not torch.equal(scaled, unit)  # what an upstream of 1, rounded, would give


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


@item("NaN and inf", ops=("linear_cross_entropy",))
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


@item("NaN and inf", ops=("linear_cross_entropy",))
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


def test_one_chunk_has_a_weight_gradient_in_the_dtype_of_the_weight():
    """In float32 it would be 2.1 GB at 4096 x 128,256, more than all the rest."""
    hidden, weight = torch.randn(4, 3).bfloat16(), torch.randn(5, 3).bfloat16()
    for chunks, dtype in ((0, torch.bfloat16), (1, torch.bfloat16), (2, torch.float32)):
        gradients = Gradients(hidden, weight, (True, True), chunks)
        assert gradients.dweight.dtype == dtype
        for _ in range(chunks):
            gradients.add_(slice(0, 4), torch.ones(4, 5).bfloat16(), hidden)
        dweight = gradients.result()[1]
        assert dweight.dtype == torch.bfloat16
        torch.testing.assert_close(
            dweight, (chunks * hidden.float().sum(0)).expand(5, 3).bfloat16()
        )


@item("bad input", ops=("linear_cross_entropy", "linear_log_probs"))
@pytest.mark.parametrize("bad", [-1, 9, -101, 1 << 40])
@pytest.mark.parametrize("op", [linear_cross_entropy, linear_log_probs])
def test_a_target_out_of_range_is_refused(op, bad):
    hidden, weight, targets = _inputs(6, 4, 9)
    targets[3] = bad
    with pytest.raises(
        ValueError, match=rf"in \[0, 9\) or the ignore_index, got {bad} at position 3"
    ):
        op(hidden, weight, targets)


@item("bad input", ops=("cross_entropy", "linear_cross_entropy", "linear_log_probs"))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_VD": torch.zeros(9, 5, dtype=torch.float64)}, "one width"),
        ({"weight_VD": torch.zeros(0, 4, dtype=torch.float64)}, "a row at least"),
        ({"weight_VD": torch.zeros(9, 4)}, "one floating dtype"),
        ({"targets_T": torch.zeros(5, dtype=torch.int64)}, r"targets \[T\]"),
        ({"targets_T": torch.zeros(6)}, "int32 or int64"),
        ({"chunk": 0}, "at least 1 token, got 0"),
        ({"softcap": 0.0}, "softcap must be above 0 and finite, or None, got 0.0"),
        ({"softcap": float("nan")}, "softcap must be above 0"),
        ({"label_smoothing": 1.1}, "label_smoothing must be from 0 to 1, got 1.1"),
    ],
)
def test_bad_arguments_are_refused_in_words(change, message):
    hidden, weight, targets = _inputs(6, 4, 9)
    args = {"hidden_TD": hidden, "weight_VD": weight, "targets_T": targets} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**args)


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


def _minus_infinity():
    """Three columns masked out, one row of nothing but -inf, one whose target is masked out."""
    logits = torch.randn(5, 9, dtype=torch.float64)
    logits[:, [0, 4, 8]] = -torch.inf
    logits[3] = -torch.inf
    return logits.requires_grad_(), torch.tensor([1, 2, 4, 3, 7])


@item("NaN and inf", ops=("cross_entropy", "linear_cross_entropy"))
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_masked_columns_are_those_of_pytorch(smoothing):
    logits, targets = _minus_infinity()
    for row in range(5):
        one, target = logits[row : row + 1], targets[row : row + 1]
        got = cross_entropy(one, target, label_smoothing=smoothing)[0]
        want = F.cross_entropy(one, target, reduction="sum", label_smoothing=smoothing)
        torch.testing.assert_close(got, want, equal_nan=True)
        (a,) = torch.autograd.grad(got, logits)
        (b,) = torch.autograd.grad(want, logits)
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("far", [-1e9, -1e4, -100.0, -50.0, 1e4])
def test_a_target_far_below_the_others_leaves_the_z_loss_exact(far):
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    logits[0, 4] = logits[1, 0] = far  # of the token, and of one that is ignored
    logits.requires_grad_()
    exact, targets = logits.detach().double().requires_grad_(), torch.tensor([4, -100, 2])
    (nll, _), (z, _) = cross_entropy(logits, targets, z_loss=True)
    lse = exact.logsumexp(-1)[targets != -100]
    want = F.cross_entropy(exact, targets, reduction="sum")
    torch.testing.assert_close(nll.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z.double(), lse.square().sum(), rtol=1e-5, atol=1e-6)
    (a,) = torch.autograd.grad(nll + 0.1 * z, logits)
    (b,) = torch.autograd.grad(want + 0.1 * lse.square().sum(), exact)
    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_entropy_and_gradient_of_masked_columns():
    """A masked column is as one that is not there, under a soft-cap too."""
    logits, targets = _minus_infinity()
    kept, at = logits[:2, [1, 2, 3, 5, 6, 7]], targets[:2] - 1
    options = {"softcap": 1.5, "moments": True}
    masked, alone = (
        cross_entropy_partials(x.detach(), t, **options)
        for x, t in ((logits[:2], targets[:2]), (kept, at))
    )
    for i in (0, 1, 2, 4):  # the sum of logits alone is -inf
        torch.testing.assert_close(masked[i], alone[i])
    lse = alone[0] + alone[1].log()
    masked, alone = (
        cross_entropy_gradient_(x.detach().clone(), t, 0, lse, softcap=1.5)
        for x, t in ((logits[:2], targets[:2]), (kept, at))
    )
    torch.testing.assert_close(masked[:, [1, 2, 3, 5, 6, 7]], alone)
    assert not masked[:, [0, 4, 8]].any()


def test_softcap_is_that_of_gemma_2():
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        vocab_size=31, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).double()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.randint(31, (1, 6))
    logits = model(ids).logits[0]
    want = F.cross_entropy(logits, ids[0], reduction="sum")
    weight = model.lm_head.weight
    got, _ = linear_cross_entropy(seen[0][0], weight, ids[0], softcap=2.0)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, weight, retain_graph=True), torch.autograd.grad(want, weight)
    )


def test_logits_are_overwritten_by_their_gradient():
    _, _, targets = _inputs(6, 4, 9)
    x = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    options = {"softcap": 2.0, "label_smoothing": 0.1}
    (want,) = torch.autograd.grad(cross_entropy(x, targets, **options)[0], x, torch.tensor(0.3))
    logits = x * 1
    total, count = cross_entropy(logits, targets, inplace=True, **options)
    assert count == (targets != -100).sum()
    torch.testing.assert_close(total, cross_entropy(x, targets, **options)[0])
    torch.testing.assert_close(logits.detach() * 0.3, want)
    (got,) = torch.autograd.grad(total, x, torch.tensor(0.3), retain_graph=True)
    torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match="for a second backward use inplace=False"):
        torch.autograd.grad(total, x)


def test_who_else_needs_overwritten_logits_is_told():
    x = torch.randn(2, 5, requires_grad=True)
    logits = x * 1
    other = logits.square().sum()  # saves the logits
    total, _ = cross_entropy(logits, torch.tensor([1, 2]), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (total + other).backward()


def test_overwriting_is_refused_where_it_cannot_be():
    x, targets = torch.randn(2, 5, requires_grad=True), torch.tensor([1, 2])
    for logits in (x, torch.randn(5, 2, requires_grad=True).mul(1).t()):
        with pytest.raises(ValueError, match="must be contiguous and no leaf, got strides"):
            cross_entropy(logits, targets, inplace=True)
    with pytest.raises(ValueError, match="without z_loss"):
        cross_entropy(x * 1, targets, inplace=True, z_loss=True)
    before = x.detach().clone()
    cross_entropy(before, targets, inplace=True)  # no gradient is asked for: nothing is written
    assert torch.equal(before, x)


@item("NaN and inf", ops=("cross_entropy",))
def test_an_ignored_row_of_given_logits_may_hold_anything():
    logits = torch.randn(3, 5, dtype=torch.float64)
    logits[1] = torch.nan
    logits.requires_grad_()
    targets = torch.tensor([1, -100, 2])
    for smoothing in (0.0, 0.2):
        (a, _), (z, _) = cross_entropy(logits, targets, z_loss=True, label_smoothing=smoothing)
        (gradient,) = torch.autograd.grad(a + z, logits)
        assert torch.isfinite(a + z)
        assert not gradient[1].any()
        assert gradient.isfinite().all()


STUDENT, TEACHER = [[1.0, 2.0, 0.5], [0.0, 0.0, 1.0]], [[2.0, 1.0, 0.0], [0.3, 0.1, 1.0]]


@pytest.mark.parametrize(
    ("k", "options", "want"),
    [
        (3, {}, [0.4322600178, 0.0075728519]),
        (2, {}, [0.4322600178, 0.0075728519]),  # one token is left: the tail is that token
        (1, {}, [0.4246869979, 0.0052118798]),
        (2, {"tail": False}, [0.4621171573, 0.0096193070]),
    ],
)
def test_top_k_divergence_of_a_worked_example(k, options, want):
    student = torch.tensor(STUDENT, dtype=torch.float64)
    teacher = torch.tensor(TEACHER, dtype=torch.float64).log_softmax(-1)
    log_probs, indices = teacher.topk(k, -1)
    weight = torch.eye(3, dtype=torch.float64)
    got = linear_top_k_kl(student, weight, indices, log_probs, **options)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=2e-10)


def test_a_tail_too_small_for_one_minus_the_rest_is_still_right():
    """The student leaves 1e-13: in float32 1 - p is 0, and the divergence would be infinite."""
    logits = torch.tensor([[30.0, 0.0, -1.0, -2.0]])
    weight = torch.eye(4, requires_grad=True)
    indices, log_probs = torch.tensor([[0]]), torch.tensor([[0.5]]).log()
    got = linear_top_k_kl(logits, weight, indices, log_probs)
    log = logits.double().log_softmax(-1)[0]
    want = (0.5 * (2 * torch.tensor(0.5).log().double() - log[0] - log[1:].logsumexp(0)))[None]
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    assert torch.autograd.grad(got, weight)[0].isfinite().all()


def test_outcomes_without_probability_add_nothing():
    weight = torch.eye(4, dtype=torch.float64)
    hidden = torch.tensor([[1.0, -1e4, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 1]])
    log_probs = torch.tensor([[0.5, 0.0]], dtype=torch.float64).log()
    for direction in ("forward", "reverse"):
        kl = linear_top_k_kl(hidden, weight, indices, log_probs, direction=direction)
        assert kl.isfinite().all()
        assert torch.autograd.grad(kl.sum(), hidden)[0].isfinite().all()


@item("bad input", ops=("linear_top_k_kl",))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_indices_TM": torch.zeros(3, dtype=torch.int64)}, r"\[T, M\] with M at least 1"),
        ({"teacher_log_probs_TM": torch.zeros(3, 1)}, r"got \[3, 2\] and \[3, 1\]"),
        ({"teacher_log_probs_TM": torch.zeros(3, 2).long()}, "must be floating, got torch.int64"),
        ({"direction": "both"}, "direction must be forward or reverse, got 'both'"),
        ({"teacher_indices_TM": torch.tensor([[0, 1], [2, 9], [0, 1]])}, r"got \[2, 9\] at pos"),
        ({"teacher_indices_TM": torch.tensor([[0, 1], [2, 2], [0, 1]])}, r"distinct.*\[2, 2\]"),
    ],
)
def test_a_teacher_that_is_none_is_refused_in_words(change, message):
    good = {
        "teacher_indices_TM": torch.tensor([[0, 1]] * 3),
        "teacher_log_probs_TM": torch.zeros(3, 2),
    }
    with pytest.raises(ValueError, match=message):
        linear_top_k_kl(torch.zeros(3, 4), torch.zeros(5, 4), **good | change)


def test_operators_in_place_are_registered_properly():
    logits, targets, g = torch.randn(7, 9), torch.randint(9, (7,)), torch.randn(4, 7)
    for op, args in [
        (OPS.cross_entropy_partials, (logits, targets, 0, 2.0, True, None)),
        (OPS.cross_entropy_gradient_, (logits, targets, 0, g[0], g, 2.0, None)),
        (OPS.cross_entropy_overwrite_, (logits, targets, -100, 2.0, 0.1, None)),
        (OPS.cross_entropy_scale_, (logits, g[0, 0], None)),
    ]:
        torch.library.opcheck(op.default, args)
