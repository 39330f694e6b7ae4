"""Reads the `.pt` files of torch.save without torch, and without running code.

`read` returns the tree of values with a `TensorRef` in place of each tensor, which describes it and
its bytes in the file; tensor data is not read. All globals that a pickle may name are listed here;
any other name is an error, and so is an archive that torch did not write (`zips`) or a pickle that
would not end (`unpickler`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import FormatError
from harness.formats import file_kinds, unpickler, zips
from harness.formats.dtypes import SIZES, STORAGES
from harness.formats.unpickler import AllowedGlobal, PickleError, Placeholder

MAX_PICKLE = 256 << 20
"""Most bytes of the pickle in a file."""


class Shape(tuple[int, ...]):
    """Placeholder of a torch.Size."""

    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self)


@dataclass(frozen=True)
class DType:
    """Placeholder of a torch.dtype; `name` is without "torch."."""

    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    """The memory of one or more tensors: a record of the file."""

    record: zips.Record
    location: str
    """The device it was on."""


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A reference to a tensor in a file; `offset` and `stride` count elements of the storage."""

    storage: Storage
    dtype: str
    shape: Shape
    stride: tuple[int, ...]
    offset: int
    requires_grad: bool = False

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


def read(path: Path, extra_globals: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """The tree in a `.pt` file, tensors as TensorRef.

    `extra_globals`: what else the pickle may call, by full name. All kinds of dict are returned as
    dict, torch.Size as Shape, torch.dtype as DType, and torch.device and the other globals in
    `PLACEHOLDERS` as Placeholder. Raises FormatError, which names the file, also if it cannot be
    opened.
    """
    try:
        prefix, archive, pickled = _open(path)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    storages: dict[str, Storage] = {}

    def load_storage(reference: Any) -> tuple[Storage, str]:
        match reference:
            case ("storage", AllowedGlobal(name=kind), str(number), str(location), int()):
                record = archive.get(f"{prefix}data/{number}")
                if kind not in _STORAGE_DTYPES or record is None:
                    raise PickleError(f"the tensor data {number!r} is missing")
                storage = storages.setdefault(number, Storage(record, location))
                return storage, _STORAGE_DTYPES[kind]
        raise PickleError("malformed: not a reference to tensor data")

    extra = {name: AllowedGlobal(name, make) for name, make in (extra_globals or {}).items()}
    try:
        return unpickler.unpickle(pickled.read(), _GLOBALS | extra, load_storage)
    except PickleError as error:
        raise FormatError(f"{path}: cannot be read: {error}") from None


def _open(path: Path) -> tuple[str, Mapping[str, zips.Record], zips.Record]:
    """The prefix of all names in an archive, the archive, and its pickle."""
    if file_kinds.format_of(path) != file_kinds.PT:
        raise FormatError(f"{path}: a safetensors file, expected one of torch.save")
    try:
        archive = zips.records(path)
        prefix, pickled = _find_pickle(path, archive)
    except FormatError:
        file_kinds.refuse_foreign_zip(path)
        raise
    return prefix, archive, pickled


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
    memory, dtype = storage
    if rest[1:] and isinstance(rest[1], DType):
        dtype = rest[1].name
    if any(isinstance(flags, dict) and any(flags.values()) for flags in rest[1:]):
        raise PickleError(
            "a conjugated or negated tensor: save it after resolve_conj() and resolve_neg()"
        )
    sizes = [offset, *size, *stride]
    if not isinstance(memory, Storage) or len(size) != len(stride) or len(size) > 64:
        raise PickleError("malformed: a tensor")
    if dtype not in SIZES:
        raise PickleError(f"a tensor of unsupported dtype {dtype}")
    if not all(map(_is_count, sizes)):
        raise PickleError("malformed: the shape of a tensor")
    ref = TensorRef(memory, dtype, Shape(size), tuple(stride), offset, bool(requires_grad))
    if ref.numel() >= 2**62:
        raise PickleError("malformed: the shape of a tensor")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    record = memory.record
    if ref.numel() and (last + 1) * ref.itemsize > record.size:
        raise PickleError(
            f"a tensor extends past the end of its data {record.name} of {record.size} bytes"
        )
    return ref


def _shape(sizes: Any = ()) -> Shape:
    if not all(map(_is_count, sizes)):
        raise PickleError("malformed: a shape")
    return Shape(sizes)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _of_type(rebuild: Any, _: Any, args: Any, __: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor that carries attributes."""
    make = rebuild.make if isinstance(rebuild, AllowedGlobal) else None
    if make is None or make not in (_tensor, _parameter):
        raise PickleError("malformed: a tensor")
    return make(*args)


def mapping(items: Any = ()) -> dict[Any, Any]:
    """A dict from another dict, or from pairs whose keys are quick to hash."""
    if isinstance(items, dict):
        return dict(items)
    return {unpickler.hashable(key): value for key, value in items}


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "utf-8"):
        raise PickleError("malformed: bytes")
    return text.encode(encoding)


def _bytearray(content: Any = b"", *encoding: Any) -> bytearray:
    if isinstance(content, str):
        content = _bytes(content, *encoding)
    if not isinstance(content, bytes):  # a number would be a size
        raise PickleError("malformed: a bytearray")
    return bytearray(content)


def _set(items: Any = ()) -> set[Any]:
    return {unpickler.hashable(item) for item in items}


def _placeholder(name: str) -> AllowedGlobal:
    return AllowedGlobal(name, lambda *values: Placeholder(name, *values))


_STORAGE_DTYPES = {f"torch.{name}": dtype for dtype, name in STORAGES.items()} | {
    "torch.UntypedStorage": "uint8",
    "torch.storage.UntypedStorage": "uint8",
}

PLACEHOLDERS = (
    "torch.device",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch.serialization._get_layout",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Globals that are returned as Placeholder: only their arguments and attributes are needed."""

_GLOBALS: dict[str, Any] = {
    allowed.name: allowed
    for allowed in (
        *map(AllowedGlobal, _STORAGE_DTYPES),
        *map(_placeholder, PLACEHOLDERS),
        AllowedGlobal("torch.Tensor"),
        AllowedGlobal("torch.nn.parameter.Parameter"),
        AllowedGlobal("torch.Size", _shape),
        AllowedGlobal("torch._utils._rebuild_tensor_v2", _tensor),
        AllowedGlobal("torch._utils._rebuild_tensor_v3", _tensor),
        AllowedGlobal("torch._utils._rebuild_parameter", _parameter),
        AllowedGlobal("torch._utils._rebuild_parameter_with_state", _parameter),
        AllowedGlobal("torch._tensor._rebuild_from_type_v2", _of_type),
        AllowedGlobal("collections.OrderedDict", mapping),
        AllowedGlobal("collections.Counter", mapping),
        AllowedGlobal("collections.defaultdict", lambda _=None: {}),
        AllowedGlobal("builtins.set", _set),
        AllowedGlobal("builtins.frozenset", lambda items=(): frozenset(_set(items))),
        AllowedGlobal("builtins.bytes", lambda: b""),
        AllowedGlobal("builtins.complex", complex),
        AllowedGlobal("builtins.bytearray", _bytearray),
        AllowedGlobal("_codecs.encode", _bytes),
        *map(AllowedGlobal, ("builtins.dict", "builtins.list", "builtins.int", "builtins.float")),
    )
} | {f"torch.{name}": DType(name) for name in SIZES}
