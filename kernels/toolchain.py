"""Compilers that are known to miscompile matrix kernels for Hopper, and what is done about it.

    triton 3.4 to 3.7.0     dot(trans(cast(result of a dot))) gives wrong values on sm_90
    ptxas before 13.3       a product that reads its first factor from registers may read it after
                            it was overwritten (12.8.93, 12.9 and 13.0.88 are each known for it)
    triton before 3.7       cannot schedule ahead, for sm_100, a loop that multiplies a head in two
                            tiles (`flash_backward_triton.py`): it is not pipelined there

No interpreter and no CPU test can show the first two. Both need a product whose first factor is in
registers, so no kernel here has one: the compile gate looks for it in the PTX of every kernel that
is shipped. What remains is for kernels of others in the same process: `warploom doctor` says it.

Source: flash-linear-attention issues 640 and 983, pull requests 826 and 1262; triton pull request
11781; the release notes of CUDA 13.3.
"""

import importlib.metadata
import re


def version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, such as (3, 6, 0) of "3.6.0+git1"; no more than three."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def pipelines_two_tiles() -> bool:
    """Tell whether the installed Triton can run loads ahead where a head is in two tiles."""
    return version(importlib.metadata.version("triton")) >= (3, 7)
