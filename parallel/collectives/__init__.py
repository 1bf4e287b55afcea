"""Every collective of a training step: the only place that calls torch.distributed for data.

`pairs` holds those that stand in a forward and a backward, each beside its adjoint; `plain` those
of the step around them (gradients, optimizer, metrics); `debug` checks what the pairs promise.
"""

from .debug import checked
from .pairs import copy, gather, join, reduce, scatter, split
from .plain import (
    Group,
    all_gather_rows,
    all_reduce_,
    barrier,
    broadcast_,
    device_of,
    gather_json,
    reduce_scatter_rows,
)

__all__ = [
    "Group",
    "all_gather_rows",
    "all_reduce_",
    "barrier",
    "broadcast_",
    "checked",
    "copy",
    "device_of",
    "gather",
    "gather_json",
    "join",
    "reduce",
    "reduce_scatter_rows",
    "scatter",
    "split",
]
