"""Files that contain only flat tensors: `.pt`, `.sft`, Hugging Face shards."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.errors import FormatError, first_few
from harness.formats import (
    dtypes,
    file_kinds,
    json_tree,
    pt_reader,
    safetensors,
    shard_index,
    subtrees,
    tied_weights,
)
from harness.formats.pickled import Global, Placeholder, UnsupportedTensor, describe
from harness.formats.pt_reader import TensorRef
from harness.formats.stored_tensor import ByteRange, StoredTensor
from harness.formats.tensor_writer import TensorEntry

_OURS = {json_tree.KEY, "format", "total_size"}
"""Metadata keys of our own files and indices."""


def is_extra_state(name: str) -> bool:
    """Whether an entry of a state dict is what a module's `get_extra_state` returned, an object of
    any type."""
    return name.rpartition(".")[2] == "_extra_state"


@dataclass(frozen=True)
class TensorFile:
    """The content of a file, or of an index of shards."""

    tensors: dict[str, StoredTensor]
    """By name; tied tensors under all of their names."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Metadata of other programs."""
    notes: list[str] = field(default_factory=list)
    """For the user: what was chosen, and what was skipped."""
    key: str | None = None
    """The part of the file that the tensors are in (`subtrees`); None: all of it."""


def read(path: Path, key: str | None = None) -> TensorFile | None:
    """The tensors of a file; None if it contains another structure.

    `key`: which part of a `.pt` (`subtrees`); None: all of it, or the only part that is a dict of
    tensors. Raises FormatError if a file is damaged or has no such part, OSError if it cannot be
    read.
    """
    if path.name.endswith(shard_index.SUFFIX):
        found = _read_shards(path)
    elif file_kinds.format_of(path) == file_kinds.SAFETENSORS:
        header = safetensors.read_header(path)
        stored = {name: _stored(path, name, entry) for name, entry in header.tensors.items()}
        found = _tensor_file(stored, header.metadata)
    else:
        return _read_pt(path, key)
    if key is not None:
        raise FormatError(f"{path}: --key {key!r}: only a .pt has parts")
    return found


def parts(path: Path) -> list[str]:
    """The keys of a `.pt` that can be read alone; none of another file."""
    if path.name.endswith(shard_index.SUFFIX) or file_kinds.format_of(path) != file_kinds.PT:
        return []
    return list(subtrees.weights_in(pt_reader.read(path), partial(_is_weights, path=path)))


def _read_pt(path: Path, key: str | None) -> TensorFile | None:
    tree = pt_reader.read(path)
    if key is None and (found := _of_tree(path, tree)) is not None:
        return found
    try:
        key, part = subtrees.choose(tree, key, partial(_is_weights, path=path))
    except FormatError as error:
        if key is None:
            return None
        raise FormatError(f"{path}: {error}") from None
    found = _of_tree(path, part)
    assert found is not None
    others = first_few(list(map(repr, subtrees.beside(tree, key))))
    left = f"; left out: {others}" if others else ""
    return replace(found, key=key, notes=[f"the weights of key {key!r}{left}", *found.notes])


def _read_shards(path: Path) -> TensorFile | None:
    index = shard_index.read_index(path)
    shards: dict[Path, dict[str, StoredTensor]] = {}
    for file in set(index.files.values()):
        if file_kinds.format_of(file) == file_kinds.SAFETENSORS:
            entries = safetensors.read_header(file).tensors
            shards[file] = {name: _stored(file, name, entry) for name, entry in entries.items()}
        elif (shard := _of_tree(file, pt_reader.read(file))) is not None:
            shards[file] = shard.tensors
        else:
            raise FormatError(f"{file}: not a dict of tensors, as expected of a shard")
    shard_index.check_shards(path, index, shards)
    stored = {name: shards[file][name] for name, file in index.files.items()}
    return _tensor_file(stored, index.metadata)


def _is_weights(tree: Any, path: Path) -> bool:
    found = _of_tree(path, tree)
    return found is not None and bool(found.tensors)


def _of_tree(path: Path, tree: Any) -> TensorFile | None:
    """A dict of tensors by name; None for another structure."""
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        return None
    file = TensorFile({})
    for name, value in tree.items():
        if isinstance(value, TensorRef):
            file.tensors[name] = StoredTensor.from_ref(value)
        elif isinstance(value, UnsupportedTensor):
            raise FormatError(f"{path}: {name!r} cannot be read: it is {describe(value)}")
        elif is_extra_state(name) or isinstance(value, Placeholder | Global):
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
