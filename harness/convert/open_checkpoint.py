"""An engine of a run's checkpoint, of a given one or the newest complete one, without torch."""

import json
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.convert.dropped_saves import Dropped
from harness.convert.run_checkpoints import (
    MANIFEST,
    check_format,
    no_manifest,
    steps_in,
    told_time,
)
from harness.errors import (
    CheckpointError,
    FormatError,
    UnreadableCheckpoint,
    did_you_mean,
    missing_files,
    written_by,
)
from harness.files import is_present
from harness.formats import zips
from harness.remote_path import is_remote, map_reads
from harness.zero.reader import SavedEngine

OnText = Callable[[str], object]


class RunCheckpoint:
    """A checkpoint of a run: its manifest.

    Raises CheckpointError if it is damaged, UnreadableCheckpoint if that cannot be found out.
    """

    def __init__(self, path: Path):
        self.path = path
        self.engines, self._files, self._writers, self.is_finite = _read_manifest(path)

    def choose(self, engine: str | None, default_engine: str | None) -> str:
        """The engine named `engine`, or else `default_engine`, or else the only one."""
        if engine is None and default_engine in self.engines:
            engine = default_engine
        if engine is None and len(self.engines) != 1:
            hint = "use" if default_engine is not None else "use --engine NAME, or"
            names = ", ".join(self.engines) or "none"
            raise CheckpointError(
                f"{self.path}: expected one engine, found {names}: {hint} {self.path}/NAME"
            )
        if engine is not None and engine not in self.engines:
            hint = did_you_mean(engine, self.engines)
            known = ", ".join(self.engines)
            raise CheckpointError(f"{self.path} has no engine {engine!r}{hint}; engines: {known}")
        return engine or self.engines[0]

    def check(self, engine: str) -> None:
        """Checks that an engine's files are on this host, and those of the manifest.

        Raises as the constructor.
        """
        files = {name: e for name, e in self._files.items() if name.startswith(f"{engine}/")}
        try:
            absent = [name for name in files if not is_present(self.path / name)]
            if absent:
                writers = {name: self._writers[name] for name in absent}
                raise CheckpointError(missing_files(self.path, writers, [socket.gethostname()]))

            def check(name: str) -> None:
                zips.check(self.path / name, files[name]["size"], files[name]["digest"])

            deque(map_reads(check, files, is_remote([self.path])), 0)
        except FormatError as error:
            raise CheckpointError(str(error)) from None
        except OSError as error:
            name = error.filename or self.path
            raise UnreadableCheckpoint(f"cannot read {name}: {error.strerror}") from None


def open_checkpoint(path: Path, engine: str | None, default_engine: str | None) -> SavedEngine:
    """An engine of a checkpoint (`RunCheckpoint.choose`), its files checked."""
    checkpoint = RunCheckpoint(path)
    name = checkpoint.choose(engine, default_engine)
    checkpoint.check(name)
    return SavedEngine(path / name)


def open_newest(
    parent: Path, engine: str | None, default_engine: str | None, on_passed_over: OnText
) -> SavedEngine:
    """An engine of the newest complete checkpoint with finite weights that no rollback has dropped,
    as a resume chooses.

    `on_passed_over` is called with the reason for each newer one. What the files hold is not read.
    Raises CheckpointError if none is complete, UnreadableCheckpoint if one that would be chosen
    cannot be judged.
    """
    failures: list[str] = []
    directories = steps_in(parent)
    dropped = _read_dropped(parent)  # after the list: a rollback may have dropped some meanwhile
    for directory in directories:
        try:
            if dropped.has(told_time(directory)):
                raise CheckpointError(f"{directory}: a rollback has dropped it")
            checkpoint = RunCheckpoint(directory)
            for name in checkpoint.engines:
                checkpoint.check(name)
            if not checkpoint.is_finite:
                raise CheckpointError(f"{directory}: its weights are not finite")
        except UnreadableCheckpoint as error:
            raise UnreadableCheckpoint(
                f"{error}; it may be complete, so it is not passed over: give the path of another "
                f"checkpoint in {parent}"
            ) from None
        except CheckpointError as error:
            failures.append(str(error))
            continue
        for text in failures:
            on_passed_over(text)
        return SavedEngine(directory / checkpoint.choose(engine, default_engine))
    raise CheckpointError(
        f"{parent}: no checkpoint is complete on this host:\n  " + "\n  ".join(failures)
    )


def _read_dropped(parent: Path) -> Dropped:
    try:
        return Dropped.read(parent)
    except OSError as error:
        raise UnreadableCheckpoint(
            f"cannot read {error.filename}: {error.strerror}: what rollbacks have dropped is not "
            f"known: give the path of a checkpoint in {parent}"
        ) from None


def _read_manifest(
    path: Path,
) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, str], bool]:
    """Reads a manifest without pydantic: the engines that have files, the entry of each file, who
    wrote it, and whether the weights are finite, as far as is known. Raises CheckpointError if it
    is damaged, UnreadableCheckpoint if that cannot be found out."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        check_format(manifest, path)
        if invalid := [name for name in manifest["engines"] if not is_plain(name)]:
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
    except FileNotFoundError:
        raise CheckpointError(no_manifest(path)) from None
    except OSError as error:
        raise UnreadableCheckpoint(f"cannot read {path / MANIFEST}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error!r}") from None
    return engines, files, writers, manifest.get("finite") is not False


def is_plain(name: str) -> bool:
    """Whether a name is that of a directory entry, not a path to elsewhere."""
    return name not in ("", ".", "..") and Path(name).name == name and "\0" not in name
