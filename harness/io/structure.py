"""Splits a nested structure into flat named tensors and a JSON tree, and rebuilds it.

The nodes of the tree, besides those of `formats.json_tree`:

    {"tensor": name}                             the tensor of that name; optional keys:
        "stride": [...]                              its strides, if not row-major
        "view": [offset, shape, stride]              only this view of it, in elements
        "complex": true                              stored as pairs of real numbers
        "parameter": true, "requires_grad": true
    {"numpy": name, "dtype": "<f4", "shape": [...]}     an array, its bytes in the U8 tensor `name`
    {"scalar": "<f4", "bytes": hex}                     a numpy scalar
    {"dtype": "float32"}, {"size": [...]}, {"device": "cuda:0"}
"""

import math
import re
from collections.abc import Callable
from itertools import chain
from itertools import count as count_from
from typing import Any

import numpy as np
import torch

from harness.errors import FormatError
from harness.formats import json_tree, safetensors
from harness.formats.dtypes import SIZES
from harness.formats.json_tree import Keys, Node, dotted
from harness.io.shared_memory import extent, find_bases, is_dense, unexpanded
from harness.utils import dtype_name

RESERVED_PREFIX = "__harness__."
"""Prefix of the names of stored tensors that are not tensors of the structure."""
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in SIZES if hasattr(torch, name)
}
"""The supported dtypes of tensors."""

STORED_AS_PAIRS = (torch.complex32, torch.complex128)
"""Dtypes that safetensors does not support: stored as pairs of real numbers."""
_ARRAY_DTYPE = re.compile(r"[<>|][biufcSUmM]\d{1,9}(\[[0-9a-zA-Z]{1,9}\])?")
_ARRAYS_OUTSIDE = {"U8": torch.uint8, "I64": torch.int64, "F64": torch.float64}


def pack(data: Any) -> tuple[Node, dict[str, torch.Tensor]]:
    """The tree of a structure, and the tensors that it names: shared memory only once.

    A tensor is named by its keys, joined by dots ("model.0.weight"); if two tensors would have the
    same name, the more nested one gets another. The tensors are not copied. Raises FormatError,
    with the keys, for unsupported values.
    """
    packer = _Packer()
    node = json_tree.encode(data, packer)
    packer.finish()
    return node, packer.tensors


def unpack(
    node: Node, tensor: Callable[[str], torch.Tensor], device: str | torch.device = "cpu"
) -> Any:
    """The structure of a tree, its tensors on `device`; `tensor(name)` returns them on the CPU.

    Raises FormatError if it is not a tree, or does not match the tensors.
    """
    return json_tree.decode(node, _Unpacker(tensor, torch.device(device)))


