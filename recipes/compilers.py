"""What the compilers of this machine may do wrong to others' kernels: see kernels/toolchain.py."""

import functools
import importlib.metadata
import importlib.util
import re
import subprocess
from pathlib import Path

import torch

from warploom.kernels.toolchain import version

_TRITON = ((3, 4), (3, 7, 1))  # from, and mended in
_PTXAS = (13, 3)  # mended in


def hazards(triton: str, ptxas: str | None) -> list[str]:
    """Name what a pair of compilers may do wrong on Hopper.

    Args:
        triton: Version, such as "3.6.0".
        ptxas: Version of the assembler that Triton uses for sm_90, such as "12.8.93"; None when
            it has none.

    Returns:
        A sentence each; none when both are mended.
    """
    found = []
    if _TRITON[0] <= version(triton) < _TRITON[1]:
        found.append(
            f"triton {triton} gives wrong values on Hopper for a dot of a transposed, cast result "
            f"of a dot: kernels of this package have none, others may; take triton >= 3.7.1"
        )
    if ptxas is not None and version(ptxas) < _PTXAS:
        found.append(
            f"ptxas {ptxas}, which triton uses, may overwrite a product's first factor in "
            f"registers before it is read: kernels of this package have none there, others may; "
            f"pip install 'nvidia-cuda-nvcc>=13.3' and set TRITON_PTXAS_PATH to its bin/ptxas"
        )
    return found


@functools.cache
def warnings() -> tuple[str, ...]:
    """Name what the compilers of this machine may do wrong on its GPUs; imports triton.

    Returns:
        Sentences, as `hazards`; none without triton or without a Hopper GPU.
    """
    devices = range(torch.cuda.device_count())
    hopper = any(torch.cuda.get_device_capability(device)[0] == 9 for device in devices)
    if not hopper or importlib.util.find_spec("triton") is None:
        return ()
    from triton.backends.nvidia.compiler import get_ptxas  # type: ignore[import-untyped]

    path = Path(get_ptxas(90).path)
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    ptxas = re.search(r"V(\d+\.\d+\.\d+)", said)
    return tuple(hazards(importlib.metadata.version("triton"), ptxas[1] if ptxas else None))
