"""The checkpoints of a run of harness: which there are, in which order, and what marks them.

Imports little: `harness inspect` does not wait for what it does not use.
"""

import json
import math
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness import __version__
from harness.errors import CheckpointError, UnreadableCheckpoint
from harness.files import is_present
from harness.remote_path import is_remote

MANIFEST = "manifest.json"
FORMAT = 4
"""The format of the manifests that this version writes."""
BEST = "best"
"""Next to the checkpoints: a link to the best one, by `checkpoint.best_metric`; in a store, a file
with its name."""
KEPT = ".kept"
"""Suffix of a replaced directory that cannot be judged: no longer a checkpoint of the run, and left
to the user."""

_STEP = re.compile(r"step-\d{8,}(-[\w.-]+)?")
_STORED_STEP = re.compile(rf"{_STEP.pattern}(\.\d+)?")
"""In a store: also with the time of the save."""


def checkpoints_in(parent: Path) -> list[Path]:
    """The directories that hold a manifest, readable or not, the newest first. Raises OSError."""
    return [path for path in steps_in(parent) if may_hold_manifest(path)]


def steps_in(parent: Path) -> list[Path]:
    """`checkpoints_in`, and those with the name of a checkpoint whose manifest is gone."""
    times: dict[Path, float] = {}
    for path in named_in(parent):
        with suppress(FileNotFoundError):  # a run has removed it meanwhile
            times[path] = saved_at(path)
    return sorted(times, key=lambda path: (times[path], path.name), reverse=True)


def named_in(parent: Path) -> list[Path]:
    """The directories with the name of a checkpoint, in any order; none of them is read."""
    try:
        entries = list(parent.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [
        path
        for path in entries
        if is_step(path) and path.suffix not in (".tmp", KEPT) and path.is_dir()
    ]


def is_step(path: Path) -> bool:
    """Whether a path has the name of a checkpoint."""
    pattern = _STORED_STEP if is_remote([path]) else _STEP
    return pattern.fullmatch(path.name) is not None


def best_in(path: Path) -> Path:
    """The checkpoint that a run has linked as its best one. `path`: the run directory, or its
    `checkpoints`, or those in a store. Raises CheckpointError if there is none."""
    for parent in (path, path / "checkpoints"):
        if found := linked_in(parent):
            return found
    raise CheckpointError(
        f"{path}: no checkpoint is linked as checkpoints/{BEST}: a run links the one with the best "
        "checkpoint.best_metric, if it was saved at a step with an evaluation that has it: "
        "harness inspect shows them, and each can be given by its path"
    )


def linked_in(parent: Path) -> Path | None:
    """The best checkpoint in a directory of them; None if none is linked."""
    link, name = parent / BEST, ""
    if link.is_symlink():
        name = link.readlink().name
    elif is_remote([link]) and link.is_file():
        name = link.read_text()
    best = parent / name
    return best if name and is_step(best) and best.is_dir() else None


def may_hold_manifest(directory: Path) -> bool:
    """False only if it is known to hold none."""
    try:
        return is_present(directory / MANIFEST)
    except OSError:
        return True


def saved_at(directory: Path) -> float:
    """When a checkpoint was saved, in seconds since 1970, for the order; if its manifest does not
    tell, the modification time, which a store may not have: there it may be the newest. Raises
    OSError."""
    if (told := told_time(directory)) is not None:
        return told
    try:
        modified = (directory / MANIFEST).stat().st_mtime
    except OSError:
        return directory.stat().st_mtime
    return math.inf if is_remote([directory]) else modified


def told_time(directory: Path) -> float | None:
    """When a checkpoint was saved, as its manifest tells, also one of a newer format. None if that
    is unreadable, or gone: what else is known of the time is later."""
    try:
        return _saved_at(directory / MANIFEST, identity(directory / MANIFEST))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


@lru_cache(4096)
def _saved_at(manifest: Path, _: tuple[int, int]) -> float:
    """Read once: with the files of ten thousand ranks it takes 0.1 s."""
    return float(json.loads(manifest.read_bytes())["saved_at"])


def identity(path: Path) -> tuple[int, int]:
    """Equal where two ranks see one file, also over a network, and it has not changed in between:
    inode and time of last change. Raises OSError."""
    status = path.stat()
    return status.st_ino, status.st_ctime_ns


def no_manifest(directory: Path) -> str:
    """The reason why a directory is not a checkpoint."""
    return f"{directory} is not a checkpoint: it has no {MANIFEST}, which is written last"


def check_format(manifest: Any, path: Path | str) -> None:
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
