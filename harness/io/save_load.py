"""Saves and loads state dicts and nested structures as `.pt` and `.sft`, unchanged.

docs/files.md describes what other programs see in a file, and what is not supported.
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from harness.errors import FormatError
from harness.formats import dtypes, file_kinds, json_tree, safetensors, shard_index, suffixes
from harness.formats.tensor_writer import TensorWriter
from harness.io import pt
from harness.io.mmap import ByteFile
from harness.io.structure import (
    DTYPES,
    STORED_AS_PAIRS,
    copyable,
    pack,
    unpack,
    with_own_storage,
)
from harness.utils import dtype_name


def save(data: Any, path: str | Path, shard_size: int | None = None) -> None:
    """Writes a structure in the format of the suffix (`formats.suffixes`).

    With `shard_size`, in bytes, `path` is a directory for Hugging Face shards and their index.
    Tensors that share memory are stored once. Raises FormatError, with the keys, for unsupported
    values, before writing; OSError if it cannot be written.
    """
    path = Path(path)
    if not shard_size:
        _check_suffix(path)
    try:
        node, tensors = pack(data)
        if shard_size:
            _save_shards(node, tensors, path, shard_size)
        elif path.suffix in suffixes.PT:
            pt.write(unpack(node, lambda name: with_own_storage(tensors[name])), path)
        else:
            metadata = {"format": "pt"} | json_tree.to_metadata(node, tensors)
            _save_safetensors(tensors, path, metadata)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    unsafe: bool = False,
    lazy: bool = False,
    skipped: list[str] | None = None,
) -> Any:
    """The structure in a file, or in a directory of Hugging Face shards; ties are restored.

    No code in a pickle is run, except with `unsafe`, which passes a `.pt` file to torch.load: that
    may run any code. `lazy`: the tensors are memory-mapped and read on use; writing to them does
    not change the file. An object of an unknown class in a `.pt` is an error, or with the list
    `skipped` left out, and described there. Raises FormatError for a file that is damaged, hostile,
    or in another format.
    """
    path = Path(path)
    if lazy and torch.device(device).type != "cpu":
        raise ValueError(f"device = {device}: with lazy, expected cpu")
    if path.is_dir():
        path = shard_index.find_index(path)
    if path.name.endswith(shard_index.SUFFIX):
        return _load_shards(path, device, lazy)
    if file_kinds.format_of(path) == file_kinds.SAFETENSORS:
        with ExitStack() as stack:
            file = _SafetensorsFile(path, lazy, stack)
            files = dict.fromkeys(file.header.tensors, file)
            return _assemble(path, file.header.metadata, files, device)
    if unsafe:
        return torch.load(path, map_location=device, weights_only=False, mmap=lazy or None)
    return pt.read(path, device, lazy, skipped)


def _check_suffix(path: Path) -> None:
    if path.suffix not in suffixes.KNOWN:
        raise FormatError(f"{path}: expected one of {suffixes.listed()}")


def _save_safetensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    def fill(writer: TensorWriter) -> None:
        for name, tensor in tensors.items():
            writer.write(name, _row_major_bytes(tensor))

    described = {name: _dtype_and_shape(tensor) for name, tensor in tensors.items()}
    safetensors.write(path, described, fill, metadata)


def _save_shards(
    node: json_tree.Node, tensors: Mapping[str, torch.Tensor], path: Path, shard_size: int
) -> None:
    described = {name: _dtype_and_shape(tensor) for name, tensor in tensors.items()}
    sizes = {name: safetensors.nbytes_of(*tensor) for name, tensor in described.items()}
    shards = shard_index.split(sizes, shard_size)
    metadata = {"total_size": sum(sizes.values())} | json_tree.to_metadata(node, tensors)
    for names in shards:  # raises before anything is written
        safetensors.make_header({name: described[name] for name in names}, {})
    path.mkdir(parents=True, exist_ok=True)
    (path / shard_index.INDEX).unlink(missing_ok=True)
    for number, names in enumerate(shards):
        file = path / shard_index.shard_name(number, len(shards))
        _save_safetensors({name: tensors[name] for name in names}, file, {"format": "pt"})
    shard_index.write_index(path, shards, metadata)


def _dtype_and_shape(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape of a tensor in a safetensors file."""
    if tensor.dtype in STORED_AS_PAIRS:
        return ("F16" if tensor.itemsize == 4 else "F64"), (*tensor.shape, 2)
    return dtypes.to_safetensors(dtype_name(tensor.dtype), tensor.shape)


