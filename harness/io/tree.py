"""Trees of `formats.pt_reader` as values of torch and numpy."""

from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import date, time, timedelta, tzinfo
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

import torch

from harness.formats.json_tree import Keys
from harness.formats.known_values import NumpyArray, NumpyDType, NumpyScalar
from harness.formats.pt_reader import Device, DType, Shape, TensorRef
from harness.io.structure import DTYPES, make_array

LEFT_OUT = object()
"""What `unknown` returns for a value that its container shall not have: None in a sequence."""

_PLAIN = (
    *(str, int, float, bytes, complex, type(None), range, slice),
    *(date, time, timedelta, tzinfo, PurePath),
)


class TreeConverter:
    """Replaces the references in trees. A value that occurs twice is one object again."""

    def __init__(
        self,
        tensor: Callable[[TensorRef], torch.Tensor],
        unknown: Callable[[Any, Keys], Any],
    ):
        """`tensor` reads a tensor; `unknown(node, keys)` returns what becomes of any other value: a
        Placeholder, a Global, a storage, a dtype of numpy, an array of its objects or records."""
        self.tensor = tensor
        self.unknown = unknown
        self._converted: dict[int, Any] = {}

    def value(self, node: Any, keys: Keys = ()) -> Any:
        """The value of a node at `keys`. Raises ValueError, TypeError, ... if it is damaged."""
        if isinstance(node, _PLAIN):
            return node
        if id(node) not in self._converted:
            self._converted[id(node)] = self._convert(node, keys)
        return self._converted[id(node)]

    def _convert(self, node: Any, keys: Keys) -> Any:
        match node:
            case TensorRef(is_parameter=True):
                return torch.nn.Parameter(self.tensor(node), node.requires_grad)
            case TensorRef():
                return self.tensor(node).requires_grad_(node.requires_grad)
            case Shape():
                return torch.Size(node)
            case DType(name=name) if name in DTYPES:
                return DTYPES[name]
            case Device(name=name):
                return torch.device(name)
            case NumpyArray(content=bytes(content), dtype=NumpyDType(text=text)) if text:
                shape = node.shape[::-1] if node.is_fortran else node.shape
                array = make_array(content, text, shape)
                return array.T if node.is_fortran else array
            case NumpyScalar(content=content, dtype=NumpyDType(text=text)) if text:
                return make_array(content, text, ())[()]
            case dict():
                return self._mapping(node, keys)
            case tuple() | list() | deque():
                items = [self.value(item, (*keys, index)) for index, item in enumerate(node)]
                items = [None if item is LEFT_OUT else item for item in items]
                return deque(items, node.maxlen) if isinstance(node, deque) else type(node)(items)
            case set() | frozenset():
                items = [self.value(item, keys) for item in node]
                return type(node)(item for item in items if item is not LEFT_OUT)
            case Namespace() | SimpleNamespace():
                return type(node)(**self._mapping(vars(node), keys))
            case bytearray():
                return node
        return self.unknown(node, keys)

    def _mapping(self, node: dict[Any, Any], keys: Keys) -> dict[Any, Any]:
        result = (
            defaultdict(node.default_factory) if isinstance(node, defaultdict) else type(node)()
        )
        for key, item in node.items():
            name, value = self._key(key, keys), self.value(item, (*keys, key))
            if name is not LEFT_OUT and value is not LEFT_OUT:
                result[name] = value
        if isinstance(node, OrderedDict) and "_metadata" in vars(node):
            vars(result)["_metadata"] = self.value(vars(node)["_metadata"], (*keys, "_metadata"))
        return result

    def _key(self, key: Any, keys: Keys) -> Any:
        if isinstance(key, tuple) and not isinstance(key, Shape):
            parts = [self.value(part, keys) for part in key]
            return LEFT_OUT if any(part is LEFT_OUT for part in parts) else tuple(parts)
        return self.value(key, keys)
