"""Read the plain data of a pickle without running it.

The checkpoints of other projects describe themselves in pickles, which can name any function and
have it called. Here the stream of opcodes is only read (`pickletools` decodes, it executes
nothing): numbers, strings and containers become themselves; an object becomes a `Record` of its
name, arguments and state, if its name is on the caller's list; anything else is an error. No name
is ever looked up or imported.
"""

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NOTHING = ("PROTO", "FRAME", "STOP")
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}


@dataclass(eq=False, slots=True)
class Record:
    """An object that a pickle describes.

    Attributes:
        name: Its class or function, as `module.name`.
        args: What it is called with; `None` for the class or function itself.
        state: What it is filled with.
    """

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None

    def key(self) -> Any:
        """Return what stands for it as a key of a dict: name and arguments, or state."""
        return self.name, self.args, str(self.state)


class _Machine:
    def __init__(self, allowed: Collection[str], what: str) -> None:
        self.allowed, self.what = allowed, what
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def refuse(self, found: str) -> ValueError:
        return ValueError(
            f"{self.what} may hold plain data and known names alone, it holds {found}: it is "
            f"damaged, or of a kind that is not read; nothing was run"
        )

    def marked(self) -> list[Any]:
        at = max(i for i, x in enumerate(self.stack) if x is _MARK)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def named(self, name: str) -> Record:
        if name not in self.allowed:
            raise self.refuse(f"the name {name}")
        return Record(name)

    def call(self, function: Any, args: Any) -> Record:
        if not isinstance(function, Record) or function.args is not None:
            raise self.refuse(found="a call of something that is no name")
        return Record(function.name, tuple(args))

    def step(self, op: str, arg: Any) -> None:
        """Run one opcode on the stack."""
        stack = self.stack
        if op in _NOTHING:
            return
        if op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif (
            op.startswith(("BININT", "LONG", "INT"))
            and not op.endswith(("PUT", "GET"))
            or op.endswith(("UNICODE", "UNICODE8", "FLOAT"))
            or "BYTES" in op
        ):
            stack.append(arg)
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op.endswith("PUT"):
            self.memo[arg] = stack[-1]
        elif op.endswith("GET"):
            stack.append(self.memo[arg])
        elif op == "MARK":
            stack.append(_MARK)
        elif op.startswith("TUPLE"):
            items = self.marked() if op == "TUPLE" else self.popped(int(op[-1]))
            stack.append(tuple(items))
        elif op in ("APPEND", "APPENDS"):
            items = self.marked() if op == "APPENDS" else [stack.pop()]
            stack[-1].extend(items)
        elif op in ("SETITEM", "SETITEMS"):
            items = self.marked() if op == "SETITEMS" else self.popped(2)
            keys = [k.key() if isinstance(k, Record) else k for k in items[::2]]
            stack[-1].update(zip(keys, zip(items[::2], items[1::2], strict=True), strict=True))
        else:
            self.build(op, arg)

    def popped(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def build(self, op: str, arg: Any) -> None:
        """Run an opcode that makes an object."""
        if op == "GLOBAL":
            self.stack.append(self.named(arg.replace(" ", ".")))
        elif op == "STACK_GLOBAL":
            self.stack.append(self.named(".".join(self.popped(2))))
        elif op in ("REDUCE", "NEWOBJ"):
            self.stack.append(self.call(*self.popped(2)))
        elif op == "BUILD":
            target, state = self.popped(2)
            if not isinstance(target, Record):
                raise self.refuse(found="a state for something that is no object")
            target.state = state
            self.stack.append(target)
        elif op == "BINPERSID":
            self.stack.append(Record("persistent", self.stack.pop()))
        else:
            raise self.refuse(f"the instruction {op}")


def read(data: bytes, allowed: Collection[str], what: str) -> Any:
    """Return what a pickle describes.

    A dict's values are pairs of key and value, since a key may be a `Record`; see `plain`.

    Args:
        data: The pickle.
        allowed: Names that it may use, as `module.name`.
        what: What it is, for the error.

    Raises:
        ValueError: If it uses another name or instruction, or is cut short.
    """
    machine = _Machine(allowed, what)
    try:
        stream = [(opcode.name, arg) for opcode, arg, _ in pickletools.genops(data)]
    except ValueError as error:
        raise machine.refuse(f"no pickle ({error})") from error
    try:
        for name, arg in stream:
            machine.step(name, arg)
        (result,) = machine.stack
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise machine.refuse(f"something that does not fit ({error})") from error
    return result


def plain(found: Any) -> dict[str, Any]:
    """Return a dict of `read` whose keys are strings as an ordinary one."""
    return {key: value for key, value in found.values() if isinstance(key, str)}
