"""The block of experts: plain loops over tokens, what transformers does, what is kept.

Tests over `backends` run on the reference here, on Triton in the interpreter and on a GPU.
"""

import pytest
import torch
from tests.kernels.specimen import calls, item
from tests.kernels.test_must import DEVICES, INTERPRETED

from warploom.kernels.moe import moe_block, moe_block_reference

backends = pytest.mark.parametrize(
    ("device", "backend"),
    [d for d in DEVICES if getattr(d, "values", d)[1] in ("reference", "triton")],
)
ROUTES = {  # experts of each token; 5 there are
    "first, middle, last empty": [[1, 3], [3, 1], [1, 3], [3, 3]],
    "one has all": [[2, -1], [2, -1], [2, -1], [2, -1]],
    "nobody": [[-1, -1], [-1, -1], [-1, -1], [-1, -1]],
    "some absent": [[-1, 4], [-1, -1], [0, -1], [3, 0]],
    "no tokens": torch.zeros(0, 2, dtype=torch.int64),
    "no choice": torch.zeros(4, 0, dtype=torch.int64),
}


def _randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _draw(indices, *, width=6, hidden=5, experts=5, scale=0.5):
    """Return x, gate_up, down and weights in float64."""
    shapes = (len(indices), width), (experts, 2 * hidden, width), (experts, width, hidden)
    drawn = [scale * _randn(*s, seed=i) for i, s in enumerate((*shapes, indices.shape))]
    return drawn[0] / scale, *drawn[1:]


def _loops(x, gate_up, down, indices, weights):
    """Serve token after token, expert after expert."""
    y = [0 * row for row in x]
    for t, line in enumerate(indices.tolist()):
        for j, e in enumerate(line):
            if e >= 0:
                gate, up = (gate_up[e] @ x[t]).chunk(2)
                y[t] = y[t] + weights[t, j] * (down[e] @ (gate * gate.sigmoid() * up))
    return torch.stack(y) if y else x.clone()


def _compute(call, tensors, dy):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, materialize_grads=True)]


@item("values", "empty experts", ops=("moe_block",))
@backends
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("recompute", [False, True])
def test_plain_loops(device, backend, route, recompute):
    """Values and all gradients, in memory that is NaN before it is written."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    indices = torch.as_tensor(ROUTES[route], device=device)
    drawn = [t.to(device, dtype) for t in _draw(indices)]
    dy = _randn(len(indices), 6, seed=9).to(device, dtype)
    want = _compute(lambda x, g, d, w: _loops(x, g, d, indices, w), drawn, dy)
    tolerance = {"atol": 1e-12, "rtol": 0} if dtype == torch.float64 else {}
    options = {"recompute": recompute, "backend": backend}
    got = _compute(lambda x, g, d, w: moe_block(x, g, d, indices, w, **options), drawn, dy)
    torch.testing.assert_close(got, want, **tolerance)
    if indices.shape[1]:
        got = _compute(lambda x, g, d, w: moe_block_reference(x, g, d, indices, w), drawn, dy)
        torch.testing.assert_close(got, want, **tolerance)


@item("layout", ops=("moe_block",))
@backends
def test_tensors_whose_elements_lie_apart(device, backend):
    indices = torch.tensor(ROUTES["some absent"], device=device)
    dense = [t.to(device, torch.float32) for t in (*_draw(indices), _randn(4, 6, seed=9))]
    apart = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in dense]
    call = lambda x, g, d, w: moe_block(x, g, d, indices, w, backend=backend)  # noqa: E731
    got, want = (_compute(call, tensors[:4], tensors[4]) for tensors in (apart, dense))
    torch.testing.assert_close(got, want)


@pytest.mark.skipif(not INTERPRETED, reason="runs the Triton kernels")
@pytest.mark.parametrize("block", [4], ids="{}-cpu-triton".format)
def test_rows_wider_than_a_program_holds(monkeypatch, block):
    from warploom.kernels.moe import block_triton

    monkeypatch.setattr(
        block_triton, "configuration", lambda width: {"BLOCK": block, "num_warps": 1}
    )
    indices = torch.tensor(ROUTES["some absent"])
    drawn, dy = [t.float() for t in _draw(indices, hidden=10)], _randn(4, 6, seed=9).float()
    want = _compute(lambda x, g, d, w: _loops(x, g, d, indices, w), drawn, dy)
    got = _compute(lambda x, g, d, w: moe_block(x, g, d, indices, w, backend="triton"), drawn, dy)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute):
    indices = torch.tensor([[1, 0], [2, -1], [1, 3]])
    drawn = [t.requires_grad_() for t in _draw(indices, width=3, hidden=2, experts=4)]
    call = lambda x, g, d, w: moe_block(x, g, d, indices, w, recompute=recompute)  # noqa: E731
    assert torch.autograd.gradcheck(call, drawn)


def _saved(call):
    """Return the bytes of the distinct memory that a call saves for its backward."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        call()
    return {at: t.numel() * t.element_size() for at, t in kept.items() if t.numel()}


