"""Whether a model's parameters are those that pages of keys and values were computed with."""

from typing import Any

from torch import Tensor

from warploom.parallel.collectives import gather_json


def _mark(parameter: Tensor) -> tuple[int, int]:
    """Where a parameter lies and how often it was written to; inference tensors do not count."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


class Weights:
    """Watches the parameters of a model, without reading them.

    Args:
        model: On one rank or tensor-parallel.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._group = None if model.mesh is None else model.mesh.tp
        self._marks = self._now()

    def _now(self) -> list[tuple[int, int]]:
        return [_mark(parameter) for parameter in self._model.parameters()]

    def changed(self) -> bool:
        """Tell whether any rank's were written to or replaced since the last call.

        A collective call: all ranks answer the same. A write that autograd does not count, such as
        one to `.data`, is not seen.
        """
        before, self._marks = self._marks, self._now()
        return any(gather_json(before != self._marks, self._group))
