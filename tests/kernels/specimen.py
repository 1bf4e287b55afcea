"""What the common tests need to know of an operator: how to draw inputs, and three ways to compute.

A `Specimen` is one way to call one operator. The files in `specimens/` hold them, one a folder of
`kernels/`; `test_must.py` runs every item of the must-test list on every one.
"""

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((0, 6), (1, 1), (1, 64), (5, 3), (33, 129), (3, 1000), (130, 128))


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """One way to call an operator.

    `draw(rows, width)` returns the tensors that take a gradient and a dictionary of what is fixed
    (tables, targets, numbers). `run(*inputs, backend=, **fixed)` calls the operator;
    `truth(*inputs, **fixed)` is its float64 specification on the same rounded inputs; `plain(...)`
    is the usual form in PyTorch, whose error in a low precision is the yardstick. All three return
    a tensor or a tuple. Where the operator rounds something in the middle, `truth` gets the dtype
    that it rounds to as `rounded`, if it takes that.

    Attributes:
        name: Of this way, unique; begins with the operator's.
        op: Operator, as `backends.available()` lists it.
        draw: `(Draw, rows, width)` to inputs and fixed arguments.
        run: The operator.
        truth: Its specification.
        plain: Plain PyTorch.
        shapes: Rows and widths of the tests of values: empty, one, odd, not a power of two.
        training: Rows and widths of real models, for the compile gate and the benchmarks.
        dtypes: Those that are served.
        rows: Outputs whose dimension 0 is that of every input's: a NaN in a row of the first input
            may poison only that row of these. Empty where rows are meant to mix.
        exact: Outputs that must equal the specification bit for bit (indices, codes).
        backends: Device backends that serve this way; some serve only the plain one.
        huge: Whether it may be called on more than 2^31 elements that nobody touches (see `Ghost`).
        waits: Whether its reference asks the device for a value, so that no graph can hold it.
        gradient: Whether it has one.
        second: What the error of a second derivative says; None where that is right.
    """

    name: str
    op: str
    draw: Callable[..., tuple[tuple[Tensor, ...], dict[str, Any]]]
    run: Callable[..., Any]
    truth: Callable[..., Any]
    plain: Callable[..., Any]
    shapes: tuple[tuple[int, int], ...] = SHAPES
    training: tuple[tuple[int, int], ...] = ((8192, 4096),)
    dtypes: tuple[torch.dtype, ...] = DTYPES
    rows: tuple[int, ...] = (0,)
    exact: tuple[int, ...] = ()
    backends: tuple[str, ...] = ("triton",)
    huge: bool = True
    waits: bool = False
    gradient: bool = True
    second: str | None = field(default="there is no second derivative")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Draw:
    """Random numbers that depend on nothing but their seed: drawn in float64, then rounded."""

    dtype: torch.dtype
    device: str = "cpu"

    @property
    def ghost(self) -> bool:
        """Tell that nobody will read the tensors: tables need not be computed, only have sizes."""
        return False

    def __call__(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, dtype=torch.float64, generator=generator) * scale
        return x.to(self.device, self.dtype)

    def integers(self, high: int, *shape: int, seed: int = 0) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=torch.int64, device="meta")
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, high, shape, generator=generator).to(self.device)


def families() -> dict[str, tuple[Specimen, ...]]:
    """Return the specimens of each folder of `kernels/`."""
    package = importlib.import_module("tests.kernels.specimens")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__))
    return {n: importlib.import_module(f"tests.kernels.specimens.{n}").SPECIMENS for n in names}


def specimens() -> tuple[Specimen, ...]:
    """Return all of them, by the files' and their own order."""
    return tuple(specimen for family in families().values() for specimen in family)


