"""How it is measured: an operator and its peers in turns, in one process, with the ceilings.

A round gives each contender a block of calls; who begins rotates from round to round. The forward
is timed as in training, with the graph recorded. The backward is timed alone: each repetition runs
a fresh forward before the timed span, so that contenders may overwrite what they saved, and no
graph is kept. `both` is one span over forward and backward, for operators that do the work of the
backward in the forward. Inputs and upstream gradients are random; on a GPU the L2 is flushed.
"""

import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from warploom.kernels import backends, peers
from warploom.recipes.plan import timing

from .cases import Case, Draw, Inputs, Work

PASSES = ("forward", "backward", "both")
OWN = ("reference", "triton", "cuda")
OURS = (*OWN, "torch", "cudnn")
"""Backends of our operators; the last two are PyTorch's code behind them, and so peers as well."""
PEERS = ("eager", "compile")
PACKAGES: Mapping[str, str] = MappingProxyType(
    {"bitsandbytes": "bitsandbytes: pip install warploom[quant]"}
)
"""Peers of single operators, `Case.others`, and how they are installed."""
_CPU_S = 0.4  # what a round of one contender may take on the CPU


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and with whom.

    Attributes:
        device: Where.
        dtype: Of the inputs.
        ours: Backends of ours, of those that can be served.
        peers: Names of peers: `eager`, `compile` and backends of other libraries.
        rounds: How often the contenders take turns, at least 3 for a spread that means something.
        repeats: Calls a round.
        clock: Of the CPU, as `timing.samples_ms` takes it.
    """

    device: torch.device
    dtype: torch.dtype
    ours: Sequence[str]
    peers: Sequence[str]
    rounds: int = 5
    repeats: int = 10
    clock: Callable[[], float] = time.perf_counter


def ceilings(plan: Plan) -> dict[str, float]:
    """Measure what this device reaches, now.

    Args:
        plan: Where, by which clock, and the dtype of the product that operators are held to.

    Returns:
        `copy_bytes_per_s`, `matmul_flops_per_s`, and on a device that has such products
        `fp8_matmul_flops_per_s`.
    """
    device = plan.device
    found = {"copy_bytes_per_s": timing.copy_ceiling(device, clock=plan.clock)}
    found["matmul_flops_per_s"] = timing.matmul_ceiling(device, plan.dtype, clock=plan.clock)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        found["fp8_matmul_flops_per_s"] = timing.matmul_ceiling(device, torch.float8_e4m3fn)
    return found


def ceiling(work: Work, found: Mapping[str, float]) -> float:
    """Return the FLOP/s that a product is held to: of its own kind where that was measured."""
    return found.get(work.ceiling, found["matmul_flops_per_s"])


def roof_ms(work: Work, found: Mapping[str, float]) -> float:
    """Return the least time of a pass at the measured ceilings."""
    seconds = work.bytes / found["copy_bytes_per_s"]
    if work.products:
        seconds = max(seconds, work.flops / ceiling(work, found))
    return seconds * 1e3


def lacking(peer: str, device: torch.device) -> str | None:
    """Say what a peer lacks to run on a device, or None when it can.

    Args:
        peer: One of `PEERS`, `PACKAGES` and `peers.PEERS`.
        device: Where.
    """
    if peer in PACKAGES:
        return None if importlib.util.find_spec(peer) else f"needs the package {PACKAGES[peer]}"
    if peer not in peers.PEERS:
        return None
    if lack := peers.missing(peer):
        return lack
    return None if device.type == "cuda" else f"needs a CUDA device, here is {device.type}"


def contenders(case: Case, plan: Plan) -> dict[str, Callable[..., Any]]:
    """Return who can run the case here: ours by backend, then the peers."""

    def serve(backend: str) -> Callable[..., Any]:
        return lambda *inputs, **fixed: case.ours(*inputs, **fixed, backend=backend)

    found: dict[str, Callable[..., Any]] = {}
    others = [peer for peer in plan.peers if peer not in PEERS and case.peers]
    for name in (*plan.ours, *others):
        if name in backends.available()[case.op] and _served(case.op, name, plan):
            found[name] = serve(name)
    found |= {name: run for name, run in case.others.items() if name in plan.peers}
    if "eager" in plan.peers:
        found["eager"] = case.eager
    if "compile" in plan.peers and case.compiles:
        found["compile"] = torch.compile(case.eager, dynamic=False)
    return found


def _served(op: str, backend: str, plan: Plan) -> bool:
    if backend in peers.PEERS:
        return lacking(backend, plan.device) is None
    try:
        return backends.choose(op, plan.device, plan.dtype, backend) == backend
    except RuntimeError:
        return False


def tensors(found: Any) -> tuple[Tensor, ...]:
    """Return the tensors of an answer in a flat tuple."""
    if isinstance(found, Tensor):
        return (found,)
    if isinstance(found, tuple | list):
        return tuple(tensor for part in found for tensor in tensors(part))
    return ()


class Runner:
    """One contender on one case: `prepare(span)` is what `timing.samples_ms` takes.

    `first` is its first output, `upstream` holds a random gradient of each that takes one.
    """

    def __init__(self, case: Case, run: Callable[..., Any], drawn: Inputs, draw: Draw) -> None:
        self.case, self.run, (self.inputs, self.fixed) = case, run, drawn
        self.leaves = self._leaves()
        outputs = tensors(self._forward())
        self.first = outputs[0].detach() if outputs else None
        self.upstream = [draw(*y.shape, dtype=y.dtype) for y in outputs if y.requires_grad]

    def _leaves(self) -> tuple[Tensor, ...]:
        grad = self.case.backward is not None
        fresh = (x.clone() if self.case.inplace else x.detach() for x in self.inputs)
        return tuple(x.requires_grad_(grad and x.is_floating_point()) for x in fresh)

    def _forward(self) -> Any:
        return self.run(*self.leaves, **self.fixed)

    def _backward(self, outputs: Any) -> object:
        wanted = [y for y in tensors(outputs) if y.requires_grad]
        leaves = [x for x in self.leaves if x.requires_grad]
        return torch.autograd.grad(wanted, leaves, self.upstream, allow_unused=True)

    def prepare(self, span: str) -> Callable[[], object]:
        """Do what is not timed; return the call that is.

        Args:
            span: One of `PASSES`.
        """
        if self.case.inplace:
            self.leaves = self._leaves()
        if span == "forward":
            return self._forward
        if span == "both":
            return lambda: self._backward(self._forward())
        outputs = self._forward()
        return lambda: self._backward(outputs)


def _difference(got: Tensor | None, want: Tensor | None) -> float | None:
    """Return the norm of the difference of the first outputs, relative to the peer's."""
    if got is None or want is None or got.shape != want.shape:
        return None
    a, b = got.double(), want.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def measure(case: Case, plan: Plan, found: Mapping[str, float]) -> list[dict[str, Any]]:
    """Measure every contender on a case, in turns.

    Args:
        case: What.
        plan: How, and with whom.
        found: The ceilings.

    Returns:
        A row a contender and pass, for JSON: quantiles in milliseconds, bytes and flops a second,
        the share of the roof, how many times as fast as each peer, and the difference of its
        output from eager PyTorch's. A contender that raises has a row `failed` instead, with
        `refused` where it said that it does not serve this. Where the case asks for it, a row of
        the longest span has `peak_mib`, the most memory beyond what was there before.
    """
    torch._dynamo.reset()  # the peers of all cases share their code, and so a limit of recompiles
    draw = Draw(plan.dtype, plan.device)
    drawn = case.draw(draw)
    runners: dict[str, Runner] = {}
    failed: dict[str, dict[str, Any]] = {}
    for name, run in contenders(case, plan).items():
        try:
            runners[name] = Runner(case, run, drawn, Draw(plan.dtype, plan.device))
        except Exception as error:  # one contender's failure is that contender's row
            failed[name] = _failed(name, error)
    spans = PASSES if case.backward is not None else PASSES[:1]
    samples: dict[tuple[str, str], list[float]] = {}
    for span in spans:
        for number in range(plan.rounds):
            order = [name for name in runners if name not in failed]
            turn = number % max(len(order), 1)
            for name in order[turn:] + order[:turn]:
                try:
                    block = _block(runners[name], span, plan, first=number == 0)
                    samples.setdefault((span, name), []).extend(block)
                except Exception as error:
                    failed[name] = _failed(name, error)
    wanted = runners["eager"].first if "eager" in runners else None
    shared = {"op": case.op, "variant": case.variant, "size": case.size, "key": case.key}
    rows = []
    for (span, name), times in samples.items():
        if name not in failed:
            row = _row(case, span, times, samples, found)
            row["difference"] = _difference(runners[name].first, wanted)
            if case.memory and span == spans[-1]:
                row["peak_mib"] = peak_bytes(runners[name].prepare(span), plan.device) / 2**20
            rows.append({**shared, "pass": span, "contender": name, **row})
    return rows + [{**shared, "contender": n, **why} for n, why in failed.items()]


