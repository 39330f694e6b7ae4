"""A nested structure of plain values as JSON that preserves all types.

    null, true, 1, 1.5, "text", [...]     themselves
    {"dict": {"a": node}}                 a dict whose keys are all strings
    {"items": [[key, node], ...]}         any other dict
    {"tuple": [...]}, {"float": "nan"}, {"int": "0x..."}, {"bytes": base64}, ...
    {"datetime": ["2024-01-01T00:00:00", 0]}, {"deque": [[...], 5]}, ...     of its parts
    {"ints_in": name}, {"text_in": name}, ...     long values, stored outside as arrays
    {anything else: ..., ...}             encoded by the caller: tensors, dtypes

The first key of a JSON object is always its tag.
"""

import base64
import json
import math
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from harness.errors import FormatError
from harness.formats import composites

KEY = "harness"
"""The key of the structure in the metadata of a file."""
VERSION = 1
MAX_DEPTH = 100
MAX_NODES = 5_000_000
LONG = 64
"""Lists of more numbers, and strings and bytes of more than 16 times that, are stored outside."""

Node = Any  # a JSON value
Keys = tuple[Any, ...]
"""The path to a value: dict keys and list indices."""

_KEY_TYPES = (str, int, float, bool, type(None), bytes, complex)
_DICTS: dict[str, type[dict]] = {"items": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_SETS: dict[str, type] = {"set": set, "frozenset": frozenset}
_DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
_INT64 = range(-(2**63), 2**63)


class LeafEncoder(Protocol):
    """Encodes values of other types."""

    def encode(self, value: Any, keys: Keys) -> dict[str, Any] | None:
        """The node of a value, or None if it cannot be stored."""
        ...

    def store(self, dtype: str, data: Any) -> str:
        """Stores a one-dimensional array ("U8", "I64", "F64"). Returns its name."""
        ...


class LeafDecoder(Protocol):
    """Decodes what a LeafEncoder encoded."""

    def decode(self, node: dict[str, Any]) -> Any:
        """The value of a LeafEncoder's node. Raises FormatError if it is not one."""
        ...

    def fetch(self, dtype: str, name: Any) -> bytes:
        """The bytes of a stored array. Raises FormatError if it does not exist."""
        ...


def dotted(keys: Keys) -> str:
    """The keys, joined with dots: "model.layers.0.weight"."""
    return ".".join(str(key) for key in keys)


def flat_dict(names: Iterable[str]) -> Node:
    """The tree of a dict of tensors, each under the name that it is stored by."""
    return {"dict": {name: {"tensor": name} for name in names}}


def to_metadata(node: Node, names: Iterable[str]) -> dict[str, str]:
    """The metadata for a tree in a file of these tensors: empty if it is their flat dict.

    Raises FormatError if the tree is too large.
    """
    return {} if node == flat_dict(names) else {KEY: dumps({"version": VERSION, "tree": node})}


def from_metadata(metadata: Mapping[str, Any], names: Iterable[str]) -> Node:
    """The tree of a file with that metadata. Raises FormatError if it is damaged."""
    if KEY not in metadata:
        return flat_dict(names)
    stored = loads(str(metadata[KEY]))
    if not isinstance(stored, dict) or stored.get("version") != VERSION or "tree" not in stored:
        raise FormatError("the structure is damaged, or from a newer version of harness")
    return stored["tree"]


def encode(value: Any, leaves: LeafEncoder) -> Node:
    """The tree of a value. Raises FormatError, with the keys, for unsupported values."""
    return _Encoder(leaves).node(value, ())


def dumps(node: Node) -> str:
    """The tree as ASCII text. Raises FormatError if it is too large for `loads`."""
    text = json.dumps(node, separators=(",", ":"))
    _check_size(text)
    return text


def loads(text: str) -> Node:
    """The tree that `dumps` wrote. Raises FormatError if it is not JSON, too large or too deep."""
    _check_size(text)
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_reject)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the structure is not JSON: {error}") from None


