"""A nested structure of plain values as JSON that tells all of their types.

    null, true, 1, 1.5, "text", [...]     themselves
    {"dict": {"a": node}}                 a dict whose keys are all strings
    {"items": [[key, node], ...]}         any other dict
    {"tuple": [...]}, {"float": "nan"}, {"int": "0x..."}, {"bytes": base64}, ...
    {"ints_in": name}, {"text_in": name}, ...     what is long lies outside, as an array
    {anything else: ..., ...}             what the caller encodes: tensors, dtypes

So a node that is a JSON object is always told by its first key.
"""

import base64
import json
import math
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from harness.errors import FormatError

KEY = "harness"
"""The key of a file's metadata under which its structure stands."""
VERSION = 1
MAX_DEPTH = 100
MAX_NODES = 5_000_000
LONG = 64
"""Lists of more numbers, and texts and bytes of more than 16 times that, lie outside the JSON."""

Node = Any  # a JSON value
Keys = tuple[Any, ...]
"""What leads to a value: keys of dicts, positions in lists."""

_PLAIN = (str, int, float, bool, type(None), bytes, complex)  # what keys are made of
_DICTS: dict[str, type[dict]] = {"items": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_SETS: dict[str, type] = {"set": set, "frozenset": frozenset}
_DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
_INT64 = range(-(2**63), 2**63)


class LeafEncoder(Protocol):
    """What a tree does not know itself, on the way out."""

    def encode(self, value: Any, keys: Keys) -> dict[str, Any] | None:
        """The node of a value of another type, or None if it is of no use."""
        ...

    def store(self, dtype: str, data: Any) -> str:
        """Keeps a one-dimensional array ("U8", "I64", "F64"), and gives it a name."""
        ...


class LeafDecoder(Protocol):
    """The same on the way back."""

    def decode(self, node: dict[str, Any]) -> Any:
        """The value of a node that LeafEncoder made. Raises FormatError if it is none."""
        ...

    def fetch(self, dtype: str, name: Any) -> bytes:
        """The bytes of an array that was stored. Raises FormatError if there is none."""
        ...


def joined(keys: Keys) -> str:
    """The keys with dots between them: "model.layers.0.weight"."""
    return ".".join(str(key) for key in keys)


def flat(names: Iterable[str]) -> Node:
    """The tree of a dict that holds tensors under the names that they are stored by."""
    return {"dict": {name: {"tensor": name} for name in names}}


def to_metadata(node: Node, names: Iterable[str]) -> dict[str, str]:
    """What to write into the metadata of a file of these tensors: nothing if they tell it all.

    Raises FormatError if the tree is too large.
    """
    return {} if node == flat(names) else {KEY: dumps({"version": VERSION, "tree": node})}


def from_metadata(metadata: Mapping[str, Any], names: Iterable[str]) -> Node:
    """The tree of a file with that metadata. Raises FormatError if it is damaged."""
    if KEY not in metadata:
        return flat(names)
    found = loads(str(metadata[KEY]))
    if not isinstance(found, dict) or found.get("version") != VERSION or "tree" not in found:
        raise FormatError("its structure is damaged, or of a later version of harness")
    return found["tree"]


def encode(value: Any, leaves: LeafEncoder) -> Node:
    """The tree of a value. Raises FormatError, which names the keys, for what it cannot hold."""
    return _Encoder(leaves).node(value, ())


def dumps(node: Node) -> str:
    """The tree as ASCII text. Raises FormatError if it is one that `loads` would refuse."""
    text = json.dumps(node, separators=(",", ":"))
    _check_size(text)
    return text


def loads(text: str) -> Node:
    """The tree that `dumps` wrote. Raises FormatError for what is none, or too large or deep."""
    _check_size(text)
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the structure is no JSON: {error}") from None


def decode(node: Node, leaves: LeafDecoder) -> Any:
    """The value of a tree. Raises FormatError for what is none."""
    try:
        return _Decoder(leaves).value(node, MAX_DEPTH)
    except _DAMAGE as error:
        raise FormatError(f"the structure is damaged: {error!r:.200}") from None


def other_nodes(node: Node) -> list[tuple[Keys, dict[str, Any]]]:
    """The nodes that a LeafEncoder made, in order, each behind the keys that lead to it.

    Raises FormatError for what is no tree.
    """
    try:
        return list(_walk(node, ()))
    except _DAMAGE as error:
        raise FormatError(f"the structure is damaged: {error!r:.200}") from None


class _Encoder:
    def __init__(self, leaves: LeafEncoder):
        self.leaves = leaves
        self.nodes = 0
        self.open: set[int] = set()  # the containers around the value

    def node(self, value: Any, keys: Keys) -> Node:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise FormatError(f"{joined(keys)}: more than {MAX_NODES} values")
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind in _ENCODERS:
            return _ENCODERS[kind](self, value)
        if kind not in _CONTAINERS:
            node = self.leaves.encode(value, keys)
            if node is None:
                name = f"{kind.__module__}.{kind.__qualname__}"
                raise FormatError(f"{joined(keys) or 'the data'}: cannot store a {name}")
            return node
        if len(self.open) >= MAX_DEPTH:
            raise FormatError(f"{joined(keys)[:200]}...: nested more than {MAX_DEPTH} deep")
        if id(value) in self.open:
            raise FormatError(f"{joined(keys)}: holds itself")
        self.open.add(id(value))
        node = self.container(kind, value, keys)
        self.open.discard(id(value))
        return node

    def container(self, kind: type, value: Any, keys: Keys) -> Node:
        if kind is list:
            return self.sequence(value, keys)
        if kind is tuple:
            return {"tuple": self.sequence(value, keys)}
        if kind in _SETS.values():
            return {kind.__name__: [self.key(item, keys) for item in value]}
        if kind is dict and all(type(key) is str for key in value):
            return {"dict": {key: self.node(item, (*keys, key)) for key, item in value.items()}}
        items = [[self.key(key, keys), self.node(v, (*keys, key))] for key, v in value.items()]
        node: dict[str, Any] = {"items" if kind is dict else kind.__name__: items}
        attributes = dict(getattr(value, "__dict__", {}))
        if "_metadata" in attributes:  # what Module.state_dict() notes
            node["_metadata"] = self.node(attributes.pop("_metadata"), (*keys, "_metadata"))
        if attributes:
            names = ", ".join(attributes)
            raise FormatError(f"{joined(keys) or 'the data'}: cannot store attributes: {names}")
        return node

    def sequence(self, value: list[Any] | tuple[Any, ...], keys: Keys) -> Node:
        if len(value) > LONG:
            if all(type(item) is int and item in _INT64 for item in value):
                return {"ints_in": self.leaves.store("I64", array("q", value))}
            if all(type(item) is float for item in value):
                return {"floats_in": self.leaves.store("F64", array("d", value))}
        return [self.node(item, (*keys, index)) for index, item in enumerate(value)]

    def key(self, key: Any, keys: Keys) -> Node:
        parts = key if type(key) is tuple else (key,)
        for part in parts:
            if type(part) not in _PLAIN:
                kind = f"{type(part).__module__}.{type(part).__qualname__}"
                raise FormatError(f"{joined((*keys, key))}: cannot store a key of type {kind}")
        return self.node(key, keys)

    def integer(self, value: int) -> Node:
        return value if value in _INT64 else {"int": hex(value)}

    def real(self, value: float) -> Node:
        return value if math.isfinite(value) else {"float": str(value)}

    def two_reals(self, value: complex) -> Node:
        return {"complex": [self.real(value.real), self.real(value.imag)]}

    def text(self, value: str) -> Node:
        if len(value) <= 16 * LONG:
            return value
        return {"text_in": self.leaves.store("U8", value.encode("utf-8", "surrogatepass"))}

    def binary(self, value: bytes) -> Node:
        if len(value) <= 16 * LONG:
            return {"bytes": base64.b64encode(value).decode()}
        return {"bytes_in": self.leaves.store("U8", value)}

    def mutable_binary(self, value: bytearray) -> Node:
        return {"bytearray": self.binary(bytes(value))}


_ENCODERS: dict[type, Callable[[_Encoder, Any], Node]] = {
    int: _Encoder.integer,
    float: _Encoder.real,
    complex: _Encoder.two_reals,
    str: _Encoder.text,
    bytes: _Encoder.binary,
    bytearray: _Encoder.mutable_binary,
}
_CONTAINERS = {list, tuple, *_DICTS.values(), *_SETS.values()}


class _Decoder:
    def __init__(self, leaves: LeafDecoder):
        self.leaves = leaves

    def value(self, node: Node, depth: int) -> Any:
        if depth < 0:
            raise FormatError(f"the structure is nested more than {MAX_DEPTH} deep")
        if isinstance(node, list):
            return [self.value(item, depth - 1) for item in node]
        if not isinstance(node, dict):
            return node
        tag, held = _told(node)
        if tag == "dict":
            return {key: self.value(item, depth - 1) for key, item in held.items()}
        if tag in _DICTS:
            return self.mapping(_DICTS[tag], node, held, depth)
        if tag in _SETS:
            return _SETS[tag](self.key(item, depth) for item in _list(held))
        if tag in _DECODERS:
            return _DECODERS[tag](self, held, depth)
        return self.leaves.decode(node)

    def mapping(self, kind: type[dict], node: dict[str, Any], held: Any, depth: int) -> Any:
        found = kind()
        for key_node, item in _list(held):
            key = self.key(key_node, depth)
            if key in found:
                raise ValueError(f"duplicate key {key!r}")
            found[key] = self.value(item, depth - 1)
        if kind is OrderedDict and "_metadata" in node:
            found.__dict__["_metadata"] = self.value(node["_metadata"], depth - 1)
        return found

    def key(self, node: Node, depth: int) -> Any:
        key = self.value(node, depth - 1)
        if not all(type(part) in _PLAIN for part in (key if type(key) is tuple else (key,))):
            raise TypeError(f"a key of type {type(key).__name__}")
        return key

    def immutable(self, held: Any, depth: int) -> Any:
        return tuple(_list(self.value(held, depth)))

    def two_reals(self, held: Any, depth: int) -> complex:
        real, imaginary = _list(self.value(held, depth))
        return complex(float(real), float(imaginary))

    def mutable_binary(self, held: Any, depth: int) -> bytearray:
        content = self.value(held, depth)
        if not isinstance(content, bytes):  # a number would be a size
            raise TypeError("a bytearray without bytes")
        return bytearray(content)

    def numbers(self, dtype: str, name: Any) -> list[Any]:
        numbers = array(_CODES[dtype])
        numbers.frombytes(self.leaves.fetch(dtype, name))
        return numbers.tolist()


_CODES = {"I64": "q", "F64": "d"}
_DECODERS: dict[str, Callable[[_Decoder, Any, int], Any]] = {
    "tuple": _Decoder.immutable,
    "int": lambda _, held, __: int(held, 16),
    "float": lambda _, held, __: float(held),
    "complex": _Decoder.two_reals,
    "bytes": lambda _, held, __: base64.b64decode(held, validate=True),
    "bytearray": _Decoder.mutable_binary,
    "bytes_in": lambda self, held, _: bytes(self.leaves.fetch("U8", held)),
    "text_in": lambda self, held, _: str(self.leaves.fetch("U8", held), "utf-8", "surrogatepass"),
    "ints_in": lambda self, held, _: self.numbers("I64", held),
    "floats_in": lambda self, held, _: self.numbers("F64", held),
}


def _walk(node: Node, keys: Keys) -> Iterator[tuple[Keys, dict[str, Any]]]:
    if isinstance(node, list):
        for index, child in enumerate(node):
            yield from _walk(child, (*keys, index))
    elif isinstance(node, dict):
        tag, held = _told(node)
        if tag == "dict":
            for key, child in held.items():
                yield from _walk(child, (*keys, key))
        elif tag in _DICTS:
            for key, child in held:
                yield from _walk(child, (*keys, key if isinstance(key, str | int) else "?"))
        elif tag == "tuple":
            yield from _walk(held, keys)
        elif tag not in _DECODERS and tag not in _SETS:
            yield keys, node


def _told(node: dict[str, Any]) -> tuple[str, Any]:
    for tag, held in node.items():
        return tag, held
    raise ValueError("an empty node")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a {type(value).__name__} where a list should be")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a duplicate key")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _check_size(text: str) -> None:
    if (size := sum(map(text.count, "[{,"))) > 2 * MAX_NODES:
        raise FormatError(f"the structure has {size} values, at most {2 * MAX_NODES}")
