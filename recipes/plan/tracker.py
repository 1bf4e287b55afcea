"""Peaks of live bytes, by cause, and where in the model they are reached.

    with track(model=model, optimizer=optimizer) as seen:
        step(batches)
    seen.peak.total, seen.peak.by["activations"], seen.peak.at

A dispatch mode sees every tensor that an operator returns, and a weak reference to its storage when
it dies: the count is exact in bytes of storages, at any moment, and the same on a CPU as on a GPU.

    cause           a storage is counted so
    parameters      of the model's parameters and buffers
    gradients       while it is some parameter's `.grad`; and all that `gradients` holds
    optimizer       all that `optimizer` holds
    activations     while autograd keeps it for a backward; a storage once, parameters never
    communication   passed through a collective, and none of the above
    temporaries     what is left

A storage that was there before counts while autograd keeps it, or if the model, optimizer or
gradients hold it. What an operator allocates and frees inside itself is not seen; nor is what an
inner pair of saved-tensor hooks (recomputation, offload) keeps: that is a temporary.

Source: Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4 (what is kept for the
backward); Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 3 (the causes).
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from warploom.parallel.collectives import Group, gather_json

CAUSES = ("parameters", "gradients", "optimizer", "activations", "communication", "temporaries")
_PARAMETERS, _GRADIENTS, _OPTIMIZER, _ACTIVATIONS, _COMMUNICATION, _TEMPORARIES = CAUSES
_LOOSE = (_COMMUNICATION, _TEMPORARIES)  # what autograd may claim


@dataclass(frozen=True, slots=True)
class Peak:
    """The moment of the most live bytes.

    Attributes:
        total: Bytes.
        by: Bytes of each cause at that moment.
        at: Path of the module that ran, with ` (backward)` after it in its backward; empty outside.
    """

    total: int = 0
    by: dict[str, int] = field(default_factory=dict)
    at: str = ""


@dataclass(slots=True)
class _Block:
    """A live storage."""

    bytes: int
    cause: str
    weak: "weakref.ref[torch.UntypedStorage] | None" = None
    saves: int = 0
    ours: bool = True  # counted when autograd does not keep it, too
    before: str = _TEMPORARIES  # what it is once autograd lets go


class Seen:
    """What was measured on this rank.

    Attributes:
        live: Bytes of each cause now.
        highest: The most bytes of each cause, each at its own moment.
        peak: The moment of the most bytes in all.
        cuda: torch's own peak of allocated bytes on the current CUDA device; `None` without one.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.live = dict.fromkeys(CAUSES, 0)
        self.highest = dict.fromkeys(CAUSES, 0)
        self.peak = Peak()
        self.cuda: int | None = None
        self._total = 0
        self._blocks: dict[int, _Block] = {}
        self._inside: list[str] = []
        self._backward = ""

    def gather(self, group: Group) -> list[dict[str, Any]]:
        """Return peak, highest and cuda of every rank of `group`, in rank order: plain JSON."""
        own = {"peak": asdict(self.peak), "highest": self.highest, "cuda": self.cuda}
        return gather_json(own, group)

    def _where(self) -> str:
        if self._inside:
            return self._inside[-1]
        return self._backward if torch._C._current_graph_task_id() >= 0 else ""

    def _shift(self, block: _Block, change: int, cause: str | None = None) -> None:
        """Change a block's bytes, or move them to another cause."""
        if cause is not None:
            self.live[block.cause] -= block.bytes
            block.cause = cause
            self.live[cause] += block.bytes
        else:
            block.bytes += change
            self.live[block.cause] += change
            self._total += change
        now = self.live[block.cause]
        self.highest[block.cause] = max(self.highest[block.cause], now)
        # equal totals count too: what has just been made is often claimed right after
        if self._total >= self.peak.total and (change > 0 or cause not in (None, _TEMPORARIES)):
            self.peak = Peak(self._total, dict(self.live), self._where())

    def _meet(self, x: Tensor, cause: str, *, ours: bool = True) -> _Block | None:
        """Count the storage of `x` if it is new, and say what is known of it."""
        if x.layout != torch.strided or x.device.type != self.device:
            return None
        storage = x.untyped_storage()
        key = storage._cdata
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Block(0, cause, ours=ours)
            block.weak = weakref.ref(storage, lambda _: self._forget(key))
        if block.bytes != storage.nbytes():
            self._shift(block, storage.nbytes() - block.bytes)
        return block

    def _forget(self, key: int) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            self._shift(block, -block.bytes)

    def _claim(self, x: Tensor, cause: str) -> None:
        """Count the storage of `x` under `cause` until it dies, or a later claim."""
        block = self._meet(x, cause)
        if block is not None and block.cause in (*_LOOSE, _ACTIVATIONS) and block.cause != cause:
            if block.cause == _ACTIVATIONS and cause in _LOOSE:
                block.before = cause
                return
            block.ours = True
            self._shift(block, 0, cause)

    def _save(self, x: Tensor) -> _Block | None:
        block = self._meet(x, _ACTIVATIONS, ours=False)
        if block is not None:
            block.saves += 1
            if block.cause in _LOOSE:
                block.before = block.cause
                self._shift(block, 0, _ACTIVATIONS)
        return block

    def _release(self, block: _Block) -> None:
        block.saves -= 1
        if block.saves or block.cause != _ACTIVATIONS:
            return
        storage = None if block.weak is None else block.weak()
        if storage is not None and self._blocks.get(storage._cdata) is block:
            if block.ours:
                self._shift(block, 0, block.before)
            else:
                self._forget(storage._cdata)


