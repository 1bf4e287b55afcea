"""AdamW and the clip over many tensors: against torch, and the edges where others broke.

On the reference, and on the Triton kernels in the interpreter (in a process of its own) or on a
GPU.
"""

import pytest
import torch
from tests.kernels.specimen import Draw, item
from tests.kernels.test_must import DEVICES, INTERPRETED, compiled_only

from warploom.kernels.optim import (
    adamw_,
    adamw_reference,
    clip_coefficient,
    global_norm,
    join_remainder,
    plan,
    split_remainder,
    table,
)

every = pytest.mark.parametrize(("device", "backend"), DEVICES)
on_adamw = {"ops": ("adamw",)}
on_norm = {"ops": ("global_norm",)}
KINDS = ("in place", "masters", "remainders")
SHAPES = ((5,), (1,), (0, 3), (33, 70), (1100, 16), (2, 3, 4))
RATES = {"learning_rate": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class State:
    """Parameters of one kind, their moments, and what `adamw_` is called with."""

    def __init__(self, kind, device, backend, *, dtype=torch.float32, shapes=SHAPES, place=None):
        self.kind, self.device, self.backend = kind, device, backend
        place = place or (lambda t: t)
        drawn = [Draw(dtype, device)(*shape, seed=n) for n, shape in enumerate(shapes)]
        self.masters = [place(w) for w in drawn]
        self.parameters, self.extra = self.masters, None
        if kind == "masters":
            self.extra = self.masters
            self.parameters = [place(w.bfloat16()) for w in drawn]
        if kind == "remainders":
            halves = [split_remainder(w) for w in drawn]
            self.parameters = [place(high) for high, _ in halves]
            self.extra = [place(low) for _, low in halves]
        self.means, self.squares = ([place(torch.zeros_like(w)) for w in drawn] for _ in "mv")
        self.step = torch.zeros((), device=device)

    @property
    def tensors(self):
        return [*self.parameters, *self.means, *self.squares, *(self.extra or []), self.step]

    @property
    def values(self):
        if self.kind == "remainders":
            return [join_remainder(p, e) for p, e in zip(self.parameters, self.extra, strict=True)]
        return self.masters

    def gradients(self, step, dtype=torch.float32):
        draw = Draw(dtype, self.device)
        return [draw(*w.shape, seed=97 * step + n) for n, w in enumerate(self.parameters)]

    def call(self, gradients, **options):
        named = {} if self.extra is None else {self.kind: self.extra}
        adamw_(
            self.parameters,
            gradients,
            self.means,
            self.squares,
            **{"step": self.step, "backend": self.backend} | RATES | named | options,
        )


def same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def copies(tensors):
    return [t.clone() for t in tensors]


def _oracle(values, **options):
    known = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "foreach": False}
    return torch.optim.AdamW(values, **known | options)


def _units(got, want):
    """Return the largest difference, in units in the last place of the largest value."""
    return max(
        float((a.double() - b.double()).abs().max() / (b.double().abs().max() * 2**-23))
        for a, b in zip(got, want, strict=True)
        if a.numel()
    )


@item("values", "zero and odd sizes", **on_adamw)
@every
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw_equals_torch(device, backend, kind, dtype):
    """Fifty steps; as near to float64 as torch's own float32."""
    state = State(kind, device, backend)
    exact, plain = ([w.to(t, copy=True) for w in state.values] for t in ("cpu", "cpu"))
    exact = [w.double() for w in exact]
    oracles = [_oracle(exact), _oracle(plain)]
    for step in range(3 if INTERPRETED else 50):
        gradients = state.gradients(step, dtype)
        for oracle, values in zip(oracles, (exact, plain), strict=True):
            for w, g in zip(values, gradients, strict=True):
                w.grad = g.to("cpu", w.dtype)
            oracle.step()
        state.call(gradients)
    got = [w.cpu() for w in state.values]
    assert _units(got, exact) <= 1.5 * _units(plain, exact) + 1
    assert float(state.step) == step + 1
    if kind == "remainders":
        assert all(
            torch.equal(p, split_remainder(w)[0])
            for p, w in zip(state.parameters, state.values, strict=True)
        )
    if kind == "masters":  # the interpreter truncates
        for p, w in zip(state.parameters, state.masters, strict=True):
            error = (p.float() - w).abs()
            assert (error <= w.abs() * (2**-7 if INTERPRETED else 2**-8)).all()