class _Packer:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.arrays: dict[str, torch.Tensor] = {}  # stored by `store`
        self.keys: list[Keys] = []  # of every tensor, with its node
        self.originals: list[torch.Tensor] = []
        self.nodes: list[dict[str, Any]] = []

    def encode(self, value: Any, keys: Keys) -> dict[str, Any] | None:
        match value:
            case torch.Tensor():
                return self.tensor(value, keys)
            case torch.dtype() if value in DTYPES.values():
                return {"dtype": dtype_name(value)}
            case torch.Size():
                return {"size": list(value)}
            case torch.device():
                return {"device": str(value)}
            case np.ndarray() if type(value) is np.ndarray:
                if not _ARRAY_DTYPE.fullmatch(value.dtype.str):
                    where = dotted(keys) or "the data"
                    raise FormatError(f"{where}: cannot store a numpy array of {value.dtype}")
                data = np.ascontiguousarray(value).tobytes()
                name = self.store("U8", data)
                return {"numpy": name, "dtype": value.dtype.str, "shape": list(value.shape)}
            case np.generic() if _ARRAY_DTYPE.fullmatch(value.dtype.str):
                return {"scalar": value.dtype.str, "bytes": value.tobytes().hex()}
        return None

    def tensor(self, value: torch.Tensor, keys: Keys) -> dict[str, Any]:
        for is_unsupported, kind in (
            (type(value) not in (torch.Tensor, torch.nn.Parameter), type(value).__qualname__),
            (value.layout != torch.strided, f"tensor of layout {value.layout}: use to_dense()"),
            (value.is_quantized or value.dtype not in DTYPES.values(), f"tensor of {value.dtype}"),
            (value.is_meta, "tensor without data, on the meta device"),
            (value.dim() > safetensors.MAX_DIMENSIONS, f"tensor of {value.dim()} dimensions"),
        ):
            if is_unsupported:
                raise FormatError(f"{dotted(keys) or 'the data'}: cannot store a {kind}")
        node: dict[str, Any] = {"tensor": ""}
        if isinstance(value, torch.nn.Parameter):
            node["parameter"] = True
        if value.requires_grad:
            node["requires_grad"] = True
        self.keys.append(keys)
        self.originals.append(value.detach().resolve_conj().resolve_neg())
        self.nodes.append(node)
        return node

    def store(self, dtype: str, data: Any) -> str:
        name, kind = f"{RESERVED_PREFIX}{len(self.arrays)}", _ARRAYS_OUTSIDE[dtype]
        self.arrays[name] = torch.empty(0, dtype=kind)
        if len(data):  # frombuffer rejects an empty buffer
            self.arrays[name] = torch.frombuffer(bytearray(data), dtype=kind)
        return name

    def finish(self) -> None:
        """Names the stored tensors, and completes all nodes."""
        bases = find_bases(self.originals, [dotted(keys) for keys in self.keys])
        names = self.choose_names([base.owner for base in bases])
        for base, name in zip(bases, names, strict=True):
            self.tensors[name] = base.tensor
            stride = _stride_to_restore(base.tensor)
            for number, offset in base.offsets.items():
                node, tensor = self.nodes[number], self.originals[number]
                node["tensor"] = name
                if tensor.dtype in STORED_AS_PAIRS:
                    node["complex"] = True
                if stride is not None:
                    node["stride"] = stride
                shape, steps = tensor.shape, tensor.stride()
                if (shape, steps) != (base.tensor.shape, base.tensor.stride()):
                    node["view"] = [offset, list(shape), list(steps)]
        self.tensors |= self.arrays

    def choose_names(self, owners: list[int | None]) -> list[str]:
        """A name for each base; tensors at the top level of the structure choose first."""
        count = len(self.arrays)
        names: dict[int, str] = {}
        taken = {safetensors.METADATA}

        def is_nested(index: int) -> bool:
            owner = owners[index]
            return owner is not None and len(self.keys[owner]) > 1

        for index in sorted(range(len(owners)), key=is_nested):
            owner = owners[index]
            if owner is None:
                name, count = f"{RESERVED_PREFIX}{count}", count + 1
            else:
                stem = dotted(self.keys[owner]).encode(errors="backslashreplace").decode()
                stem = "tensor" if not self.keys[owner] else stem
                stem = "tensor~" + stem if stem.startswith(RESERVED_PREFIX) else stem
                choices = chain([stem], (f"{stem}~{number}" for number in count_from(2)))
                name = next(choice for choice in choices if choice not in taken)
            taken.add(name)
            names[index] = name
        return [names[index] for index in range(len(owners))]