def _row_major_bytes(tensor: torch.Tensor) -> Any:
    flat = copyable(tensor).cpu().contiguous()
    size = flat.numel() * flat.itemsize
    content = torch.empty(0, dtype=torch.uint8)
    start = int(flat.storage_offset()) * flat.itemsize
    return content.set_(flat.untyped_storage(), start, (size,), (1,)).numpy()


class _SafetensorsFile:
    """An open file with a checked header."""

    def __init__(self, path: Path, lazy: bool, stack: ExitStack):
        """`stack` closes the file."""
        self.bytes = stack.enter_context(ByteFile(path, lazy))
        self.header = safetensors.header_of(self.bytes.file, path)

    @property
    def names(self) -> Collection[str]:
        return self.header.tensors.keys()

    def tensor(self, name: str) -> torch.Tensor:
        entry = self.header.tensors[name]
        try:
            own_name, shape = dtypes.from_safetensors(entry.dtype, entry.shape)
        except FormatError as error:
            raise FormatError(f"{self.bytes.path}: {name!r}: {error}") from None
        dtype = DTYPES.get(own_name)
        if dtype is None:
            raise FormatError(
                f"{self.bytes.path}: {name!r}: this torch does not support {entry.dtype}"
            )
        if not entry.nbytes:
            return torch.empty(shape, dtype=dtype)
        return self.bytes.tensor(entry.start, entry.nbytes, dtype.itemsize).view(dtype).view(shape)


class _PtShard:
    """A shard in torch's format, a dict of tensors."""

    def __init__(self, path: Path, lazy: bool):
        self.tensors = pt.read(path, "cpu", lazy)
        is_flat = isinstance(self.tensors, dict)
        if not is_flat or not all(isinstance(t, torch.Tensor) for t in self.tensors.values()):
            raise FormatError(f"{path}: not a dict of tensors, as expected of a shard")

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def _load_shards(path: Path, device: str | torch.device, lazy: bool) -> Any:
    index = shard_index.read_index(path)
    with ExitStack() as stack:
        opened: dict[Path, _SafetensorsFile | _PtShard] = {}
        for file in set(index.files.values()):
            is_pt = file_kinds.format_of(file) == file_kinds.PT
            opened[file] = _PtShard(file, lazy) if is_pt else _SafetensorsFile(file, lazy, stack)
        shard_index.check_shards(path, index, {file: s.names for file, s in opened.items()})
        files = {name: opened[file] for name, file in index.files.items()}
        return _assemble(path, index.metadata, files, device)


def _assemble(
    path: Path,
    metadata: Mapping[str, Any],
    files: Mapping[str, _SafetensorsFile | _PtShard],
    device: str | torch.device,
) -> Any:
    """The structure of one or more files; `files`: the file of each tensor, by name."""
    unused = set(files)

    def tensor(name: str) -> torch.Tensor:
        if name not in unused:
            problem = "twice" if name in files else "which does not exist"
            raise FormatError(f"the structure names the tensor {name!r}, {problem}")
        unused.remove(name)
        return files[name].tensor(name)

    try:
        data = unpack(json_tree.from_metadata(metadata, files), tensor, device)
        if unused:
            raise FormatError(
                f"the structure does not name {min(unused)!r}: it belongs to another file"
            )
    except FormatError as error:
        raise FormatError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    return data
