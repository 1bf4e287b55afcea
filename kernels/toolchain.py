"""Compilers that are known to miscompile matrix kernels for Hopper, and what is done about it.

    triton 3.4 to 3.7.0     dot(trans(cast(result of a dot))) gives wrong values on sm_90
    ptxas before 13.3       a product that reads its first factor from registers may read it after
                            it was overwritten (12.8.93, 12.9 and 13.0.88 are each known for it)
    triton before 3.7       cannot schedule ahead, for sm_100, a loop that multiplies a head in two
                            tiles (`flash_backward_triton.py`): it is not pipelined there

No interpreter and no CPU test can show the first two. Both need a product whose first factor is in
registers, so no kernel here has one: the compile gate looks for it in the PTX of every kernel that
is shipped. What remains is for kernels of others in the same process: `warnings` says it.

Source: flash-linear-attention issues 640 and 983, pull requests 826 and 1262; triton pull request
11781; the release notes of CUDA 13.3.
"""

import functools
import importlib.metadata
import importlib.util
import re
import subprocess
from pathlib import Path

import torch

_TRITON = ((3, 4), (3, 7, 1))  # from, and mended in
_PTXAS = (13, 3)  # mended in


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def pipelines_two_tiles() -> bool:
    """Tell whether the installed Triton can run loads ahead where a head is in two tiles."""
    return _version(importlib.metadata.version("triton")) >= (3, 7)


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
    if _TRITON[0] <= _version(triton) < _TRITON[1]:
        found.append(
            f"triton {triton} gives wrong values on Hopper for a dot of a transposed, cast result "
            f"of a dot: kernels of this package have none, others may; take triton >= 3.7.1"
        )
    if ptxas is not None and _version(ptxas) < _PTXAS:
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
    version = re.search(r"V(\d+\.\d+\.\d+)", said)
    return tuple(hazards(importlib.metadata.version("triton"), version[1] if version else None))
