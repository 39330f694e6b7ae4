"""The manifest, written last into a checkpoint: a directory without one is not a checkpoint.

checkpoints/
  latest                  the name of the newest checkpoint, for people and other tools
  step-00001000/
    manifest.json         what it holds, a digest of every file, and who wrote it
    safe.json             with `checkpoint.replicas`: that every file is on two nodes
    rank-00000.pt         each rank's own state
    ENGINE/               DeepSpeed's own files
"""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from harness import __version__
from harness.checkpoint.files import FileEntry, reading
from harness.checkpoint.json_record import RecordError, from_json
from harness.config.old_names import current_import_path
from harness.convert.run_checkpoints import FORMAT, MANIFEST, check_format, no_manifest
from harness.errors import CheckpointError, UnreadableCheckpoint, written_by
from harness.files import is_present, json_write

SAFE = "safe.json"


def _versions() -> dict[str, str]:
    from importlib.metadata import version  # slow to import, and a reader does not need it

    return {
        "harness": __version__,
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
    }


@dataclass(kw_only=True)
class EngineManifest:
    """An engine's kind of state, and its layout."""

    zero_stage: int
    dtype: str
    optimizer: str
    """Import path of its class; "none" for a teacher."""
    layout: str
    """`layout.layout_digest`; "" for a teacher."""

    def __post_init__(self) -> None:
        self.optimizer = current_import_path(self.optimizer)


@dataclass(kw_only=True)
class Manifest:
    """What a checkpoint holds."""

    format: Literal[4] = FORMAT
    step: int
    world_size: int
    engines: dict[str, EngineManifest]
    files: dict[str, FileEntry]
    """By path relative to the checkpoint. A node with its own disk has those that its ranks
    wrote."""
    hosts: list[str]
    """The host of every rank."""
    config_digest: str
    """SHA-256 of the resolved config."""
    pinned: str | None = None
    """NAME of `save as NAME`; a pinned checkpoint is never pruned."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The evaluation at this step, if there was one."""
    finite: bool | None = None
    """Whether all trained weights are finite; None if that was not recorded (by harness 0.1)."""
    note: str = ""
    """Why it was saved, if the run did not go on from it."""
    saved_at: float = field(default_factory=time.time)
    """Seconds since 1970, always greater than in the previous checkpoint, even if a clock was set
    back: the newest checkpoint is the one with the largest value."""
    versions: dict[str, str] = field(default_factory=_versions)

    @property
    def fault(self) -> str:
        """Why the checkpoint is not a good one: non-finite weights, or a metric that is NaN; empty
        if nothing is known against it."""
        if self.finite is False:
            return "its weights are not finite"
        undefined = [name for name, value in self.metrics.items() if math.isnan(value)]
        return f"{', '.join(undefined)}: NaN" if undefined else ""

    def writer(self, name: str) -> str:
        """Who wrote a file."""
        return written_by(self.files[name].rank, self.hosts)

    def write(self, directory: Path) -> None:
        """Makes the directory a checkpoint."""
        json_write(asdict(self), directory / MANIFEST)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises CheckpointError if it is missing or damaged; UnreadableCheckpoint if it cannot be judged:
    of another format, with keys that this version does not know, or not given by the disk.
    """
    with reading(directory / MANIFEST):
        if not is_present(directory / MANIFEST):
            raise CheckpointError(no_manifest(directory))
        text = (directory / MANIFEST).read_bytes()
    return parse_manifest(text, directory)


def parse_manifest(text: bytes, directory: Path | str) -> Manifest:
    """A manifest from its text. `directory`: of the checkpoint, for the errors, as of
    `read_manifest`."""
    damaged = f"checkpoint {directory}: {MANIFEST} is damaged"
    try:
        found = json.loads(text)
        if b"\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate is not text
        check_format(found, directory)
        return from_json(Manifest, found)
    except RecordError as error:
        mistakes = {mistake.key: mistake for mistake in error.mistakes}
    except (ValueError, RecursionError) as error:  # not JSON
        raise CheckpointError(f"{damaged}: {error}") from None
    if wrong := mistakes.get("format"):
        raise UnreadableCheckpoint(
            f"checkpoint {directory} has format {wrong.value!r:.40}; this version of harness reads "
            f"format {FORMAT}: use the version that wrote it"
        )
    if unknown := [key for key, mistake in mistakes.items() if mistake.is_unknown]:
        raise UnreadableCheckpoint(
            f"checkpoint {directory}: {MANIFEST} has {unknown[0]!r:.80}, which this version of "
            "harness does not know: update harness"
        )
    raise CheckpointError(f"{damaged}: {next(iter(mistakes.values()))}")


def mark_safe(directory: Path, manifest: Manifest) -> None:
    """Marks a checkpoint, of which all files are on two nodes. Not in its manifest, which nothing
    changes. Raises OSError."""
    json_write({"saved_at": manifest.saved_at}, directory / SAFE)


def unmark_safe(directory: Path) -> None:
    """Takes the mark away. Raises OSError."""
    (directory / SAFE).unlink(missing_ok=True)


def is_safe(directory: Path, manifest: Manifest) -> bool:
    """Whether a checkpoint has the mark; another save that it has replaced may have left one."""
    try:
        return json.loads((directory / SAFE).read_bytes()) == {"saved_at": manifest.saved_at}
    except (OSError, ValueError):
        return False


def digest(text: str) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def step_directory(parent: Path, step: int, name: str | None = None) -> Path:
    """`parent/step-00001000`, or with a name `parent/step-00001000-NAME`."""
    return parent / (f"step-{step:08d}" + (f"-{name}" if name else ""))


def is_unreadable(directory: Path) -> bool:
    """Whether a checkpoint cannot be judged by its manifest, and may be complete."""
    try:
        read_manifest(directory)
    except CheckpointError as error:
        return isinstance(error, UnreadableCheckpoint)
    return False
