"""Words for a collective and for the place that called it."""

import math
import sys
from numbers import Real
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from ..collectives import Call

_LIBRARY = Path(__file__).parents[1].resolve()
_SKIPPED = (
    str(_LIBRARY / "collectives"), str(_LIBRARY / "faults"), str(Path(torch.__file__).parent),
)  # fmt: skip


def check_patience(patience_s: float) -> None:
    """Check how long to be patient.

    Raises:
        ValueError: If it is not a finite number above 0.
    """
    if not (isinstance(patience_s, Real) and 0 < patience_s < math.inf):
        raise ValueError(f"patience_s must be a finite number of seconds above 0, got {patience_s}")


def members(group: dist.ProcessGroup) -> tuple[int, ...]:
    """Return the group's ranks in the world, in the group's order."""
    return tuple(dist.get_process_group_ranks(group))


def group_key(group: dist.ProcessGroup) -> str:
    """Name a group by its ranks, the same on each of them."""
    return "+".join(map(str, members(group)))


def what(call: Call) -> str:
    """Describe what a rank brings, such as `all_reduce of [4] float32 (sum)`."""
    if call.op == "exchange":
        ranks = members(call.group)
        parts = [
            f"{m.elements} {_short(m.dtype)} {'to' if m.sent else 'from'} rank {ranks[m.peer]}"
            for m in call.messages
        ]
        return f"exchange of {', '.join(parts)}"
    detail = f" ({call.detail})" if call.detail else ""
    return f"{call.op} of {[*call.shape]} {_short(call.dtype)}{detail}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def place(frame: FrameType | None = None) -> str:
    """Return `file:line in function` of the innermost caller outside collectives and torch.

    Args:
        frame: Where to begin; by default the caller's.
    """
    at: FrameType | None = frame or sys._getframe(1)
    innermost = at
    while at is not None:
        file = str(Path(at.f_code.co_filename).resolve())
        if not file.startswith((*_SKIPPED, "<")) and not file.endswith("contextlib.py"):
            return f"{file}:{at.f_lineno} in {at.f_code.co_name}"
        at = at.f_back
    assert innermost is not None
    return f"{innermost.f_code.co_filename}:{innermost.f_lineno}"
