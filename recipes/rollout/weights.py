"""Whether a model's parameters are those that pages of keys and values were computed with."""

from typing import Any

import torch
from torch import Tensor

from warploom.parallel.collectives import gather_json

_EACH = 4  # elements that are read along a dimension


def _mark(x: Tensor) -> tuple[int, int]:
    """Where a tensor lies and how often it was written to; inference tensors do not count."""
    return x.data_ptr(), 0 if x.is_inference() else x._version


def _sample(x: Tensor) -> Tensor:
    """Return bytes of a few elements, spread over all of it."""
    spread = tuple(slice(None, None, max(1, -(-n // _EACH))) for n in x.shape)
    return x.detach()[spread].reshape(-1).clone().view(torch.uint8)


class Weights:
    """Watches a model's parameters, and buffers such as routers' biases; reads a few elements.

    Args:
        model: On one rank or tensor-parallel.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._group = None if model.mesh is None else model.mesh.tp
        self._marks = self._now()

    def _now(self) -> tuple[list[tuple[int, int]], bytes]:
        held = [*self._model.parameters(), *self._model.buffers()]
        read = torch.cat([_sample(x) for x in held]).cpu()
        return [_mark(x) for x in held], read.numpy().tobytes()

    def changed(self) -> bool:
        """Tell whether any rank's were written to or replaced since the last call.

        A collective call: all ranks answer the same. A write that autograd does not count, as one
        to `.data` or by a fused optimizer, is seen where it changes an element that is read: up to
        four along each dimension.
        """
        before, self._marks = self._marks, self._now()
        return any(gather_json(before != self._marks, self._group))