@item("values", **on_adamw)
@compiled_only
def test_adamw_in_float64_is_the_formula():
    state = State("in place", "cpu", "reference", dtype=torch.float64)
    want = [
        (w.clone(), m.clone(), m.clone()) for w, m in zip(state.values, state.means, strict=True)
    ]
    for step in range(5):
        gradients = state.gradients(step, torch.float64)
        want = [
            adamw_reference(*(w, g, m, v), step=step + 1, **RATES)
            for (w, m, v), g in zip(want, gradients, strict=True)
        ]
        state.call(gradients)
    for n, column in enumerate((state.values, state.means, state.squares)):
        for got, line in zip(column, want, strict=True):
            torch.testing.assert_close(got, line[n], atol=1e-14, rtol=1e-13)


@item("values", **on_adamw)
@every
@pytest.mark.parametrize("beta", [0.999, 0.9999])
def test_the_first_steps_keep_their_digits(device, backend, beta):
    """1 - 0.999^1 in float32 has five digits; the first update is the rate to seven."""
    w, g, m, v = (torch.full((1000,), x, device=device) for x in (0.0, 1e-3, 0.0, 0.0))
    step = torch.zeros((), device=device)
    rates = RATES | {"betas": (0.9, beta), "eps": 0.0, "weight_decay": 0.0}
    adamw_([w], [g], [m], [v], step=step, backend=backend, **rates)
    torch.testing.assert_close(w, torch.full_like(w, -1e-2), rtol=5e-7, atol=0)


@item("layout", **on_adamw)
@every
@pytest.mark.parametrize("kind", KINDS)
def test_adamw_of_tensors_that_are_not_aligned(device, backend, kind):
    def shift(t):
        return t.new_empty(t.numel() + 1)[1:].copy_(t.flatten()).view(t.shape)

    plain, shifted = (State(kind, device, backend, place=place) for place in (None, shift))
    gradients = plain.gradients(0)
    plain.call(gradients)
    strided = [g.new_empty(*g.shape, 2)[..., 1].copy_(g) for g in gradients]
    shifted.call(strided)
    if backend == "triton":
        same_bits(plain.values, shifted.values)
    torch.testing.assert_close(plain.values, shifted.values, rtol=1e-6, atol=1e-7)


