"""Reads `.pt` files as torch tensors, through `formats.pt_reader`, which runs no code."""

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
from harness.formats.unpickler import Placeholder
from harness.io.mmap import ByteFile
from harness.io.structure import DTYPES, make_array
from harness.utils import torch_write


def write(data: Any, path: Path) -> None:
    """Writes a structure that `pack` supports with torch.save, and checks that it can be read back.

    Raises FormatError if `read` would reject it, OSError if it cannot be written.
    """

    def write_staged(staged: Path) -> None:
        torch_write(data, staged)
        try:
            pt_reader.read(staged, _EXTRA_GLOBALS)
        except FormatError as error:
            reason = str(error).removeprefix(f"{staged}: ")
            raise FormatError(f"cannot be read back: {reason}") from None

    write_atomically(path, write_staged)


def read(path: Path, device: str | torch.device, lazy: bool) -> Any:
    """The structure in a file. Raises FormatError if it could run code or is damaged.

    Checks the CRC of every tensor, except with `lazy`, which reads no tensor.
    """
    node = pt_reader.read(path, _EXTRA_GLOBALS)
    with ByteFile(path, lazy) as file:
        loader = _Loader(file, device, check=not lazy)
        try:
            return loader.value(node)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise FormatError(f"{path}: damaged: {error!r:.200}") from None


class _Array(Placeholder):
    """A numpy array."""

    def set_state(self, state: Any) -> None:
        _, shape, dtype, is_fortran, content = state
        self.state = {"dtype": dtype, "content": content, "shape": shape}
        self.state["is_fortran"] = is_fortran

    def value(self) -> np.ndarray:
        shape, is_fortran = self.state["shape"], self.state["is_fortran"]
        shape = shape[::-1] if is_fortran else shape
        array = make_array(self.state["content"], self.state["dtype"].text(), shape)
        return array.T if is_fortran else array


class _ArrayDType(Placeholder):
    """A numpy dtype."""

    def set_state(self, state: Any) -> None:
        self.state = {"order": state[1], "fields": state[2:5], "unit": state[8:]}

    def text(self) -> str:
        """Its name in numpy: "<f4"."""
        if self.state["fields"] != (None, None, None):
            raise ValueError("structured numpy arrays are not supported")
        text = f"{self.state['order']}{self.values[0]}"
        for _, (unit, count, *_) in self.state["unit"]:
            text += f"[{count if count != 1 else ''}{unit.decode()}]"
        return text


def _ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(pt_reader.mapping(items))


def _counter(items: Any = ()) -> Counter[Any]:
    return Counter(pt_reader.mapping(items))


def _placeholder(kind: type[Placeholder], name: str) -> Callable[..., Any]:
    return lambda *values: kind(name, *values)


_EXTRA_GLOBALS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "torch._utils._rebuild_parameter": _placeholder(Placeholder, "parameter"),
    "torch._utils._rebuild_parameter_with_state": _placeholder(Placeholder, "parameter"),
    "numpy.ndarray": _placeholder(_Array, "numpy.ndarray"),
    "numpy.dtype": _placeholder(_ArrayDType, "numpy.dtype"),
    **{
        f"numpy.{core}.multiarray.{name}": _placeholder(kind, name)
        for core in ("core", "_core")
        for name, kind in {"_reconstruct": _Array, "scalar": Placeholder}.items()
    },
}
"""Globals that a pickle may call besides those of `formats.pt_reader`, which preserve types."""


class _Loader:
    """Converts a tree of `pt_reader` to values of torch and numpy."""

    def __init__(self, file: ByteFile, device: str | torch.device, check: bool):
        self.file = file
        self.device = device
        self.check = check
        self.storages: dict[Storage, torch.UntypedStorage] = {}
        self.converted: dict[int, Any] = {}  # by id: shared values are shared again

    def value(self, node: Any) -> Any:
        if isinstance(node, str | int | float | bytes | complex | None):
            return node
        if id(node) not in self.converted:
            self.converted[id(node)] = self.convert(node)
        return self.converted[id(node)]

    def convert(self, node: Any) -> Any:
        match node:
            case TensorRef():
                return self.tensor(node)
            case Shape():
                return torch.Size(node)
            case DType():
                return DTYPES[node.name]
            case _Array():
                return node.value()
            case Placeholder(class_name="scalar", values=(_ArrayDType() as dtype, bytes(content))):
                return make_array(content, dtype.text(), ())[()]
            case Placeholder(class_name="parameter", values=(data, requires_grad, *_)):
                return torch.nn.Parameter(self.value(data), bool(requires_grad))
            case Placeholder(class_name="torch.device"):
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
        raise FormatError(f"{self.file.path}: contains a {name}, which is not supported")

    def mapping(self, node: dict[Any, Any]) -> dict[Any, Any]:
        result = type(node)()
        for key, item in node.items():
            result[self.value(key)] = self.value(item)
        if isinstance(node, OrderedDict) and "_metadata" in vars(node):
            vars(result)["_metadata"] = self.value(vars(node)["_metadata"])
        return result

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
            if self.check:
                record.check_crc(zlib.crc32(content.numpy().data))
            self.storages[storage] = content.to(self.device).untyped_storage()
        return self.storages[storage]
