"""Files of flat tensors and nothing else, as sources: `.pt`, `.sft`, Hugging Face shards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import FormatError
from harness.formats import pickles, sft, shards, ties
from harness.formats.dtypes import SFT
from harness.formats.pickles import TensorRef
from harness.formats.sources import Source, Stretch, source

_DTYPES = {short: dtype for dtype, short in SFT.items() if short != "F4"}


def tensors(path: Path) -> dict[str, Source] | None:
    """The tensors by name, tied ones under all of theirs; None if there is more than that.

    Raises FormatError if a file is damaged, OSError if it cannot be read.
    """
    if path.name.endswith(shards.SUFFIX):
        index = shards.read_index(path)
        headers = {file: sft.read_header(file) for file in set(index.files.values())}
        shards.check(path, index, headers)
        stored = {
            name: _source(file, name, headers[file].tensors[name])
            for name, file in index.files.items()
        }
        return _named(stored, index.metadata)
    if path.suffix in sft.SUFFIXES:
        header = sft.read_header(path)
        stored = {name: _source(path, name, entry) for name, entry in header.tensors.items()}
        return _named(stored, header.metadata)
    tree = pickles.read(path)
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        return None
    if not all(isinstance(value, TensorRef) for value in tree.values()):
        return None
    return {name: source(ref) for name, ref in tree.items()}


def _named(stored: dict[str, Source], metadata: Mapping[str, Any]) -> dict[str, Source] | None:
    names = ties.names(metadata, stored)
    return None if names is None else {name: stored[kept] for name, kept in names.items()}


def _source(path: Path, name: str, entry: sft.Entry) -> Source:
    if entry.dtype not in _DTYPES:
        raise FormatError(f"{path}: {name!r}: a tensor of {entry.dtype} cannot be converted")
    stretches = (Stretch(path, entry.start, entry.nbytes),) if entry.nbytes else ()
    return Source(_DTYPES[entry.dtype], entry.shape, stretches)