@item("NaN and inf", "optimizer edge cases", **on_adamw)
@every
@pytest.mark.parametrize("flag", [1.0, float("nan"), 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_gradient_skips_the_whole_step(device, backend, kind, flag):
    state = State(kind, device, backend)
    state.call(state.gradients(0))
    if kind == "masters":
        state.parameters[0].fill_(7.0)  # what is not the rounded master stays too
    before = copies(state.tensors)
    bad = [torch.full_like(g, float("inf")) for g in state.gradients(1)]
    state.call(bad, found_inf=torch.tensor(flag, device=device))
    same_bits(state.tensors, before)
    state.call(state.gradients(1), found_inf=torch.zeros((), device=device))
    assert float(state.step) == 2
    assert not torch.equal(state.means[0], before[len(state.parameters)])


@item("optimizer edge cases", **on_adamw)
@every
def test_scale_and_rate_come_from_the_device(device, backend):
    """The same bits as a gradient that was multiplied before, and as a rate that is a number."""
    one, other = (State("masters", device, backend) for _ in "ab")
    scale, rate = (torch.tensor(x, device=device) for x in (0.37, 1e-2))
    for step in range(3):
        gradients = one.gradients(step)
        one.call([g * scale for g in gradients])
        other.call(gradients, scale=scale.double(), learning_rate=rate)
        same_bits(gradients, one.gradients(step))
    same_bits(one.tensors, other.tensors)


@item("optimizer edge cases", **on_adamw)
def test_remainders_hold_every_bit():
    """Each of the 2^16 upper halves, with lower halves around the middle and at random."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32).repeat_interleave(12)
    low = torch.tensor([0, 1, 2, 32766, 32767, 32768, 32769, 65534, 65535], dtype=torch.int32)
    drawn = torch.randint(0, 2**16, (2**16, 3), generator=torch.Generator().manual_seed(0))
    lower = torch.cat([low.expand(2**16, 9), drawn.int()], 1).flatten()
    master = ((upper << 16) | lower).view(torch.float32)
    parameter, remainder = split_remainder(master)
    back = join_remainder(parameter, remainder)
    number = ~master.isnan()
    assert torch.equal(back.view(torch.int32)[number], master.view(torch.int32)[number])
    assert back[~number].isnan().all()
    assert parameter[~number].isnan().all()
    nearest = master.bfloat16()
    tie = lower == 32768
    assert torch.equal(parameter[number & ~tie], nearest[number & ~tie])
    assert (parameter[number & tie].abs().float() >= master[number & tie].abs()).all()


@item("optimizer edge cases", **on_adamw)
@every
def test_a_step_of_rate_0_leaves_every_bit_of_a_remainder(device, backend):
    upper = torch.arange(-(2**15), 2**15, 8 if INTERPRETED else 1, dtype=torch.int32)
    lower = torch.randint(0, 2**16, upper.shape, generator=torch.Generator().manual_seed(0))
    master = ((upper << 16) | lower.int()).view(torch.float32)
    master = master[master.isfinite()]
    high, low = (t.to(device) for t in split_remainder(master))
    m, v, g = (torch.zeros(len(master), device=device) for _ in range(3))
    before = copies([high, low])
    step = torch.zeros((), device=device)
    rates = RATES | {"learning_rate": 0.0}
    adamw_([high], [g], [m], [v], remainders=[low], step=step, backend=backend, **rates)
    same_bits([high, low], before)
    assert not m.any()
    g.view(torch.int32)[3] = 0x7FFFFFFF  # the NaN of GPUs, whose rounded half would be -0
    adamw_([high], [g], [m], [v], remainders=[low], step=step, backend=backend, **rates)
    assert high.isnan().nonzero().tolist() == [[3]], "a NaN must be seen by the model too"


@item("zero and odd sizes", **on_adamw)
@every
def test_adamw_of_nothing_still_counts(device, backend):
    step = torch.zeros((), device=device)
    adamw_([], [], [], [], step=step, backend=backend, **RATES)
    empty = [[torch.empty(0, device=device)] for _ in range(4)]
    adamw_(*empty, step=step, backend=backend, **RATES)
    assert float(step) == 2


@item("determinism", **on_adamw)
@every
def test_adamw_repeats_give_the_same_bits(device, backend):
    def run():
        state = State("masters", device, backend)
        for step in range(2):
            state.call(state.gradients(step))
        return state.tensors

    first = run()
    for _ in range(100 if device == "cuda" else 2):
        same_bits(run(), first)


@item("more than 2^31 elements", "optimizer edge cases", **on_adamw)
def test_the_table_of_a_tensor_of_more_than_2_to_the_31_elements():
    """DeepSpeed #7640: its fused Adam silently left such a tensor as it was."""
    size = 2**31 + 5
    small, huge = (torch.empty(n, device="meta") for n in (3, size))
    rows, owners = table._build([[small, huge, small]] * 4)
    chunks = -(-size // table.CHUNK)
    assert rows[:, 4].tolist() == [3, size, 3]
    assert rows[:, 5].tolist() == [0, 1, 1 + chunks]
    assert owners.bincount().tolist() == [1, chunks, 1]
    assert rows.dtype == owners.dtype == torch.int64
    x = torch.empty(9)
    rows, _ = table._build([[x, x[1:], x[4:]], [x, x, x]])
    assert rows[:, -1].tolist() == [1, 0, 1]  # 16-byte accesses where every address allows them


@item("more than 2^31 elements", "optimizer edge cases", ops=("adamw", "global_norm"))
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_more_than_2_to_the_31_elements(backend):
    size = 2**31 + 4099
    like = {"device": "cuda", "dtype": torch.bfloat16}
    p, low = torch.zeros(size, **like), torch.zeros(size, device="cuda", dtype=torch.int16)
    g = torch.full((size,), 2.0**-10, **like)
    m, v = (torch.zeros(size, device="cuda") for _ in range(2))
    norm = global_norm([g], backend=backend)
    assert float(norm) == pytest.approx(size**0.5 * 2.0**-10, rel=1e-4)
    step = torch.zeros((), device="cuda")
    rates = RATES | {"eps": 0.0}
    adamw_([p], [g], [m], [v], remainders=[low], step=step, backend=backend, **rates)
    for part in (p[:100], p[2**31 - 50 : 2**31 + 50], p[-100:]):
        torch.testing.assert_close(
            part.float(), torch.full_like(part.float(), -1e-2), rtol=4e-3, atol=0
        )
    assert int((p == 0).sum()) == 0


@item("streams and graphs", "optimizer edge cases", ops=("adamw", "global_norm"))
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_captured_step_goes_on(backend):
    """Replays count on: step, rate, coefficient and flag are read when the graph runs."""
    eager, graphed = (State("masters", "cuda", backend) for _ in "ab")
    gradients, rate = eager.gradients(0), torch.tensor(1e-2, device="cuda")

    def train(state, norms=None, step=None):
        norm = global_norm(gradients, backend=backend, plan=norms)
        scale, found = clip_coefficient(norm, 1.0)
        state.call(gradients, scale=scale, found_inf=found, learning_rate=rate, plan=step)

    columns = (graphed.parameters, gradients, graphed.means, graphed.squares, graphed.masters)
    plans = (plan(gradients), plan(*columns)) if backend == "triton" else (None, None)
    train(eager)
    train(graphed, *plans)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(graphed, *plans)
    for step in range(1, 4):
        for g, new in zip(gradients, eager.gradients(step), strict=True):
            g.copy_(new * (float("inf") if step == 2 else 1.0))
        rate.fill_(1e-2 / step)
        train(eager)
        graph.replay()
    torch.cuda.synchronize()
    same_bits(eager.tensors, graphed.tensors)
    assert float(eager.step) == 3


@item("bad input", **on_adamw)
@every
def test_adamw_refuses_in_a_sentence(device, backend):
    state = State("masters", device, backend, shapes=((4, 3), (5,)))
    before, fine = copies(state.tensors), state.gradients(0)

    def refused(words, gradients=fine, **options):
        with pytest.raises(ValueError, match=words):
            state.call(gradients, **options)
        same_bits(state.tensors, before)

    refused(r"there are 2 parameters and 1 gradients", fine[:1])
    refused(
        r"gradients\[1\] has shape \[6\], parameters\[1\] \[5\]", [fine[0], fine[0].new_ones(6)]
    )
    refused(r"one device, got .* \(step\) and meta", [fine[0].to("meta"), fine[1]])
    refused(r"one dtype a list, but gradients\[1\] is torch.float16", [fine[0], fine[1].half()])
    refused(r"gradients must be float16.*gradients torch.int32", [g.int() for g in fine])
    refused(r"gradients must be float16.*got .*float64", [g.double() for g in fine])
    refused(r"masters or remainders, not both; got 2 and 2", remainders=state.masters)
    refused(r"masters are float32.*masters torch.bfloat16", masters=copies(state.parameters))
    refused(r"16 bits need masters or remainders", masters=None)
    refused(r"what is written must be contiguous, masters\[0\] .* strides \[1, 4\]",
            masters=[torch.zeros(3, 4, device=device).t(), state.masters[1]])  # fmt: skip
    refused(r"no two tensors may share memory, but gradients\[\d\] and means", state.means)
    refused(r"step must be float32, got torch.float64", step=state.step.double())
    refused(r"scale must be 0-dim, floating and on .*, got \[1\]", scale=state.step.view(1))
    refused(r"found_inf must be 0-dim.*torch.bool", found_inf=state.step == 0)
    refused(r"beta2 must be at least 0 and below 1.0, got 1.0", betas=(0.9, 1.0))
    refused(r"learning_rate must be at least 0 and below inf, got nan", learning_rate=float("nan"))
    state.means[0] = state.means[0].double()
    with pytest.raises(ValueError, match=r"one dtype a list, but means\[1\]"):
        state.call(fine)
    if backend == "reference":
        with pytest.raises(RuntimeError, match="needs a CUDA device" if device == "cpu" else "x"):
            State("masters", device, "triton").call(State("masters", device, None).gradients(0))


@item("bad input", **on_adamw)
@every
def test_a_plan_of_other_tensors_is_refused(device, backend):
    if backend != "triton":
        pytest.skip("the reference needs no plan")
    state = State("remainders", device, backend)
    gradients = state.gradients(0)
    columns = (state.parameters, gradients, state.means, state.squares, state.extra)
    made, other = plan(*columns), State("remainders", device, backend)
    state.call(gradients, plan=made)
    other.call(gradients)
    same_bits(state.tensors, other.tensors)
    with pytest.raises(ValueError, match="plan is of other tensors than the 6 given"):
        state.call(copies(gradients), plan=made)
    with pytest.raises(ValueError, match=r"one length, at least 1; got \[6, 5\]"):
        plan(gradients, gradients[1:])


@item("opcheck", **on_adamw)
@compiled_only
def test_adamw_and_scale_are_registered_properly():
    state = State("masters", "cpu", "reference", shapes=((4, 3), (5,)))
    lists = (state.parameters, state.gradients(0), state.means, state.squares, state.extra)
    rates = (1e-2, 0.9, 0.95, 1e-8, 0.1)
    args = (*map(list, lists), state.step, None, None, None, *rates, None, "reference")
    torch.library.opcheck(torch.ops.warploom.adamw_.default, args)
    torch.library.opcheck(
        torch.ops.warploom.scale_.default, (state.gradients(1), torch.tensor(2.0), None, None)
    )


@item("torch.compile", **on_adamw)
@compiled_only
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_is_the_same(kind):
    torch._dynamo.reset()

    def train(state, gradients):
        scale, found = clip_coefficient(global_norm(gradients), 1.0)
        state.call(gradients, scale=scale, found_inf=found)

    compiled = torch.compile(train, fullgraph=True, dynamic=True, backend="aot_eager")
    for shapes in (((4, 3), (5,)), ((7, 2), (6,))):
        one, other = (State(kind, "cpu", "reference", shapes=shapes) for _ in "ab")
        gradients = one.gradients(0)
        train(one, gradients)
        compiled(other, gradients)
        same_bits(one.tensors, other.tensors)


@item("no_grad, autocast", **on_adamw)
@every
def test_parameters_that_require_gradients(device, backend):
    """They are stepped outside of autograd, and what saved them before is told of it."""
    state = State("in place", device, backend)
    state.parameters = [torch.nn.Parameter(w) for w in state.parameters]
    held = (state.parameters[3] ** 2).sum()
    state.call(state.gradients(0))
    assert all(p.grad_fn is None for p in state.parameters)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()
