"""A pickle machine that runs no code: it builds plain values, and asks `find` for everything else.

It knows the opcodes that torch.save's pickles are made of, and none that look anything up. What it
builds is bounded: in the number of its operations, in its depth, and in what it unfolds to when
somebody walks it ("billion laughs"). Keys are plain, as hashing a nested tuple can take for ever.
The opcodes: Python's pickletools.py.
"""

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

MAX_OPERATIONS = 5_000_000
MAX_DEPTH = 200
MAX_NODES = 20_000_000
"""Values in a tree, those that it holds several times counted as often."""

Find = Callable[[str, str], Any]


class PickleError(Exception):
    """Why a pickle was not read."""


class Callee:
    """What a pickle may call, or name: `make(*args)`. It has no attributes that could be set."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., Any] | None = None):
        """`make` None: it may be named, like a class that is an argument, but not called."""
        self.name = name
        self.make = make


class StandIn:
    """An object of a class that is not loaded: what it was made of, as plain attributes."""

    def __init__(self, name: str, *values: Any):
        self.class_name = name
        self.values = values
        self.state: dict[str, Any] = {}

    def set_state(self, state: Any) -> None:
        """Takes what the pickle says of its attributes."""
        if isinstance(state, tuple) and len(state) == 2:  # of a class with __slots__
            state = {**(state[0] or {}), **(state[1] or {})}
        if not isinstance(state, dict):
            raise PickleError(f"malformed: the attributes of {self.class_name}")
        self.state |= state


def build(data: bytes, find: Find, persistent: Callable[[Any], Any]) -> Any:
    """The tree that a pickle describes.

    `find(module, name)` gives a Callee or another value for a global, `persistent(id)` what stands
    outside the pickle. Raises PickleError for whatever is not as it should be.
    """
    machine = _Machine(data, find, persistent)
    try:
        tree = machine.run()
    except PickleError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise PickleError(f"malformed at byte {machine.at}: {error!r}"[:200]) from None
    _check_size(tree)
    return tree


_MARK = object()


class _Machine:
    def __init__(self, data: bytes, find: Find, persistent: Callable[[Any], Any]):
        self.data = data
        self.at = 0
        self.find = find
        self.persistent = persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, steps = self.data, _STEPS
        for _ in range(MAX_OPERATIONS):
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                (tree,) = self.stack
                if tree is _MARK:
                    raise PickleError("malformed: nothing but a mark")
                return tree
            step = steps.get(code)
            if step is None:
                raise PickleError(f"opcode {bytes([code])!r} at byte {self.at - 1}")
            step(self)
        raise PickleError(f"more than {MAX_OPERATIONS} operations")

    def take(self, length: int) -> bytes:
        start, self.at = self.at, self.at + length
        if length < 0 or self.at > len(self.data):
            raise PickleError("cut off")
        return self.data[start : self.at]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        return self.take(end + 1 - self.at)[:-1].decode("ascii")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("malformed: a mark where a value should be")
        return value

    def pop_mark(self) -> list[Any]:
        stack = self.stack
        for at in range(len(stack) - 1, -1, -1):
            if stack[at] is _MARK:
                values = stack[at + 1 :]
                del stack[at:]
                return values
        raise PickleError("malformed: no mark")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise PickleError(f"malformed: {type(value).__name__} where {kind.__name__} is needed")
        return value

    def remember(self, key: int) -> None:
        value = self.stack[-1]
        if value is _MARK:
            raise PickleError("malformed: a mark in the memo")
        self.memo[key] = value

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[hashable(key)] = value

    def call(self) -> None:
        args = self.pop()
        callee = self.pop()
        if not isinstance(args, tuple) or not isinstance(callee, Callee) or callee.make is None:
            raise PickleError(f"calls {_told(callee)}")
        self.push(callee.make(*args))

    def set_state(self) -> None:
        state = self.pop()
        target = self.top(object)
        if isinstance(target, StandIn):
            target.set_state(state)
        elif isinstance(target, OrderedDict) and isinstance(state, dict):
            if "_metadata" in state:  # what Module.state_dict() notes
                vars(target)["_metadata"] = state["_metadata"]
        elif not isinstance(target, dict):
            raise PickleError(f"sets attributes of {_told(target)}")


def _told(value: Any) -> str:
    return value.name if isinstance(value, Callee) else type(value).__name__


def hashable(key: Any) -> Any:
    """The key, if hashing it is a matter of moments."""
    parts = key if isinstance(key, tuple) else (key,)
    plain = (str, int, float, bool, bytes, complex, type(None), Callee)
    if not all(isinstance(part, plain) or type(part).__hash__ is object.__hash__ for part in parts):
        raise PickleError(f"a key of type {type(key).__name__}")
    return key


def _global(machine: _Machine) -> None:
    module, name = machine.line(), machine.line()
    machine.push(machine.find(module, name))


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise PickleError("malformed: a global without a name")
    machine.push(machine.find(module, name))


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.top(list).append(value)


def _appends(machine: _Machine) -> None:
    values = machine.pop_mark()
    machine.top(list).extend(values)


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _add_items(machine: _Machine) -> None:
    values = machine.pop_mark()
    machine.top(set).update(map(hashable, values))


def _tuple_of(length: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        values = [machine.pop() for _ in range(length)]
        machine.push(tuple(reversed(values)))

    return step


def _text(machine: _Machine, width: int) -> None:
    machine.push(machine.take(machine.number(width)).decode("utf-8", "surrogatepass"))


def _signed(machine: _Machine, width: int) -> None:
    machine.push(int.from_bytes(machine.take(width), "little", signed=True))


def _memo_next(machine: _Machine) -> None:
    machine.remember(len(machine.memo))


_STOP = pickle.STOP[0]
_STEPS: dict[int, Callable[[_Machine], None]] = {
    opcode[0]: step
    for opcode, step in {
        pickle.PROTO: lambda m: m.take(1),
        pickle.FRAME: lambda m: m.take(8),
        pickle.MARK: lambda m: m.push(_MARK),
        pickle.POP: lambda m: m.stack.pop(),
        pickle.NONE: lambda m: m.push(None),
        pickle.NEWTRUE: lambda m: m.push(True),
        pickle.NEWFALSE: lambda m: m.push(False),
        pickle.BININT: lambda m: _signed(m, 4),
        pickle.BININT1: lambda m: m.push(m.number(1)),
        pickle.BININT2: lambda m: m.push(m.number(2)),
        pickle.LONG1: lambda m: _signed(m, m.number(1)),
        pickle.BINFLOAT: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        pickle.BINUNICODE: lambda m: _text(m, 4),
        pickle.SHORT_BINUNICODE: lambda m: _text(m, 1),
        pickle.BINUNICODE8: lambda m: _text(m, 8),
        pickle.SHORT_BINSTRING: lambda m: m.push(m.take(m.number(1)).decode("latin1")),
        pickle.BINBYTES: lambda m: m.push(m.take(m.number(4))),
        pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number(1))),
        pickle.BINBYTES8: lambda m: m.push(m.take(m.number(8))),
        pickle.BYTEARRAY8: lambda m: m.push(bytearray(m.take(m.number(8)))),
        pickle.EMPTY_LIST: lambda m: m.push([]),
        pickle.EMPTY_DICT: lambda m: m.push({}),
        pickle.EMPTY_SET: lambda m: m.push(set()),
        pickle.EMPTY_TUPLE: lambda m: m.push(()),
        pickle.TUPLE: lambda m: m.push(tuple(m.pop_mark())),
        pickle.TUPLE1: _tuple_of(1),
        pickle.TUPLE2: _tuple_of(2),
        pickle.TUPLE3: _tuple_of(3),
        pickle.APPEND: _append,
        pickle.APPENDS: _appends,
        pickle.SETITEM: _set_item,
        pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
        pickle.ADDITEMS: _add_items,
        pickle.BINGET: lambda m: m.push(m.memo[m.number(1)]),
        pickle.LONG_BINGET: lambda m: m.push(m.memo[m.number(4)]),
        pickle.BINPUT: lambda m: m.remember(m.number(1)),
        pickle.LONG_BINPUT: lambda m: m.remember(m.number(4)),
        pickle.MEMOIZE: _memo_next,
        pickle.GLOBAL: _global,
        pickle.STACK_GLOBAL: _stack_global,
        pickle.REDUCE: lambda m: m.call(),
        pickle.NEWOBJ: lambda m: m.call(),
        pickle.BUILD: lambda m: m.set_state(),
        pickle.BINPERSID: lambda m: m.push(m.persistent(m.pop())),
    }.items()
}


def children(node: Any) -> list[Any]:
    """What a node of a tree holds, keys left out."""
    match node:
        case dict():
            return [*node.values(), getattr(node, "__dict__", None)]
        case list() | tuple() | set():
            return list(node)
        case StandIn():
            return [*node.values, *node.state.values()]
    return []


def _check_size(tree: Any) -> None:
    """Raises PickleError if walking the tree would take too deep a stack, too long, or for ever."""
    sizes: dict[int, tuple[int, int]] = {}  # of finished containers: nodes, depth
    open_ones: set[int] = set()
    stack = [(tree, False)]
    while stack:
        node, is_finished = stack.pop()
        key = id(node)
        if not is_finished:
            if key in sizes:
                continue
            if key in open_ones:
                raise PickleError("a value that holds itself")
            held = children(node)
            open_ones.add(key)
            stack.append((node, True))
            stack.extend((child, False) for child in held if isinstance(child, _CONTAINERS))
            continue
        open_ones.discard(key)
        held = children(node)
        known = [sizes[id(child)] for child in held if isinstance(child, _CONTAINERS)]
        nodes = 1 + len(held) + sum(size for size, _ in known)
        depth = 1 + max((depth for _, depth in known), default=0)
        if depth > MAX_DEPTH:
            raise PickleError(f"values nested more than {MAX_DEPTH} deep")
        if nodes > MAX_NODES:
            raise PickleError(f"a tree of more than {MAX_NODES} values")
        sizes[key] = nodes, depth


_CONTAINERS = (dict, list, tuple, set, StandIn)
