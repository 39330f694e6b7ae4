"""From a user's path to an engine's files in a checkpoint, or to a file of weights."""

import json
import re
import socket
from pathlib import Path
from typing import Any

from harness import __version__
from harness.errors import (
    CheckpointError,
    FormatError,
    UnreadableCheckpoint,
    did_you_mean,
    missing_files,
    written_by,
)
from harness.formats import shard_index, suffixes, zips
from harness.zero.reader import SavedEngine, is_engine

MANIFEST = "manifest.json"
FORMAT = 4
"""The format of the manifests that this version writes."""
LATEST = "latest"


def resolve_source(
    path: Path, engine: str | None = None, default_engine: str | None = None
) -> SavedEngine | Path:
    """What to read for `path`.

    - A run directory, or its `checkpoints`: the newest checkpoint.
    - A checkpoint: its only engine, the engine named `engine`, or else `default_engine`.
    - A directory with `latest`, from plain DeepSpeed, Accelerate or the HF Trainer: the tag that it
      names.
    - The output directory of the HF Trainer: its newest checkpoint.
    - A tag, or a file: itself.
    - A directory of Hugging Face shards: the index, or the only file.

    Raises CheckpointError or FormatError.
    """
    if path.is_file():
        if path.suffix not in suffixes.KNOWN and not path.name.endswith(shard_index.SUFFIX):
            raise CheckpointError(f"{path}: expected a directory, or one of {suffixes.listed()}")
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    elif not (path / LATEST).is_file() and (steps := _trainer_steps(path)):
        path = path / f"checkpoint-{max(steps)}"
    if is_engine(path):
        return SavedEngine(path)
    if (path / MANIFEST).is_file():
        return _open_checkpoint(path, engine, default_engine)
    if (path / LATEST).is_file():
        tag = _latest(path)
        if (tag / MANIFEST).is_file():
            return _open_checkpoint(tag, engine, default_engine)
        return SavedEngine(tag)
    if any(path.glob(f"*{shard_index.SUFFIX}")) or (path / shard_index.SINGLE).is_file():
        return shard_index.find_index(path)
    raise CheckpointError(
        f"{path}: not a checkpoint or weights: expected {LATEST}, {MANIFEST}, DeepSpeed's "
        f"*_model_states.pt, {shard_index.SINGLE} or its index"
    )


def _latest(path: Path) -> Path:
    with (path / LATEST).open("rb") as file:
        tag = file.read(4096).decode(errors="replace").strip()
    if not _is_plain(tag):
        raise CheckpointError(
            f"{path / LATEST}: {tag!r:.80} is not the name of a directory next to it"
        )
    if not (path / tag).is_dir():
        raise CheckpointError(f"{path / LATEST} names {tag!r:.80}, which does not exist")
    return path / tag


def _trainer_steps(path: Path) -> list[int]:
    """The steps of the HF Trainer's checkpoints in a directory that were saved by DeepSpeed."""
    names = (latest.parent.name for latest in path.glob(f"checkpoint-*/{LATEST}"))
    return [int(name[11:]) for name in names if re.fullmatch(r"checkpoint-\d{1,18}", name)]


def _is_plain(name: str) -> bool:
    """Whether a name is that of a directory entry, not a path to elsewhere."""
    return name not in ("", ".", "..") and Path(name).name == name and "\0" not in name


def _open_checkpoint(path: Path, engine: str | None, default_engine: str | None) -> SavedEngine:
    """An engine of a harness checkpoint, its files checked against the manifest."""
    engines, files, writers = _read_manifest(path)
    if engine is None and default_engine in engines:
        engine = default_engine
    if engine is None and len(engines) != 1:
        hint = "use" if default_engine is not None else "use --engine NAME, or"
        names = ", ".join(engines) or "none"
        raise CheckpointError(f"{path}: expected one engine, found {names}: {hint} {path}/NAME")
    if engine is not None and engine not in engines:
        hint = did_you_mean(engine, engines)
        raise CheckpointError(
            f"{path} has no engine {engine!r}{hint}; engines: {', '.join(engines)}"
        )
    name = engine or engines[0]
    files = {file: entry for file, entry in files.items() if file.startswith(f"{name}/")}
    if absent := {file: writers[file] for file in files if not (path / file).is_file()}:
        raise CheckpointError(missing_files(path, absent, [socket.gethostname()]))
    for file, entry in files.items():
        try:
            zips.check(path / file, entry["size"], entry["digest"])
        except FormatError as error:
            raise CheckpointError(f"damaged: {error}") from None
        except OSError as error:
            raise UnreadableCheckpoint(f"cannot read {path / file}: {error.strerror}") from None
    return SavedEngine(path / name)


def check_format(manifest: Any, path: Path) -> None:
    """Raises UnreadableCheckpoint if a manifest is of a newer format. `path`: of the checkpoint."""
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if type(found) is int and found > FORMAT:
        versions = manifest.get("versions")
        writer = versions.get("harness") if isinstance(versions, dict) else None
        by = f", written by harness {writer!s:.40}" if writer else ""
        raise UnreadableCheckpoint(
            f"checkpoint {path} has format {found}{by}; harness {__version__} reads format "
            f"{FORMAT}: update harness"
        )


def _read_manifest(path: Path) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, str]]:
    """Reads a manifest without pydantic: the engines that have files, the entry of each file, and
    who wrote it. Raises CheckpointError if it is damaged, UnreadableCheckpoint if that cannot be
    found out."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        check_format(manifest, path)
        if invalid := [name for name in manifest["engines"] if not _is_plain(name)]:
            raise ValueError(f"invalid engine name {invalid[0]!r:.80}")
        files: dict[str, dict[str, Any]] = manifest["files"]
        directories = {file.partition("/")[0] for file in files}
        engines = [name for name in manifest["engines"] if name in directories]
        if not all({"size", "digest"} <= entry.keys() for entry in files.values()):
            raise ValueError("a file without size or digest")
        hosts = [str(host) for host in manifest.get("hosts", ())]  # not in older formats
        writers = {
            file: written_by(int(entry.get("rank", -1)), hosts) for file, entry in files.items()
        }
    except OSError as error:
        raise UnreadableCheckpoint(f"cannot read {path / MANIFEST}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error!r}") from None
    return engines, files, writers
