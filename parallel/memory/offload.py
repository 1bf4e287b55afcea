"""Offload of saved activations to host memory.

    with offloaded(least=1 << 20) as moved:
        loss = model.loss(batch)
    loss.backward()                      # what was moved comes back, the next one ahead of its use

Each storage travels once, however many tensors of it are saved, and is as it was to the bit. On
CUDA the copies run on a stream of their own, from and to pinned memory; device memory is free as
soon as its copy has been made. Elsewhere the round trip is through another allocation. Parameters,
and views of them, stay where they are.

torch's `save_on_cpu` copies parameters, copies a storage for each tensor of it, and waits for every
copy.

Source: Rhu et al. 2016, https://arxiv.org/abs/1602.08124, section 3 (offload in the forward,
prefetch in the backward).
"""

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(slots=True)
class Moved:
    """What has travelled.

    Attributes:
        tensors: Saved tensors that were replaced.
        out: Bytes copied to the host; each storage once.
        back: Bytes copied from it.
    """

    tensors: int = 0
    out: int = 0
    back: int = 0


@dataclass(frozen=True, slots=True)
class _Packed:
    """A view of a storage that is on the host."""

    host: "_Host"
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Host:
    """A storage on the host, and its copy on the device while that is used."""

    origin: StorageWeakRef
    bytes: Tensor
    device: torch.device
    order: int
    here: weakref.ref[Any] | None = None
    ahead: tuple[Tensor, torch.cuda.Event] | None = None


@dataclass(slots=True)
class _Mover:
    least: int
    prefetch: int
    moved: Moved = field(default_factory=Moved)
    hosts: "weakref.WeakValueDictionary[tuple[int, int], _Host]" = field(
        default_factory=weakref.WeakValueDictionary
    )
    ordered: list["weakref.ref[_Host]"] = field(default_factory=list)
    streams: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)

    def pack(self, x: Tensor) -> Tensor | _Packed:
        kept = isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter)
        plain = type(x) is Tensor and x.layout == torch.strided and x.device.type != "meta"
        if kept or not plain or x.untyped_storage().nbytes() < self.least:
            return x
        self.moved.tensors += 1
        place = (x.dtype, int(x.storage_offset()), tuple(x.shape), x.stride())
        return _Packed(self._to_host(x), *place)

    def unpack(self, packed: Tensor | _Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        storage = self._to_device(packed.host)
        last = packed.host.order
        ahead = self.prefetch if packed.host.device.type == "cuda" else 0
        for order in range(last - 1, max(last - 1 - ahead, -1), -1):
            host = self.ordered[order]()
            if host is not None and host.ahead is None and _alive(host) is None:
                self._begin(host)
        empty = torch.empty(0, dtype=packed.dtype, device=packed.host.device)
        return empty.set_(storage, packed.offset, packed.size, packed.stride)

    def _stream(self, device: torch.device) -> AbstractContextManager[Any]:
        if device.type != "cuda":
            return nullcontext()
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        stream = self.streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)

    def _to_host(self, x: Tensor) -> _Host:
        storage = x.untyped_storage()
        key = (storage._cdata, x._version)
        host = self.hosts.get(key)
        if host is not None and not host.origin.expired():
            return host
        raw = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
        cuda = x.device.type == "cuda"
        copy = torch.empty(raw.shape, dtype=torch.uint8, pin_memory=cuda)
        with self._stream(x.device):
            copy.copy_(raw, non_blocking=cuda)
        if cuda:
            raw.record_stream(self.streams[x.device])
        self.moved.out += raw.numel()
        host = _Host(StorageWeakRef(storage), copy, x.device, len(self.ordered))
        self.hosts[key] = host
        self.ordered.append(weakref.ref(host))
        return host

    def _begin(self, host: _Host) -> Tensor:
        """Copy to the device; on CUDA beside what runs there now."""
        raw = torch.empty(host.bytes.shape, dtype=torch.uint8, device=host.device)
        with self._stream(host.device):
            raw.copy_(host.bytes, non_blocking=True)
        if host.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(self.streams[host.device])
            host.ahead = (raw, event)
        self.moved.back += raw.numel()
        return raw

    def _to_device(self, host: _Host) -> torch.UntypedStorage:
        storage = _alive(host)
        if storage is None:
            raw = self._begin(host) if host.ahead is None else host.ahead[0]
            if host.ahead is not None:
                torch.cuda.current_stream(host.device).wait_event(host.ahead[1])
                host.ahead = None
            storage = raw.untyped_storage()
            host.here = weakref.ref(storage)
        return storage


def _alive(host: _Host) -> torch.UntypedStorage | None:
    return None if host.here is None else host.here()


@contextmanager
def offloaded(*, least: int = 1 << 20, prefetch: int = 1) -> Iterator[Moved]:
    """Move what is saved for the backward to host memory while the context is open.

    The backward may run after it has closed. A tensor that is saved must not be changed in place
    before its backward: autograd would refuse, and cannot see it here.

    Args:
        least: Bytes of the smallest storage that moves.
        prefetch: Storages that are fetched ahead of their use, in the reverse of the order in which
            they were saved; on CUDA alone.

    Raises:
        ValueError: If `least` or `prefetch` is negative.
    """
    if least < 0 or prefetch < 0:
        raise ValueError(
            f"least and prefetch must be at least 0; got least={least}, prefetch={prefetch}"
        )
    mover = _Mover(least, prefetch)
    with torch.autograd.graph.saved_tensors_hooks(mover.pack, mover.unpack):
        yield mover.moved