def decode(node: Node, leaves: LeafDecoder) -> Any:
    """The value of a tree. Raises FormatError if it is not a tree."""
    try:
        return _Decoder(leaves).value(node, MAX_DEPTH)
    except _DAMAGE as error:
        raise FormatError(f"the structure is damaged: {error!r:.200}") from None


def leaf_nodes(node: Node) -> list[tuple[Keys, dict[str, Any]]]:
    """The nodes of a LeafEncoder, in order, each after the keys that lead to it.

    Raises FormatError if it is not a tree.
    """
    try:
        return list(_walk(node, ()))
    except _DAMAGE as error:
        raise FormatError(f"the structure is damaged: {error!r:.200}") from None


class _Encoder:
    def __init__(self, leaves: LeafEncoder):
        self.leaves = leaves
        self.nodes = 0
        self.parents: set[int] = set()  # ids of the containers around the value

    def node(self, value: Any, keys: Keys) -> Node:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise FormatError(f"{dotted(keys)}: more than {MAX_NODES} values in total")
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind in _ENCODERS:
            return _ENCODERS[kind](self, value)
        if kind in composites.TAGS and (parts := composites.parts(value)) is not None:
            return {composites.TAGS[kind]: self.node(parts, keys)}
        if kind not in _CONTAINERS:
            node = self.leaves.encode(value, keys)
            if node is None:
                name = f"{kind.__module__}.{kind.__qualname__}"
                raise FormatError(f"{dotted(keys) or 'the data'}: cannot store a {name}")
            return node
        if len(self.parents) >= MAX_DEPTH:
            raise FormatError(f"{dotted(keys)[:200]}...: nested deeper than {MAX_DEPTH} levels")
        if id(value) in self.parents:
            raise FormatError(f"{dotted(keys)}: contains itself")
        self.parents.add(id(value))
        node = self.container(kind, value, keys)
        self.parents.discard(id(value))
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
        if "_metadata" in attributes:  # of Module.state_dict()
            node["_metadata"] = self.node(attributes.pop("_metadata"), (*keys, "_metadata"))
        if attributes:
            names = ", ".join(attributes)
            raise FormatError(f"{dotted(keys) or 'the data'}: cannot store attributes: {names}")
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
            if type(part) not in _KEY_TYPES:
                kind = f"{type(part).__module__}.{type(part).__qualname__}"
                raise FormatError(f"{dotted((*keys, key))}: cannot store a key of type {kind}")
        return self.node(key, keys)

    def encode_int(self, value: int) -> Node:
        return value if value in _INT64 else {"int": hex(value)}

    def encode_float(self, value: float) -> Node:
        return value if math.isfinite(value) else {"float": str(value)}

    def encode_complex(self, value: complex) -> Node:
        return {"complex": [self.encode_float(value.real), self.encode_float(value.imag)]}

    def encode_str(self, value: str) -> Node:
        if len(value) <= 16 * LONG:
            return value
        return {"text_in": self.leaves.store("U8", value.encode("utf-8", "surrogatepass"))}

    def encode_bytes(self, value: bytes) -> Node:
        if len(value) <= 16 * LONG:
            return {"bytes": base64.b64encode(value).decode()}
        return {"bytes_in": self.leaves.store("U8", value)}

    def encode_bytearray(self, value: bytearray) -> Node:
        return {"bytearray": self.encode_bytes(bytes(value))}


_ENCODERS: dict[type, Callable[[_Encoder, Any], Node]] = {
    int: _Encoder.encode_int,
    float: _Encoder.encode_float,
    complex: _Encoder.encode_complex,
    str: _Encoder.encode_str,
    bytes: _Encoder.encode_bytes,
    bytearray: _Encoder.encode_bytearray,
}
_CONTAINERS = {list, tuple, *_DICTS.values(), *_SETS.values()}


