"""Time on the device: medians from a cold cache, and the ceilings that a kernel is held against.

On a GPU each repetition is timed by a pair of events after a buffer larger than the L2 cache has
been overwritten, so that inputs come from memory as they do in a training step. Only ratios of
one run count: time a kernel, its peers and the ceilings in the same process.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch

_FLUSH_BYTES = 256 << 20  # the largest L2 of the supported GPUs is 126 MB


def time_ms(
    fn: Callable[[], object],
    device: torch.device | str,
    *,
    repeats: int = 20,
    warmup: int = 3,
    flush: bool = True,
) -> float:
    """Measure the median time of a call.

    Args:
        fn: Enqueues the work; its result is dropped.
        device: Where the work runs; on the CPU it is over when `fn` returns.
        repeats: Calls measured, at least 1.
        warmup: Calls before, which compile and fill the allocator.
        flush: On a GPU, overwrite the L2 cache before each call.

    Returns:
        Median milliseconds.

    Raises:
        ValueError: If `repeats` is below 1, or the device is neither a CPU nor a CUDA device.
    """
    device = torch.device(device)
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warmup):
        fn()
    if device.type == "cpu":
        return statistics.median(_once_cpu(fn) for _ in range(repeats))
    if device.type != "cuda":
        raise ValueError(f"device must be a CPU or a CUDA device, got {device}")
    with torch.cuda.device(device):
        return statistics.median(_all_cuda(fn, repeats, flush))


def _once_cpu(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return (time.perf_counter() - start) * 1e3


def _all_cuda(fn: Callable[[], object], repeats: int, flush: bool) -> list[float]:
    """Enqueue every repetition before waiting, so that launch gaps hide behind the flushes."""
    buffer = torch.empty(_FLUSH_BYTES if flush else 0, dtype=torch.uint8, device="cuda")
    pairs = []
    for _ in range(repeats):
        buffer.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) for start, end in pairs]


def matmul_ceiling(
    device: torch.device | str, dtype: torch.dtype, *, size: int | None = None
) -> float:
    """Measure what a large square matrix product of random numbers reaches.

    Args:
        device: CPU or CUDA device.
        dtype: Of the factors.
        size: Rows, columns and depth; None takes 8192 on a GPU and 1024 on the CPU, where a dtype
            that its processor cannot multiply (some 50 times slower) gets 192.

    Returns:
        FLOP/s, two to a multiply-add.
    """
    device = torch.device(device)
    native = dtype.itemsize > 2 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    n = size or (8192 if device.type == "cuda" else 1024 if native else 192)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / (time_ms(lambda: torch.mm(a, b, out=out), device) * 1e-3)


def copy_ceiling(device: torch.device | str, *, size: int | None = None) -> float:
    """Measure what a large copy reaches.

    Args:
        device: CPU or CUDA device.
        size: Bytes copied; None takes 4 GiB on a GPU and 256 MiB on the CPU.

    Returns:
        Bytes a second, reads and writes both counted.
    """
    device = torch.device(device)
    count = math.ceil((size or (4 << 30 if device.type == "cuda" else 256 << 20)) / 4)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    return 8 * count / (time_ms(lambda: target.copy_(source), device, repeats=10) * 1e-3)
