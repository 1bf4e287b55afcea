"""The must-test list, held on every operator, on every backend that this machine can run.

Without a GPU these are the reference and, where TRITON_INTERPRET=1 (see `test_interpreted.py`), the
Triton kernels in the interpreter. `docs/kernels.md` is made of this file: each test that carries
`@item` proves that item for every specimen it is run on; `table.py` says how.
"""

import pytest
import torch
from tests.kernels.specimen import (
    Draw,
    Specimen,
    calls,
    check,
    compute,
    differentiable,
    item,
    specimens,
    tuple_of,
    upstream,
)
from torch.autograd import forward_ad

from warploom.kernels import backends

INTERPRETED = backends.interpreted()
DEVICES = (
    [("cpu", "triton")]
    if INTERPRETED
    else [
        ("cpu", "reference"),
        *(pytest.param("cuda", b, marks=pytest.mark.gpu) for b in ("reference", "triton", "cuda")),
    ]
)
LIBRARY = (
    [] if INTERPRETED else [("cpu", "torch"), pytest.param("cuda", "torch", marks=pytest.mark.gpu)]
)


AVAILABLE = backends.available()  # asked for once: it looks for the packages of peers


def _served(s: Specimen, backend: str) -> bool:
    listed = ("reference", *s.backends)
    return backend in listed and backend in AVAILABLE[s.op]


def on(wanted=lambda s, device, backend: True):
    """Run a test on every specimen, device and backend of which `wanted` is true.

    Where it is false the test does not exist, so that `docs/kernels.md` cannot count it.
    """
    cases = []
    for s in specimens():
        for d in (*DEVICES, *LIBRARY):
            device, backend = getattr(d, "values", d)
            if _served(s, backend) and wanted(s, device, backend):
                name = f"{s}-{device}-{backend}"
                cases.append(
                    pytest.param(s, device, backend, marks=getattr(d, "marks", ()), id=name)
                )
    return pytest.mark.parametrize(("s", "device", "backend"), cases)


every = on()
by_rows = on(lambda s, device, backend: s.rows)
one_schema = on(lambda s, device, backend: (device, backend) != ("cpu", "torch"))  # as reference's


class OnDevice(Draw):
    """Random numbers that are drawn where they are used: quick, and not the same everywhere."""

    def __call__(self, *shape, seed=0, scale=1.0):
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(*shape, dtype=self.dtype, device=self.device, generator=generator)
        return drawn.mul_(scale)


compiled_only = pytest.mark.skipif(INTERPRETED, reason="the reference has shown it: one schema")


def _case(s, device, dtype=torch.float32, *, rows=5, width=24):
    return s.draw(Draw(dtype, device), rows, width)


def _same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def _with(fn, inputs, extra):
    return compute(lambda *leaves: fn(*leaves, *extra), inputs)


def _equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@item("values", "zero and odd sizes")
@every
def test_values_and_gradients_against_float64(s, device, backend):
    """Zero and odd sizes too; fresh memory is NaN."""
    for rows, width in s.shapes:
        for dtype in s.dtypes:
            narrow = dtype in (torch.bfloat16, torch.float64)
            if backend == "triton" and (dtype == torch.float64 or INTERPRETED and narrow):
                continue  # the interpreter truncates where it stores bfloat16
            check(s, rows, width, dtype, backend, device)


def _strided(x):
    """The same values in memory that is not contiguous, and begins at an odd place."""
    for dim in range(x.dim()):
        wider = x.new_full(
            (*x.shape[:dim], 2 * x.shape[dim] + 1, *x.shape[dim + 1 :]), float("nan")
        )
        view = (
            wider.narrow(dim, 1, 2 * x.shape[dim])
            .unflatten(dim, (x.shape[dim], 2))
            .select(dim + 1, 0)
        )
        yield view.copy_(x)
    if x.dim() > 1:
        yield x.transpose(0, -1).contiguous().transpose(0, -1)
    flat = x.new_empty(x.numel() + 1)[1:]
    yield flat.copy_(x.reshape(-1)).view(x.shape)


@item("layout")
@every
def test_any_layout(s, device, backend):
    inputs, fixed = _case(s, device)
    want = compute(s.run, inputs, backend=backend, **fixed)
    for i, x in enumerate(inputs):
        for view in _strided(x):
            _same(
                compute(s.run, (*inputs[:i], view, *inputs[i + 1 :]), backend=backend, **fixed),
                want,
            )
    for name, x in fixed.items():
        if isinstance(x, torch.Tensor) and x.dim():
            for view in _strided(x.double() if not x.is_floating_point() else x):
                view = view.to(x.dtype) if view.dtype != x.dtype else view
                _same(compute(s.run, inputs, backend=backend, **{**fixed, name: view}), want)


