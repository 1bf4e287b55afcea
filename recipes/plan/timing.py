"""Time on the device and on its host, and the ceilings that a kernel is held against.

On a GPU each repetition is timed by a pair of events after a buffer larger than the L2 cache has
been overwritten, so that inputs come from memory as they do in a training step; it is overwritten
as often as hides the time that the host takes to enqueue the work. Only ratios of one run count:
time a kernel, its peers and the ceilings in the same process.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch

_FLUSH_BYTES = 256 << 20  # the largest L2 of the supported GPUs is 126 MB
_FLUSH_S = 30e-6  # the least that overwriting them takes, at 8 TB/s
_FLUSHES = 64  # the most before a repetition: some 4 ms of a host that is slow
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

Call = Callable[[], object]
Clock = Callable[[], float]


def samples_ms(
    prepare: Callable[[], Call],
    device: torch.device | str,
    *,
    repeats: int = 20,
    warmup: int = 3,
    flush: bool = True,
    clock: Clock = time.perf_counter,
) -> list[float]:
    """Measure calls, each with something done before that is not measured.

    Args:
        prepare: Does what is not timed and returns the call that is.
        device: Where the work runs; on the CPU it is over when the call returns.
        repeats: Calls measured, at least 1.
        warmup: Calls before, which compile and fill the allocator.
        flush: On a GPU, overwrite the L2 cache before each call.
        clock: What the CPU's calls are timed by, in seconds; `time.thread_time` leaves out what
            other processes took from a call of one thread.

    Returns:
        Milliseconds of each call, in order.

    Raises:
        ValueError: If `repeats` is below 1, or the device is neither a CPU nor a CUDA device.
    """
    device = torch.device(device)
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA device, got {device}")
    host = [_once_cpu(prepare()) for _ in range(warmup)]
    if device.type == "cpu":
        return [_once_cpu(prepare(), clock) for _ in range(repeats)]
    flushes = math.ceil(min(host, default=0.0) * 1e-3 / _FLUSH_S)
    with torch.cuda.device(device):
        return _all_cuda(prepare, repeats, min(max(flushes, 1), _FLUSHES) if flush else 0)


def time_ms(
    fn: Call,
    device: torch.device | str,
    *,
    repeats: int = 20,
    warmup: int = 3,
    flush: bool = True,
    clock: Clock = time.perf_counter,
) -> float:
    """Measure the median time of a call.

    Args:
        fn: Enqueues the work; its result is dropped.
        device: Where the work runs; on the CPU it is over when `fn` returns.
        repeats: Calls measured, at least 1.
        warmup: Calls before, which compile and fill the allocator.
        flush: On a GPU, overwrite the L2 cache before each call.
        clock: As in `samples_ms`.

    Returns:
        Median milliseconds.

    Raises:
        ValueError: If `repeats` is below 1, or the device is neither a CPU nor a CUDA device.
    """
    found = samples_ms(lambda: fn, device, repeats=repeats, warmup=warmup, flush=flush, clock=clock)
    return statistics.median(found)


def _once_cpu(fn: Call, clock: Clock = time.perf_counter) -> float:
    start = clock()
    fn()
    return (clock() - start) * 1e3


def _all_cuda(prepare: Callable[[], Call], repeats: int, flushes: int) -> list[float]:
    """Enqueue every repetition before waiting, so that launch gaps hide behind the flushes."""
    buffer = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    pairs = []
    for _ in range(repeats):
        fn = prepare()
        for _ in range(flushes):
            buffer.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) for start, end in pairs]


def host_us(
    fn: Call,
    device: torch.device | str,
    *,
    calls: int = 100,
    rounds: int = 7,
    warmup: int = 20,
    clock: Clock = time.perf_counter,
) -> float:
    """Measure what the host spends on a call, on inputs so small that the device keeps up.

    Args:
        fn: Enqueues the work.
        device: Where the work runs; it is waited for between rounds only.
        calls: Calls a round; fewer than the device's queue holds, about 1000 kernels.
        rounds: Of which the quietest counts.
        warmup: Calls before.
        clock: As in `samples_ms`.

    Returns:
        Microseconds a call.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    for _ in range(warmup):
        fn()
    times = []
    for _ in range(rounds):
        wait()
        start = clock()
        for _ in range(calls):
            fn()
        times.append((clock() - start) / calls)
    wait()
    return min(times) * 1e6


def matmul_ceiling(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    size: int | None = None,
    clock: Clock = time.perf_counter,
) -> float:
    """Measure what a large square matrix product of random numbers reaches.

    Args:
        device: CPU or CUDA device.
        dtype: Of the factors; of an 8-bit one the product is bfloat16, with one scale a factor.
        size: Rows, columns and depth; None takes 8192 on a GPU and 1024 on the CPU, where a dtype
            that its processor cannot multiply (some 50 times slower) gets 192.
        clock: As in `samples_ms`.

    Returns:
        FLOP/s, two to a multiply-add.

    Raises:
        RuntimeError: If the factors have 8 bits and the device has no products of such.
    """
    device = torch.device(device)
    if dtype in _FP8:
        return _fp8_ceiling(device, dtype, size or 8192)
    native = dtype.itemsize > 2 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    n = size or (8192 if device.type == "cuda" else 1024 if native else 192)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / (time_ms(lambda: torch.mm(a, b, out=out), device, clock=clock) * 1e-3)


def _fp8_ceiling(device: torch.device, dtype: torch.dtype, n: int) -> float:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise RuntimeError(f"{dtype} products need a CUDA device of capability 8.9, got {device}")
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> object:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)

    return 2 * n**3 / (time_ms(product, device) * 1e-3)


def copy_ceiling(
    device: torch.device | str, *, size: int | None = None, clock: Clock = time.perf_counter
) -> float:
    """Measure what a large copy reaches.

    Args:
        device: CPU or CUDA device.
        size: Bytes copied; None takes 4 GiB on a GPU and 256 MiB on the CPU.
        clock: As in `samples_ms`.

    Returns:
        Bytes a second, reads and writes both counted.
    """
    device = torch.device(device)
    count = math.ceil((size or (4 << 30 if device.type == "cuda" else 256 << 20)) / 4)
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    ms = time_ms(lambda: target.copy_(source), device, repeats=10, clock=clock)
    return 8 * count / (ms * 1e-3)
