"""What the hosts of Triton kernels share; imports triton only inside the functions that need it."""

import contextlib
import functools
import importlib.util
from contextlib import AbstractContextManager

import torch
from torch import Tensor

_INTERPRETED_PROCESSORS = 4  # a grid of a few programs, so that CPU tests cover several a kernel


@functools.cache
def has_triton() -> bool:
    """Tell whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Tell whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1); imports triton."""
    if not has_triton():
        return False
    import triton  # type: ignore[import-untyped]

    return bool(triton.knobs.runtime.interpret)


def next_power_of_two(n: int) -> int:
    """Round `n` up to a power of two: Triton tiles have such sizes.

    Args:
        n: At least 0; 0 and 1 give 1.

    Returns:
        The smallest power of two that is at least `n`.
    """
    return 1 << max(n - 1, 0).bit_length()


def processors(device: torch.device) -> int:
    """Count the streaming multiprocessors of `device`, to size a persistent grid.

    Args:
        device: A CUDA device; for the CPU, under Triton's interpreter, a small fixed number.

    Returns:
        The number of programs that run at the same time, one to a multiprocessor.
    """
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of `tensor` current for a launch: Triton launches on the current one.

    Args:
        tensor: An argument of the kernel.

    Returns:
        A context; one that does nothing when the device is current or is the CPU.
    """
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def near(x: Tensor) -> Tensor:
    """Leave a strided view as it is; copy only when the elements of a row are apart.

    Args:
        x: Any shape, at least one dimension.

    Returns:
        x, or a copy, with stride 1 in the last dimension (or size 1 there).
    """
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
