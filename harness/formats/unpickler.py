"""An unpickler that runs no code: it builds plain values from a closed list of globals.

It executes only the opcodes in torch.save's pickles, and imports nothing. Limited are the number of
operations, the depth of the tree, and its size when it is walked ("billion laughs"). Keys must be
plain, as hashing a nested tuple can take forever. The opcodes: Python's pickletools.py.
"""

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

MAX_OPERATIONS = 5_000_000
MAX_DEPTH = 200
MAX_NODES = 20_000_000
"""Values in a tree; a shared value counts each time it occurs."""

_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Python 2's names, which pickles of protocol 2 use."""


class PickleError(Exception):
    """A pickle that cannot be read, and why."""


class AllowedGlobal:
    """A global that a pickle may name, and call if it has `make`. Its attributes cannot be set."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., Any] | None = None):
        """`make` None: it may be named, like a class that is an argument, but not called."""
        self.name = name
        self.make = make


class Placeholder:
    """An object whose class is not imported: its arguments and state, as plain values."""

    def __init__(self, name: str, *values: Any):
        self.class_name = name
        self.values = values
        self.state: dict[str, Any] = {}

    def set_state(self, state: Any) -> None:
        """Stores the attributes that the pickle sets."""
        if isinstance(state, tuple) and len(state) == 2:  # for a class with __slots__
            state = {**(state[0] or {}), **(state[1] or {})}
        if not isinstance(state, dict):
            raise PickleError(f"malformed: the attributes of {self.class_name}")
        self.state |= state


_CONTAINERS = (dict, list, tuple, set, Placeholder)


def unpickle(
    data: bytes, known_globals: Mapping[str, Any], load_persistent: Callable[[Any], Any]
) -> Any:
    """The tree that a pickle describes.

    `known_globals`: an AllowedGlobal, or another value, for each global that the pickle may name,
    by full name. `load_persistent(id)` returns objects outside the pickle. Raises PickleError for a
    pickle that is malformed or too large, or that names or does anything else.
    """
    unpickler = _Unpickler(data, known_globals, load_persistent)
    try:
        tree = unpickler.run()
    except PickleError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise PickleError(f"malformed at byte {unpickler.position}: {error!r}"[:200]) from None
    _check_size(tree)
    return tree


_MARK = object()


class _Unpickler:
    """The stack machine of Python's pickle module, without its imports and calls."""

    def __init__(
        self, data: bytes, known_globals: Mapping[str, Any], load_persistent: Callable[[Any], Any]
    ):
        self.data = data
        self.position = 0
        self.known_globals = known_globals
        self.load_persistent = load_persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, opcodes = self.data, _OPCODES
        for _ in range(MAX_OPERATIONS):
            code = data[self.position]
            self.position += 1
            if code == _STOP:
                (tree,) = self.stack
                if tree is _MARK:
                    raise PickleError("malformed: a mark instead of a value")
                return tree
            execute = opcodes.get(code)
            if execute is None:
                raise PickleError(
                    f"unsupported opcode {bytes([code])!r} at byte {self.position - 1}"
                )
            execute(self)
        raise PickleError(f"more than {MAX_OPERATIONS} operations")

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

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise PickleError(f"malformed: expected {kind.__name__}, found {type(value).__name__}")
        return value

    def remember(self, key: int) -> None:
        value = self.stack[-1]
        if value is _MARK:
            raise PickleError("malformed: a mark in the memo")
        self.memo[key] = value

    def push_global(self, module: str, name: str) -> None:
        full = f"{_MODULES.get(module, module)}.{name}"
        if full not in self.known_globals:
            raise PickleError(f"it names {full}, which could run code; nothing was run")
        self.push(self.known_globals[full])

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[hashable(key)] = value

    def call(self) -> None:
        args = self.pop()
        target = self.pop()
        if not (isinstance(args, tuple) and isinstance(target, AllowedGlobal) and target.make):
            raise PickleError(f"it calls {_name_of(target)}")
        self.push(target.make(*args))

    def set_state(self) -> None:
        state = self.pop()
        target = self.top(object)
        if isinstance(target, Placeholder):
            target.set_state(state)
        elif isinstance(target, OrderedDict) and isinstance(state, dict):
            if "_metadata" in state:  # of Module.state_dict()
                vars(target)["_metadata"] = state["_metadata"]
        elif not isinstance(target, dict):
            raise PickleError(f"it sets attributes of {_name_of(target)}")


def _name_of(value: Any) -> str:
    return value.name if isinstance(value, AllowedGlobal) else type(value).__name__


def hashable(key: Any) -> Any:
    """The key, if it is quick to hash. Raises PickleError otherwise."""
    parts = key if isinstance(key, tuple) else (key,)
    plain = (str, int, float, bool, bytes, complex, type(None), AllowedGlobal)
    if not all(isinstance(part, plain) or type(part).__hash__ is object.__hash__ for part in parts):
        raise PickleError(f"unsupported key type {type(key).__name__}")
    return key


def _global(unpickler: _Unpickler) -> None:
    module, name = unpickler.line(), unpickler.line()
    unpickler.push_global(module, name)


def _stack_global(unpickler: _Unpickler) -> None:
    name, module = unpickler.pop(), unpickler.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise PickleError("malformed: a global without a name")
    unpickler.push_global(module, name)


def _append(unpickler: _Unpickler) -> None:
    value = unpickler.pop()
    unpickler.top(list).append(value)


def _appends(unpickler: _Unpickler) -> None:
    values = unpickler.pop_mark()
    unpickler.top(list).extend(values)


