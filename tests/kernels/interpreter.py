"""A pytest plugin for processes with TRITON_INTERPRET=1: the same interpreter in half the time.

Triton looks through all of `triton.language` for built-in functions before every call of a device
function. The list does not change; here it is made once.
"""

import functools
import inspect

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _builtins(package):
    return [name for name, x in inspect.getmembers(package) if tl.core.is_builtin(x)]


def _patch_builtin(package, *rest):
    for name in _builtins(package):
        found = getattr(package, name)
        if tl.core.is_builtin(found):  # not yet patched
            interpreter._patch_attr(package, name, found, *rest)


def pytest_configure():
    for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        _builtins(package)
    interpreter._patch_builtin = _patch_builtin
