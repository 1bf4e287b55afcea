"""Every collective of a training step: the only place that calls torch.distributed for data.

`pairs` holds those that stand in a forward and a backward, each beside its adjoint; `plain` those
of the step around them (gradients, optimizer, metrics); `debug` checks what the pairs promise;
`door` lets ledgers, fingerprints and watchdogs see each one.
"""

import copyreg

from torch.distributed import ProcessGroup

from .debug import checked
from .door import Call, Message, Observer, observed, observers, watched
from .pairs import copy, gather, join, reduce, scatter, split, swap
from .plain import (
    Group,
    Pending,
    all_gather_rows,
    all_gather_rows_begin,
    all_reduce_,
    all_reduce_begin,
    all_to_all_rows,
    all_to_all_rows_begin,
    barrier,
    broadcast_,
    device_of,
    exchange_begin,
    gather_json,
    place,
    reduce_scatter_rows,
    reduce_scatter_rows_begin,
)

__all__ = [
    "Call", "Group", "Message", "Observer", "Pending", "all_gather_rows", "all_gather_rows_begin",
    "all_reduce_", "all_reduce_begin", "all_to_all_rows", "all_to_all_rows_begin", "barrier",
    "broadcast_", "checked", "copy", "device_of", "exchange_begin", "gather", "gather_json", "join",
    "observed", "observers", "place", "reduce", "reduce_scatter_rows", "reduce_scatter_rows_begin",
    "scatter", "split", "swap", "watched",
]  # fmt: skip

# A copy of a layer, such as one that averages its weights, communicates over the same groups: copy
# keeps an object whose reduction is a name as it is. A pickle of a group is refused as before.
copyreg.pickle(ProcessGroup, lambda group: "ProcessGroup")