@item("upstream gradients")
@on(lambda s, device, backend: s.gradient)
def test_upstream_gradients_of_any_kind(s, device, backend):
    """Expanded (as of a sum), zero, strided, and a graph that is used twice."""
    inputs, fixed = _case(s, device)
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = differentiable(tuple_of(s.run(*leaves, backend=backend, **fixed)))
    grads = lambda g: torch.autograd.grad(outputs, leaves, g, retain_graph=True)  # noqa: E731
    ones = grads([torch.ones_like(o) for o in outputs])
    _same(grads([o.new_ones(()).expand(o.shape) for o in outputs]), ones)
    for g in grads([torch.zeros_like(o) for o in outputs]):
        assert not g.count_nonzero()
    drawn = upstream(outputs)
    first = grads(drawn)
    _same(
        grads(
            [g.transpose(0, -1).contiguous().transpose(0, -1) if g.dim() > 1 else g for g in drawn]
        ),
        first,
    )
    _equal(grads(drawn), first)
    for i in range(len(outputs)):  # one output alone is used
        alone = torch.autograd.grad(
            outputs[i],
            leaves,
            drawn[i],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        rest = [g if j == i else torch.zeros_like(g) for j, g in enumerate(drawn)]
        _same(alone, grads(rest))


@item("NaN and inf")
@by_rows
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_poisons_its_row_alone(s, device, backend, poison):
    inputs, fixed = _case(s, device, rows=9)
    clean = compute(s.run, inputs, backend=backend, **fixed)
    x = inputs[0].clone()
    x[4] = poison
    got = compute(s.run, (x, *inputs[1:]), backend=backend, **fixed)
    outputs = len(tuple_of(s.run(*inputs, backend=backend, **fixed)))
    others = [i for i in range(9) if i != 4]
    for i in (*s.rows, *([outputs] if len(got) > outputs else ())):  # and the input's own gradient
        assert torch.equal(got[i][others], clean[i][others])
    if poison != poison:
        assert got[s.rows[0]][4].isnan().all()


@item("batch invariance")
@by_rows
def test_a_row_does_not_depend_on_its_company(s, device, backend):
    inputs, fixed = _case(s, device, rows=40, width=70)
    whole = tuple_of(s.run(*inputs, backend=backend, **fixed))
    cut = {n: x[7:12] if _has_rows(x, 40) else x for n, x in fixed.items()}
    few = [x[7:12] if _has_rows(x, 40) else x for x in inputs]
    part = tuple_of(s.run(*few, backend=backend, **cut))
    for i in s.rows:
        assert torch.equal(part[i], whole[i][7:12])


def _has_rows(x, rows):
    return isinstance(x, torch.Tensor) and x.dim() > 0 and x.shape[0] == rows


@item("more than 2^31 elements")
@pytest.mark.gpu
@on(lambda s, device, backend: s.rows and s.huge and device == "cuda")
def test_more_than_2_to_the_31_elements(s, device, backend):
    """The last rows of a huge call are those of a small one."""
    rows = 2**31 // 1024 + 3
    inputs, fixed = s.draw(OnDevice(torch.bfloat16, device), rows, 1024)
    few = [x[-3:].clone() if _has_rows(x, rows) else x for x in inputs]
    cut = {n: x[-3:] if _has_rows(x, rows) else x for n, x in fixed.items()}
    want = tuple_of(s.run(*few, backend=backend, **cut))
    got = tuple_of(s.run(*inputs, backend=backend, **fixed))
    for i in s.rows:
        assert torch.equal(got[i][-3:], want[i])


@item("determinism")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after the other")
@every
def test_repeats_give_the_same_bits(s, device, backend):
    repeats = 100 if device == "cuda" else 3
    inputs, fixed = _case(s, device, rows=40, width=70)
    first = compute(s.run, inputs, backend=backend, **fixed)
    for _ in range(repeats):
        _equal(compute(s.run, inputs, backend=backend, **fixed), first)


@item("no_grad, autocast")
@every
def test_without_gradients_and_under_autocast(s, device, backend):
    inputs, fixed = _case(s, device)
    leaves = [x.detach().requires_grad_() for x in inputs]
    with_grad = tuple_of(s.run(*leaves, backend=backend, **fixed))
    with torch.no_grad():
        without = tuple_of(s.run(*leaves, backend=backend, **fixed))
    assert not differentiable(without)
    _equal([o.detach() for o in with_grad], without)
    products = ("linear_", "fp8_linear", "nf4_linear", "grouped_gemm", "moe_block", "flash_")
    if s.op.startswith(products):  # cast as `linear` would be, but for router weights and sinks
        cast = [x.bfloat16() for x in inputs]
        cast[3:] = inputs[3:] if s.op.startswith(("moe_block", "flash_")) else cast[3:]
        without = tuple_of(s.run(*cast, backend=backend, **fixed))
    with torch.autocast(device, torch.bfloat16):
        _same(tuple_of(s.run(*inputs, backend=backend, **fixed)), without)


@item("second derivative")
@on(lambda s, device, backend: s.gradient and s.second)
def test_a_second_derivative_is_refused(s, device, backend):
    inputs, fixed = _case(s, device)
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = differentiable(tuple_of(s.run(*leaves, backend=backend, **fixed)))
    with pytest.raises(RuntimeError, match=s.second):
        torch.autograd.grad(outputs, leaves, upstream(outputs), create_graph=True)


@item("second derivative")
@compiled_only
@on(lambda s, device, backend: s.gradient)
def test_forward_mode_is_refused(s, device, backend):
    """A tangent would be lost silently."""
    inputs, fixed = _case(s, device)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs]
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            s.run(*duals, backend=backend, **fixed)


