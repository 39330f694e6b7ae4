"""`.pt` files as torch tensors, read by `formats.pickles`, which runs no code."""

import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.errors import FormatError
from harness.files import write_atomically
from harness.formats import pt_reader
from harness.formats.pt_reader import DType, Shape, Storage, TensorRef
from harness.formats.unpickler import StandIn
from harness.io.mmap import Bytes
from harness.io.structure import DTYPES, array_of
from harness.utils import torch_write


def write(data: Any, path: Path) -> None:
    """Writes a structure of what `pack` knows with torch.save, and makes sure that it is readable.

    Raises FormatError if `read` would refuse it, OSError if the disk does not take it.
    """

    def write_staged(staged: Path) -> None:
        torch_write(data, staged)
        try:
            pt_reader.read(staged, _ALSO)
        except FormatError as error:
            reason = str(error).removeprefix(f"{staged}: ")
            raise FormatError(f"it could not be read again: {reason}") from None

    write_atomically(path, write_staged)


def read(path: Path, device: str | torch.device, lazy: bool) -> Any:
    """The structure in a file. Raises FormatError for whatever could run code, or is damaged.

    The CRC of every tensor is checked, but not if `lazy`: then nothing of them is read.
    """
    node = pt_reader.read(path, _ALSO)
    with Bytes(path, lazy) as file:
        reading = _Reading(file, device, check=not lazy)
        try:
            return reading.value(node)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise FormatError(f"{path}: damaged: {error!r:.200}") from None


class _Array(StandIn):
    """A numpy array, and what its state is."""

    def set_state(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        self.state = {"kind": kind, "content": content, "shape": shape}
        self.state["is_fortran"] = is_fortran

    def value(self) -> np.ndarray:
        shape, is_fortran = self.state["shape"], self.state["is_fortran"]
        shape = shape[::-1] if is_fortran else shape
        array = array_of(self.state["content"], self.state["kind"].text(), shape)
        return array.T if is_fortran else array


class _Kind(StandIn):
    """A numpy dtype, and what its state is."""

    def set_state(self, state: Any) -> None:
        self.state = {"order": state[1], "fields": state[2:5], "unit": state[8:]}

    def text(self) -> str:
        """What numpy calls it: "<f4"."""
        if self.state["fields"] != (None, None, None):
            raise ValueError("an array of records")
        text = f"{self.state['order']}{self.values[0]}"
        for _, (unit, count, *_) in self.state["unit"]:
            text += f"[{count if count != 1 else ''}{unit.decode()}]"
        return text


def _ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(pt_reader.mapping(items))


def _counter(items: Any = ()) -> Counter[Any]:
    return Counter(pt_reader.mapping(items))


def _stands_for(kind: type[StandIn], name: str) -> Callable[..., Any]:
    return lambda *values: kind(name, *values)


_ALSO: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "torch._utils._rebuild_parameter": _stands_for(StandIn, "parameter"),
    "torch._utils._rebuild_parameter_with_state": _stands_for(StandIn, "parameter"),
    "numpy.ndarray": _stands_for(_Array, "numpy.ndarray"),
    "numpy.dtype": _stands_for(_Kind, "numpy.dtype"),
    **{
        f"numpy.{core}.multiarray.{name}": _stands_for(kind, name)
        for core in ("core", "_core")
        for name, kind in {"_reconstruct": _Array, "scalar": StandIn}.items()
    },
}
"""What a pickle may call besides what `formats.pickles` knows: here it keeps its type."""


class _Reading:
    def __init__(self, file: Bytes, device: str | torch.device, check: bool):
        self.file = file
        self.device = device
        self.check = check
        self.storages: dict[Storage, torch.UntypedStorage] = {}
        self.known: dict[int, Any] = {}  # what is in the tree twice comes back as one object

    def value(self, node: Any) -> Any:
        if isinstance(node, str | int | float | bytes | complex | None):
            return node
        if id(node) not in self.known:
            self.known[id(node)] = self.made(node)
        return self.known[id(node)]

    def made(self, node: Any) -> Any:
        match node:
            case TensorRef():
                return self.tensor(node)
            case Shape():
                return torch.Size(node)
            case DType():
                return DTYPES[node.name]
            case _Array():
                return node.value()
            case StandIn(class_name="scalar", values=(_Kind() as kind, bytes(content))):
                return array_of(content, kind.text(), ())[()]
            case StandIn(class_name="parameter", values=(data, requires_grad, *_)):
                return torch.nn.Parameter(self.value(data), bool(requires_grad))
            case StandIn(class_name="torch.device"):
                return torch.device(*node.values)
            case dict():
                return self.mapping(node)
            case tuple():
                return tuple([self.value(item) for item in node])
            case list():
                return [self.value(item) for item in node]
            case set() | frozenset():
                return type(node)([self.value(item) for item in node])
            case bytearray():
                return node
        name = getattr(node, "class_name", None) or getattr(node, "name", type(node).__name__)
        raise FormatError(f"{self.file.path}: it holds a {name}, which is not loaded")

    def mapping(self, node: dict[Any, Any]) -> dict[Any, Any]:
        found = type(node)()
        for key, item in node.items():
            found[self.value(key)] = self.value(item)
        if isinstance(node, OrderedDict) and "_metadata" in vars(node):
            vars(found)["_metadata"] = self.value(vars(node)["_metadata"])
        return found

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        dtype = DTYPES[ref.dtype]
        if not ref.numel():
            tensor = torch.empty_strided(ref.shape, ref.stride, dtype=dtype, device=self.device)
        else:
            tensor = torch.empty(0, dtype=dtype, device=self.device)
            tensor.set_(self.storage(ref.storage), ref.offset, ref.shape, ref.stride)
        return tensor.requires_grad_(ref.requires_grad)

    def storage(self, storage: Storage) -> torch.UntypedStorage:
        if storage not in self.storages:
            record = storage.record
            content = self.file.tensor(record.start, record.size, alignment=16)  # for any dtype
            if self.check and zlib.crc32(content.numpy().data) != record.crc:
                raise FormatError(f"{self.file.path}: damaged: wrong CRC of {record.name}")
            self.storages[storage] = content.to(self.device).untyped_storage()
        return self.storages[storage]
