"""The `.pt` files that torch.save writes, read without torch, and without running any code.

`read` returns the tree of values with a `TensorRef` in the place of every tensor: what it is, and
which bytes of the file it is made of. Nothing of the tensors is read. All that a pickle may name is
listed here; any other name is an error, and so is an archive that torch did not write (`zips`), and
a pickle that would never end (`unpickler`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import FormatError
from harness.formats import unpickler, zips
from harness.formats.dtypes import SIZES, STORAGES
from harness.formats.unpickler import Callee, PickleError, StandIn

MAX_PICKLE = 256 << 20
"""Bytes of the part of a file that is not tensors."""


class Shape(tuple[int, ...]):
    """Stands for torch.Size."""

    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self)


@dataclass(frozen=True)
class DType:
    """Stands for a torch.dtype; `name` is without "torch."."""

    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    """The memory of one tensor or several, as a record of the file."""

    record: zips.Record
    location: str
    """The device it was on."""


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor that has not been read; `offset` and `stride` count elements of the storage."""

    storage: Storage
    dtype: str
    shape: Shape
    stride: tuple[int, ...]
    offset: int
    requires_grad: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
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
        """The position of its first element in the file, in bytes."""
        return self.storage.record.start + self.offset * self.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of its elements; in the file only if it is contiguous."""
        return self.numel() * self.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements are one after the other in the file, from `start` on."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.numel() == 0
            expected *= size
        return True


def read(path: Path, extra_globals: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """The tree in a `.pt` file, tensors as TensorRef.

    `extra_globals`: what else the pickle may call, by full name. Dicts of any kind come back as
    dict, torch.Size as Shape, torch.dtype as DType, torch.device and the classes in `STAND_INS` as
    StandIn. Raises FormatError that names the file, also if it cannot be opened.
    """
    try:
        archive = zips.records(path)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    prefix, pickled = _find_pickle(path, archive)
    storages: dict[str, Storage] = {}

    def load_storage(reference: Any) -> tuple[Storage, str]:
        match reference:
            case ("storage", Callee(name=kind), str(number), str(location), int()):
                record = archive.get(f"{prefix}data/{number}")
                if kind not in _STORAGE_DTYPES or record is None:
                    raise PickleError(f"the tensor data {number!r} are missing")
                storage = storages.setdefault(number, Storage(record, location))
                return storage, _STORAGE_DTYPES[kind]
        raise PickleError("malformed: not a reference to tensor data")

    extra = {name: Callee(name, make) for name, make in (extra_globals or {}).items()}
    try:
        return unpickler.unpickle(pickled.read(), _GLOBALS | extra, load_storage)
    except PickleError as error:
        raise FormatError(f"{path}: not read: {error}") from None


def _find_pickle(path: Path, archive: Mapping[str, zips.Record]) -> tuple[str, zips.Record]:
    """The prefix of all names in an archive, and its pickle. Raises FormatError if torch.save did
    not write it, or on a machine of another byte order."""
    pickles = [name for name in archive if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise FormatError(f"{path}: a zip archive, but not one that torch.save wrote")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in archive:
        raise FormatError(f"{path}: a TorchScript archive, which is code")
    order = archive.get(f"{prefix}byteorder")
    if order is not None and (order.size > 16 or order.read() != b"little"):
        raise FormatError(f"{path}: not in little-endian byte order")
    pickled = archive[pickles[0]]
    if pickled.size > MAX_PICKLE:
        raise FormatError(f"{path}: a pickle of {pickled.size} bytes, at most {MAX_PICKLE}")
    return prefix, pickled


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, *rest: Any
) -> TensorRef:
    """`torch._utils._rebuild_tensor_v2`, and `_v3`, whose dtype follows the hooks."""
    memory, dtype = storage
    if rest[1:] and isinstance(rest[1], DType):
        dtype = rest[1].name
    if any(isinstance(flags, dict) and any(flags.values()) for flags in rest[1:]):
        raise PickleError("a conjugated or negated tensor: resolve_conj(), resolve_neg() first")
    sizes = [offset, *size, *stride]
    if not isinstance(memory, Storage) or len(size) != len(stride) or len(size) > 64:
        raise PickleError("malformed: a tensor")
    if dtype not in SIZES:
        raise PickleError(f"a tensor of dtype {dtype}")
    if not all(map(_is_count, sizes)):
        raise PickleError("malformed: the shape of a tensor")
    ref = TensorRef(memory, dtype, Shape(size), tuple(stride), offset, bool(requires_grad))
    if ref.numel() >= 2**62:
        raise PickleError("malformed: the shape of a tensor")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    record = memory.record
    if ref.numel() and (last + 1) * ref.itemsize > record.size:
        raise PickleError(
            f"a tensor reaches over the end of its data {record.name}, {record.size} bytes"
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
    make = rebuild.make if isinstance(rebuild, Callee) else None
    if make is None or make not in (_tensor, _parameter):
        raise PickleError("malformed: a tensor")
    return make(*args)


def mapping(items: Any = ()) -> dict[Any, Any]:
    """A dict made of another, or of pairs whose keys are quick to hash."""
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


def _stand_in(name: str) -> Callee:
    return Callee(name, lambda *values: StandIn(name, *values))


_STORAGE_DTYPES = {f"torch.{name}": dtype for dtype, name in STORAGES.items()} | {
    "torch.UntypedStorage": "uint8",
    "torch.storage.UntypedStorage": "uint8",
}

STAND_INS = (
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
"""What comes back as StandIn: only their arguments and attributes are needed."""

_GLOBALS: dict[str, Any] = {
    callee.name: callee
    for callee in (
        *map(Callee, _STORAGE_DTYPES),
        *map(_stand_in, STAND_INS),
        Callee("torch.Tensor"),
        Callee("torch.nn.parameter.Parameter"),
        Callee("torch.Size", _shape),
        Callee("torch._utils._rebuild_tensor_v2", _tensor),
        Callee("torch._utils._rebuild_tensor_v3", _tensor),
        Callee("torch._utils._rebuild_parameter", _parameter),
        Callee("torch._utils._rebuild_parameter_with_state", _parameter),
        Callee("torch._tensor._rebuild_from_type_v2", _of_type),
        Callee("collections.OrderedDict", mapping),
        Callee("collections.Counter", mapping),
        Callee("collections.defaultdict", lambda _=None: {}),
        Callee("builtins.set", _set),
        Callee("builtins.frozenset", lambda items=(): frozenset(_set(items))),
        Callee("builtins.bytes", lambda: b""),
        Callee("builtins.complex", complex),
        Callee("builtins.bytearray", _bytearray),
        Callee("_codecs.encode", _bytes),
        *map(Callee, ("builtins.dict", "builtins.list", "builtins.int", "builtins.float")),
    )
} | {f"torch.{name}": DType(name) for name in SIZES}
