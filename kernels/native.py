"""The compiled library of CUDA C++ operators, `warploom._csrc`: whether it can serve, and calls.

`setup.py` builds it from `csrc/`, where nvcc is. It links no torch and loads on a machine without a
driver; what a launch then lacks is one sentence. Its functions take pointers, sizes, strides, a
device and a stream, and answer an error code.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

_MODULE = "warploom._csrc"
_CAPABILITIES = ((9, 0), (10, 0))  # sm_90a and sm_100a run nowhere else
_CODES = (torch.float16, torch.bfloat16, torch.float32)  # csrc/warploom.h has the same order


@functools.cache
def _loaded() -> ModuleType | str:
    """Return the module, or what it lacks; an import that failed once is not tried again."""
    if importlib.util.find_spec(_MODULE) is None:
        return f"needs {_MODULE}, which was not built: install nvcc 13, then `pip install -e .`"
    try:
        return importlib.import_module(_MODULE)
    except ImportError as error:
        return f"needs {_MODULE}, which does not load here ({error}): `pip install -e .` again"


def missing(device: torch.device | None) -> str | None:
    """Say what the CUDA C++ operators lack.

    Args:
        device: Where they are to run; None asks of the machine alone.

    Returns:
        A fragment that begins with "needs", or None when nothing is missing.
    """
    if isinstance(lack := _loaded(), str):
        return lack
    if not torch.cuda.is_available():
        return f"needs a CUDA device and its driver, torch {torch.__version__} finds none here"
    if device is None or device.type != "cuda":
        return None
    if (found := torch.cuda.get_device_capability(device)) in _CAPABILITIES:
        return None
    name = torch.cuda.get_device_name(device)
    return (
        f"needs compute capability 9.0 or 10.0, {device} ({name}) has {found[0]}.{found[1]}: "
        "use backend 'triton'"
    )


def library() -> ModuleType:
    """Return the compiled library; no driver is needed to load it.

    Returns:
        The module `warploom._csrc`.

    Raises:
        RuntimeError: If it was not built, or does not load.
    """
    if isinstance(found := _loaded(), str):
        raise RuntimeError(f"csrc: {found}")
    return found


def source_hash() -> str:
    """Return the hash of the sources that the library was compiled from.

    Returns:
        SHA-256, 64 digits.

    Raises:
        RuntimeError: If the library was not built, or does not load.
    """
    digits: str = library().source_hash()
    return digits


def code(dtype: torch.dtype) -> int:
    """Return the number that stands for `dtype` in the library.

    Args:
        dtype: float16, bfloat16 or float32.

    Returns:
        Its code.

    Raises:
        RuntimeError: If the library does not know it.
    """
    if dtype not in _CODES:
        raise RuntimeError(f"csrc: float16, bfloat16 and float32 are served, got {dtype}")
    return _CODES.index(dtype)


def pointer(tensor: Tensor | None) -> int:
    """Return the address of the first element, as the library takes it.

    Args:
        tensor: Any tensor, or None.

    Returns:
        The address; 0 for None.
    """
    return 0 if tensor is None else tensor.data_ptr()


def call(name: str, tensor: Tensor, *arguments: float) -> None:
    """Call a function of the library on the device and the current stream of `tensor`.

    Args:
        name: Of the function, which is also what the message begins with.
        tensor: A CUDA tensor.
        arguments: All but the last two, the device and the stream.

    Raises:
        RuntimeError: If the arguments do not fit or the launch fails; the message has the values.
    """
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    if getattr(library(), name)(*arguments, tensor.get_device(), stream):
        raise RuntimeError(f"{name}: {library().last_error()}")
