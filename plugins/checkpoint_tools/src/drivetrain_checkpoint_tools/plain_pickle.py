"""Reading pickles as data: nothing is imported and nothing called but what is listed here.

Pickles are programs for a small machine. This one knows the instructions that plain data and
tensors need. It makes plain containers, so that no instruction can have it hash, compare or
allocate more than the pickle is long.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any

SIMPLE = (str, bytes, int, float, bool, type(None))
"""What may be a key; hashing tuples that hold each other twice takes for ever."""

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class RefusedError(Exception):
    """A pickle asks for something that is not loaded for safety."""


class Inert:
    """Stands in for an object of a class that is not here: keeps its state, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def load_plain(data: bytes, known: Mapping[str, Any], persistent: Callable[[Any], Any]) -> Any:
    """The value in a pickle.

    Args:
        data: the pickle.
        known: ``"module name"`` -> what is called, or used as a value, in place of that.
        persistent: returns what is outside of the pickle under an id.

    Raises:
        RefusedError: it names what is not in ``known``, or uses it otherwise than as data.
        LookupError, TypeError, ValueError, AttributeError: it is damaged.
    """
    machine = _Machine(known, persistent)
    for code, argument, _ in pickletools.genops(data):
        machine.execute(code.name, argument)
    return machine.stack.pop()


class _Machine:
    def __init__(self, known: Mapping[str, Any], persistent: Callable[[Any], Any]) -> None:
        self.known = known
        self.functions = {id(value) for value in known.values() if callable(value)}
        self.persistent = persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under the marks
        self.memo: dict[int, Any] = {}

    def execute(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            if len(self.stack) < count:
                raise ValueError("a tuple of values that are not there")
            self.stack[-count:] = [tuple(self.stack[-count:])]
        else:
            handle = _HANDLERS.get(name)
            if handle is None:
                raise RefusedError(f"instruction {name}")
            handle(self, argument)

    # -- the stack ---------------------------------------------------------------------------------

    def nothing(self, _: Any) -> None:
        """Instructions about the pickle itself."""

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        """What is above the last mark; the mark goes."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def pop_mark(self, _: Any) -> None:
        self.marked()

    def drop(self, _: Any) -> None:
        self.stack.pop()

    def put(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, number: int) -> None:
        self.stack.append(self.memo[number])

    # -- containers --------------------------------------------------------------------------------

    def make_tuple(self, _: Any) -> None:
        self.stack_marked(tuple)

    def make_list(self, _: Any) -> None:
        self.stack_marked(list)

    def make_dict(self, _: Any) -> None:
        values = self.marked()
        made: dict[Any, Any] = {}
        _set_items(made, values)
        self.stack.append(made)

    def stack_marked(self, kind: Callable[[list[Any]], Any]) -> None:
        values = self.marked()
        self.stack.append(kind(values))

    def append(self, _: Any) -> None:
        value = self.stack.pop()
        _extend(self.stack[-1], [value])

    def appends(self, _: Any) -> None:
        values = self.marked()
        _extend(self.stack[-1], values)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def set_items(self, _: Any) -> None:
        values = self.marked()
        _set_items(self.stack[-1], values)

    def add_items(self, _: Any) -> None:
        values = self.marked()
        if type(self.stack[-1]) is not set:
            raise TypeError("elements of what is no set")
        self.stack[-1].update(map(key_of, values))

    # -- what is not data --------------------------------------------------------------------------

    def name(self, text: str) -> None:
        if text not in self.known:
            raise RefusedError(text.replace(" ", "."))
        self.stack.append(self.known[text])

    def stacked_name(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(f"{module} {name}")

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if id(function) not in self.functions:
            raise RefusedError("a call of what is no function")
        self.stack.append(function(*arguments))

    def state(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Inert):
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise TypeError("state of an object that is no dict")
            vars(target).update(state)
        elif not isinstance(target, dict):  # those of state_dict have attributes, which are no data
            raise RefusedError(f"state of a {type(target).__name__}")

    def outside(self, _: Any) -> None:
        self.stack.append(self.persistent(self.stack.pop()))


def key_of(value: Any) -> Any:
    """``value`` if it may be a key.

    Raises:
        RefusedError: it may not.
    """
    flat = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, SIMPLE) for part in flat):
        raise RefusedError(f"a key that is a {type(value).__name__}")
    return value


def _set_items(target: Any, values: list[Any]) -> None:
    if type(target) is not dict or len(values) % 2:
        raise TypeError("items of what is no dict")
    for key, value in zip(values[::2], values[1::2], strict=True):
        target[key_of(key)] = value


def _extend(target: Any, values: list[Any]) -> None:
    if type(target) is not list:
        raise TypeError("elements of what is no list")
    target.extend(values)


_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _Machine.nothing),
    "MARK": _Machine.mark,
    "POP": _Machine.drop,
    "POP_MARK": _Machine.pop_mark,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": _Machine.memoize,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "TUPLE": _Machine.make_tuple,
    "LIST": _Machine.make_list,
    "DICT": _Machine.make_dict,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stacked_name,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "BUILD": _Machine.state,
    "BINPERSID": _Machine.outside,
}
