"""An unpickler that runs no code: it imports nothing, and calls only the globals that it is given.

Any other global is a `Global`, and what it would make is a `Placeholder`. An operation takes a byte
or more, so that the size of the pickle limits their number; limited are also the containers, and
the tree (`pickled`). The opcodes: Python's pickletools.py; those of protocols 0 and 1, and of
buffers outside the pickle, are not supported.

Python's own unpickler in C would be faster; with a closed `find_class` it runs no code either.
But it hashes any key (nested tuples take exponential time), allocates what an index of the memo
asks for, and does not count containers; no hook comes before that. It would take about half the
time: the rest is spent on making and checking the tensors, which both would do in Python.
"""

import pickle
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from harness.formats.pickled import (
    MAX_NODES,
    Global,
    PickleError,
    Placeholder,
    Unusual,
    check_size,
    hashable,
)

MAX_CONTAINERS = 5_000_000
"""Containers and other objects that a pickle may make; each takes more memory than its bytes."""

_DAMAGE = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, struct.error)


def unpickle(
    data: bytes,
    known_globals: Mapping[str, Any],
    load_persistent: Callable[[Any], Any],
) -> Any:
    """The tree that a pickle describes.

    `known_globals`: the values of globals by full name; a `Global` among them may be called.
    `load_persistent(id)` returns objects outside the pickle. Raises PickleError for a pickle that
    is malformed or too large.
    """
    return unpickle_first(data, 0, known_globals, load_persistent)[0]


def unpickle_first(
    data: bytes,
    start: int,
    known_globals: Mapping[str, Any],
    load_persistent: Callable[[Any], Any],
) -> tuple[Any, int]:
    """The tree of the pickle at offset `start`, and the offset of its end. As `unpickle`."""
    unpickler = _Unpickler(data, start, known_globals, load_persistent)
    try:
        tree = unpickler.run()
    except PickleError:
        raise
    except _DAMAGE as error:
        if unpickler.position >= len(data) or isinstance(error, struct.error):  # a short buffer
            raise PickleError("truncated") from None
        raise PickleError(f"malformed at byte {unpickler.position}: {error!r}"[:200]) from None
    check_size(tree, max(MAX_NODES, len(data)))
    return tree, unpickler.position


_MARK = object()
_MARK_IN_MEMO = "malformed: a mark in the memo"


