"""Describes an engine's files, an `.sft` or a `.pt`: loads no weights, runs no pickled code."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.checkpoint.files import bytes_text
from harness.convert.resolve_source import resolve_source
from harness.errors import CheckpointError, FormatError, counted, printable
from harness.formats import file_kinds, pt_reader, shard_index, tensor_file
from harness.formats.json_tree import Keys, dotted, from_metadata, leaf_nodes
from harness.formats.pickled import Placeholder, describe
from harness.formats.pt_reader import TensorRef
from harness.formats.safetensors import read_header
from harness.zero.reader import SavedEngine


def describe_weights(path: Path) -> Iterator[str]:
    """Lines that describe what `resolve_source` takes of a path, and raises as it does."""
    notes: list[str] = []
    source = resolve_source(path, on_note=notes.append)
    yield from notes
    if isinstance(source, SavedEngine):
        yield from _describe_engine(source)
    else:
        yield from _describe_file(source)


def _describe_engine(saved: SavedEngine) -> Iterator[str]:
    ranks = counted(saved.world_size, "rank")
    yield (
        f"{saved.directory}: DeepSpeed, ZeRO stage {saved.stage}, {ranks}, step "
        f"{saved.global_steps}"
    )
    stored = {name: saved.weight(name) for name in saved.weights}
    yield from _list_tensors({n: (s.dtype, list(s.shape), s.nbytes) for n, s in stored.items()})


def _describe_file(path: Path) -> Iterator[str]:
    if path.name.endswith(shard_index.SUFFIX):
        content = tensor_file.read(path)
        stored = content.tensors if content else {}
        tensors = {n: (s.dtype, list(s.shape), s.nbytes) for n, s in stored.items()}
        yield f"{path}: {len(tensors)} tensors in shards"
        yield from _list_tensors(tensors)
    elif file_kinds.format_of(path) == file_kinds.SAFETENSORS:
        yield from _describe_tensors(path, _sft_tensors(path))
    else:
        yield from _describe_pt(path)


def _describe_tensors(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> Iterator[str]:
    yield f"{path}: {len(tensors)} tensors, {bytes_text(path.stat().st_size).strip()}"
    yield from _list_tensors(tensors)


def _list_tensors(tensors: Mapping[str, tuple[str, list[int], int]]) -> Iterator[str]:
    names = {name: printable(name) for name in tensors}
    width = max(map(len, names.values()), default=0)
    for name, (dtype, shape, size) in zip(names.values(), tensors.values(), strict=True):
        yield f"  {name:<{width}}  {dtype:<8}  {bytes_text(size)}  {shape}"


def _sft_tensors(path: Path) -> dict[str, tuple[str, list[int], int]]:
    try:
        header = read_header(path)
        stored = {n: (e.dtype, list(e.shape), e.nbytes) for n, e in header.tensors.items()}
        tied = {}
        for keys, node in leaf_nodes(from_metadata(header.metadata, stored)):
            name, base = dotted(keys) or "tensor", str(node.get("tensor"))
            if "view" in node:
                tied[name] = (f"in {base}", list(node["view"][1]), 0)
            elif base in stored and name != base:
                tied[name] = (f"= {base}", stored[base][1], 0)
    except (FormatError, LookupError, TypeError) as error:
        text = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path}: {text}") from None
    return stored | tied


def _describe_pt(path: Path) -> Iterator[str]:
    """The tensors, by their keys joined with dots, and what is neither a tensor nor plain."""
    found = list(_walk(pt_reader.read(path), ()))
    tensors = {
        dotted(keys) or "(tensor)": (value.dtype, list(value.shape), value.nbytes)
        for keys, value in found
        if isinstance(value, TensorRef)
    }
    yield from _describe_tensors(path, tensors)
    for keys, value in found:
        if not isinstance(value, TensorRef):
            yield f"  not read: {dotted(keys) or 'all'!r}, {describe(value)}"


def _walk(node: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    match node:
        case TensorRef() | Placeholder():
            yield keys, node
        case dict():
            for key, child in node.items():
                yield from _walk(child, (*keys, key))
        case list() | tuple():
            for index, child in enumerate(node):
                yield from _walk(child, (*keys, index))
