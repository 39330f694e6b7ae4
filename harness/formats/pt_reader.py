"""Reads the `.pt` files of torch.save without torch, and without running code.

`read` returns the tree of values with a `TensorRef` in place of each tensor, which describes it and
its bytes in the file; tensor data is not read. What makes tensors is listed here, and what makes
other plain values in `known_values`; any other object is a `Placeholder`. An archive that torch did
not write is an error (`zips`), and so is a pickle that is too large (`unpickler`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from harness.errors import FormatError
from harness.formats import file_kinds, legacy_pt, unpickler, zips
from harness.formats.dtypes import SIZES, STORAGE_DTYPES
from harness.formats.known_values import known_globals
from harness.formats.pickled import (
    Global,
    PickleError,
    Placeholder,
    UnsupportedTensor,
    Unusual,
)

MAX_PICKLE = legacy_pt.MAX_PICKLE


class Shape(tuple[int, ...]):
    """Placeholder of a torch.Size."""

    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self)


@dataclass(frozen=True)
class DType:
    """Placeholder of a torch.dtype; `name` is without "torch."."""

    name: str

    def __str__(self) -> str:
        return f"torch.{self.name}"


@dataclass(frozen=True)
class Device:
    """Placeholder of a torch.device: "cuda:0"."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Storage:
    """The memory of one or more tensors: a record of the file."""

    record: zips.Record
    location: str
    """The device it was on."""


@dataclass(frozen=True, eq=False)
class TypedStorage:
    """A storage with the dtype of its elements, as a pickle names it. For a kind of storage that is
    not read the dtype is that kind."""

    CALLED: ClassVar[str] = "a storage of torch"
    storage: Storage
    dtype: str


@dataclass(eq=False, slots=True)  # not frozen: that takes three times as long to make
class TensorRef:
    """A reference to a tensor in a file; `offset` and `stride` count elements of the storage."""

    storage: Storage
    dtype: str
    shape: Shape
    stride: tuple[int, ...]
    offset: int
    requires_grad: bool = False
    is_parameter: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return SIZES[self.dtype]

    def numel(self) -> int:
        """The number of elements."""
        return self.shape.numel()

    def dim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def path(self) -> Path:
        """The file."""
        return self.storage.record.path

    @property
    def start(self) -> int:
        """The byte offset of its first element in the file."""
        return self.storage.record.start + self.offset * self.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of its elements; the extent in the file only if it is contiguous."""
        return self.numel() * self.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements are contiguous in the file, row-major, from `start` on."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.numel() == 0
            expected *= size
        return True


def read(path: Path) -> Any:
    """The tree in a `.pt` file.

    Tensors are TensorRef, torch.Size, torch.dtype and torch.device Shape, DType and Device; values
    of numpy are those of `known_values`. An object of an unknown class is a Placeholder, wherever
    it is. Raises FormatError, which names the file, also if it cannot be opened.
    """
    try:
        pickled, storage_records = _open(path)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    storages: dict[str, Storage] = {}
    typed: dict[tuple[str, str], TypedStorage] = {}

    def load_storage(reference: Any) -> TypedStorage | Global:
        match reference:
            case ("storage", Global(name=kind), str(number), str(location), int(), *_):
                if known := typed.get((number, kind)):
                    return known
                record = storage_records.get(number)
                if record is None:
                    raise PickleError(f"the tensor data {number!r:.40} is missing")
                storage = storages.setdefault(number, Storage(record, location))
                dtype = STORAGE_DTYPES.get(kind, kind)
                return typed.setdefault((number, kind), TypedStorage(storage, dtype))
            case ("module", Global() as kind, *_):  # a class, before torch 1.6
                return kind
        raise PickleError("malformed: not a reference to tensor data")

    try:
        return unpickler.unpickle(pickled, _GLOBALS, load_storage)
    except PickleError as error:
        raise FormatError(f"{path}: cannot be read: {error}") from None


def _open(path: Path) -> tuple[bytes, Mapping[str, zips.Record]]:
    """The pickle of a file, and its tensor data by number."""
    if file_kinds.format_of(path) != file_kinds.PT:
        raise FormatError(f"{path}: a safetensors file, expected one of torch.save")
    if legacy_pt.is_legacy(path):
        return legacy_pt.read(path)
    try:
        archive = zips.records(path)
        prefix, record = _find_pickle(path, archive)
    except FormatError:
        file_kinds.refuse_foreign_zip(path)
        raise
    start = f"{prefix}data/"
    data = {n.removeprefix(start): data for n, data in archive.items() if n.startswith(start)}
    return record.read(), data


def _find_pickle(path: Path, archive: Mapping[str, zips.Record]) -> tuple[str, zips.Record]:
    """The prefix of all names in an archive, and its pickle. Raises FormatError if it was not
    written by torch.save, or on a machine with another byte order."""
    pickles = [name for name in archive if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise FormatError(f"{path}: a zip archive, but not written by torch.save")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in archive:
        raise FormatError(f"{path}: a TorchScript archive, which contains code")
    order = archive.get(f"{prefix}byteorder")
    if order is not None and (order.size > 16 or order.read() != b"little"):
        raise FormatError(f"{path}: not in little-endian byte order")
    pickled = archive[pickles[0]]
    if pickled.size > MAX_PICKLE:
        raise FormatError(
            f"{path}: its pickle has {pickled.size} bytes, expected at most {MAX_PICKLE}"
        )
    return prefix, pickled


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, *rest: Any
) -> TensorRef:
    """`torch._utils._rebuild_tensor_v2`, and `_v3`, which has the dtype after the hooks."""
    if not isinstance(storage, TypedStorage):
        raise PickleError("malformed: a tensor")
    memory, dtype = storage.storage, storage.dtype
    for extra in rest[1:]:
        if isinstance(extra, DType):
            dtype = extra.name
        elif isinstance(extra, Global):
            raise _Unread(f"tensor of {extra.name:.80}")
        elif isinstance(extra, dict) and any(extra.values()):
            raise _Unread(
                "conjugated or negated tensor: save it after resolve_conj() and resolve_neg()"
            )
    if dtype not in SIZES:
        raise _Unread(f"tensor of a {dtype:.80}")
    if len(size) != len(stride) or len(size) > 64:
        raise PickleError("malformed: a tensor")
    if not all(map(_is_count, (offset, *size, *stride))):
        raise PickleError("malformed: the shape of a tensor")
    numel = math.prod(size)
    if numel >= 2**62:
        raise PickleError("malformed: the shape of a tensor")
    last = offset
    for count, step in zip(size, stride, strict=True):
        last += (count - 1) * step
    record = memory.record
    if numel and (last + 1) * SIZES[dtype] > record.size:
        raise PickleError(
            f"a tensor extends past the end of its data {record.name} of {record.size} bytes"
        )
    return TensorRef(memory, dtype, Shape(size), tuple(stride), offset, bool(requires_grad))


def _of_type(rebuild: Any, kind: Any, args: Any, state: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor that carries attributes."""
    if not isinstance(rebuild, Global) or not isinstance(args, tuple):
        raise PickleError("malformed: a tensor")
    if rebuild.make is not None and rebuild.module == "torch._utils":
        return rebuild.make(*args)
    return UnsupportedTensor(_OF_TYPE, (rebuild, kind, args, state))