class _Unpacker:
    def __init__(self, tensor: Callable[[str], torch.Tensor], device: torch.device):
        self.tensor = tensor
        self.device = device
        self.bases: dict[str, tuple[tuple[Any, Any], torch.Tensor]] = {}

    def decode(self, node: dict[str, Any]) -> Any:
        match node:
            case {"tensor": str()}:
                return self.view(node)
            case {"numpy": str(name), "dtype": str(dtype), "shape": list(shape)}:
                return make_array(self.fetch("U8", name), dtype, _sizes(shape))
            case {"scalar": str(dtype), "bytes": str(content)}:
                return make_array(bytes.fromhex(content), dtype, ())[()]
            case {"dtype": str(name)} if name in DTYPES:
                return DTYPES[name]
            case {"size": list(sizes)}:
                return torch.Size(_sizes(sizes))
            case {"device": str(name)}:
                return torch.device(name)
        raise FormatError(f"the structure contains an unknown node: {node!r:.100}")

    def fetch(self, dtype: str, name: Any) -> bytes:
        tensor = self.tensor(name)
        if tensor.dtype != _ARRAYS_OUTSIDE[dtype] or tensor.dim() != 1:
            raise FormatError(f"{name!r}: expected a one-dimensional tensor of {dtype}")
        return tensor.numpy().tobytes()

    def view(self, node: dict[str, Any]) -> torch.Tensor:
        tensor = self.base(node["tensor"], node.get("stride"), node.get("complex"))
        if "view" in node:
            offset, shape, stride = node["view"]
            (offset,), shape, stride = _sizes([offset]), _sizes(shape), _sizes(stride)
            if len(shape) != len(stride) or not is_dense(tensor.shape, tensor.stride()):
                raise ValueError("invalid view")
            if offset + extent(shape, stride) > tensor.numel() or math.prod(shape) >= 2**62:
                raise ValueError(f"a view of shape {shape} extends past the end of its tensor")
            tensor = tensor.as_strided(shape, stride, tensor.storage_offset() + offset)
        else:
            tensor = tensor.view_as(tensor)  # a separate object
        if node.get("parameter"):
            return torch.nn.Parameter(tensor, requires_grad=bool(node.get("requires_grad")))
        return tensor.requires_grad_() if node.get("requires_grad") else tensor

    def base(self, name: str, stride: Any, is_complex: Any) -> torch.Tensor:
        kind = stride, is_complex
        if name not in self.bases:
            tensor = self.tensor(name)
            if is_complex and not tensor.is_complex():
                tensor = torch.view_as_complex(tensor)
            if stride is not None:
                tensor = _strided(tensor, _sizes(stride))
            self.bases[name] = kind, tensor.to(self.device)
        if self.bases[name][0] != kind:
            raise ValueError(f"{name!r} has conflicting descriptions")
        return self.bases[name][1]


def copyable(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8 if the elements are one byte: torch cannot copy all such dtypes."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if its storage is larger: a file would get the complete storage."""
    inner = unexpanded(tensor)
    if tensor.untyped_storage().nbytes() == extent(inner.shape, inner.stride()) * inner.itemsize:
        return tensor
    return copyable(inner).clone().view(tensor.dtype).expand(tensor.shape)


def _stride_to_restore(tensor: torch.Tensor) -> list[int] | None:
    """The strides that the tree must record: of permuted tensors, and 0 where it is expanded."""
    inner = unexpanded(tensor)
    if tensor.numel() == 0 or (inner is tensor and tensor.is_contiguous()):
        return None
    stride = inner.stride()
    if not is_dense(inner.shape, stride):
        if inner is tensor:
            return None
        stride = torch.empty(inner.shape, device="meta").stride()
    sizes = zip(tensor.shape, inner.shape, stride, strict=True)
    return [0 if size != inner_size else step for size, inner_size, step in sizes]


def _strided(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """The tensor with these strides, copied if it has others."""
    inner = unexpanded(tensor, stride)
    if not is_dense(inner.shape, stride):
        raise ValueError(f"invalid strides {stride} for shape {list(tensor.shape)}")
    if tensor.stride() == stride:
        return tensor
    copy = torch.empty_strided(inner.shape, stride, dtype=tensor.dtype)
    copyable(copy).copy_(copyable(inner))
    return copy.expand(tensor.shape)


def make_array(content: bytes, dtype: str, shape: tuple[int, ...]) -> Any:
    """A numpy array of these bytes. Raises ValueError if they do not match dtype and shape."""
    if not _ARRAY_DTYPE.fullmatch(dtype):
        raise ValueError(f"unknown dtype {dtype!r:.60}")
    kind = np.dtype(dtype)
    if len(content) != math.prod(shape) * kind.itemsize:
        raise ValueError(
            f"{len(content)} bytes do not match an array of shape {shape} and dtype {dtype}"
        )
    return np.ndarray(shape, kind, bytearray(content) or bytearray(1))


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > safetensors.MAX_DIMENSIONS:
        raise ValueError("expected a list of sizes")
    if not all(type(size) is int and 0 <= size < 2**62 for size in value):
        raise ValueError(f"expected sizes, found {value!r:.100}")
    return tuple(value)
