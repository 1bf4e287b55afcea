"""Routing kept and used again: what reinforcement learning needs to train on what was sampled.

    with record_routing() as recorded:
        log_probabilities = model(tokens)          # or an engine that samples
    with replay_routing(recorded):
        loss = model.loss(batch)                   # the same experts; weights from today's scores

Each MoE layer that runs takes its turn, in the order of the calls. Layers that run again in the
backward (`parallel/memory`) remember their first run, and take no turn.

Source: Ma et al. 2025, https://arxiv.org/abs/2510.11370 (routing replay).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class _Replay:
    """Recorded indices, and which is next."""

    def __init__(self, recorded: Sequence[Tensor]) -> None:
        self.recorded = list(recorded)
        self.next = 0

    def take(self, tokens: int, top_k: int) -> Tensor:
        if self.next == len(self.recorded):
            raise RuntimeError(
                f"replay_routing has {len(self.recorded)} recorded layers, and one more ran: the "
                f"same layers and micro-batches must run as while recording"
            )
        indices = self.recorded[self.next]
        if tuple(indices.shape) != (tokens, top_k):
            raise RuntimeError(
                f"replay_routing: recorded layer {self.next} chose {[*indices.shape]} experts, the "
                f"layer that runs chooses [{tokens}, {top_k}]: tokens must lie on ranks as before"
            )
        self.next += 1
        return indices


_RECORD: ContextVar[list[Tensor] | None] = ContextVar("warploom_routing_record", default=None)
_REPLAY: ContextVar[_Replay | None] = ContextVar("warploom_routing_replay", default=None)


@contextmanager
def record_routing() -> Iterator[list[Tensor]]:
    """Collect the indices `[T, k]` int64 of each MoE layer that runs here, in call order."""
    recorded: list[Tensor] = []
    token = _RECORD.set(recorded)
    try:
        yield recorded
    finally:
        _RECORD.reset(token)


@contextmanager
def replay_routing(recorded: Sequence[Tensor]) -> Iterator[None]:
    """Have each MoE layer that runs here serve its tokens by the recorded experts, in call order.

    Args:
        recorded: What `record_routing` collected on this rank, on the same tokens.

    Raises:
        RuntimeError: In a layer, if more layers run than were recorded, or with other sizes; here,
            at the end, if fewer ran.
    """
    replay = _Replay(recorded)
    token = _REPLAY.set(replay)
    try:
        yield
    finally:
        _REPLAY.reset(token)
    if replay.next != len(replay.recorded):
        raise RuntimeError(
            f"replay_routing has {len(replay.recorded)} recorded layers, but {replay.next} ran"
        )


def replayed(tokens: int, top_k: int) -> Tensor | None:
    """Return the indices that the layer which runs now must use; None where it is free."""
    replay = _REPLAY.get()
    return None if replay is None else replay.take(tokens, top_k)


def record(indices: Tensor) -> None:
    """Note what a layer chose, where it is recorded."""
    recorded = _RECORD.get()
    if recorded is not None:
        recorded.append(indices)


def in_backward() -> bool:
    """Tell whether autograd runs a backward here: a layer that runs then is run again."""
    return torch._C._current_graph_task_id() != -1
