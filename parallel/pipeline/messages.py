"""In which order messages travel: a plan that every rank derives from the same table.

The end of an F on one rank and the F of the next stage on another are joined by a message, as are
the ends of B or I backward. All messages are ordered by the time at which, in a run with unit
times, they are ready. Every rank begins its own in this order: a send after the action that made
it, a receive one action ahead of the one that needs it, earlier where the order asks for it.

No rank can hang, even if every message blocks both its ends from when it is begun until both have
begun it. For suppose all messages before M have passed. All that M's sender runs before M, and all
that its receiver runs before it begins to receive M, ends before M is ready or needs no message
after M; so both come to M. The order of messages between two ranks is the same on both, whatever
their backend queues (gloo matches a pair's messages in order, NCCL runs them on one stream).
"""

from collections.abc import Sequence
from typing import NamedTuple

from .tables import Rows


class Message(NamedTuple):
    """A tensor that one rank sends to another.

    Attributes:
        forward: Whether it is an output, or the gradient of an input.
        stage: Which stage it is for.
        microbatch: Which micro-batch.
        source: Rank that sends it.
        target: Rank that receives it.
    """

    forward: bool
    stage: int
    microbatch: int
    source: int
    target: int


Plan = tuple[tuple[tuple[Message, ...], ...], ...]


def plan(
    table: Rows, placement: Sequence[int], ends: Sequence[Sequence[float]], ahead: int
) -> Plan:
    """List what each rank begins before each of its actions, and after the last.

    Args:
        table: Actions of each rank, without a deadlock.
        placement: Rank of each stage.
        ends: End of each action, when each takes longer than 0.
        ahead: How many actions before the one that needs it a receive is begun.
    """
    needed = {
        (kind == "F", stage, microbatch): index
        for row in table
        for index, (kind, stage, microbatch) in enumerate(row)
        if kind != "W"
    }
    found: list[tuple[float, int, Message]] = []
    for rank, row in enumerate(table):
        for index, (kind, stage, microbatch) in enumerate(row):
            to = stage + 1 if kind == "F" else stage - 1
            if kind != "W" and 0 <= to < len(placement) and placement[to] != rank:
                message = Message(kind == "F", to, microbatch, rank, placement[to])
                found.append((ends[rank][index], index + 1, message))
    found.sort()
    own: list[list[tuple[int, Message]]] = [[] for _ in table]
    for _, index, message in found:
        own[message.source].append((index, message))
        before = max(needed[message[:3]] - ahead, 0)
        own[message.target].append((before, message))
    return tuple(_begin(rank, len(table[rank]), own[rank]) for rank in range(len(table)))


def _begin(
    rank: int, actions: int, own: list[tuple[int, Message]]
) -> tuple[tuple[Message, ...], ...]:
    """Put a rank's messages, in order, before its actions; only receives may move."""
    places = [index for index, _ in own]
    for k in range(len(own) - 2, -1, -1):
        if own[k][1].target == rank:
            places[k] = min(places[k], places[k + 1])
    begun: list[list[Message]] = [[] for _ in range(actions + 1)]
    place = 0
    for k, (_, message) in enumerate(own):
        place = max(place, places[k])
        assert message.target == rank or place == own[k][0]
        begun[place].append(message)
    return tuple(map(tuple, begun))
