"""How many pages of keys and values fit into the memory that is free."""

import os
from collections.abc import Callable
from typing import Any

import torch

from warploom.parallel.collectives import all_reduce_

from ..errors import UserError

_SHARE = {"cpu": 0.2, "cuda": 0.9}  # of the free memory; the rest is for activations and others


def pages_that_fit(
    model: Any, make_cache: Callable[..., Any], window: int, *, page_size: int, slots: int
) -> int:
    """Return the pages that all slots could need, or that the memory can hold, if these are fewer.

    Equal on all tensor-parallel ranks; a collective call. Ranks on CPUs share the memory.

    Raises:
        UserError: If there is no room for a page.
    """
    wanted = slots * -(-window // page_size)
    one, two = (_bytes(make_cache(model, pages=n, page_size=page_size, slots=1)) for n in (1, 2))
    states = slots * (2 * one - two)  # of one slot: what a second page does not add
    device = next(model.parameters()).device
    group = None if model.mesh is None else model.mesh.tp
    room = _free(device) * _SHARE[device.type]
    if device.type == "cpu" and group is not None:
        room /= group.size()
    found = torch.tensor(min(wanted, int(room - states) // max(two - one, 1)), device=device)
    pages = int(all_reduce_(found, group, op="min"))
    if pages < 1:
        raise UserError(
            f"a page of {page_size} tokens needs {two - one} bytes and the states {states}; "
            f"{room:.0f} are free for them: take fewer max_sequences, or free some memory"
        )
    return pages


def _bytes(cache: Any) -> int:
    return sum(x.nbytes for tensors in cache.layers.values() for x in tensors)


def _free(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
