"""Weights in several files with an index, as Hugging Face stores them.

    model-00001-of-00002.safetensors, model-00002-of-00002.safetensors
    model.safetensors.index.json          {"metadata": {...}, "weight_map": {name: file}}

Older ones have `pytorch_model.bin.index.json` and shards in torch's format, which are only read.
The index is removed first and written last: if it exists, its files are complete.
The format: https://github.com/huggingface/huggingface_hub, serialization/_base.py.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import FormatError, first_few
from harness.files import json_write
from harness.formats import json_tree, safetensors, suffixes

SUFFIX = ".index.json"
INDEX = f"model.safetensors{SUFFIX}"
SINGLE = "model.safetensors"
SINGLES = (SINGLE, "pytorch_model.bin")
_SHARDS = suffixes.SAFETENSORS | {".bin"}
_OF_OTHERS = (".h5.index.json", ".msgpack.index.json")
MAX_INDEX = safetensors.MAX_HEADER


@dataclass(frozen=True)
class Index:
    """The content of an index: the file of each tensor, next to the index, and the metadata."""

    files: dict[str, Path]
    metadata: dict[str, Any]


def shard_name(number: int, count: int) -> str:
    """The file name of shard `number` (from 0) of `count`."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Splits names into shards of at most `limit` bytes, in order; larger tensors get their own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_index(
    directory: Path, shards: Sequence[Sequence[str]], metadata: Mapping[str, Any]
) -> None:
    """Writes the index of complete shards. Other programs expect `total_size` in `metadata`, in
    bytes."""
    files = {
        name: shard_name(number, len(shards))
        for number, names in enumerate(shards)
        for name in names
    }
    json_write({"metadata": dict(metadata), "weight_map": files}, directory / INDEX)


def find_index(directory: Path) -> Path:
    """The index in a directory, or its only weights file.

    Raises FormatError if there is neither, or more than one of them.
    """
    found = find_weights(directory)
    if len(found) == 1:
        return found[0]
    names = first_few([path.name for path in found]) or "none"
    raise FormatError(f"{directory}: expected one of {INDEX} or {SINGLE}; found: {names}")


def find_weights(directory: Path) -> list[Path]:
    """The indices in a directory, and the files of weights as Hugging Face names them."""
    indices = [path for path in directory.glob(f"*{SUFFIX}") if path.is_file()]
    ours = sorted(path for path in indices if not path.name.endswith(_OF_OTHERS))
    return ours + [directory / name for name in SINGLES if (directory / name).is_file()]


def read_index(path: Path) -> Index:
    """The index at `path`, after a check that its files are next to it, under plain names.

    They may be symbolic links, like all files in Hugging Face's cache. Raises FormatError if the
    index is invalid, OSError if it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MAX_INDEX + 1)
    if len(content) > MAX_INDEX:
        raise FormatError(f"{path}: longer than {MAX_INDEX} bytes")
    try:
        index = json_tree.loads(content.decode())
    except (FormatError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not an index of shards: {error}") from None
    weights = index.get("weight_map") if isinstance(index, dict) else None
    metadata = index.get("metadata") or {} if isinstance(index, dict) else {}
    if not isinstance(weights, dict) or not isinstance(metadata, dict):
        raise FormatError(f'{path}: not an index of shards: expected {{"weight_map": {{...}}}}')
    known: dict[Any, Path] = {}
    for name, file in weights.items():
        if not isinstance(file, str):
            raise FormatError(f"{path}: {name!r}: expected the name of a file, found {file!r:.60}")
        if file not in known:
            known[file] = _next_to(path, file)
    return Index({name: known[file] for name, file in weights.items()}, metadata)


def check_shards(path: Path, index: Index, shards: Mapping[Path, Collection[str]]) -> None:
    """Raises FormatError unless each shard has exactly the tensors that the index lists.

    `shards`: the names in each file.
    """
    expected: dict[Path, set[str]] = {}
    for name, file in index.files.items():
        expected.setdefault(file, set()).add(name)
    for file, names in expected.items():
        if missing := sorted(names.difference(shards[file])):
            raise FormatError(f"{file}: missing: {_names(missing)}, listed in {path.name}")
        if unexpected := sorted(set(shards[file]) - names):
            raise FormatError(
                f"{file}: unexpected: {_names(unexpected)}, not listed in {path.name}"
            )


def _names(names: Sequence[str]) -> str:
    return first_few(list(map(repr, names)), most=3)


def _next_to(index: Path, file: str) -> Path:
    if Path(file).name != file or "\0" in file or Path(file).suffix not in _SHARDS:
        raise FormatError(f"{index}: {file!r} is not a plain file name like {SINGLE}")
    if not index.with_name(file).is_file():
        raise FormatError(f"{index}: the shard {file!r} is missing")
    return index.with_name(file)