def item(*names: str, ops: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Say which items of the must-test list a test proves, for `docs/kernels.md`.

    Args:
        names: Items, of `tests/kernels/table.py`.
        ops: Operators; without them, the operator of the specimen that the test is run on.
    """

    def mark(test: Any) -> Any:
        test.items, test.ops = names, ops
        return test

    return mark


def tuple_of(found: Any) -> tuple[Tensor, ...]:
    """Return the tensors of an operator's answer, in a flat tuple; None is left out."""
    if isinstance(found, Tensor):
        return (found,)
    parts = [tuple_of(part) for part in found if part is not None]
    return tuple(tensor for part in parts for tensor in part)


def differentiable(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [o for o in outputs if o.requires_grad]


def upstream(outputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Draw a gradient for each output, rounded to its dtype, or to `dtype` first."""
    drawn = []
    for i, o in enumerate(outputs):
        rounded = dtype if dtype is not None and o.dtype == torch.float64 else o.dtype
        g = Draw(rounded, "cpu")(*o.shape, seed=70 + i)
        drawn.append(g.to(o.device, o.dtype))
    return drawn


def compute(fn: Callable[..., Any], inputs: tuple[Tensor, ...], **rest: Any) -> list[Tensor]:
    """Compute outputs, and the gradients of all inputs under a random upstream gradient."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = tuple_of(fn(*leaves, **rest))
    wanted = differentiable(outputs)
    gradients = torch.autograd.grad(wanted, leaves, upstream(wanted)) if wanted else ()
    return [*(o.detach() for o in outputs), *gradients]


def compute_truth(s: Specimen, inputs: tuple[Tensor, ...], fixed: dict[str, Any]) -> list[Tensor]:
    """Compute the same in float64, on the same rounded inputs and upstream gradients."""
    dtype = inputs[0].dtype
    names = s.truth.__code__.co_varnames[: s.truth.__code__.co_argcount + 9]
    rest = {**fixed, **({"rounded": dtype} if "rounded" in names else {})}
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    outputs = tuple_of(s.truth(*leaves, **rest))
    wanted = differentiable(outputs)
    gradients = torch.autograd.grad(wanted, leaves, upstream(wanted, dtype)) if wanted else ()
    return [*(o.detach() for o in outputs), *gradients]


def check(s: Specimen, rows: int, width: int, dtype: torch.dtype, backend: str | None = None,
          device: str = "cpu") -> float:  # fmt: skip
    """Hold an operator to the rules; return its largest error over that of plain PyTorch.

    float64: 1e-10 of the largest value. float32: 1e-5 of it. Below: at most twice the error of
    plain PyTorch in that dtype, and 1.5 times on average; half a unit in the last place of the
    largest value is free, because rounding the exact answer costs as much.
    """
    inputs, fixed = s.draw(Draw(dtype, device), rows, width)
    actual = compute(s.run, inputs, backend=backend, **fixed)
    truth, plain = compute_truth(s, inputs, fixed), compute(s.plain, inputs, **fixed)
    worst = 0.0
    assert len(actual) == len(truth) == len(plain)
    for i, (a, t, p) in enumerate(zip(actual, truth, plain, strict=True)):
        assert a.shape == t.shape, f"{i}: {a.shape} for {t.shape}"
        if not a.numel():
            continue
        if i in s.exact:
            assert torch.equal(a.double(), t.double()), f"{i} is not exact"
            continue
        error, allowed = (a.double() - t.double()).abs(), (p.double() - t.double()).abs()
        top = float(t.abs().max())
        unit = torch.finfo(dtype).eps / 2 * top
        if dtype == torch.float64:
            assert float(error.max()) <= 1e-10 * max(top, 1), f"{i}: {float(error.max())}"
        elif dtype == torch.float32:
            assert float(error.max()) <= 1e-5 * top + 1e-6, f"{i}: {float(error.max())} of {top}"
        else:
            assert float(error.max()) <= 2 * float(allowed.max()) + unit, f"{i}: largest"
            assert float(error.mean()) <= 1.5 * float(allowed.mean()) + unit, f"{i}: mean"
        worst = max(worst, float(error.max()) / (float(allowed.max()) + unit + 1e-12))
    return worst


class Calls(TorchDispatchMode):
    """Record the calls of `warploom::` operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "warploom":
            self.found.append((func, args))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def calls() -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """Yield a list that fills with the operators called inside, and their arguments."""
    with Calls() as mode:
        yield mode.found
