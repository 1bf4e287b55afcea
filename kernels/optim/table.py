"""Many tensors in one launch: a table of their addresses, and which program works on which part.

The table is one int64 vector: a row a tensor (an address in each column, the size in elements, the
first chunk, whether all addresses are multiples of 16 bytes), then the tensor of each chunk of
CHUNK elements. Program p reads its tensor behind the rows, then that tensor's row. Sizes, addresses
and chunk numbers are 64-bit, so that a tensor may have more than 2^31 elements.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 14  # elements a program: 300 KB of AdamW's traffic, so that the last wave is short
_BYTES = 16  # widest access


class Plan(NamedTuple):
    """A table that is kept: a CUDA graph may not copy one to the device.

    Attributes:
        key: Hash of the rows, 0-dim int64 in host memory; a call compares it with its tensors'.
        table: int64 vector on the tensors' device.
    """

    key: Tensor
    table: Tensor


def _addresses(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return `[columns, tensors]` int64; on the meta device addresses that are aligned and free."""
    count = len(columns[0])
    found = [
        [
            t.data_ptr() if t.device.type != "meta" else (c * count + n + 1) << 44
            for n, t in enumerate(column)
        ]
        for c, column in enumerate(columns)
    ]
    return torch.tensor(found, dtype=torch.int64)


def _build(columns: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the rows `[tensors, columns + 3]`, and the tensor of each chunk, in host memory."""
    addresses = _addresses(columns)
    sizes = torch.tensor([t.numel() for t in columns[0]], dtype=torch.int64)
    chunks = (sizes + CHUNK - 1) // CHUNK
    aligned = (addresses % _BYTES == 0).all(0).long()
    rows = torch.stack([*addresses, sizes, chunks.cumsum(0) - chunks, aligned], 1)
    return rows, torch.repeat_interleave(chunks)


def _key(rows: Tensor) -> int:
    return hash(tuple(rows.flatten().tolist()))


def _upload(rows: Tensor, owners: Tensor, device: torch.device) -> Tensor:
    host = torch.cat([rows.flatten(), owners])
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def plan(*columns: Sequence[Tensor]) -> Plan:
    """Build the table of an operator over many tensors ahead of its calls.

    A call without a plan builds one and copies it to the device. A call that a CUDA graph captures
    needs one, and the tensors that it was made for.

    Args:
        columns: The lists of tensors of the call, in its order: for `adamw_` parameters, gradients,
            means, squares and, where there are any, masters or remainders; for the norm and the
            scaling the tensors. Any dtypes, contiguous.

    Returns:
        The plan; it holds until one of the tensors is replaced. A captured graph reads its table:
        keep the plan as long as the graph.

    Raises:
        ValueError: If the lists are empty or differ in length, or tensors share memory.
    """
    if not columns or not columns[0] or len({len(column) for column in columns}) > 1:
        raise ValueError(
            f"plan: the lists must have one length, at least 1; got {[len(c) for c in columns]}"
        )
    names = {f"list {n}": column for n, column in enumerate(columns)}
    refuse_shared_memory("plan", names)
    rows, owners = _build(columns)
    return Plan(torch.tensor(_key(rows)), _upload(rows, owners, columns[0][0].device))


def device_table(
    op: str, columns: Sequence[Sequence[Tensor]], planned: Sequence[Tensor] | None
) -> tuple[Tensor, int]:
    """Return the table of a call on its device, and the number of chunks.

    Args:
        op: Operator, for the message.
        columns: Lists of contiguous tensors on one device, not empty.
        planned: A plan, or None to build the table now.

    Raises:
        ValueError: If the plan is of other tensors.
        RuntimeError: If a CUDA graph is being captured and there is no plan.
    """
    rows, owners = _build(columns)
    device = columns[0][0].device
    if planned is not None:
        if int(planned[0]) != _key(rows):
            raise ValueError(
                f"{op}: the plan is of other tensors than the {len(columns[0])} given: make a new "
                f"plan() when one is replaced, and keep them contiguous"
            )
        return planned[1], len(owners)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op}: a CUDA graph cannot copy the table of {len(columns[0])} tensors to the device: "
            f"make it with plan() before the capture and pass plan="
        )
    return _upload(rows, owners, device), len(owners)


def refuse_shared_memory(op: str, columns: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse tensors that overlap: what is written last would depend on the order of programs.

    Args:
        op: Operator, for the message.
        columns: Lists of contiguous tensors of one device, by name.

    Raises:
        ValueError: If any two share memory.
    """
    lists = [*columns.values()]
    begin = _addresses(lists).flatten()
    size = torch.tensor([[t.nbytes for t in column] for column in lists]).flatten()
    filled = size.nonzero().squeeze(1)
    order = filled[begin[filled].argsort()]
    over = begin[order][1:] < (begin + size)[order][:-1]
    if over.any():
        first = int(over.nonzero()[0])
        names = [f"{name}[{n}]" for name, column in columns.items() for n in range(len(column))]
        one, other = sorted(names[int(i)] for i in order[first : first + 2])
        raise ValueError(f"{op}: no two tensors may share memory, but {one} and {other} do")
