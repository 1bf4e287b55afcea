"""Time on the device.

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
