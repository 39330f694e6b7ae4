"""State dicts, and whatever nests around them, as `.pt` and `.sft`: the same thing comes back.

docs/files.md says what a file looks like to others, and what is refused.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from harness.errors import FormatError
from harness.formats import json_tree, pt_writer, safetensors, sft_index
from harness.formats.dtypes import SFT
from harness.io import pt
from harness.io.mmap import Bytes
from harness.io.structure import DTYPES, alone, pack, raw, unpack

SAFETENSORS = safetensors.SUFFIXES
PICKLES = pt_writer.SUFFIXES
_DTYPES = {short: DTYPES[dtype] for dtype, short in SFT.items() if dtype in DTYPES}
_NAMES = {dtype: short for short, dtype in _DTYPES.items()}


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
            pt.write(unpack(node, lambda name: alone(tensors[name])), path)
        elif shard_size:
            _save_shards(node, tensors, path, shard_size)
        else:
            _save_sft(tensors, path, {"format": "pt"} | json_tree.to_metadata(node, tensors))
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
        path = sft_index.find_index(path)
    if path.name.endswith(sft_index.SUFFIX):
        return _load_shards(path, device, lazy)
    if _format(path) == "sft":
        with ExitStack() as stack:
            file = _File(path, lazy, stack)
            return _assemble(
                path, file.header.metadata, dict.fromkeys(file.header.tensors, file), device
            )
    if unsafe:
        return torch.load(path, map_location=device, weights_only=False, mmap=lazy or None)
    return pt.read(path, device, lazy)


def _format(path: Path) -> str:
    if path.suffix in SAFETENSORS:
        return "sft"
    if path.suffix in PICKLES:
        return "pt"
    raise FormatError(f"{path}: expected one of {', '.join(sorted(SAFETENSORS | PICKLES))}")


def _save_sft(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    def fill(writer: safetensors.Writer) -> None:
        for name, tensor in tensors.items():
            writer.write(name, _content(tensor))

    safetensors.write(path, {name: _described(t) for name, t in tensors.items()}, fill, metadata)


def _save_shards(
    node: json_tree.Node, tensors: Mapping[str, torch.Tensor], path: Path, shard_size: int
) -> None:
    sizes = {name: safetensors.nbytes_of(*_described(tensor)) for name, tensor in tensors.items()}
    parts = sft_index.split(sizes, shard_size)
    metadata = {"total_size": sum(sizes.values())} | json_tree.to_metadata(node, tensors)
    for part in parts:
        safetensors.layout(
            {name: _described(tensors[name]) for name in part}, {}
        )  # or nothing is touched
    path.mkdir(parents=True, exist_ok=True)
    (path / sft_index.INDEX).unlink(missing_ok=True)
    for number, part in enumerate(parts):
        file = path / sft_index.shard_name(number, len(parts))
        _save_sft({name: tensors[name] for name in part}, file, {"format": "pt"})
    sft_index.write_index(path, parts, metadata)


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
        self.header = safetensors.header_of(self.bytes.file, path)

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
        return self.bytes.tensor(entry.start, entry.nbytes, dtype.itemsize).view(dtype).view(shape)


def _load_shards(path: Path, device: str | torch.device, lazy: bool) -> Any:
    index = sft_index.read_index(path)
    with ExitStack() as stack:
        files = {file: _File(file, lazy, stack) for file in set(index.files.values())}
        sft_index.check(path, index, {file: opened.header for file, opened in files.items()})
        tensors = {name: files[file] for name, file in index.files.items()}
        return _assemble(path, index.metadata, tensors, device)


def _assemble(
    path: Path, metadata: Mapping[str, Any], files: Mapping[str, _File], device: str | torch.device
) -> Any:
    """The structure over tensors, each in its file."""
    unused = set(files)

    def tensor(name: str) -> torch.Tensor:
        if name not in unused:
            what = "twice" if name in files else "but it is not there"
            raise FormatError(f"the structure names {name!r}, {what}")
        unused.remove(name)
        return files[name].tensor(name)

    try:
        data = unpack(json_tree.from_metadata(metadata, files), tensor, device)
        if unused:
            raise FormatError(f"the structure does not name {min(unused)!r}; it is another file's")
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    return data
