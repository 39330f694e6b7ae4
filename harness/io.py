"""State dicts, and whatever nests around them, as `.pt` and `.sft`: the same thing comes back.

docs/files.md says what a file looks like to others, and what is refused.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from harness import pickled
from harness.errors import FormatError
from harness.formats import sft, shards, ties, tree
from harness.mapped import Bytes
from harness.pack import alone, is_plain, pack, raw, unpack

SAFETENSORS = sft.SUFFIXES
PICKLES = {".pt", ".pth"}
TREE = ties.KEY
"""The key of the metadata under which the structure stands."""

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
} | {
    name: getattr(torch, dtype)
    for name, dtype in {"F4": "float4_e2m1fn_x2", "F8_E8M0": "float8_e8m0fnu"}.items()
    if hasattr(torch, dtype)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def save(data: Any, path: str | Path, shard_size: int | None = None) -> None:
    """Writes a structure in the format that the suffix names: .pt, .pth, .sft, .safetensors.

    With `shard_size`, in bytes, `path` is a directory that gets Hugging Face's shards and index.
    Tensors that share memory are stored once. Raises FormatError, which names the keys, for what
    cannot be stored, before anything is written; OSError if the disk does not take it.
    """
    path = Path(path)
    kind = "shards" if shard_size else _format(path)
    try:
        node, tensors = pack(data)
        if kind == "pt":
            pickled.write(unpack(node, lambda name: alone(tensors[name])), path)
        elif shard_size:
            _save_shards(node, tensors, path, shard_size)
        else:
            _save_sft(tensors, path, {"format": "pt"} | _structure(node, tensors))
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    unsafe: bool = False,
    lazy: bool = False,
) -> Any:
    """The structure in a file, or in a directory of Hugging Face's shards; ties are tied again.

    A pickle is never run, unless `unsafe`: then a `.pt` file is left to torch.load, and can do
    whatever its author wanted. `lazy`: the tensors lie in a memory map of the file and are read
    where they are touched; writing to them changes no file. Raises FormatError for a file that is
    damaged, hostile, or no such file.
    """
    path = Path(path)
    if lazy and torch.device(device).type != "cpu":
        raise ValueError("lazy tensors are on the CPU")
    if path.is_dir():
        path = shards.find_index(path)
    if path.name.endswith(shards.SUFFIX):
        return _load_shards(path, device, lazy)
    if _format(path) == "sft":
        with ExitStack() as stack:
            file = _File(path, lazy, stack)
            return _assemble(
                path, file.header.metadata, dict.fromkeys(file.header.tensors, file), device
            )
    if unsafe:
        return torch.load(path, map_location=device, weights_only=False, mmap=lazy or None)
    return pickled.read(path, device, lazy)


def structure(path: Path, metadata: Mapping[str, Any]) -> tree.Node | None:
    """The tree in the metadata of a file, None if it holds nothing but flat tensors.

    Raises FormatError if it is damaged, or of another version.
    """
    if TREE not in metadata:
        return None
    try:
        node = tree.loads(str(metadata[TREE]))
        if not isinstance(node, dict) or node.get("version") != 1 or "tree" not in node:
            raise FormatError("a structure of another version")
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    return node["tree"]


def _format(path: Path) -> str:
    if path.suffix in SAFETENSORS:
        return "sft"
    if path.suffix in PICKLES:
        return "pt"
    raise FormatError(f"{path}: expected one of {', '.join(sorted(SAFETENSORS | PICKLES))}")


def _structure(node: tree.Node, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {} if is_plain(node, tensors) else {TREE: tree.dumps({"version": 1, "tree": node})}


def _save_sft(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    def fill(writer: sft.Writer) -> None:
        for name, tensor in tensors.items():
            writer.write(name, _content(tensor))

    sft.write(path, {name: _described(t) for name, t in tensors.items()}, fill, metadata)


def _save_shards(
    node: tree.Node, tensors: Mapping[str, torch.Tensor], path: Path, shard_size: int
) -> None:
    sizes = {name: sft.nbytes_of(*_described(tensor)) for name, tensor in tensors.items()}
    parts = shards.split(sizes, shard_size)
    metadata = {"total_size": sum(sizes.values())} | _structure(node, tensors)
    for part in parts:
        sft.layout({name: _described(tensors[name]) for name in part}, {})  # or nothing is touched
    path.mkdir(parents=True, exist_ok=True)
    (path / shards.INDEX).unlink(missing_ok=True)
    for number, part in enumerate(parts):
        file = path / shards.shard_name(number, len(parts))
        _save_sft({name: tensors[name] for name in part}, file, {"format": "pt"})
    shards.write_index(path, parts, metadata)


def _described(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a tensor in a safetensors file."""
    if tensor.dtype in (torch.complex32, torch.complex128):
        return ("F16" if tensor.itemsize == 4 else "F64"), (*tensor.shape, 2)
    name, shape = _NAMES[tensor.dtype], tuple(tensor.shape)
    if name == "F4":  # two elements in a byte: torch counts bytes, the format elements
        if not shape:
            raise FormatError("cannot store a float4 tensor of no dimension")
        return name, (*shape[:-1], 2 * shape[-1])
    return name, shape


def _content(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor, row-major."""
    flat = raw(tensor).cpu().contiguous()
    size = flat.numel() * flat.itemsize
    content = torch.empty(0, dtype=torch.uint8)
    start = int(flat.storage_offset()) * flat.itemsize
    return content.set_(flat.untyped_storage(), start, (size,), (1,)).numpy()


class _File:
    """A safetensors file, its header checked."""

    def __init__(self, path: Path, lazy: bool, stack: ExitStack):
        """`stack` closes it."""
        self.bytes = stack.enter_context(Bytes(path, lazy))
        self.header = sft.header_of(self.bytes.file, path)

    def tensor(self, name: str) -> torch.Tensor:
        entry = self.header.tensors[name]
        dtype, shape = _DTYPES.get(entry.dtype), entry.shape
        if dtype is None:
            raise FormatError(f"{self.bytes.path}: {name!r}: this torch has no {entry.dtype}")
        if entry.dtype == "F4":
            if not shape or shape[-1] % 2:
                raise FormatError(f"{self.bytes.path}: {name!r}: torch holds F4 in pairs")
            shape = (*shape[:-1], shape[-1] // 2)
        if not entry.nbytes:
            return torch.empty(shape, dtype=dtype)
        return self.bytes.tensor(entry.start, entry.nbytes).view(dtype).view(shape)


def _load_shards(path: Path, device: str | torch.device, lazy: bool) -> Any:
    index = shards.read_index(path)
    with ExitStack() as stack:
        files = {file: _File(file, lazy, stack) for file in set(index.files.values())}
        shards.check(path, index, {file: opened.header for file, opened in files.items()})
        tensors = {name: files[file] for name, file in index.files.items()}
        return _assemble(path, index.metadata, tensors, device)


def _assemble(
    path: Path, metadata: Mapping[str, Any], files: Mapping[str, _File], device: str | torch.device
) -> Any:
    """The structure over tensors, each in its file."""
    node = structure(path, metadata)
    if node is None:
        return {name: file.tensor(name).to(device) for name, file in files.items()}
    unused = set(files)

    def tensor(name: str) -> torch.Tensor:
        if name not in unused:
            what = "twice" if name in files else "but it is not there"
            raise FormatError(f"the structure names {name!r}, {what}")
        unused.remove(name)
        return files[name].tensor(name)

    try:
        data = unpack(node, tensor, device)
        if unused:
            raise FormatError(f"the structure does not name {min(unused)!r}; it is another file's")
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    return data
