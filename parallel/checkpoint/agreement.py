"""What ranks tell each other on the main thread: an error of one is an error of all."""

from typing import Any

from ..collectives import gather_json
from ..mesh import Mesh
from .folders import CheckpointError

_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (CheckpointError, ValueError, TypeError, RuntimeError)
}


def agree(mesh: Mesh | None, error: Exception | None, value: Any = None) -> list[Any]:
    """Gather a JSON value of every rank, or raise on all of them; a collective call.

    Args:
        mesh: Over its world; `None` for this process alone.
        error: What went wrong here, or `None`.
        value: What to tell where nothing did.

    Raises:
        Exception: Of the kind that the lowest rank with an error has, so that all ranks go the
            same way on; the rank's own where that is of this kind, else the lowest's, by rank.
    """
    mine = {"value": value} if error is None else {"kind": _kind(error), "text": str(error)}
    told = gather_json(mine, None if mesh is None else mesh.world)
    for rank, item in enumerate(told):
        if "kind" in item:
            if error is not None and _kind(error) == item["kind"]:
                raise error
            raise _KINDS[item["kind"]](f"rank {rank}: {item['text']}")
    return [item["value"] for item in told]


def _kind(error: Exception) -> str:
    return next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "RuntimeError")