@pytest.mark.parametrize("top_k", [1, 4])
def test_what_is_kept_for_the_backward(top_k):
    """x, the routing, and h of each row or nothing; never the rows, the activation, the answers."""
    tokens, width, hidden, experts = 24, 16, 40, 8
    indices = torch.arange(tokens * top_k).view(tokens, top_k) % experts
    drawn = _draw(indices, width=width, hidden=hidden, experts=experts)
    x, gate_up, down = (t.bfloat16().requires_grad_() for t in drawn[:3])
    weights = drawn[3].float().requires_grad_()
    parameters = {gate_up.data_ptr(), down.data_ptr()}
    routing = tokens * top_k * (4 + 8) + experts * 8  # weights, order, counts
    for recompute, more in ((True, 0), (False, tokens * top_k * 2 * hidden * 2)):
        kept = _saved(
            lambda r=recompute: moe_block(x, gate_up, down, indices, weights, recompute=r)
        )
        found = sum(size for at, size in kept.items() if at not in parameters)
        assert found == tokens * width * 2 + routing + more
    with torch.no_grad():
        assert not _saved(lambda: moe_block(x, gate_up, down, indices, weights))


def test_mixtrals_block_agrees():
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=12, intermediate_size=20, num_local_experts=6, num_experts_per_tok=2
    )
    layer = MixtralSparseMoeBlock(config).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = _randn(9, 12).requires_grad_()
    gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
    theirs = layer(x.unsqueeze(0))
    theirs = (theirs[0] if isinstance(theirs, tuple) else theirs).squeeze(0)
    _, weights, indices = layer.gate(x)
    ours = moe_block(x, gate_up, down, indices, weights)
    dy = _randn(9, 12, seed=1)
    leaves = [x, gate_up, down, layer.gate.weight]
    results = [[y, *torch.autograd.grad(y, leaves, dy)] for y in (ours, theirs)]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)  # its softmax is in float32


@pytest.mark.parametrize("recompute", [False, True])
def test_pytorchs_grouped_product_serves_the_products(monkeypatch, recompute):
    indices = torch.tensor(ROUTES["first, middle, last empty"])
    drawn = [t.bfloat16() for t in _draw(indices, width=16, hidden=8)]
    drawn[3] = drawn[3].float()
    dy, asked, real = _randn(4, 16, seed=9).bfloat16(), [], torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda *a, **b: asked.append(a) or real(*a, **b)
    )
    options = {"recompute": recompute}
    got, want = (
        _compute(lambda x, g, d, w: moe_block(x, g, d, indices, w, backend=b, **options), drawn, dy)  # noqa: B023
        for b in ("torch", "reference")
    )
    assert len(asked) == 6 + recompute
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)


@item("NaN and inf", ops=("moe_block",))
@backends
def test_a_poisoned_token_poisons_itself_and_its_experts_gradients_alone(device, backend):
    indices = torch.tensor([[0, 1], [2, 4], [1, -1], [0, 3], [4, 1]], device=device)
    drawn = [t.to(device, torch.float32) for t in _draw(indices)]
    dy = _randn(5, 6, seed=9).to(device, torch.float32)
    call = lambda x, g, d, w: moe_block(x, g, d, indices, w, backend=backend)  # noqa: E731
    clean = _compute(call, drawn, dy)
    drawn[0][1, 3] = float("nan")
    got = _compute(call, drawn, dy)
    others = [0, 2, 3, 4]
    for i in (0, 1, 4):  # y, dx, dweights
        assert got[i][1].isnan().any()
        assert torch.equal(got[i][others], clean[i][others])
    for i in (2, 3):
        assert got[i].flatten(1).isnan().any(1).tolist() == [False, False, True, False, True]
        assert torch.equal(got[i][[0, 1, 3]], clean[i][[0, 1, 3]])


