"""The manifest, written last into a checkpoint: a directory without one is not a checkpoint.

checkpoints/
  latest                  the name of the newest checkpoint, for people and other tools
  step-00001000/
    manifest.json         what it holds, a digest of every file, and who wrote it
    rank-00000.pt         each rank's own state
    ENGINE/               DeepSpeed's own files
"""

import hashlib
import json
import math
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from harness import __version__
from harness.checkpoint.files import FileEntry, reading
from harness.config.old_names import current_import_path
from harness.convert.run_checkpoints import FORMAT, MANIFEST, check_format, no_manifest
from harness.errors import CheckpointError, UnreadableCheckpoint, written_by
from harness.files import is_present, json_write


class EngineManifest(BaseModel):
    """An engine's kind of state, and its layout."""

    model_config = ConfigDict(extra="forbid")
    zero_stage: int
    dtype: str
    optimizer: str
    """Import path of its class; "none" for a teacher."""
    layout: str
    """`layout.layout_digest`; "" for a teacher."""

    @field_validator("optimizer")
    @classmethod
    def _current(cls, path: str) -> str:
        return current_import_path(path)


class Manifest(BaseModel):
    """What a checkpoint holds."""

    model_config = ConfigDict(extra="forbid")
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
    metrics: dict[str, float] = {}
    """The evaluation at this step, if there was one."""
    finite: bool | None = None
    """Whether all trained weights are finite; None if that was not recorded (by harness 0.1)."""
    note: str = ""
    """Why it was saved, if the run did not go on from it."""
    saved_at: float = Field(default_factory=time.time)
    """Seconds since 1970, always greater than in the previous checkpoint, even if a clock was set
    back: the newest checkpoint is the one with the largest value."""
    versions: dict[str, str] = Field(
        default_factory=lambda: {
            "harness": __version__,
            "torch": version("torch"),
            "deepspeed": version("deepspeed"),
        }
    )

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
        json_write(self.model_dump(), directory / MANIFEST)


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
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        mistakes = {".".join(map(str, mistake["loc"])): mistake for mistake in error.errors()}
    with suppress(ValueError):  # not JSON: damaged
        check_format(json.loads(text), directory)
    where = "format" if "format" in mistakes else next(iter(mistakes))
    if where == "format":
        raise UnreadableCheckpoint(
            f"checkpoint {directory} has format {mistakes[where]['input']!r:.40}; this version of "
            f"harness reads format {FORMAT}: use the version that wrote it"
        )
    if unknown := [key for key, found in mistakes.items() if found["type"] == "extra_forbidden"]:
        raise UnreadableCheckpoint(
            f"checkpoint {directory}: {MANIFEST} has {unknown[0]!r:.80}, which this version of "
            "harness does not know: update harness"
        )
    reason = f"{MANIFEST} is damaged: {where and where + ' '}{mistakes[where]['msg']}"
    raise CheckpointError(f"checkpoint {directory}: {reason}")


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
