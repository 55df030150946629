"""What a pickle says, as plain data: nothing is imported, called or unpickled.

`torch.load(weights_only=True)` runs a list of functions that a file may name, and some of them allocate what the file
asks for (386 bytes that say `bytearray(3000000000)` take 3 GB). Here a global is its name, a call is the function's
name with its arguments, and whoever asked decides what they mean. Time and memory are linear in the pickle's length.
"""

import pickletools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from umv2_export.errors import InputRejected, shown

__all__ = ["Call", "Global", "Persistent", "read_pickle"]

# A state dict of 1000 tensors with its optimizer has 100,000 opcodes; a million take 3 s.
MAX_OPCODES = 10**6

# Sizes and offsets fit in 8 bytes, and nothing else in these files is an integer.
MAX_INTEGER_BYTES = 9

# An attribute of every module's state dict: version numbers of its layers.
_METADATA = "_metadata"


@dataclass(frozen=True)
class Global:
    """A name that unpickling would import."""

    name: str


@dataclass
class Call:
    """A call that unpickling would make.

    Attributes:
        function: name of the function or class.
        arguments: of the call.
        state: what unpickling would set on the result.
    """

    function: str
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True)
class Persistent:
    """A reference to something outside of the pickle: a storage in the same archive."""

    identifier: Any


@dataclass
class _Machine:
    """The unpickler's stack and memo. A mark is the list that was interrupted by it."""

    allowed: Collection[str]
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items


def read_pickle(data: bytes, allowed: Collection[str], *, most_operations: int = MAX_OPCODES) -> Any:
    """Read a pickle.

    Args:
        data: the pickle, and nothing behind it.
        allowed: globals that it may name, as `module.name`.
        most_operations: more are not read.

    Returns:
        Dictionaries, lists, tuples, strings, numbers, and the classes of this module. Values are shared as in the
        pickle, so a tuple of tuples may be exponentially larger than its memory: nobody should walk through it all.

    Raises:
        InputRejected: the pickle is corrupt, or holds more than was allowed.
    """
    machine = _Machine(allowed)
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if opcode.name == "STOP":
                if len(machine.stack) != 1 or machine.marks:
                    raise InputRejected("the pickle is corrupt", why="it ends with more or less than one value")
                if position != len(data) - 1:
                    raise InputRejected("the pickle is corrupt", why="bytes follow its end")
                return machine.stack[0]
            if count > most_operations:
                raise InputRejected(
                    f"the pickle holds more than {most_operations} operations", why="no checkpoint does"
                )
            step = _STEPS.get(opcode.name)
            if step is None:
                raise _forbidden(f"operation {opcode.name}")
            step(machine, argument)
    except InputRejected:
        raise
    except Exception as error:  # a stack that runs empty, an unknown key, bytes that end: the reader's errors vary
        raise InputRejected("the pickle is corrupt", why=f"{type(error).__name__}: {error}"[:200]) from error
    raise InputRejected("the pickle is corrupt", why="it does not end")


def _forbidden(what: str) -> InputRejected:
    return InputRejected(
        "the file holds more than tensors",
        why=f"{what}; loading what no state dict needs would run code from the file, or let it take any memory",
        fix="save the state dict alone: torch.save(model.state_dict(), ...)",
    )


def _push(machine: _Machine, value: object) -> None:
    machine.stack.append(value)


def _push_integer(machine: _Machine, value: int) -> None:
    if value.bit_length() > 8 * MAX_INTEGER_BYTES:
        raise _forbidden(f"an integer of {value.bit_length()} bits")
    machine.stack.append(value)


def _mark(machine: _Machine, _: object) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _tuple_of(size: int) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, _: object) -> None:
        if len(machine.stack) < size:
            raise IndexError("the stack is empty")
        start = len(machine.stack) - size
        machine.stack[start:] = [tuple(machine.stack[start:])]

    return step


def _tuple(machine: _Machine, _: object) -> None:
    items = machine.to_mark()
    machine.stack.append(tuple(items))


def _list(machine: _Machine, _: object) -> None:
    items = machine.to_mark()
    machine.stack.append(items)


def _append(machine: _Machine, _: object) -> None:
    value = machine.stack.pop()
    _extend(machine.stack[-1], [value])


def _appends(machine: _Machine, _: object) -> None:
    items = machine.to_mark()
    _extend(machine.stack[-1], items)


def _extend(target: object, items: list[Any]) -> None:
    if type(target) is not list:
        raise TypeError("items are appended to what is not a list")
    target.extend(items)


def _set_item(machine: _Machine, _: object) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _update(machine.stack[-1], [key, value])


def _set_items(machine: _Machine, _: object) -> None:
    items = machine.to_mark()
    _update(machine.stack[-1], items)


def _update(target: object, items: list[Any]) -> None:
    """Set items of a dictionary: keys are strings and numbers, whose hashes are cheap, or calls, by identity."""
    if type(target) is not dict:
        raise TypeError("items are set of what is not a dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, Call):
            target[id(key)] = (key, value)
        elif key is not None and not isinstance(key, str | int | float):
            raise _forbidden(f"a key of type {type(key).__name__}")
        elif key in target:
            raise InputRejected(f"the pickle holds key {shown(key)} twice")
        else:
            target[key] = value


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _memoize(machine: _Machine, _: object) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(machine: _Machine, index: int) -> None:
    machine.stack.append(machine.memo[index])


def _global(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    _push_global(machine, f"{module}.{name}")


def _stack_global(machine: _Machine, _: object) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise TypeError("a global without a name")
    _push_global(machine, f"{module}.{name}")


def _push_global(machine: _Machine, name: str) -> None:
    if name not in machine.allowed:
        raise _forbidden(f"it names {shown(name)}")
    machine.stack.append(Global(name))


def _call(machine: _Machine, _: object) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise _forbidden("a call of what is not a global")
    if function.name == "collections.OrderedDict" and not arguments:
        machine.stack.append({})
    else:
        machine.stack.append(Call(function.name, arguments))


def _build(machine: _Machine, _: object) -> None:
    state, target = machine.stack.pop(), machine.stack[-1]
    if isinstance(target, Call):
        target.state = state
    elif type(target) is not dict or not isinstance(state, Mapping) or state.keys() - {_METADATA}:
        raise _forbidden("attributes are set")


def _persistent(machine: _Machine, _: object) -> None:
    machine.stack.append(Persistent(machine.stack.pop()))


def _nothing(machine: _Machine, _: object) -> None:
    """PROTO and FRAME change nothing."""


_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "NONE": lambda machine, _: _push(machine, None),
    "NEWTRUE": lambda machine, _: _push(machine, True),
    "NEWFALSE": lambda machine, _: _push(machine, False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _push_integer),
    **dict.fromkeys(("BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), _push),
    "MARK": _mark,
    "EMPTY_TUPLE": lambda machine, _: _push(machine, ()),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": _tuple,
    "EMPTY_LIST": lambda machine, _: _push(machine, []),
    "LIST": _list,
    "APPEND": _append,
    "APPENDS": _appends,
    "EMPTY_DICT": lambda machine, _: _push(machine, {}),
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _get),
    "MEMOIZE": _memoize,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _call),
    "BUILD": _build,
    "BINPERSID": _persistent,
}