class _Decoder:
    def __init__(self, leaves: LeafDecoder):
        self.leaves = leaves

    def value(self, node: Node, depth: int) -> Any:
        if depth < 0:
            raise FormatError(f"the structure is nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, list):
            return [self.value(item, depth - 1) for item in node]
        if not isinstance(node, dict):
            return node
        tag, content = _tag_and_content(node)
        if tag == "dict":
            return {key: self.value(item, depth - 1) for key, item in content.items()}
        if tag in _DICTS:
            return self.mapping(_DICTS[tag], node, content, depth)
        if tag in _SETS:
            return _SETS[tag](self.key(item, depth) for item in _list(content))
        if tag in _DECODERS:
            return _DECODERS[tag](self, content, depth)
        if tag in composites.MAKERS:
            return composites.MAKERS[tag](*_list(self.value(content, depth - 1)))
        return self.leaves.decode(node)

    def mapping(self, kind: type[dict], node: dict[str, Any], content: Any, depth: int) -> Any:
        result = kind()
        for key_node, item in _list(content):
            key = self.key(key_node, depth)
            if key in result:
                raise ValueError(f"duplicate key {key!r}")
            result[key] = self.value(item, depth - 1)
        if kind is OrderedDict and "_metadata" in node:
            result.__dict__["_metadata"] = self.value(node["_metadata"], depth - 1)
        return result

    def key(self, node: Node, depth: int) -> Any:
        key = self.value(node, depth - 1)
        if not all(type(part) in _KEY_TYPES for part in (key if type(key) is tuple else (key,))):
            raise TypeError(f"unsupported key type {type(key).__name__}")
        return key

    def decode_tuple(self, content: Any, depth: int) -> Any:
        return tuple(_list(self.value(content, depth)))

    def decode_complex(self, content: Any, depth: int) -> complex:
        real, imaginary = _list(self.value(content, depth))
        return complex(float(real), float(imaginary))

    def decode_bytearray(self, content: Any, depth: int) -> bytearray:
        data = self.value(content, depth)
        if not isinstance(data, bytes):  # a number would be a size
            raise TypeError("expected bytes for a bytearray")
        return bytearray(data)

    def numbers(self, dtype: str, name: Any) -> list[Any]:
        numbers = array(_CODES[dtype])
        numbers.frombytes(self.leaves.fetch(dtype, name))
        return numbers.tolist()


_CODES = {"I64": "q", "F64": "d"}
_DECODERS: dict[str, Callable[[_Decoder, Any, int], Any]] = {
    "tuple": _Decoder.decode_tuple,
    "int": lambda _, content, __: int(content, 16),
    "float": lambda _, content, __: float(content),
    "complex": _Decoder.decode_complex,
    "bytes": lambda _, content, __: base64.b64decode(content, validate=True),
    "bytearray": _Decoder.decode_bytearray,
    "bytes_in": lambda self, name, _: bytes(self.leaves.fetch("U8", name)),
    "text_in": lambda self, name, _: str(self.leaves.fetch("U8", name), "utf-8", "surrogatepass"),
    "ints_in": lambda self, name, _: self.numbers("I64", name),
    "floats_in": lambda self, name, _: self.numbers("F64", name),
}


def _walk(node: Node, keys: Keys) -> Iterator[tuple[Keys, dict[str, Any]]]:
    if isinstance(node, list):
        for index, child in enumerate(node):
            yield from _walk(child, (*keys, index))
    elif isinstance(node, dict):
        tag, content = _tag_and_content(node)
        if tag == "dict":
            for key, child in content.items():
                yield from _walk(child, (*keys, key))
        elif tag in _DICTS:
            for key, child in content:
                yield from _walk(child, (*keys, key if isinstance(key, str | int) else "?"))
        elif tag == "tuple" or tag in composites.MAKERS:
            yield from _walk(content, keys)
        elif tag not in _DECODERS and tag not in _SETS:
            yield keys, node


def _tag_and_content(node: dict[str, Any]) -> tuple[str, Any]:
    for tag, content in node.items():
        return tag, content
    raise ValueError("empty node")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, found a {type(value).__name__}")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _reject(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _check_size(text: str) -> None:
    if (size := sum(map(text.count, "[{,"))) > 2 * MAX_NODES:
        raise FormatError(f"the structure has {size} values, expected at most {2 * MAX_NODES}")
