"""Describes a checkpoint, an `.sft` or a `.pt`: no weights are loaded, no pickled code is run."""

import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.checkpoint.files import verify_file
from harness.checkpoint.manifest import Manifest, read_manifest
from harness.convert.resolve_source import resolve_source
from harness.convert.run_checkpoints import MANIFEST, may_hold_manifest, steps_in
from harness.errors import (
    CheckpointError,
    FormatError,
    UnreadableCheckpoint,
    missing_files,
    printable,
)
from harness.formats import file_kinds, pt_reader, shard_index, tensor_file
from harness.formats.json_tree import Keys, dotted, from_metadata, leaf_nodes
from harness.formats.pickled import Placeholder, describe
from harness.formats.pt_reader import TensorRef
from harness.formats.safetensors import read_header
from harness.health import goodput
from harness.zero.reader import SavedEngine


def describe_path(path: Path, verify: bool = False) -> Iterator[str]:
    """Lines that describe a run directory with its ledger, a checkpoint, a file of weights, or what
    `resolve_source` takes of another directory.

    `verify` reads the files of a checkpoint of a run and checks every CRC; otherwise their sizes
    are checked. Raises CheckpointError or FormatError for any other path, and for what is damaged
    or incomplete; for a run directory, after all its checkpoints have been described.
    """
    found = (steps_in(parent) for parent in (path, path / "checkpoints"))
    steps = next((paths for paths in found if any(map(may_hold_manifest, paths))), None)
    if (path / MANIFEST).is_file():
        yield from _describe_checkpoint(path, read_manifest(path), verify)
    elif steps:
        yield from goodput.table(path / goodput.FILE)
        yield from _describe_run(path, steps, verify)
    else:
        notes: list[str] = []
        source = resolve_source(path, on_note=notes.append)
        yield from notes
        if isinstance(source, SavedEngine):
            yield from _describe_engine(source)
        else:
            yield from _describe_file(source)


def _describe_engine(saved: SavedEngine) -> Iterator[str]:
    yield (
        f"{saved.directory}: DeepSpeed, ZeRO stage {saved.stage}, {saved.world_size} ranks, step "
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


def _describe_run(path: Path, directories: list[Path], verify: bool) -> Iterator[str]:
    broken: list[str] = []
    unreadable: list[str] = []
    for directory in directories:
        try:
            yield from _describe_checkpoint(directory, read_manifest(directory), verify)
        except CheckpointError as error:
            yield f"  {error}"
            is_unreadable = isinstance(error, UnreadableCheckpoint)
            (unreadable if is_unreadable else broken).append(directory.name)
    found = {"damaged or incomplete on this host": broken, "cannot be judged": unreadable}
    if reports := [f"{what}: {', '.join(names)}" for what, names in found.items() if names]:
        raise CheckpointError(f"{path}: {'; '.join(reports)}")


def _describe_checkpoint(path: Path, manifest: Manifest, verify: bool) -> Iterator[str]:
    saved_at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.saved_at))
    pinned = f", pinned as {manifest.pinned}" if manifest.pinned else ""
    yield f"{path}: step {manifest.step}, {manifest.world_size} ranks, saved {saved_at}{pinned}"
    yield "  " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    for name, engine in manifest.engines.items():
        kind = f"{engine.dtype}, optimizer {engine.optimizer}"
        yield f"  engine {name}: ZeRO stage {engine.zero_stage}, {kind}"
    for text in filter(None, (manifest.fault, manifest.note)):
        yield f"  {text}"
    for name, value in manifest.metrics.items():
        yield f"  {name} {value:.6g}"
    missing = {n: manifest.writer(n) for n in manifest.files if not (path / n).is_file()}
    for name, entry in manifest.files.items():
        note = f"  missing, written by {missing[name]}" if name in missing else ""
        yield f"  {_bytes(entry.size)}  {name}{note}"
    for name, entry in manifest.files.items():
        if name not in missing:
            verify_file(path / name, entry, read=verify)
    if missing:
        raise CheckpointError(missing_files(path, missing, [socket.gethostname()]))
    total = sum(entry.size for entry in manifest.files.values())
    checks = "every CRC checked" if verify else "sizes checked"
    yield f"  {_bytes(total)}  in total, {checks}: complete"


def _describe_tensors(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> Iterator[str]:
    yield f"{path}: {len(tensors)} tensors, {_bytes(path.stat().st_size).strip()}"
    yield from _list_tensors(tensors)


def _list_tensors(tensors: Mapping[str, tuple[str, list[int], int]]) -> Iterator[str]:
    names = {name: printable(name) for name in tensors}
    width = max(map(len, names.values()), default=0)
    for name, (dtype, shape, size) in zip(names.values(), tensors.values(), strict=True):
        yield f"  {name:<{width}}  {dtype:<8}  {_bytes(size)}  {shape}"


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


def _bytes(size: int) -> str:
    number, unit = float(size), "B "
    for larger in ("kB", "MB", "GB"):
        if number >= 1000:
            number, unit = number / 1000, larger
    return f"{number:7.4g} {unit}"