def _failed(name: str, error: Exception) -> dict[str, Any]:
    """Say in a row why a contender has no times: it failed, or refused what it does not serve."""
    words = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    refused = isinstance(error, RuntimeError) and f"backend {name!r}" in words
    return {"failed": words, **({"refused": True} if refused else {})}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the most memory that a call holds beyond what is there before.

    Args:
        call: Runs once.
        device: Where its tensors are.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with torch.profiler.profile(profile_memory=True) as trace:
        call()
    assert trace.profiler is not None
    events = trace.profiler.kineto_results.events()
    moved = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(max(itertools.accumulate((size for _, size in moved), initial=0)))


def _block(runner: Runner, span: str, plan: Plan, *, first: bool) -> list[float]:
    repeats, warmup = plan.repeats, 3 if first else 1
    if plan.device.type == "cpu":
        start = time.perf_counter()
        runner.prepare(span)()
        seconds = time.perf_counter() - start
        repeats, warmup = max(1, min(repeats, int(_CPU_S / max(seconds, 1e-9)))), int(first)
    return timing.samples_ms(
        lambda: runner.prepare(span), plan.device, repeats=repeats, warmup=warmup, clock=plan.clock
    )


def _row(
    case: Case,
    span: str,
    times: Sequence[float],
    samples: Mapping[tuple[str, str], Sequence[float]],
    found: Mapping[str, float],
) -> dict[str, Any]:
    work = case.forward if span == "forward" else case.backward
    assert work is not None
    if span == "both":
        work = case.forward + work
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
    peers = {name: block for (other, name), block in samples.items() if other == span}
    return {
        "ms": {"min": min(times), "q1": low, "median": median, "q3": high, "max": max(times)},
        "samples": len(times),
        "bytes": work.bytes,
        "flops": work.flops,
        "products": work.products,
        "gb_per_s": work.bytes / median * 1e-6,
        "tflops_per_s": work.flops / median * 1e-9,
        "roof_share": roof_ms(work, found) / median,
        "times_as_fast_as": {
            name: statistics.median(block) / median
            for name, block in peers.items()
            if name not in OWN
        },
    }


def overhead(case: Case, plan: Plan) -> list[dict[str, Any]]:
    """Measure what the host spends on a call at a tiny size, beside a bare launch.

    Args:
        case: At a size whose kernels are over sooner than the host's next call.
        plan: How, and with whom.

    Returns:
        A row a contender: microseconds of a forward without gradient and of forward and backward,
        and of `x.add_(1)`, the least that a call into torch costs.
    """
    torch._dynamo.reset()
    draw = Draw(plan.dtype, plan.device)
    drawn = case.draw(draw)
    x = torch.ones(8, device=plan.device)
    bare = _host(lambda: x.add_(1), plan)
    rows = []
    for name, run in contenders(case, plan).items():
        row = {"op": case.op, "variant": case.variant, "contender": name, "bare_us": bare}
        try:
            runner = Runner(case, run, drawn, Draw(plan.dtype, plan.device))
            with torch.no_grad():
                row["forward_us"] = _host(runner.prepare("forward"), plan)
            if case.backward is not None:
                row["both_us"] = _host(runner.prepare("both"), plan)
        except Exception as error:  # as above
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        rows.append(row)
    return rows


def _host(call: Callable[[], object], plan: Plan) -> float:
    return timing.host_us(call, plan.device, clock=plan.clock)