class _Saved:
    """A tensor that autograd keeps; its end is the end of the keeping."""

    __slots__ = ("block", "seen", "where", "x")

    def __init__(self, seen: Seen, x: Tensor) -> None:
        self.x, self.seen = x, seen
        self.block = seen._save(x)
        self.where = seen._inside[-1] if seen._inside else ""

    def unpack(self) -> Tensor:
        self.seen._backward = f"{self.where} (backward)" if self.where else ""
        return self.x

    def __del__(self) -> None:
        if self.block is not None:
            self.seen._release(self.block)


class _Watch(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        travels = func.namespace in ("c10d", "_c10d_functional")
        for x in tree_leaves((args, kwargs, result) if travels else result):
            if isinstance(x, Tensor):
                if travels:
                    self.seen._claim(x, _COMMUNICATION)
                else:
                    self.seen._meet(x, _TEMPORARIES)
        return result


def _tensors(holder: Any, done: set[int]) -> Iterator[Tensor]:
    """Yield every tensor that `holder` reaches through attributes, mappings and sequences."""
    if id(holder) in done or isinstance(holder, nn.Module | type | str | bytes):
        return
    done.add(id(holder))
    if isinstance(holder, Tensor):
        yield holder
    elif isinstance(holder, dict):
        for value in list(holder.values()):
            yield from _tensors(value, done)
    elif isinstance(holder, list | tuple):
        for value in holder:
            yield from _tensors(value, done)
    elif type(holder).__module__.startswith(("warploom.", "torch.optim")):
        names = [n for c in type(holder).__mro__ for n in getattr(c, "__slots__", ())]
        yield from _tensors([getattr(holder, n, None) for n in names], done)
        yield from _tensors(getattr(holder, "__dict__", {}), done)


def _modules(seen: Seen, model: nn.Module, stack: ExitStack) -> None:
    """Keep `seen` told of the module that runs."""

    def entering(path: str) -> Callable[..., None]:
        return lambda *_: seen._inside.append(path)

    def leave(*_: Any) -> None:
        seen._inside.pop()

    for path, module in model.named_modules():
        name = path or type(model).__name__
        before = module.register_forward_pre_hook(entering(name), prepend=True)
        stack.callback(before.remove)
        stack.callback(module.register_forward_hook(leave, always_call=True).remove)


def _gradients(seen: Seen, model: nn.Module, stack: ExitStack) -> None:
    """Tell gradients as they are accumulated."""

    def arrived(parameter: Tensor) -> None:
        if parameter.grad is not None:
            seen._claim(parameter.grad, _GRADIENTS)

    for parameter in model.parameters():
        if parameter.requires_grad:
            arrived(parameter)
            stack.callback(parameter.register_post_accumulate_grad_hook(arrived).remove)


@contextmanager
def track(
    *,
    model: nn.Module | None = None,
    optimizer: Any = None,
    gradients: Any = None,
    device: str | None = None,
) -> Iterator[Seen]:
    """Measure the live bytes of this rank while the context is open.

    Args:
        model: Tells its parameters and gradients, and where a peak is reached.
        optimizer: Of this library or of torch, or any dict or list of tensors: its state. What
            torch's creates in its first step is temporary until the end of that step.
        gradients: What else holds gradients, such as `Step.gradients`.
        device: Kind of device that is counted; by default that of the model's parameters, or `cpu`.

    Yields:
        The measurement, current while the context is open and kept after it.
    """
    first = None if model is None else next(model.parameters(), None)
    seen = Seen(device or (first.device.type if first is not None else "cpu"))

    def hold(holder: Any, cause: str) -> None:
        for x in list(_tensors(holder, set())):
            seen._claim(x, cause)

    with ExitStack() as stack:
        stack.callback(seen._blocks.clear)
        if model is not None:
            hold([*model.parameters(), *model.buffers()], _PARAMETERS)
            _gradients(seen, model, stack)
            _modules(seen, model, stack)
        hold(gradients, _GRADIENTS)
        hold(optimizer, _OPTIMIZER)
        if isinstance(optimizer, torch.optim.Optimizer):
            after = optimizer.register_step_post_hook(lambda o, *_: hold(o.state, _OPTIMIZER))
            stack.callback(after.remove)
        if seen.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: _Saved(seen, x), _Saved.unpack)
        stack.enter_context(hooks)
        stack.enter_context(_Watch(seen))
        yield seen
        if seen.device == "cuda":
            seen.cuda = torch.cuda.max_memory_allocated()