def _shape(sizes: Any = ()) -> Shape:
    if not all(map(_is_count, sizes)):
        raise PickleError("malformed: a shape")
    return Shape(sizes)


def _parameter(data: Any, requires_grad: Any = True, *_: Any) -> Any:
    if isinstance(data, Placeholder):
        return data
    if not isinstance(data, TensorRef):
        raise PickleError("malformed: a parameter")
    return replace(data, is_parameter=True, requires_grad=bool(requires_grad))


def _device(kind: Any, index: Any = None) -> Device:
    if not isinstance(kind, str) or not isinstance(index, int | None):
        raise Unusual
    return Device(kind if index is None else f"{kind}:{index}")


class _Unread(Exception):
    """A tensor that cannot be read, and what it is."""


def _rebuilder(name: str, make: Callable[..., Any] | str) -> Global:
    """A function of `torch._utils` that makes tensors. `make`: for a kind not read, what it is."""

    def rebuild(*args: Any) -> Any:
        try:
            if not isinstance(make, str):
                return make(*args)
            what = make
        except _Unread as error:
            what = str(error)
        tensor = UnsupportedTensor(known, args)
        tensor.class_name = what
        return tensor

    known = Global("torch._utils", name, rebuild)
    return known


_WHOLE = {
    "DTensor": ": save it after full_tensor()",
    "ShardedTensor": ": gather it before it is saved",
}


def _wrapper(kind: Any, *_: Any) -> Any:
    """A tensor that other tensors stand for: of one rank of a sharded model, or quantized."""
    if not isinstance(kind, Global):
        raise PickleError("malformed: a tensor")
    remedy = _WHOLE.get(kind.qualname, ", which wraps others")
    raise _Unread(f"tensor of the class {kind.qualname:.40}{remedy}")


_OF_TYPE = Global("torch._tensor", "_rebuild_from_type_v2", _of_type)
_TENSORS = (
    _OF_TYPE,
    _rebuilder("_rebuild_tensor", _tensor),
    _rebuilder("_rebuild_tensor_v2", _tensor),
    _rebuilder("_rebuild_tensor_v3", _tensor),
    _rebuilder("_rebuild_parameter", _parameter),
    _rebuilder("_rebuild_parameter_with_state", _parameter),
    _rebuilder("_rebuild_sparse_tensor", "sparse tensor: save it after to_dense()"),
    _rebuilder("_rebuild_nested_tensor", "nested tensor: save the tensors in it after unbind()"),
    _rebuilder("_rebuild_qtensor", "quantized tensor: save it after dequantize()"),
    _rebuilder("_rebuild_meta_tensor_no_storage", "meta tensor, which has no data"),
    _rebuilder("_rebuild_wrapper_subclass", _wrapper),
    _rebuilder("_rebuild_device_tensor_from_numpy", "tensor saved through numpy"),
    _rebuilder("_rebuild_device_tensor_from_cpu_tensor", "tensor saved through a CPU tensor"),
)
_GLOBALS: dict[str, Any] = {
    **known_globals(),
    **{known.name: known for known in _TENSORS},
    "torch.Size": Global("torch", "Size", _shape),
    "torch.device": Global("torch", "device", _device),
    **{f"torch.{name}": DType(name) for name in SIZES},
}
