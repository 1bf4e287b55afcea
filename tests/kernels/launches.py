"""Record what an operator launches, and compile exactly that for a GPU that is not here.

An operator runs on memory that nobody touches, with Triton's launch replaced by a note of its
arguments. Triton then specialises and compiles the noted calls as it would before a launch, for a
driver that only says which target it has.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tests.kernels.specimen import Draw, Specimen, differentiable, tuple_of

from warploom.kernels import backends, tuning
from warploom.kernels.quant import Fp8


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments of one call."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What the compiler made: registers and bytes of stack a thread, bytes of shared memory."""

    name: str
    registers: int
    stack: int
    shared: int
    ttir: str
    ptx: str


class Ghost(Draw):
    """Tensors of memory that is reserved and never touched."""

    @property
    def ghost(self) -> bool:
        return True

    def __call__(self, *shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(*shape, dtype=self.dtype)

    def integers(self, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int64)


@contextlib.contextmanager
def _unfilled() -> Iterator[None]:
    """Leave fresh memory as it is: a CPU would write gigabytes of NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before


@contextlib.contextmanager
def recorded(pick: int = 0) -> Iterator[list[Launch]]:
    """Yield a list that fills with the launches inside; nothing runs.

    Args:
        pick: Which of the configurations that may be chosen; the last where there are fewer.
    """
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(Launch(self, args, options))

    def product(a: torch.Tensor, b: torch.Tensor, *, out: Any = None) -> torch.Tensor:
        return out if out is not None else a.new_empty(*a.shape[:-1], b.shape[-1])

    def picked(op: str, key: Any, candidates: list[Any], *_: Any, **__: Any) -> Any:
        return candidates[min(pick, len(candidates) - 1)]

    with (
        _unfilled(),
        mock.patch.object(tuning, "tuned", picked),
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(torch, "mm", product),  # a CPU would take minutes for the bfloat16 ones
        mock.patch.object(torch.Tensor, "__matmul__", product),
        mock.patch.object(torch.Tensor, "addmm_", lambda self, *_: self),
        mock.patch.object(torch, "addmm", lambda c, *_, **__: torch.empty_like(c)),
        mock.patch.object(torch, "baddbmm", lambda c, *_, **__: torch.empty_like(c)),
        mock.patch.object(Fp8, "dequantize", lambda self, dtype=None: self.carrier),
        mock.patch.object(backends, "interpreted", return_value=True),
    ):
        yield found


def launches(s: Specimen, rows: int, width: int, dtype: torch.dtype, pick: int = 0) -> list[Launch]:
    """Return what one forward and backward of a specimen launches; `pick` as in `recorded`."""
    with recorded(pick) as found:
        inputs, fixed = s.draw(Ghost(dtype), rows, width)
        leaves = [x.requires_grad_(x.is_floating_point()) for x in inputs]
        outputs = differentiable(tuple_of(s.run(*leaves, backend="triton", **fixed)))
        if outputs:
            upstream = [torch.empty_like(o) for o in outputs]
            torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    return found


class _Driver:
    """A driver of a GPU of one compute capability, of which there is none."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(launch: Launch, capability: int) -> Report:
    """Compile a launch for an SM of `capability`, through Triton's own cache.

    Args:
        launch: What `recorded` noted.
        capability: 90 or 100.
    """
    from triton.runtime.driver import driver

    driver.set_active(_Driver(capability))
    made = launch.kernel.run(*launch.args, grid=(1, 1, 1), warmup=True, **launch.options)
    usage = _resources(made.asm["cubin"])
    return Report(
        name=f"{launch.kernel.fn.__module__.rpartition('.')[2]}.{launch.kernel.fn.__name__}",
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=made.metadata.shared,
        ttir=made.asm["ttir"],
        ptx=made.asm["ptx"],
    )


def _resources(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wide_accesses(launch: Launch, ptx: str) -> tuple[int, int]:
    """Count 16-byte (or wider) loads and stores of global memory.

    A thread that reads 16 bytes and writes codes of one byte writes 8 of them: 8 bytes are enough.
    """
    wide = r"\.v4\.b32|\.v2\.b64|\.v4\.b64|\.v8\.b32"
    codes = any(x.dtype.itemsize == 1 for x in launch.args if isinstance(x, torch.Tensor))
    least = rf"{wide}|\.v2\.b32|\.b64" if codes else wide
    loads, stores = (
        len(re.findall(rf"{word}\.global[.\w:]*(?:{size})", ptx))
        for word, size in (("ld", wide), ("st", least))
    )
    ahead = len(re.findall(r"cp\.async\.cg\.shared\.global.*, 0x10", ptx))  # 16 bytes each
    return loads + ahead, stores


def products_from_registers(ptx: str) -> int:
    """Count Hopper's matrix products that read their first factor from registers (a hazard)."""
    return len(re.findall(r"wgmma\.mma_async[^;{]*\{[^}]*\},\s*\{", ptx))


_LINE = re.compile(r"^\s*(%[\w#]+)(?::\d+)? = ([\w.]+)(.*)$")


def narrow_products(ttir: str) -> list[str]:
    """Find 32-bit products that reach a pointer and could overflow.

    A factor grows when it depends on a program's place, an argument, a loop or memory. Two growing
    factors (a row and its stride) must be 64 bits wide before they are multiplied. A growing factor
    times a constant is a place along one dimension, which has fewer than 2^31 elements, or its
    size would have come as a 64-bit argument: in a kernel that has one, that is refused as well.
    """
    made, pointers = {}, []
    long = re.search(r"tt\.func public .*%\w+: i64", ttir) is not None
    for line in ttir.splitlines():
        if found := _LINE.match(line):
            name, op, rest = found.groups()
            operands = re.findall(r"%[\w]+", rest.split(" : ")[0])
            made[name.split("#")[0]] = (op, operands, line.strip())
            if op == "tt.addptr":
                pointers.append(operands[1])
    bad, seen = [], set()

    def grows(name: str, depth: int = 0) -> bool:
        if name not in made or depth > 200:
            return True  # an argument of the function, or of a loop
        op, operands, _ = made[name]
        if op in ("arith.constant", "tt.make_range"):
            return False
        return op in ("tt.get_program_id", "tt.get_num_programs", "tt.load") or any(
            grows(operand, depth + 1) for operand in operands
        )

    def walk(name: str) -> None:
        if name in seen or name not in made:
            return
        seen.add(name)
        op, operands, line = made[name]
        product = op in ("arith.muli", "arith.shli") and re.search(r"\b(\w*x)?i32\b", line)
        if product and sum(map(grows, operands)) >= (1 if long else 2):
            bad.append(line)
        for operand in operands:
            walk(operand)

    for pointer in pointers:
        walk(pointer)
    return bad
