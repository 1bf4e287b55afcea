"""Debug mode: what a collective takes to be equal on all ranks is compared, bit for bit.

    with checked():
        step(...)

costs one small all-reduce for each `copy` forward and `reduce` backward, and nothing when off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

from .plain import all_reduce_

_CHECKING: ContextVar[bool] = ContextVar("warploom_collectives_checked", default=False)


@contextmanager
def checked() -> Iterator[None]:
    """Compare what must be replicated while the context is open, in this thread.

    Autograd runs the backward of CPU tensors in the calling thread, where the context holds; CUDA
    tensors' backward runs in a thread of its own and is not compared.
    """
    token = _CHECKING.set(True)
    try:
        yield
    finally:
        _CHECKING.reset(token)


def check_replicated(x: Tensor, group: dist.ProcessGroup) -> None:
    """Compare a checksum of `x` over the group; does nothing outside `checked()`.

    Raises:
        RuntimeError: If the ranks hold different values.
    """
    if not _CHECKING.get():
        return
    bits = x.detach().contiguous().view(-1).view(torch.uint8).to(torch.int64)
    weights = torch.arange(1, bits.numel() + 1, device=bits.device)
    total = (bits * weights).sum()
    extremes = torch.stack((total, -total))
    all_reduce_(extremes, group, op="max")
    if extremes[0] != -extremes[1]:
        raise RuntimeError(
            f"a tensor {tuple(x.shape)} that must be equal on the {group.size()} ranks of its "
            f"group differs (checksum {int(total)} on rank {group.rank()} of the group, between "
            f"{-int(extremes[1])} and {int(extremes[0])} over it): a reduction is missing"
        )
