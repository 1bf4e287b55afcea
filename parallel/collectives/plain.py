"""Collectives without a gradient: sums of gradients and metrics, shards of the optimizer.

`None` stands for a group of one rank: nothing is sent and, where a new tensor would be returned,
the argument itself is.
"""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

# Renamed in torch 2.13; the old names warn there, the new ones are missing before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def device_of(group: Group) -> torch.device:
    """Return the device on which small tensors travel over `group`."""
    if group is None or "nccl" not in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def all_reduce_(x: Tensor, group: Group, *, op: str = "sum") -> Tensor:
    """Reduce `x` in place over the group (`sum`, `max` or `min`) and return it."""
    if group is not None:
        dist.all_reduce(x, op=_REDUCE[op], group=group)
    return x


def all_gather_rows(x: Tensor, group: Group) -> Tensor:
    """Gather `x` `[n, ...]` of every rank, in rank order, into `[n * R, ...]`."""
    if group is None:
        return x
    full = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    _all_gather(full, x.contiguous(), group=group)
    return full


def reduce_scatter_rows(x: Tensor, group: Group) -> Tensor:
    """Sum `x` `[n * R, ...]` over the group and keep this rank's `[n, ...]`."""
    if group is None:
        return x
    part = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    _reduce_scatter(part, x.contiguous(), group=group)
    return part


def broadcast_(x: Tensor, group: Group, *, source: int = 0) -> Tensor:
    """Overwrite `x` with that of rank `source` of the group, and return it."""
    if group is not None:
        dist.broadcast(x, group=group, group_src=source)
    return x


def barrier(group: Group) -> None:
    """Wait for every rank of the group."""
    all_reduce_(torch.zeros(1, device=device_of(group)), group)


def gather_json(value: Any, group: Group) -> list[Any]:
    """Gather a JSON value of every rank, in rank order; no pickle travels."""
    if group is None:
        return [value]
    device = device_of(group)
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = all_gather_rows(torch.tensor([text.numel()], device=device), group).tolist()
    line = torch.zeros(1, max(sizes), dtype=torch.uint8, device=device)
    line[0, : text.numel()] = text.to(device)
    lines = all_gather_rows(line, group).cpu()
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(lines, sizes, strict=True)]
