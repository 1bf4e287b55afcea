"""A rehearsal: a model's own forward pass at any size, on any mesh, in which nothing is computed.

    model = Decoder(architecture, mesh=imagined(degrees), device="meta", ...)
    saved_bytes(model, model.held, batch, [1] * len(model.blocks))

The tensors are on the meta device, which has shapes and no memory; the groups have sizes and no
ranks, and what a collective would bring is as large as it would be. So what a block keeps for its
backward is asked of the block, and no formula lags behind it.

Two things depend on values, and are known all the same. Where documents lie is computed on the host
beside the meta tensors that say it. How many rows of tokens travel to experts is what a router
decides: the caller says it.

The ring of context parallelism sends to ranks by name, which no imagined group has: a model is
rehearsed with `context="all_gather"`, which keeps all keys and values of the batch beside what the
ring keeps (`parallel/context/gathered.py`).
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from warploom.models.batch import Batch
from warploom.models.decoder import Decoder
from warploom.parallel.collectives import Group, watched
from warploom.parallel.mesh import Degrees, Mesh

from .tracker import track

Rows = tuple[int, int]

META, HOST = torch.device("meta"), torch.device("cpu")
_MAKERS = (torch.tensor, torch.arange)
_READERS = (Tensor.tolist, Tensor.cpu, Tensor.item, Tensor.__int__)


class _Over:
    """A transfer that is done."""

    def wait(self) -> None:
        """Wait for nothing."""

    def is_completed(self) -> bool:
        return True


class _Imagined(dist.ProcessGroup):
    """A group of so many ranks of which this is the first; what it sends goes nowhere."""

    def _send(self, *_: Any) -> _Over:
        return _Over()

    allreduce: Any = _send
    all_gather_single: Any = _send
    reduce_scatter_single: Any = _send
    all_to_all_single: Any = _send
    _allgather_base: Any = _send  # the names of these three before torch 2.13
    _reduce_scatter_base: Any = _send
    alltoall_base: Any = _send


def imagined(degrees: Degrees) -> Mesh:
    """Return the mesh of the first rank of a world that is not there, pipeline ranks apart.

    Args:
        degrees: Resolved degrees.
    """
    d, dp = degrees, degrees.dp or 1
    inner = d.tp * d.cp * dp
    sizes = {"tp": d.tp, "cp": d.cp, "dp": dp, "rep": d.rep, "ep": d.ep, "etp": d.etp}
    sizes |= {"edp": inner // (d.ep * d.etp), "shard": d.cp * dp, "tokens": d.cp * dp * d.rep}
    sizes |= {"stage": inner, "ulysses": d.uly, "ring": d.cp // d.uly, "world": d.world}
    make: Any = _Imagined  # whose base is typed with a store, which it does not need
    groups: dict[str, Group] = {n: make(0, size) if size > 1 else None for n, size in sizes.items()}
    return Mesh(degrees=d, rank=0, pp=None, ends=None, **groups)


class _Host(TorchFunctionMode):
    """Knows the values of integers on the meta device that follow from those of the host.

    Args:
        decided: Lists that are read of tensors whose values are not known, in order.
    """

    def __init__(self, decided: Iterator[list[list[int]]]) -> None:
        super().__init__()
        self.decided = decided
        self.known = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = all(x in self.known or not x.is_meta for x in given)

        def beside() -> Any:
            a, k = tree_map(self._of_host, (args, kwargs))
            return func(*a, **k)

        if func in _READERS and given[0].is_meta and (known or func is Tensor.tolist):
            return beside() if known else next(self.decided)
        if func is torch.bincount and given[0].is_meta:  # has as many results as are asked for
            return given[0].new_empty(kwargs["minlength"], dtype=torch.int64)
        y = func(*args, **kwargs)
        if func is Tensor.to and not given[0].is_meta and y.is_meta:
            whole = given[0].untyped_storage().nbytes() // y.itemsize
            y = y.new_empty(whole).as_strided(y.shape, y.stride())  # as on a CPU: not copied
        counts = isinstance(y, Tensor) and y.is_meta and not y.is_floating_point()
        if counts and known and (given or func in _MAKERS):
            self.known[y] = beside()
        return y

    def _of_host(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self.known.get(x, x)
        return HOST if x == META else x


def laps(sorts: Sequence[Hashable]) -> Iterator[tuple[int, int, int]]:
    """Cut a sequence into laps, each of the same sorts as the one before it.

    Returns:
        Where the first of some laps starts, its length, and how many there are.
    """
    at = 0
    while at < len(sorts):
        best = (0, 1, 1)  # left out where two laps are kept, length, number
        for length in range(1, (len(sorts) - at) // 3 + 1):
            first, number = sorts[at : at + length], 1
            while sorts[at + number * length : at + (number + 1) * length] == first:
                number += 1
            best = max(best, ((number - 2) * length, length, number))
        yield at, best[1], best[2]
        at += best[1] * best[2]


def saved_bytes(
    model: Decoder,
    held: Iterable[int],
    batch: Batch,
    times: Sequence[int],
    routed: Sequence[Rows] = (),
) -> int:
    """Return the bytes that a micro-batch saves for its backward in stages of a model.

    Args:
        model: On the meta device, over an imagined mesh.
        held: The stages.
        batch: Its tokens on the meta device, the lengths of its documents on the host.
        times: For each block, in the order in which they run, how often it is there.
        routed: For each routed block, with ep or etp, the rows that this rank sends and those that
            its experts serve.
    """
    kept, ends, host = [], list[int](), _Host(_plans(model, routed))
    with torch.enable_grad(), watched(()), host, track(model=model, device="meta") as seen:
        for block in model.blocks.values():
            block.register_forward_hook(lambda *_: ends.append(seen.live["activations"]))
        for stage in held:
            x = None
            if stage:
                shape, dtype = model.boundary(stage - 1, batch)
                x = torch.empty(shape, dtype=dtype, device=META).requires_grad_()
            kept.append(model.stage(stage, x, batch))
        own = (end - before for before, end in pairwise([0, *ends]))
        more = sum((n - 1) * saved for n, saved in zip(times, own, strict=True))
        return seen.live["activations"] + more


def _plans(model: Decoder, routed: Sequence[Rows]) -> Iterator[list[list[int]]]:
    """Yield what the dispatch of each routed block learns: rows for and from each ep rank, and etp.

    The first rank of both sends all to itself, and the next etp rank serves the rest.
    """
    assert model.mesh is not None
    ep, etp = model.mesh.degree("ep"), model.mesh.degree("etp")
    for sent, served in routed:
        own = served // etp
        rest = [served - own, *[0] * (etp - 2)] if etp > 1 else []
        yield [[sent, *[0] * (ep - 1), own, *[0] * (ep - 1), own, *rest]]  # of one chunk
    raise RuntimeError(
        f"what a model reads on the host must follow from lengths of documents, or be the plan of "
        f"one of {len(routed)} routed blocks: something else is read"
    )