def _set_item(unpickler: _Unpickler) -> None:
    value, key = unpickler.pop(), unpickler.pop()
    unpickler.set_items([key, value])


def _add_items(unpickler: _Unpickler) -> None:
    values = unpickler.pop_mark()
    unpickler.top(set).update(map(hashable, values))


def _tuple_of(length: int) -> Callable[[_Unpickler], None]:
    def execute(unpickler: _Unpickler) -> None:
        values = [unpickler.pop() for _ in range(length)]
        unpickler.push(tuple(reversed(values)))

    return execute


def _text(unpickler: _Unpickler, width: int) -> None:
    unpickler.push(unpickler.take(unpickler.number(width)).decode("utf-8", "surrogatepass"))


def _signed(unpickler: _Unpickler, width: int) -> None:
    unpickler.push(int.from_bytes(unpickler.take(width), "little", signed=True))


def _memo_next(unpickler: _Unpickler) -> None:
    unpickler.remember(len(unpickler.memo))


_STOP = pickle.STOP[0]
_OPCODES: dict[int, Callable[[_Unpickler], None]] = {
    opcode[0]: execute
    for opcode, execute in {
        pickle.PROTO: lambda u: u.take(1),
        pickle.FRAME: lambda u: u.take(8),
        pickle.MARK: lambda u: u.push(_MARK),
        pickle.POP: lambda u: u.stack.pop(),
        pickle.NONE: lambda u: u.push(None),
        pickle.NEWTRUE: lambda u: u.push(True),
        pickle.NEWFALSE: lambda u: u.push(False),
        pickle.BININT: lambda u: _signed(u, 4),
        pickle.BININT1: lambda u: u.push(u.number(1)),
        pickle.BININT2: lambda u: u.push(u.number(2)),
        pickle.LONG1: lambda u: _signed(u, u.number(1)),
        pickle.BINFLOAT: lambda u: u.push(struct.unpack(">d", u.take(8))[0]),
        pickle.BINUNICODE: lambda u: _text(u, 4),
        pickle.SHORT_BINUNICODE: lambda u: _text(u, 1),
        pickle.BINUNICODE8: lambda u: _text(u, 8),
        pickle.SHORT_BINSTRING: lambda u: u.push(u.take(u.number(1)).decode("latin1")),
        pickle.BINBYTES: lambda u: u.push(u.take(u.number(4))),
        pickle.SHORT_BINBYTES: lambda u: u.push(u.take(u.number(1))),
        pickle.BINBYTES8: lambda u: u.push(u.take(u.number(8))),
        pickle.BYTEARRAY8: lambda u: u.push(bytearray(u.take(u.number(8)))),
        pickle.EMPTY_LIST: lambda u: u.push([]),
        pickle.EMPTY_DICT: lambda u: u.push({}),
        pickle.EMPTY_SET: lambda u: u.push(set()),
        pickle.EMPTY_TUPLE: lambda u: u.push(()),
        pickle.TUPLE: lambda u: u.push(tuple(u.pop_mark())),
        pickle.TUPLE1: _tuple_of(1),
        pickle.TUPLE2: _tuple_of(2),
        pickle.TUPLE3: _tuple_of(3),
        pickle.APPEND: _append,
        pickle.APPENDS: _appends,
        pickle.SETITEM: _set_item,
        pickle.SETITEMS: lambda u: u.set_items(u.pop_mark()),
        pickle.ADDITEMS: _add_items,
        pickle.BINGET: lambda u: u.push(u.memo[u.number(1)]),
        pickle.LONG_BINGET: lambda u: u.push(u.memo[u.number(4)]),
        pickle.BINPUT: lambda u: u.remember(u.number(1)),
        pickle.LONG_BINPUT: lambda u: u.remember(u.number(4)),
        pickle.MEMOIZE: _memo_next,
        pickle.GLOBAL: _global,
        pickle.STACK_GLOBAL: _stack_global,
        pickle.REDUCE: lambda u: u.call(),
        pickle.NEWOBJ: lambda u: u.call(),
        pickle.BUILD: lambda u: u.set_state(),
        pickle.BINPERSID: lambda u: u.push(u.load_persistent(u.pop())),
    }.items()
}


def _children(node: Any) -> list[Any]:
    """The values in a node of a tree, without keys."""
    match node:
        case dict():
            return [*node.values(), getattr(node, "__dict__", None)]
        case list() | tuple() | set():
            return list(node)
        case Placeholder():
            return [*node.values, *node.state.values()]
    return []


def _check_size(tree: Any) -> None:
    """Raises PickleError if the tree is too deep or too large to be walked, or contains itself."""
    sizes: dict[int, tuple[int, int]] = {}  # of finished containers: nodes, depth
    unfinished: set[int] = set()
    stack = [(tree, False)]
    while stack:
        node, is_finished = stack.pop()
        key = id(node)
        if not is_finished:
            if key in sizes:
                continue
            if key in unfinished:
                raise PickleError("a value that contains itself")
            unfinished.add(key)
            stack.append((node, True))
            stack.extend(
                (child, False) for child in _children(node) if isinstance(child, _CONTAINERS)
            )
            continue
        unfinished.discard(key)
        values = _children(node)
        inner = [sizes[id(child)] for child in values if isinstance(child, _CONTAINERS)]
        nodes = 1 + len(values) + sum(size for size, _ in inner)
        depth = 1 + max((depth for _, depth in inner), default=0)
        if depth > MAX_DEPTH:
            raise PickleError(f"values nested deeper than {MAX_DEPTH} levels")
        if nodes > MAX_NODES:
            raise PickleError(f"a tree of more than {MAX_NODES} values")
        sizes[key] = nodes, depth
