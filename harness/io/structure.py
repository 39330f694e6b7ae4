"""A nested structure split into flat named tensors and a JSON tree, and rebuilt from them.

The nodes of the tree for what `formats.json_tree` does not know itself:

    {"tensor": name}                             the tensor of that name; further keys:
        "stride": [...]                              its strides, if it was not row-major
        "view": [offset, shape, stride]              only this view of it, in elements
        "complex": true                              it is stored as pairs of real numbers
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
"""Of the names of tensors that store something else than a tensor of the structure."""
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in SIZES if hasattr(torch, name)
}
"""The dtypes of tensors that can be stored."""

STORED_AS_PAIRS = (torch.complex32, torch.complex128)
"""The dtypes that safetensors does not have: stored as pairs of real numbers."""
_ARRAY_DTYPE = re.compile(r"[<>|][biufcSUmM]\d{1,9}(\[[0-9a-zA-Z]{1,9}\])?")
_ARRAYS_OUTSIDE = {"U8": torch.uint8, "I64": torch.int64, "F64": torch.float64}


def pack(data: Any) -> tuple[Node, dict[str, torch.Tensor]]:
    """The tree of a structure and the tensors that it names: all memory once.

    A tensor is named by the keys that lead to it, joined by dots ("model.0.weight"); where two
    would have one name, the one with more keys gets another. The tensors are not copied. Raises
    FormatError, which names the keys, for what cannot be stored.
    """
    packer = _Packer()
    node = json_tree.encode(data, packer)
    packer.finish()
    return node, packer.tensors


def unpack(
    node: Node, tensor: Callable[[str], torch.Tensor], device: str | torch.device = "cpu"
) -> Any:
    """The structure of a tree, its tensors on `device`; `tensor(name)` returns them on the CPU.

    Raises FormatError if it is not a tree, or does not fit the tensors.
    """
    return json_tree.decode(node, _Unpacker(tensor, torch.device(device)))


class _Packer:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.arrays: dict[str, torch.Tensor] = {}  # what `store` has stored
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
        for is_refused, what in (
            (type(value) not in (torch.Tensor, torch.nn.Parameter), type(value).__qualname__),
            (value.layout != torch.strided, f"tensor of layout {value.layout}; to_dense() first"),
            (value.is_quantized or value.dtype not in DTYPES.values(), f"tensor of {value.dtype}"),
            (value.is_meta, "tensor without data, on the meta device"),
            (value.dim() > safetensors.MAX_DIMENSIONS, f"tensor of {value.dim()} dimensions"),
        ):
            if is_refused:
                raise FormatError(f"{dotted(keys) or 'the data'}: cannot store a {what}")
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
        if len(data):  # frombuffer refuses an empty buffer
            self.arrays[name] = torch.frombuffer(bytearray(data), dtype=kind)
        return name

    def finish(self) -> None:
        """Names the tensors that are stored, and completes all nodes."""
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
        """A name for each base; the keys of the structure itself have the first choice."""
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
                wanted = dotted(self.keys[owner]).encode(errors="backslashreplace").decode()
                wanted = "tensor" if not self.keys[owner] else wanted
                wanted = "tensor~" + wanted if wanted.startswith(RESERVED_PREFIX) else wanted
                choices = chain([wanted], (f"{wanted}~{number}" for number in count_from(2)))
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
        raise FormatError(f"the structure holds an unknown node: {node!r:.100}")

    def fetch(self, dtype: str, name: Any) -> bytes:
        tensor = self.tensor(name)
        if tensor.dtype != _ARRAYS_OUTSIDE[dtype] or tensor.dim() != 1:
            raise FormatError(f"{name!r} should be {dtype} of one dimension")
        return tensor.numpy().tobytes()

    def view(self, node: dict[str, Any]) -> torch.Tensor:
        tensor = self.base(node["tensor"], node.get("stride"), node.get("complex"))
        if "view" in node:
            offset, shape, stride = node["view"]
            (offset,), shape, stride = _sizes([offset]), _sizes(shape), _sizes(stride)
            if len(shape) != len(stride) or not is_dense(tensor.shape, tensor.stride()):
                raise ValueError("a view of nothing")
            if offset + extent(shape, stride) > tensor.numel() or math.prod(shape) >= 2**62:
                raise ValueError(f"a view of {shape} reaches over its tensor's end")
            tensor = tensor.as_strided(shape, stride, tensor.storage_offset() + offset)
        else:
            tensor = tensor.view_as(tensor)  # an object of its own
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
    """The same memory in a dtype that torch can copy, which it cannot for some of one byte."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if its storage holds more: all of it would be written to a file."""
    inner = unexpanded(tensor)
    if tensor.untyped_storage().nbytes() == extent(inner.shape, inner.stride()) * inner.itemsize:
        return tensor
    return copyable(inner).clone().view(tensor.dtype).expand(tensor.shape)


def _stride_to_restore(tensor: torch.Tensor) -> list[int] | None:
    """The strides that the tree must note: those of a permuted tensor, 0 where it is expanded."""
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
    """The tensor with those strides, copied if it has others."""
    inner = unexpanded(tensor, stride)
    if not is_dense(inner.shape, stride):
        raise ValueError(f"strides {stride} of {list(tensor.shape)}")
    if tensor.stride() == stride:
        return tensor
    copy = torch.empty_strided(inner.shape, stride, dtype=tensor.dtype)
    copyable(copy).copy_(copyable(inner))
    return copy.expand(tensor.shape)


def make_array(content: bytes, dtype: str, shape: tuple[int, ...]) -> Any:
    """A numpy array of these bytes. Raises ValueError if they do not fit dtype and shape."""
    if not _ARRAY_DTYPE.fullmatch(dtype):
        raise ValueError(f"unknown dtype {dtype!r:.60}")
    kind = np.dtype(dtype)
    if len(content) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"an array of {len(content)} bytes, but shape {shape} of {dtype}")
    return np.ndarray(shape, kind, bytearray(content) or bytearray(1))


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > safetensors.MAX_DIMENSIONS:
        raise ValueError("expected a list of sizes")
    if not all(type(size) is int and 0 <= size < 2**62 for size in value):
        raise ValueError(f"expected sizes, got {value!r:.100}")
    return tuple(value)
