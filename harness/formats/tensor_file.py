"""Files that contain only flat tensors: `.pt`, `.sft`, Hugging Face shards."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import FormatError
from harness.formats import (
    dtypes,
    json_tree,
    pt_reader,
    safetensors,
    shard_index,
    suffixes,
    tied_weights,
)
from harness.formats.pickled import Global, Placeholder, UnsupportedTensor, describe
from harness.formats.pt_reader import TensorRef
from harness.formats.stored_tensor import ByteRange, StoredTensor
from harness.formats.tensor_writer import TensorEntry

EXTRA_STATE = "_extra_state"
"""Last part of the name under which torch saves `Module.get_extra_state`, an object of any type."""
_OURS = {json_tree.KEY, "format", "total_size"}
"""Metadata keys of our own files and indices."""


@dataclass(frozen=True)
class TensorFile:
    """The content of a file, or of an index of shards."""

    tensors: dict[str, StoredTensor]
    """By name; tied tensors under all of their names."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Metadata of other programs."""
    notes: list[str] = field(default_factory=list)
    """What was skipped: extra state that is not a tensor, and objects of unknown classes."""


def read(path: Path) -> TensorFile | None:
    """The tensors of a file; None if it contains another structure.

    Raises FormatError if a file is damaged, OSError if it cannot be read.
    """
    if path.name.endswith(shard_index.SUFFIX):
        index = shard_index.read_index(path)
        headers = {file: safetensors.read_header(file) for file in set(index.files.values())}
        shard_index.check_shards(path, index, headers)
        stored = {
            name: _stored(file, name, headers[file].tensors[name])
            for name, file in index.files.items()
        }
        return _tensor_file(stored, index.metadata)
    if path.suffix in suffixes.SAFETENSORS:
        header = safetensors.read_header(path)
        stored = {name: _stored(path, name, entry) for name, entry in header.tensors.items()}
        return _tensor_file(stored, header.metadata)
    return _of_tree(path, pt_reader.read(path))


def _of_tree(path: Path, tree: Any) -> TensorFile | None:
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        return None
    file = TensorFile({})
    for name, value in tree.items():
        if isinstance(value, TensorRef):
            file.tensors[name] = StoredTensor.from_ref(value)
        elif isinstance(value, UnsupportedTensor):
            raise FormatError(f"{path}: {name!r} is {describe(value)}, which cannot be read")
        elif name.rpartition(".")[2] == EXTRA_STATE or isinstance(value, Placeholder | Global):
            file.notes.append(f"skipped {name!r}: not a tensor, but {describe(value)}")
        else:
            return None
    return file if file.tensors or not tree else None


def _tensor_file(stored: dict[str, StoredTensor], metadata: Mapping[str, Any]) -> TensorFile | None:
    names = tied_weights.stored_names(metadata, stored)
    if names is None:
        return None
    theirs = {key: value for key, value in metadata.items() if key not in _OURS}
    return TensorFile(
        {name: stored[stored_name] for name, stored_name in names.items()},
        {key: v if isinstance(v, str) else json.dumps(v) for key, v in theirs.items()},
    )


def _stored(path: Path, name: str, entry: TensorEntry) -> StoredTensor:
    try:
        dtype, shape = dtypes.from_safetensors(entry.dtype, entry.shape)
    except FormatError as error:
        raise FormatError(f"{path}: {name!r}: {error}") from None
    ranges = (ByteRange(path, entry.start, entry.nbytes),) if entry.nbytes else ()
    return StoredTensor(dtype, shape, ranges)
