"""Routing and permutation: ties, NaN, experts without tokens, padding, what transformers does.

Tests over `backends` run on the reference here, on Triton in the interpreter and on a GPU.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.specimen import item
from tests.kernels.test_must import DEVICES

from warploom.kernels.moe import (
    permute,
    permute_fp8,
    permute_reference,
    route,
    route_reference,
    unpermute,
    unpermute_reference,
)

backends = pytest.mark.parametrize(
    ("device", "backend"),
    [d for d in DEVICES if getattr(d, "values", d)[1] in ("reference", "triton")],
)
WAYS = [
    {},
    {"score": "sigmoid", "groups": 4, "top_groups": 2, "scale": 2.5, "biased": True},
    {"score": "softmax", "normalise": False, "scale": 0.7},
    {"score": "softmax", "groups": 2, "top_groups": 1, "biased": True},
    {"groups": 4, "top_groups": 2, "group_score": "max", "normalise": False, "scale": 16.0},
    {"score": "sigmoid", "normalise": False},
    {"score": "softmax_after", "scale": 3.0, "biased": True},
]


def _randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _way(way):
    way = dict(way)
    bias = _randn(8, seed=9) if way.pop("biased", False) else None
    return {**way, "bias": bias}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("replayed", [False, True])
def test_gradients_equal_the_reference(way, replayed):
    way, logits = _way(way), _randn(7, 8).requires_grad_()
    if replayed:
        way["chosen"] = torch.tensor([[1, 4], [0, 1], [7, -1], [-1, -1], [2, 3], [5, 6], [6, 0]])
    results = []
    for fn in (route, route_reference):
        weights, indices, probabilities = fn(logits, 2, **way)
        loss = (weights * _randn(7, 2, seed=1)).sum() + (probabilities * _randn(7, 8, seed=2)).sum()
        results.append([weights, indices, probabilities, *torch.autograd.grad(loss, logits)])
        for at in (0, 2):  # one of the two gradients alone
            part = fn(logits, 2, **way)[at]
            upstream = _randn(*part.shape, seed=3)
            results[-1] += torch.autograd.grad(part, logits, upstream)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(results[0][2].sum(1), torch.ones(7).double())


@pytest.mark.parametrize("way", WAYS)
def test_gradcheck(way):
    way, logits = _way(way), _randn(3, 8, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: route(z, 2, **way)[::2], (logits,))


def test_equal_values_go_to_the_lowest_index():
    for score in ("softmax", "sigmoid", "softmax_after"):
        _, indices, _ = route(torch.zeros(2, 40), 3, score=score)
        assert indices.tolist() == [[0, 1, 2]] * 2
    _, indices, _ = route(torch.zeros(1, 8), 2, groups=4, top_groups=1)
    assert indices.tolist() == [[0, 1]]
    pairs = torch.tensor([[2.0, 2, 3, 0, 3, -9, 0, 0]])  # the best two, and the best single
    for group_score, pair in (("top2", [0, 1]), ("max", [2, 3])):
        way = {"score": "sigmoid", "groups": 4, "top_groups": 1, "group_score": group_score}
        assert route(pairs, 2, **way)[1].tolist() == [pair]
    _, indices, _ = route(torch.tensor([[0.0, 3, 1, 3, 2, 3]]), 4)
    assert indices.tolist() == [[1, 3, 5, 4]]


def test_the_bias_chooses_and_does_not_weigh():
    logits, bias = torch.tensor([[2.0, 1, 0, -1]]), torch.tensor([0.0, 0, 0, 9])
    weights, indices, _ = route(logits, 2, score="sigmoid", bias=bias)
    assert indices.tolist() == [[3, 0]]
    s = torch.sigmoid(torch.tensor([-1.0, 2.0]))
    torch.testing.assert_close(weights[0], s / s.sum())


@pytest.mark.parametrize("way", WAYS)
def test_a_nan_poisons_its_own_token_only(way):
    way, logits = _way(way), _randn(3, 8)
    logits[1, 5] = float("nan")
    logits.requires_grad_()
    weights, indices, probabilities = route(logits, 2, **way)
    assert ((indices >= 0) & (indices < 8)).all()
    assert weights.isnan().any(1).tolist() == [False, True, False]
    (grad,) = torch.autograd.grad((weights * _randn(3, 2)).sum() + probabilities[0, 0], logits)
    assert grad.isnan().any(1).tolist() == [False, True, False]


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[0.0, -2000, -3000, -4000], [2000, 0, 0, 0]], requires_grad=True)
    for score in ("softmax", "sigmoid", "softmax_after"):
        chosen = torch.tensor([[2, 3], [1, 0]])
        weights, _, probabilities = route(logits, 2, score=score, chosen=chosen)
        assert weights.isfinite().all()
        (grad,) = torch.autograd.grad(weights.sum() + probabilities.sum(), logits)
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_computes_in_float32(dtype):
    logits = torch.randn(9, 8).to(dtype)
    weights, indices, _ = route(logits, 2)
    wanted, same, _ = route(logits.float(), 2)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, wanted)
    assert torch.equal(indices, same)


def _sorted(weights, indices):
    order = indices.argsort(1)
    return weights.gather(1, order), indices.gather(1, order)


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "qwen3_moe_raw", "deepseek_v2", "deepseek_v3"]
)
def test_transformers_agrees(name):
    torch.manual_seed(0)
    if name == "mixtral":
        from transformers.models.mixtral import modeling_mixtral as m

        config = m.MixtralConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=2)
        router, ways = m.MixtralTopKRouter(config), [{"score": "softmax_after"}, {}]
    elif name == "deepseek_v2":
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as m

        grouped = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
        config = m.DeepseekV2Config(
            hidden_size=32, n_routed_experts=16, num_experts_per_tok=3, **grouped
        )
        router = m.DeepseekV2TopkRouter(config)
        ways = [{"groups": 4, "top_groups": 2, "group_score": "max", "normalise": False}]
    elif name == "deepseek_v3":
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as m

        config = m.DeepseekV3Config(
            hidden_size=16, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2
        )
        router = m.DeepseekV3TopkRouter(config)
        router.e_score_correction_bias.normal_()
        ways = [{"score": "sigmoid", "groups": 4, "top_groups": 2, "scale": 2.5}]
        ways[0]["bias"] = router.e_score_correction_bias
    else:
        from transformers.models.qwen3_moe import modeling_qwen3_moe as m

        plain = name == "qwen3_moe"
        config = m.Qwen3MoeConfig(
            hidden_size=16, num_experts=8, num_experts_per_tok=3, norm_topk_prob=plain
        )
        router, ways = m.Qwen3MoeTopKRouter(config), [{"normalise": plain}]
    torch.nn.init.normal_(router.weight)
    logits, weights, indices = router(torch.randn(33, config.hidden_size))
    for way in ways:
        got = _sorted(*route(logits, indices.shape[1], **way)[:2])
        want = _sorted(weights, indices)
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)


@st.composite
def _tokens(draw):
    tokens, experts = draw(st.integers(0, 12)), draw(st.integers(1, 6))
    top_k = draw(st.integers(1, experts))
    lines = [draw(st.permutations(range(experts))) for _ in range(tokens)]
    kept = [[draw(st.booleans()) for _ in range(top_k)] for _ in range(tokens)]
    indices = [
        [e if keep else -1 for e, keep in zip(line, held, strict=False)]
        for line, held in zip(lines, kept, strict=True)
    ]
    return torch.tensor(indices, dtype=torch.int64).view(tokens, top_k), experts


@settings(max_examples=60, deadline=None)
@given(_tokens(), st.integers(1, 5))
def test_permutation_equals_plain_loops(drawn, width):
    indices, experts = drawn
    tokens, top_k = indices.shape
    x = _randn(tokens, width).requires_grad_()
    weights = _randn(tokens, top_k, seed=1).requires_grad_()
    rows, counts, order = permute(x, indices, experts)
    slots = [
        (t, j) for e in range(experts) for t in range(tokens) for j in range(top_k)
        if indices[t, j] == e
    ]  # fmt: skip
    assert rows.shape == (tokens * top_k, width)
    assert counts.tolist() == [int((indices == e).sum()) for e in range(experts)]
    assert order.tolist() == [t * top_k + j for t, j in slots] + [-1] * (len(order) - len(slots))
    assert torch.equal(rows[: len(slots)], x[[t for t, _ in slots]])
    assert not rows[len(slots) :].any()
    scale = torch.arange(1.0, len(rows) + 1).double().unsqueeze(1)
    poisoned = torch.where(
        torch.arange(len(rows)).unsqueeze(1) < len(slots), rows * scale, torch.nan
    )
    results = [unpermute(poisoned, order, weights)]
    results.append(unpermute((rows * scale)[: len(slots)], order[: len(slots)], weights))
    want = torch.zeros(tokens, width, dtype=torch.float64)
    for m, (t, j) in enumerate(slots):
        want[t] += weights[t, j] * x[t] * (m + 1)
    dy = _randn(tokens, width, seed=2)
    if want.requires_grad:
        wanted = torch.autograd.grad(want, (x, weights), dy, retain_graph=True)
    else:
        wanted = torch.zeros_like(x), torch.zeros_like(weights)
    for got in results:
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
        gradients = torch.autograd.grad(got, (x, weights), dy, retain_graph=True)
        torch.testing.assert_close(gradients, wanted, atol=1e-12, rtol=0)


def test_permutation_gradcheck():
    indices = torch.tensor([[1, 0], [2, -1], [1, 3], [-1, -1]])
    x, weights = _randn(4, 3).requires_grad_(), _randn(4, 2).requires_grad_()
    order = permute(x, indices, 4)[2]
    assert torch.autograd.gradcheck(lambda x: permute(x, indices, 4)[0], (x,))
    rows = _randn(8, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, w: unpermute(r, order, w), (rows, weights))


def test_the_references_are_differentiable():
    indices = torch.tensor([[1, 0], [2, -1], [1, 3]])
    x, weights = _randn(3, 4).requires_grad_(), _randn(3, 2).requires_grad_()
    results = []
    for forth, back in ((permute, unpermute), (permute_reference, unpermute_reference)):
        rows, _, order = forth(x, indices, 4)
        y = back(rows.tanh(), order, weights)
        results.append((y, *torch.autograd.grad(y, (x, weights), _randn(3, 4, seed=3))))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: route(torch.ones(2, 4), 5), r"top_k \(5\) must be from 1 to .* experts \(4\)"),
        (lambda: route(torch.ones(2, 4), 2, score="relu"), "score must be one of .*, got 'relu'"),
        (lambda: route(torch.ones(2, 4), 2, groups=3), r"groups \(3\) must divide the experts"),
        (
            lambda: route(torch.ones(2, 4), 2, group_score="min"),
            "group_score must be one of top2, m",
        ),
        (lambda: route(torch.ones(2, 4), 2, groups=2, top_groups=3), r"top_groups \(3\) must be"),
        (lambda: route(torch.ones(2, 4), 2, groups=4, top_groups=1), r"at most the experts of 1 g"),
        (
            lambda: route(torch.ones(2, 4), 2, score="softmax_after", normalise=False),
            "normalise must stay True",
        ),
        (lambda: route(torch.ones(2, 4), 2, bias=torch.ones(3)), r"bias has shape \[3\]"),
        (lambda: route(torch.ones(2, 4), 2, chosen=torch.ones(2, 1)), r"chosen must be \[2, 2\]"),
        (lambda: route(torch.ones(4), 2), r"logits must be \[tokens, experts\], got \[4\]"),
        (
            lambda: permute(torch.ones(2, 4), torch.full((2, 1), 3), 3),
            "indices must be below 3, got 3",
        ),
        (lambda: permute(torch.ones(2, 4), torch.ones(3, 1), 3), r"indices \[T, k\], got \[2, 4\]"),
        (
            lambda: unpermute(torch.ones(2, 4), torch.ones(3), torch.ones(2, 1)),
            r"order \[M\] and weights \[T, k\], got \[2, 4\]",
        ),
    ],
)
def test_errors_say_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@item("empty experts", ops=("permute", "unpermute"))
@backends
@pytest.mark.parametrize("empty", ["first", "middle", "last", "all", "all but one", "one expert"])
@pytest.mark.parametrize("tokens", [0, 90])
def test_experts_without_tokens(device, backend, empty, tokens):
    """Rows, counts, order and both gradients are those of the specification; the tail is zero."""
    experts = 1 if empty == "one expert" else 6
    drawn = torch.randint(0, experts, (tokens, 3), generator=torch.Generator().manual_seed(1))
    hit = {"first": [0, 1], "middle": [2, 3], "last": [5], "all": [*range(6)]}.get(empty, [])
    for expert in hit:
        drawn = drawn.masked_fill(drawn == expert, -1)
    if empty == "all but one":
        drawn = torch.full_like(drawn, 4)
    indices = drawn.to(device)
    x = torch.randn(tokens, 20, device=device).requires_grad_()
    weights = torch.rand(tokens, 3, device=device).requires_grad_()
    dy = torch.randn(tokens, 20, device=device)
    results = []
    for served in (backend, None):
        if served:
            rows, counts, order = permute(x, indices, experts, backend=served)
            back = unpermute(rows.tanh(), order, weights, backend=served)
        else:
            rows, counts, order = permute_reference(x, indices, experts)
            back = unpermute_reference(rows.tanh(), order, weights)
        grads = torch.autograd.grad(back, (x, weights), dy)
        results.append((rows.detach(), counts, order, back.detach(), *grads))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    rows, counts, order = results[0][:3]
    held = int((indices >= 0).sum())
    assert int(counts.sum()) == held
    assert not rows[held:].any()
    assert (order[held:] == -1).all()
    assert (order[:held] >= 0).all()


@item("empty experts", ops=("permute", "unpermute"))
@backends
def test_rows_that_serve_no_token_are_not_read_and_have_no_gradient(device, backend):
    indices = torch.tensor([[1, -1], [-1, -1], [0, 1], [-1, 0]], device=device)
    order = permute(torch.zeros(4, 1, device=device), indices, 2, backend=backend)[2]
    for kept in (8, 4, 2, 0):
        rows = torch.randn(8, 70, device=device)
        rows[4:] = float("nan")
        rows, weights = rows[:kept].requires_grad_(), torch.rand(4, 2, device=device)
        weights[indices < 0] = float("nan")
        weights.requires_grad_()
        y = unpermute(rows, order[:kept], weights, backend=backend)
        want = torch.zeros(4, 70, device=device)
        for m, slot in enumerate(order[: min(kept, 4)].tolist()):
            want[slot // 2] += weights.flatten()[slot].detach() * rows[m].detach()
        torch.testing.assert_close(y.detach(), want)
        drows, dweights = torch.autograd.grad(y, (rows, weights), torch.randn_like(y))
        assert drows.isfinite().all()
        assert not drows[4:].any()
        assert dweights.isfinite().all()
        assert not dweights[indices < 0].any()


@item("NaN and inf", ops=("permute", "unpermute"))
@backends
def test_a_poisoned_token_poisons_its_rows_alone(device, backend):
    indices = torch.tensor([[1, 0], [2, 1], [0, 2], [2, 0]], device=device)
    x = torch.randn(4, 300, device=device)
    x[1, 7] = float("nan")
    for scaling in (None, "row", "block"):
        if scaling is None:
            rows, _, order = permute(x, indices, 3, backend=backend)
        else:
            q, _, order = permute_fp8(x, indices, 3, scaling=scaling, backend=backend)
            rows = q.dequantize()
        poisoned = (order // 2 == 1).tolist()
        assert rows.isnan().any(1).tolist() == poisoned
        assert rows[:, 128:].isnan().any(1).tolist() == [p and scaling == "row" for p in poisoned]
        y = unpermute(rows, order, torch.rand(4, 2, device=device), backend=backend)
        assert y.isnan().any(1).tolist() == [False, True, False, False]


@item("NaN and inf", "empty experts", ops=("route",))
@backends
@pytest.mark.parametrize("way", WAYS)
def test_nan_logits_give_valid_experts_and_poison_their_token_alone(device, backend, way):
    way = {k: v.to(device).float() if hasattr(v, "to") else v for k, v in _way(way).items()}
    logits = _randn(6, 8).float().to(device)
    logits[1, 5] = float("nan")
    logits[2] = -float("nan")
    logits[3, 2] = float("inf")
    logits[4] = -float("inf")
    logits.requires_grad_()
    weights, indices, probabilities = route(logits, 3, backend=backend, **way)
    assert torch.equal(indices, route_reference(logits, 3, **way)[1])
    assert ((indices >= 0) & (indices < 8)).all()
    assert all(len({*line}) == 3 for line in indices.tolist())
    assert weights[[1, 2]].isnan().any(1).all()
    assert weights[[0, 5]].isfinite().all()
    (grad,) = torch.autograd.grad(weights.nansum() + probabilities[0, 0], logits)
    assert grad[[0, 5]].isfinite().all()


@item("empty experts", ops=("route",))
@backends
@pytest.mark.parametrize("way", WAYS)
def test_ties_go_to_the_lowest_index(device, backend, way):
    """Values of few kinds, negative zero among them: the choice of a stable sort, to the last."""
    way = {k: v for k, v in _way(way).items() if k != "bias"}
    bias = torch.tensor([0.5, 0.5, 0, 0, -0.0, 0.5, 0, 0.5], device=device)
    kinds = torch.tensor([0.0, -0.0, 1.0, -2.0, 40.0], device=device)
    drawn = torch.randint(0, 5, (64, 8), generator=torch.Generator().manual_seed(2))
    for b in (None, bias):
        got = route(kinds[drawn.to(device)], 4, backend=backend, bias=b, **way)[1]
        assert torch.equal(got, route_reference(kinds[drawn.to(device)], 4, bias=b, **way)[1])
    if way.get("top_groups", 1) == way.get("groups", 1) and way.get("score") != "sigmoid":
        plain = kinds[drawn.to(device)].sort(dim=1, descending=True, stable=True).indices
        assert torch.equal(
            route(kinds[drawn.to(device)], 4, backend=backend, **way)[1], plain[:, :4]
        )


@item("values", ops=("route",))
@backends
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 3), (16, 16), (65, 17), (512, 8)])
def test_many_experts_and_many_of_them(device, backend, experts, top_k):
    logits = _randn(5, experts).float().to(device).requires_grad_()
    results = []
    for fn in (lambda z: route(z, top_k, backend=backend), lambda z: route_reference(z, top_k)):
        weights, indices, probabilities = fn(logits)
        loss = weights.cumsum(1).square().sum() + probabilities.square().sum()
        results.append((weights, indices, probabilities, *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(results[0], results[1])


def test_low_precision_sums_in_float32():
    x = torch.randn(6, 32).bfloat16().requires_grad_()
    indices, weights = torch.arange(4).expand(6, 4).contiguous(), torch.rand(6, 4)
    rows, _, order = permute(x, indices, 4)
    y = unpermute(rows, order, weights)
    want = (x.float().unsqueeze(1) * weights.unsqueeze(2)).sum(1)
    torch.testing.assert_close(y, want.bfloat16(), rtol=2**-8, atol=0)
    drows = torch.randn(24, 32).bfloat16()
    (dx,) = torch.autograd.grad(rows, x, drows)
    want = drows.float().view(4, 6, 32).sum(0)
    torch.testing.assert_close(dx.float(), want, rtol=2**-8, atol=1e-6)  # half a unit
