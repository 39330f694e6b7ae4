"""From the path that a user names to the engine's files, or the file of weights, that he means."""

import json
import re
import socket
from pathlib import Path
from typing import Any

from harness.checkpoint import missing
from harness.errors import CheckpointError, FormatError, did_you_mean
from harness.formats import pt_writer, safetensors, sft_index, zips
from harness.zero.reader import SavedEngine, is_engine

MANIFEST = "manifest.json"
LATEST = "latest"


def locate(path: Path, engine: str | None = None, own: str | None = None) -> SavedEngine | Path:
    """What `path` means.

    A run directory or one of checkpoints: the newest checkpoint. A checkpoint: its engine, or the
    one named `engine`; of several, without a name, `own` if it is there. A directory with `latest`,
    as plain DeepSpeed, Accelerate and the HF Trainer leave it: the tag that it names. The Trainer's
    directory of such: the newest. A tag. A directory of Hugging Face's: its index, or its one file.
    A file: itself. Raises CheckpointError or FormatError.
    """
    if path.is_file():
        if path.suffix not in pt_writer.SUFFIXES | safetensors.SUFFIXES and not path.name.endswith(
            sft_index.SUFFIX
        ):
            known = ", ".join(sorted(pt_writer.SUFFIXES | safetensors.SUFFIXES))
            raise CheckpointError(f"{path}: expected a directory, or one of {known}")
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    elif not (path / LATEST).is_file() and (of_trainer := _of_trainer(path)):
        path = path / f"checkpoint-{max(of_trainer)}"
    if is_engine(path):
        return SavedEngine(path)
    if (path / MANIFEST).is_file():
        return _of_checkpoint(path, engine, own)
    if (path / LATEST).is_file():
        tag = _latest(path)
        return _of_checkpoint(tag, engine, own) if (tag / MANIFEST).is_file() else SavedEngine(tag)
    if any(path.glob(f"*{sft_index.SUFFIX}")) or (path / sft_index.SINGLE).is_file():
        return sft_index.find_index(path)
    raise CheckpointError(
        f"{path}: no checkpoint here: expected {LATEST}, {MANIFEST}, DeepSpeed's "
        f"*_model_states.pt, {sft_index.SINGLE} or its index"
    )


def _latest(path: Path) -> Path:
    with (path / LATEST).open("rb") as file:
        tag = file.read(4096).decode(errors="replace").strip()
    if not _is_plain(tag):
        raise CheckpointError(f"{path / LATEST}: {tag!r:.80} is not the name of a directory here")
    if not (path / tag).is_dir():
        raise CheckpointError(f"{path / LATEST} names {tag!r:.80}, which is not there")
    return path / tag


def _of_trainer(path: Path) -> list[int]:
    """The steps of the checkpoints with DeepSpeed's files that the HF Trainer has left here."""
    names = (latest.parent.name for latest in path.glob(f"checkpoint-*/{LATEST}"))
    return [int(name[11:]) for name in names if re.fullmatch(r"checkpoint-\d{1,18}", name)]


def _is_plain(name: str) -> bool:
    """Whether a name is that of something in a directory, and leads nowhere else."""
    return name not in ("", ".", "..") and Path(name).name == name and "\0" not in name


def _of_checkpoint(path: Path, engine: str | None, own: str | None) -> SavedEngine:
    """One engine of a checkpoint of ours, whose files are those of its manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if odd := [name for name in manifest["engines"] if not _is_plain(name)]:
            raise ValueError(f"{odd[0]!r:.80} cannot be the name of an engine")
        files: dict[str, dict[str, Any]] = manifest["files"]
        saved = {file.partition("/")[0] for file in files}
        engines = [name for name in manifest["engines"] if name in saved]
        if not all({"size", "digest"} <= entry.keys() for entry in files.values()):
            raise ValueError("a file without size or digest")
        hosts = [str(host) for host in manifest.get("hosts", ())]  # not in older formats
        writers = {
            file: missing.writer(int(entry.get("rank", -1)), hosts) for file, entry in files.items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error!r}") from None
    if engine is None and own in engines:
        engine = own
    if engine is None and len(engines) != 1:
        name_one = "name one:" if own is not None else "name one with --engine, or"
        raise CheckpointError(f"{path}: {name_one} {path}/NAME: {', '.join(engines) or 'none'}")
    if engine is not None and engine not in engines:
        hint = did_you_mean(engine, engines)
        raise CheckpointError(f"{path}: no engine {engine!r}, but {', '.join(engines)}{hint}")
    name = engine or engines[0]
    files = {file: entry for file, entry in files.items() if file.startswith(f"{name}/")}
    if absent := {file: writers[file] for file in files if not (path / file).is_file()}:
        raise CheckpointError(missing.told(path, absent, [socket.gethostname()]))
    for file, entry in files.items():
        try:
            zips.check(path / file, entry["size"], entry["digest"])
        except FormatError as error:
            raise CheckpointError(f"damaged: {error}") from None
    return SavedEngine(path / name)
