"""A pytest plugin for processes with TRITON_INTERPRET=1: quicker, and no access outside a tensor.

Triton looks through all of `triton.language` for built-in functions before every call of a device
function. The list does not change; here it is made once.

The interpreter reads and writes whatever an address points at. Here it must lie in one of the
tensors that the launch was given: what is read too far and then masked has no wrong value to show.
A kernel that makes pointers of numbers, from a list of addresses, is let alone from there on.
"""

import functools
import inspect

import numpy as np
import torch
import triton.language as tl
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

ACCESSES = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")


@functools.cache
def _builtins(package):
    return [name for name, x in inspect.getmembers(package) if tl.core.is_builtin(x)]


def _patch_builtin(package, *rest):
    for name in _builtins(package):
        found = getattr(package, name)
        if tl.core.is_builtin(found):  # not yet patched
            interpreter._patch_attr(package, name, found, *rest)


class Memory:
    """The bytes of the tensors of a launch.

    Attributes:
        starts: First byte of each tensor, ascending.
        ends: Byte after the last one, of the tensors up to this one.
        known: Whether the kernel has no pointers but these.
    """

    def __init__(self, arguments):
        tensors = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor) and x.numel()]
        spans = sorted((x.data_ptr(), x.data_ptr() + self._size(x)) for x in tensors)
        self.starts = np.array([a for a, _ in spans], dtype=np.uint64)
        self.ends = np.maximum.accumulate(np.array([b for _, b in spans], dtype=np.uint64))
        self.known = True

    def _size(self, x):
        pairs = zip(x.shape, x.stride(), strict=True)
        return (sum((n - 1) * s for n, s in pairs) + 1) * x.element_size()

    def check(self, name, addresses, itemsize):
        """Raise if an element lies outside."""
        if not addresses.size or not self.known:
            return
        first = np.searchsorted(self.starts, addresses.min(), side="right") - 1
        if first >= 0 and addresses.max() + np.uint64(itemsize) <= self.ends[first]:
            return
        at = np.searchsorted(self.starts, addresses, side="right") - 1
        bad = (at < 0) | (addresses + np.uint64(itemsize) > self.ends[at])
        if bad.any():
            raise IndexError(f"{name}: {bad.sum()} of {bad.size} elements lie outside all tensors")


def _hold_to_tensors():
    """Check every access of every launch."""
    memory = {}
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    prepare = executor._init_args_hst

    def prepared(self, args, kwargs):
        found = prepare(self, args, kwargs)
        memory["now"] = Memory(found)
        return found

    def cast(self, *args):
        memory["now"].known = False
        return to_pointer(self, *args)

    to_pointer = builder.create_int_to_ptr
    executor._init_args_hst, builder.create_int_to_ptr = prepared, cast
    for name in ACCESSES:
        _check_first(builder, name, memory)


def _check_first(builder, name, memory):
    access = getattr(builder, name)
    masks = {"create_masked_load": 1, "create_masked_store": 2, "create_atomic_rmw": 3}

    def checked(self, *args):
        pointers = args[1] if name == "create_atomic_rmw" else args[0]
        addresses = np.atleast_1d(pointers.data)
        if name in masks:
            mask = np.atleast_1d(args[masks[name]].data) != 0  # some are of int32
            addresses = addresses[np.broadcast_to(mask, addresses.shape)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        memory["now"].check(f"{name[7:]} of {size} bytes", addresses, size)
        return access(self, *args)

    setattr(builder, name, checked)


def pytest_configure():
    for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        _builtins(package)
    interpreter._patch_builtin = _patch_builtin
    _hold_to_tensors()
