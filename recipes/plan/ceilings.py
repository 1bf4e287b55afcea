"""What a machine reaches at most: the ceilings that a kernel, or a step, is held against."""

import math
import time

import torch

from warploom.kernels.timing import Clock, time_ms

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


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
        clock: As in `timing.samples_ms`.

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
        clock: As in `timing.samples_ms`.

    Returns:
        Bytes a second, reads and writes both counted.
    """
    device = torch.device(device)
    count = math.ceil((size or (4 << 30 if device.type == "cuda" else 256 << 20)) / 4)
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    ms = time_ms(lambda: target.copy_(source), device, repeats=10, clock=clock)
    return 8 * count / (ms * 1e-3)