class _Unpickler:
    """The stack machine of Python's pickle module, without its imports and calls."""

    def __init__(
        self,
        data: bytes,
        start: int,
        known_globals: Mapping[str, Any],
        load_persistent: Callable[[Any], Any],
    ):
        self.data = data
        self.position = start
        self.containers = 0
        self.protocol = 0
        self.known_globals = known_globals
        self.load_persistent = load_persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Executes the pickle. The opcodes of which a file of tensors consists are executed here:
        for them a call of a function would take most of the time."""
        data, memo, opcodes, position = self.data, self.memo, _OPCODES, self.position
        stack, natural = self.stack, _NATURAL.unpack_from
        push = stack.append
        try:
            while True:
                code = data[position]
                position += 1
                if code == _LONG_BINPUT:
                    position += 4  # first: past the end it is truncated, not malformed
                    key, value = natural(data, position - 4)[0], stack[-1]
                    if value is _MARK:
                        raise PickleError(_MARK_IN_MEMO)
                    memo[key] = value
                elif code == _BINPUT:
                    self.remember(data[position])
                    position += 1
                elif code == _LONG_BINGET:
                    position += 4
                    push(memo[natural(data, position - 4)[0]])
                elif code == _BINGET:
                    push(memo[data[position]])
                    position += 1
                elif code == _BININT1:
                    push(data[position])
                    position += 1
                elif code == _TUPLE1:
                    self.push_object((self.pop(),))
                elif code == _REDUCE:
                    self.call()
                elif code == _MARK_OPCODE:
                    push(_MARK)
                elif code == _TUPLE:
                    self.push_object(tuple(self.pop_mark()))
                elif code == _BINUNICODE:
                    start = position = position + 4
                    position += natural(data, position - 4)[0]
                    if position > len(data):
                        raise PickleError("truncated")
                    push(data[start:position].decode("utf-8", "surrogatepass"))
                elif code == _BININT:
                    position += 4
                    push(_INT4.unpack_from(data, position - 4)[0])
                elif code == _EMPTY_TUPLE:
                    push(())
                elif code == _NEWFALSE:
                    push(False)
                elif code == _STOP:
                    (tree,) = self.stack
                    if tree is _MARK:
                        raise PickleError("malformed: a mark instead of a value")
                    return tree
                elif execute := opcodes.get(code):
                    self.position = position
                    execute(self)
                    position = self.position
                else:
                    text = f"unsupported opcode {bytes([code])!r} at byte {position - 1}"
                    raise PickleError(text)
        finally:
            self.position = max(self.position, position)

    def take(self, length: int) -> bytes:
        start, self.position = self.position, self.position + length
        if length < 0 or self.position > len(self.data):
            raise PickleError("truncated")
        return self.data[start : self.position]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        end = self.data.index(b"\n", self.position)
        return self.take(end + 1 - self.position)[:-1].decode("ascii")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("malformed: a mark instead of a value")
        return value

    def pop_mark(self) -> list[Any]:
        stack = self.stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                values = stack[index + 1 :]
                del stack[index:]
                return values
        raise PickleError("malformed: no mark")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_object(self, value: Any) -> None:
        self.containers += 1
        if self.containers > MAX_CONTAINERS:
            raise PickleError(f"more than {MAX_CONTAINERS} containers and objects")
        self.stack.append(value)

    def pop_unused(self) -> None:
        """A value that was made only for its effect, as by a setter of attributes."""
        value = self.stack.pop()
        changed = value.values[:1] if isinstance(value, Placeholder) else ()
        if changed and isinstance(changed[0], Placeholder):
            changed[0].steps.append(("call", value))

    def top(self, *kinds: type) -> Any:
        value = self.stack[-1]
        if not isinstance(value, kinds):
            expected = kinds[0].__name__
            raise PickleError(f"malformed: expected {expected}, found {type(value).__name__}")
        return value

    def remember(self, key: int) -> None:
        value = self.stack[-1]
        if value is _MARK:
            raise PickleError(_MARK_IN_MEMO)
        self.memo[key] = value

    def push_global(self, module: str, name: str) -> None:
        if self.protocol < 3:  # Python 2's names
            module, name = NAME_MAPPING.get((module, name), (module, name))
            module = IMPORT_MAPPING.get(module, module)
        known = self.known_globals.get(f"{module}.{name}")
        self.push_object(Global(module, name) if known is None else known)

    def append(self, values: list[Any]) -> None:
        target = self.top(list, deque, Placeholder)
        if isinstance(target, Placeholder):
            target.steps.append(("append", values))
        else:
            target.extend(values)

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict, Placeholder)
        if isinstance(target, Placeholder):
            target.steps.append(("set", items))
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[hashable(key)] = value

    def call(self, is_new: bool = False, options: Any = None) -> None:
        args = self.pop()
        target = self.pop()
        if not isinstance(args, tuple) or not isinstance(options, dict | None):
            raise PickleError("malformed: the arguments of a call")
        if not isinstance(target, Global | Placeholder):
            raise PickleError(f"malformed: a call of a {type(target).__name__}")
        value = None
        if isinstance(target, Global) and target.make is not None and not options:
            try:
                value = target.make(*args)
            except Unusual:
                value = None
        self.push_object(Placeholder(target, args, options, is_new) if value is None else value)

    def set_state(self) -> None:
        state = self.pop()
        target = self.top(object)
        if isinstance(target, Placeholder):
            target.steps.append(("state", state))
        elif isinstance(target, Namespace | SimpleNamespace):
            if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
                raise PickleError("malformed: the attributes of a namespace")
            vars(target).update(state)
        elif hasattr(target, "set_state"):
            target.set_state(state)
        elif isinstance(target, OrderedDict) and isinstance(state, dict):
            if "_metadata" in state:  # of Module.state_dict()
                vars(target)["_metadata"] = state["_metadata"]
        elif not isinstance(target, dict):
            name = target.name if isinstance(target, Global) else f"a {type(target).__name__}"
            raise PickleError(f"malformed: it sets attributes of {name}")


def _global(unpickler: _Unpickler) -> None:
    module, name = unpickler.line(), unpickler.line()
    unpickler.push_global(module, name)


def _stack_global(unpickler: _Unpickler) -> None:
    name, module = unpickler.pop(), unpickler.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise PickleError("malformed: a global without a name")
    unpickler.push_global(module, name)


def _set_item(unpickler: _Unpickler) -> None:
    value, key = unpickler.pop(), unpickler.pop()
    unpickler.set_items([key, value])


def _add_items(unpickler: _Unpickler) -> None:
    values = unpickler.pop_mark()
    unpickler.top(set).update(map(hashable, values))


def _frozen_set(unpickler: _Unpickler) -> None:
    unpickler.push_object(frozenset(map(hashable, unpickler.pop_mark())))


def _new_with_options(unpickler: _Unpickler) -> None:
    unpickler.call(is_new=True, options=unpickler.pop())


def _tuple_of(length: int) -> Callable[[_Unpickler], None]:
    def execute(unpickler: _Unpickler) -> None:
        values = [unpickler.pop() for _ in range(length)]
        unpickler.push_object(tuple(reversed(values)))

    return execute


def _text(unpickler: _Unpickler, width: int) -> None:
    unpickler.push(unpickler.take(unpickler.number(width)).decode("utf-8", "surrogatepass"))


def _protocol(unpickler: _Unpickler) -> None:
    unpickler.protocol = unpickler.number(1)


def _float(unpickler: _Unpickler) -> None:
    unpickler.stack.append(_FLOAT.unpack_from(unpickler.data, unpickler.position)[0])
    unpickler.position += 8


def _signed(unpickler: _Unpickler, width: int) -> None:
    unpickler.push(int.from_bytes(unpickler.take(width), "little", signed=True))


def _memo_next(unpickler: _Unpickler) -> None:
    unpickler.remember(len(unpickler.memo))


_STOP, _MARK_OPCODE, _REDUCE = pickle.STOP[0], pickle.MARK[0], pickle.REDUCE[0]
_BINPUT, _LONG_BINPUT = pickle.BINPUT[0], pickle.LONG_BINPUT[0]
_BINGET, _LONG_BINGET = pickle.BINGET[0], pickle.LONG_BINGET[0]
_BININT1, _BINUNICODE = pickle.BININT1[0], pickle.BINUNICODE[0]
_TUPLE, _TUPLE1, _EMPTY_TUPLE = pickle.TUPLE[0], pickle.TUPLE1[0], pickle.EMPTY_TUPLE[0]
_BININT, _NEWFALSE = pickle.BININT[0], pickle.NEWFALSE[0]
_INT4, _NATURAL, _FLOAT = struct.Struct("<i"), struct.Struct("<I"), struct.Struct(">d")
_OPCODES: dict[int, Callable[[_Unpickler], None]] = {
    opcode[0]: execute
    for opcode, execute in {
        pickle.PROTO: _protocol,
        pickle.FRAME: lambda u: u.take(8),
        pickle.POP: lambda u: u.pop_unused(),
        pickle.POP_MARK: lambda u: u.pop_mark(),
        pickle.NONE: lambda u: u.push(None),
        pickle.NEWTRUE: lambda u: u.push(True),
        pickle.BININT2: lambda u: u.push(u.number(2)),
        pickle.LONG1: lambda u: _signed(u, u.number(1)),
        pickle.LONG4: lambda u: _signed(u, u.number(4)),
        pickle.BINFLOAT: _float,
        pickle.SHORT_BINUNICODE: lambda u: _text(u, 1),
        pickle.BINUNICODE8: lambda u: _text(u, 8),
        pickle.SHORT_BINSTRING: lambda u: u.push(u.take(u.number(1)).decode("latin1")),
        pickle.BINSTRING: lambda u: u.push(u.take(u.number(4)).decode("latin1")),
        pickle.BINBYTES: lambda u: u.push(u.take(u.number(4))),
        pickle.SHORT_BINBYTES: lambda u: u.push(u.take(u.number(1))),
        pickle.BINBYTES8: lambda u: u.push(u.take(u.number(8))),
        pickle.BYTEARRAY8: lambda u: u.push_object(bytearray(u.take(u.number(8)))),
        pickle.EMPTY_LIST: lambda u: u.push_object([]),
        pickle.EMPTY_DICT: lambda u: u.push_object({}),
        pickle.EMPTY_SET: lambda u: u.push_object(set()),
        pickle.TUPLE2: _tuple_of(2),
        pickle.TUPLE3: _tuple_of(3),
        pickle.APPEND: lambda u: u.append([u.pop()]),
        pickle.APPENDS: lambda u: u.append(u.pop_mark()),
        pickle.SETITEM: _set_item,
        pickle.SETITEMS: lambda u: u.set_items(u.pop_mark()),
        pickle.ADDITEMS: _add_items,
        pickle.FROZENSET: _frozen_set,
        pickle.MEMOIZE: _memo_next,
        pickle.GLOBAL: _global,
        pickle.STACK_GLOBAL: _stack_global,
        pickle.NEWOBJ: lambda u: u.call(is_new=True),
        pickle.NEWOBJ_EX: _new_with_options,
        pickle.BUILD: lambda u: u.set_state(),
        pickle.BINPERSID: lambda u: u.push(u.load_persistent(u.pop())),
    }.items()
}
