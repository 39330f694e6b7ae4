"""Files of flat tensors and nothing else, as sources: `.pt`, `.sft`, Hugging Face shards."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import FormatError
from harness.formats import json_tree, pt_reader, safetensors, sft_index, tied_weights
from harness.formats.dtypes import SFT
from harness.formats.pt_reader import TensorRef
from harness.formats.sources import ByteRange, StoredTensor, source

_DTYPES = {short: dtype for dtype, short in SFT.items() if short != "F4"}
_OURS = {json_tree.KEY, "format", "total_size"}
"""Metadata of ours, or of what lies where."""


@dataclass(frozen=True)
class FlatFile:
    """What a file, or an index of shards, holds."""

    tensors: dict[str, StoredTensor]
    """By name; tied ones under all of theirs."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What others have written beside them."""


def read(path: Path) -> FlatFile | None:
    """The tensors of a file; None if there is more in it than that.

    Raises FormatError if a file is damaged, OSError if it cannot be read.
    """
    if path.name.endswith(sft_index.SUFFIX):
        index = sft_index.read_index(path)
        headers = {file: safetensors.read_header(file) for file in set(index.files.values())}
        sft_index.check(path, index, headers)
        stored = {
            name: _source(file, name, headers[file].tensors[name])
            for name, file in index.files.items()
        }
        return _named(stored, index.metadata)
    if path.suffix in safetensors.SUFFIXES:
        header = safetensors.read_header(path)
        stored = {name: _source(path, name, entry) for name, entry in header.tensors.items()}
        return _named(stored, header.metadata)
    found = pt_reader.read(path)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        return None
    if not all(isinstance(value, TensorRef) for value in found.values()):
        return None
    return FlatFile({name: source(ref) for name, ref in found.items()})


def _named(stored: dict[str, StoredTensor], metadata: Mapping[str, Any]) -> FlatFile | None:
    names = tied_weights.names(metadata, stored)
    if names is None:
        return None
    further = {key: value for key, value in metadata.items() if key not in _OURS}
    return FlatFile(
        {name: stored[kept] for name, kept in names.items()},
        {key: v if isinstance(v, str) else json.dumps(v) for key, v in further.items()},
    )


def _source(path: Path, name: str, entry: safetensors.Entry) -> StoredTensor:
    if entry.dtype not in _DTYPES:
        raise FormatError(f"{path}: {name!r}: a tensor of {entry.dtype} cannot be converted")
    ranges = (ByteRange(path, entry.start, entry.nbytes),) if entry.nbytes else ()
    return StoredTensor(_DTYPES[entry.dtype], entry.shape, ranges)
