"""What a pickle holds where nothing is imported, and the limits of its trees.

The tree of a pickle must be small enough to be walked ("billion laughs"), and its keys quick to
hash. What is inside a `Placeholder` is walked by few, so it is not limited with the tree around it:
objects of unknown classes often contain each other. `check_size(..., inside=True)` limits it too.
"""

from argparse import Namespace
from collections import deque
from collections.abc import Callable
from datetime import date, time, timedelta, timezone
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

MAX_DEPTH = 200
MAX_NODES = 20_000_000
"""Values in a tree, if its pickle is no longer; a shared value counts each time it occurs."""
MAX_KEY_PARTS = 1000
"""Values in a tuple or frozenset that is a key."""
_MAX_KEY_BITS = 1 << 16
_MAX_NAME = 120


class PickleError(Exception):
    """A pickle that cannot be read, and why."""


class Unusual(Exception):
    """Arguments that a known class does not get in ordinary pickles: it becomes a Placeholder."""


class Global:
    """A global that a pickle names, not imported. With `make` it may be called."""

    __slots__ = ("make", "module", "qualname")

    def __init__(self, module: str, qualname: str, make: Callable[..., Any] | None = None):
        """`make` None: a call of it is a Placeholder."""
        self.module = module
        self.qualname = qualname
        self.make = make

    @property
    def name(self) -> str:
        """Its full name."""
        return f"{self.module}.{self.qualname}"

    @property
    def can_be_named(self) -> bool:
        """Whether another pickle can name it; a hostile one may have line breaks."""
        return self.name.isprintable() and self.name.count(".") <= 50


class Placeholder:
    """An object of an unknown class: the call that would make it, with its arguments, and what
    would be done to it (`steps`). Nothing of it is run."""

    def __init__(
        self,
        function: "Global | Placeholder",
        values: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
        is_new: bool = False,
    ):
        """`is_new`: of `function.__new__`. `options`: its keyword arguments, None without any."""
        self.function = function
        self.values = values
        self.options = options
        self.is_new = is_new
        self.steps: list[tuple[str, Any]] = []
        """Each a kind and its operand: "state", of `__setstate__`; "append" and "set", lists of
        items and of keys and values; "call", an object that is made only for its effect."""
        self.class_name = _class_name(function, values)

    @property
    def state(self) -> dict[str, Any]:
        """The attributes that the pickle sets."""
        merged: dict[str, Any] = {}
        for kind, state in self.steps:
            parts = state if isinstance(state, tuple) else (state,)  # a pair of one with __slots__
            for part in parts if kind == "state" else ():
                merged |= part if isinstance(part, dict) else {}
        return merged

    def contents(self) -> list[Any]:
        """All values in it."""
        options = list((self.options or {}).values())
        return [self.function, *self.values, *options, *(operand for _, operand in self.steps)]

    def mapped(self, change: Callable[[Any], Any]) -> "Placeholder":
        """A copy whose contents are `change(content)`."""
        options = {name: change(v) for name, v in self.options.items()} if self.options else None
        copy = type(self)(change(self.function), change(self.values), options, self.is_new)
        copy.steps = [(kind, change(operand)) for kind, operand in self.steps]
        return copy

    def __str__(self) -> str:
        return describe(self)


class UnsupportedTensor(Placeholder):
    """A tensor of a kind that is not read: sparse, quantized, without data, ..."""


def _class_name(function: Global | Placeholder, values: tuple[Any, ...]) -> str:
    if isinstance(function, Placeholder):
        return function.class_name
    if function.name == "builtins.getattr" and len(values) == 2:  # a nested class, an enum's member
        owner, attribute = values
        if isinstance(owner, Global | Placeholder) and isinstance(attribute, str):
            outer = owner.name if isinstance(owner, Global) else owner.class_name
            return f"{outer:.{_MAX_NAME}}.{attribute:.{_MAX_NAME}}"
    return function.name


def describe(value: Any) -> str:
    """A value's class, for messages: "a trainer.Config", "the global torch.add"."""
    match value:
        case Placeholder():
            text = f"a {value.class_name:.{_MAX_NAME}}"
        case Global():
            text = f"the global {value.name:.{_MAX_NAME}}"
        case None:
            return "None"
        case _:
            text = getattr(type(value), "CALLED", f"a {type(value).__name__}")
    return text if text.isprintable() else ascii(text)


_QUICK = {
    *(str, int, float, bool, bytes, complex, type(None), Global, range),
    *(date, time, timedelta, timezone),
}


def hashable(key: Any) -> Any:
    """The key, if it is quick to hash. Raises PickleError otherwise."""
    if type(key) is str:
        return key
    parts = key if isinstance(key, tuple | frozenset) else (key,)
    if len(parts) > MAX_KEY_PARTS or not all(map(_is_quick, parts)):
        raise PickleError(f"unsupported key type {type(key).__name__}")
    return key


def _is_quick(part: Any) -> bool:
    if isinstance(part, int):
        return part.bit_length() <= _MAX_KEY_BITS
    kind = type(part)
    return kind in _QUICK or kind.__hash__ is object.__hash__ or isinstance(part, date | PurePath)


_CONTAINERS = (dict, list, tuple, set, frozenset, deque, Namespace, SimpleNamespace)


def _children(node: Any) -> list[Any]:
    """The values in a node of a tree, without keys."""
    match node:
        case dict():
            return [*node.values(), getattr(node, "__dict__", None)]
        case list() | tuple() | set() | frozenset() | deque():
            return list(node)
        case Namespace() | SimpleNamespace():
            return list(vars(node).values())
        case Placeholder():
            return node.contents()
    return []


def check_size(tree: Any, most: int = MAX_NODES, inside: bool = False) -> None:
    """Raises PickleError if the tree is too deep or too large to be walked, or contains itself.

    `inside`: also within placeholders.
    """
    containers = (*_CONTAINERS, Placeholder) if inside else _CONTAINERS
    sizes: dict[int, tuple[int, int]] = {}  # of finished containers: nodes, depth
    unfinished: set[int] = set()
    stack = [(tree, False)]
    while stack:
        node, is_finished = stack.pop()
        key = id(node)
        if not isinstance(node, containers) or (not is_finished and key in sizes):
            continue
        if key in unfinished and not is_finished:
            raise PickleError("a value that contains itself")
        values = _children(node)
        within = [child for child in values if isinstance(child, containers)]
        if within and not is_finished:
            unfinished.add(key)
            stack.append((node, True))
            stack.extend((child, False) for child in within)
            continue
        unfinished.discard(key)
        inner = [sizes[id(child)] for child in within]
        nodes = 1 + len(values) + sum(size for size, _ in inner)
        depth = 1 + max((depth for _, depth in inner), default=0)
        if depth > MAX_DEPTH:
            raise PickleError(f"values nested deeper than {MAX_DEPTH} levels")
        if nodes > most:
            raise PickleError(f"a tree of more than {most} values")
        sizes[key] = nodes, depth