@item("opcheck")
@compiled_only
@one_schema
def test_operators_are_registered_properly(s, device, backend):
    inputs, fixed = _case(s, device)
    found = []
    for lay in (lambda x: x, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)):
        with calls() as called:
            compute(
                s.run, tuple(lay(x) if x.dim() > 1 else x for x in inputs), backend=backend, **fixed
            )
        assert called, "no operator of warploom was called"
        found += called
    for op, args in found:
        torch.library.opcheck(op, args)


@item("torch.compile")
@compiled_only
@one_schema
def test_compiles_without_a_break_and_for_any_size(s, device, backend):
    torch._dynamo.reset()
    fixed_names = _case(s, device)[1]

    def call(*inputs):
        n = len(inputs) - len(tensors)
        fixed = {**rest, **dict(zip(tensors, inputs[n:], strict=True))}
        return s.run(*inputs[:n], backend=backend, **fixed)

    tensors = [k for k, v in fixed_names.items() if isinstance(v, torch.Tensor)]
    rest = {k: v for k, v in fixed_names.items() if k not in tensors}
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, width in ((5, 24), (7, 30)):
        inputs, fixed = _case(s, device, rows=rows, width=width)
        rest.update({k: fixed[k] for k in rest})
        got, want = (_with(fn, inputs, [fixed[k] for k in tensors]) for fn in (compiled, call))
        _same(got, want)


@item("streams and graphs")
@pytest.mark.gpu
@on(lambda s, device, backend: device == "cuda" and not (s.waits and backend == "reference"))
def test_a_side_stream_and_a_captured_graph(s, device, backend):
    """Replayed with other inputs, a graph gives other results; a second device is not needed."""
    inputs, fixed = _case(s, device, rows=64, width=128)
    other = [x.flip(0).contiguous() for x in inputs]
    call = lambda: compute(s.run, inputs, backend=backend, **fixed)  # noqa: E731
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            on_side = call()
    torch.cuda.synchronize()
    _equal(on_side, call())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for x, y in zip(inputs, other, strict=True):
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    _equal(captured, call())


@item("streams and graphs")
@pytest.mark.gpu
@on(lambda s, device, backend: device == "cuda")
def test_tensors_on_a_device_that_is_not_current(s, device, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    check(s, 33, 129, torch.float32, backend, "cuda:1")


@item("bad input")
@on(lambda s, device, backend: not s.name.endswith("in_place"))  # has one tensor an operator
def test_devices_and_dtypes_that_cannot_be(s, device, backend):
    """Each tensor on another device, and integers for numbers: a sentence that names both."""
    inputs, fixed = _case(s, device)
    for i in range(1, len(inputs)):
        moved = (*inputs[:i], inputs[i].to("meta"), *inputs[i + 1 :])
        with pytest.raises(ValueError, match=r"all tensors must be on one device, got .* and meta"):
            s.run(*moved, backend=backend, **fixed)
    for name, x in fixed.items():
        if isinstance(x, torch.Tensor) and x.dim():
            with pytest.raises(ValueError, match="one device, got .* and meta|got meta"):
                s.run(*inputs, backend=backend, **{**fixed, name: x.to("meta")})
    with pytest.raises((ValueError, TypeError), match=r"int32|integer"):
        s.run(*(x.to(torch.int32) for x in inputs), backend=backend, **fixed)