@backends
def test_a_gradient_that_nobody_wants_is_not_computed(device, backend):
    indices = torch.tensor([[0, 1], [2, 4], [1, -1]], device=device)
    drawn = [t.to(device, torch.float32) for t in _draw(indices)]
    everything = _compute(
        lambda x, g, d, w: moe_block(x, g, d, indices, w, backend=backend), drawn, drawn[0]
    )[1:]
    for chosen in (1,) if (device, backend) == ("cpu", "triton") else range(4):
        leaves = [t.clone().requires_grad_(i == chosen) for i, t in enumerate(drawn)]
        y = moe_block(*leaves[:3], indices, leaves[3], recompute=chosen > 1, backend=backend)
        with calls() as called:
            (gradient,) = torch.autograd.grad(y, leaves[chosen], drawn[0])
        assert torch.equal(gradient, everything[chosen])
        _, args = called[0]
        assert args[9] == [i == chosen for i in range(3)]


@pytest.mark.slow
def test_compiles_without_a_break_where_nothing_is_kept():
    indices = torch.tensor([[0, 1], [2, 4], [1, -1]])
    drawn = [t.float() for t in _draw(indices)]
    call = lambda x, g, d, w: moe_block(x, g, d, indices, w, recompute=True)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    got, want = (_compute(f, drawn, drawn[0]) for f in (compiled, call))
    torch.testing.assert_close(got, want)


def _call(x=(3, 4), gate_up=(2, 6, 4), down=(2, 4, 3), indices=(3, 2), weights=(3, 2), **dtypes):
    shapes = {"x": x, "gate_up": gate_up, "down": down, "indices": indices, "weights": weights}
    dtypes = {"indices": torch.int64, **dtypes}
    return moe_block(**{n: torch.ones(s, dtype=dtypes.get(n)) for n, s in shapes.items()})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"indices": (3, 1)},
            r"indices and weights \[T, k\], got \[3, 4\], .*\[3, 1\] and \[3, 2\]",
        ),
        ({"x": (2, 4)}, r"x must be \[T, D\], .*, got \[2, 4\]"),
        ({"x": (3, 5)}, r"gate_up must be \[E, 2F, D\] .* for \[3, 5\]"),
        ({"gate_up": (2, 5, 4)}, r"gate_up must be \[E, 2F, D\] and .*, got \[2, 5, 4\] and"),
        ({"gate_up": (0, 6, 4), "down": (0, 4, 3)}, "E at least 1, got"),
        ({"down": (2, 4)}, r"down \[E, D, F\], .*\[2, 4\]"),
    ],
)
def test_shapes_that_do_not_fit(wrong, message):
    with pytest.raises(ValueError, match=f"moe_block: .*{message}"):
        _call(**wrong)


def test_dtypes_and_experts_that_cannot_be():
    x, gate_up, down, weights = (t.float() for t in _draw(torch.zeros(2, 1)))
    indices = torch.tensor([[4], [5]])
    with pytest.raises(ValueError, match="moe_block: indices must be below 5, got 5"):
        moe_block(x, gate_up, down, indices, weights)
    with pytest.raises(ValueError, match=r"one dtype of .*, got torch.bfloat16, torch.float32 and"):
        moe_block(x.bfloat16(), gate_up, down, indices, weights)
    with pytest.raises(ValueError, match=r"weights float32 or float64, got torch.int64 and .*h.b"):
        moe_block(x, gate_up, down, indices, weights.bfloat16())
    with pytest.raises(ValueError, match=r"indices must be int64 .*, got torch.int32"):
        moe_block(x, gate_up, down, indices.int(), weights)
    with pytest.raises(TypeError, match="moe_block: down must be a tensor, got NoneType"):
        moe_block(x, gate_up, None, indices, weights)
    with pytest.raises(RuntimeError, match="moe_block: backend 'cuda' is not one of reference, to"):
        moe_block(x, gate_up, down, indices - 1, weights, backend="cuda")
    with pytest.raises(RuntimeError, match="backend 'torch' needs bfloat16, .* are torch.float32"):
        moe_block(x, gate_up, down, indices - 1, weights, backend="torch")


def test_autocast_casts_as_linear_does():
    """Experts in float32 behind a norm in float32 or a layer in bfloat16."""
    indices = torch.tensor([[0, 1], [2, -1], [1, 4]])
    x, gate_up, down, weights = (t.float() for t in _draw(indices))
    want = moe_block(*(t.bfloat16() for t in (x, gate_up, down)), indices, weights)
    gate_up.requires_grad_()
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y = moe_block(given, gate_up, down, indices, weights)
        assert torch.equal(y, want)
    y.sum().backward()
    assert gate_up.grad.dtype == torch.float32
