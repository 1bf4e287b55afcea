"""Debug mode: ranks compare each collective before it runs.

    with observed(Fingerprint(store)):
        step(...)

Each rank publishes what it is about to do as the n-th collective of a group in a
`torch.distributed.Store`, waits for the others' words and compares op, shape, dtype and detail (the
kind of reduction, the source). The store is no collective: ranks that call different things on the
same group, or nothing at all, still learn so, and the error names each rank's call and its line.

Exchanges are compared message by message between two ranks, by whoever publishes second: nobody
waits, since to begin a receive before the peer sends is right.

It costs some round trips to the store a collective. Begun collectives of several groups must be
begun in one order on every rank, which NCCL asks for too.
"""

import json
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from ..collectives import Call
from .describe import check_patience, group_key, members, place, what


class MismatchError(RuntimeError):
    """Ranks of a group call different collectives, or one does not come; names who and where."""


class Fingerprint:
    """Compares; an observer for `observed`.

    Args:
        store: Reached by all ranks; where the same one serves others, a `PrefixStore` of it. Each
            new fingerprint over a store needs a prefix of its own.
        patience_s: How long a rank may be late before it is named.

    Raises:
        ValueError: If `patience_s` is not a finite number above 0.
    """

    def __init__(self, store: Store, *, patience_s: float = 60.0) -> None:
        check_patience(patience_s)
        self.store = store
        self.patience_s = patience_s
        self._numbers: Counter[str] = Counter()

    def __call__(self, call: Call) -> AbstractContextManager[object]:
        """Compare one collective with the other ranks.

        Raises:
            MismatchError: If they bring something else, or do not come in time.
        """
        own = members(call.group)[call.group.rank()]
        self.store.set(f"last/{own}", f"{what(call)} over ranks {group_key(call.group)}, {place()}")
        if call.op == "exchange":
            self._compare_messages(call, own)
        else:
            self._compare_ranks(call, own)
        return nullcontext()

    def _count(self, key: str) -> int:
        self._numbers[key] += 1
        return self._numbers[key]

    def _compare_ranks(self, call: Call, own: int) -> None:
        group, ranks = group_key(call.group), members(call.group)
        number = self._count(group)
        sides = [[m.elements for m in call.messages if m.sent == sent] for sent in (True, False)]
        shape = call.shape if call.uniform else call.shape[1:]
        line = {
            "same": [call.op, list(shape), str(call.dtype), call.detail],
            "text": f"{what(call)}, {place()}",
            "sides": sides,
        }
        keys = [f"{group}/{number}/{rank}" for rank in ranks]
        self.store.set(f"{group}/{number}/{own}", json.dumps(line))
        self._await(keys, ranks, f"collective {number} of ranks {group}: {what(call)}, {place()}")
        lines = [json.loads(text) for text in self.store.multi_get(keys)]
        if any(other["same"] != line["same"] for other in lines):
            told = "; ".join(
                f"rank {r} brings {o['text']}" for r, o in zip(ranks, lines, strict=True)
            )
            raise MismatchError(f"collective {number} of ranks {group} differs: {told}")
        _compare_sides(f"collective {number} of ranks {group}", ranks, lines)
        if number > 1:  # all are here, so none reads the one before any more
            self.store.delete_key(f"{group}/{number - 1}/{own}")

    def _await(self, keys: list[str], ranks: tuple[int, ...], told: str) -> None:
        try:
            self.store.wait(keys, timedelta(seconds=self.patience_s))
        except dist.DistStoreError as error:
            late = [r for key, r in zip(keys, ranks, strict=True) if not self.store.check([key])]
            where = "; ".join(f"rank {rank}: {self._last(rank)}" for rank in late)
            raise MismatchError(
                f"{told}: not all came within {self.patience_s:g} s. The last that is known of "
                f"those that are missing: {where}"
            ) from error

    def _last(self, rank: int) -> str:
        key = f"last/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else "no collective yet"

    def _compare_messages(self, call: Call, own: int) -> None:
        group, ranks = group_key(call.group), members(call.group)
        for message in call.messages:
            peer = ranks[message.peer]
            pair = f"{own}>{peer}" if message.sent else f"{peer}>{own}"
            mine, theirs = ("sent", "got") if message.sent else ("got", "sent")
            number = self._count(f"{group}/{pair}/{mine}")
            key = f"{group}/{pair}/{number}"
            line = {"same": [message.elements, str(message.dtype)], "at": place()}
            self.store.set(f"{key}/{mine}", json.dumps(line))
            if self.store.add(f"{key}/sides", 1) < 2:
                continue  # whoever comes second compares
            other = json.loads(self.store.get(f"{key}/{theirs}"))
            if other["same"] != line["same"]:
                by = {mine: line, theirs: other}
                sent, got = (
                    "{} {}, {}".format(*by[s]["same"], by[s]["at"]) for s in ("sent", "got")
                )
                raise MismatchError(
                    f"message {number} of ranks {pair} differs: sent are {sent}; awaited are {got}"
                )
            for side in (mine, theirs, "sides"):
                self.store.delete_key(f"{key}/{side}")


def _compare_sides(where: str, ranks: tuple[int, ...], lines: list[dict[str, Any]]) -> None:
    """Compare what each rank sends to each in an uneven all-to-all with what that one awaits."""
    for i, one in enumerate(lines):
        for j, other in enumerate(lines):
            sent, got = one["sides"][0], other["sides"][1]
            if sent and got and sent[j] != got[i]:
                raise MismatchError(
                    f"{where} differs: rank {ranks[i]} sends {sent[j]} elements to rank "
                    f"{ranks[j]} ({one['text']}), which awaits {got[i]} ({other['text']})"
                )
