"""The manifest, written last into a checkpoint: a directory without one is not a checkpoint.

checkpoints/
  latest                  the name of the newest checkpoint, for people and other tools
  step-00001000/
    manifest.json         what it holds, a digest of every file, and who wrote it
    rank-00000.pt         each rank's own state
    ENGINE/               DeepSpeed's own files
"""

import hashlib
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from harness.checkpoint.files import FileEntry
from harness.config.old_names import current_import_path
from harness.errors import CheckpointError, written_by
from harness.files import json_write

NAME = "manifest.json"
LATEST = "latest"


class EngineManifest(BaseModel):
    """What an engine's state is, and its layout."""

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
    format: Literal[4] = 4
    step: int
    world_size: int
    engines: dict[str, EngineManifest]
    files: dict[str, FileEntry]
    """By path below the checkpoint. Where each node has a disk of its own, a node has those that
    its ranks wrote."""
    hosts: list[str]
    """The host of every rank."""
    config_digest: str
    """SHA-256 of the resolved config."""
    pinned: str | None = None
    """The name that `save as NAME` gave; a pinned checkpoint is never pruned."""
    metrics: dict[str, float] = {}
    """The evaluation at this step, if there was one."""
    saved_at: float = Field(default_factory=time.time)
    """Seconds since 1970; the newest checkpoint is the one that was saved last. Where a clock was
    set back, a moment after the one before."""
    versions: dict[str, str] = Field(
        default_factory=lambda: {
            "harness": version("deepspeed-harness"),
            "torch": version("torch"),
            "deepspeed": version("deepspeed"),
        }
    )

    def writer(self, name: str) -> str:
        """Who wrote a file."""
        return written_by(self.files[name].rank, self.hosts)

    def write(self, directory: Path) -> None:
        """Makes the directory a checkpoint."""
        json_write(self.model_dump(), directory / NAME)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError if there is none that can be read."""
    try:
        return Manifest.model_validate_json((directory / NAME).read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{directory} is not a checkpoint: {NAME}: {error.strerror}"
        ) from None
    except ValidationError as error:
        mistakes = {".".join(map(str, mistake["loc"])): mistake for mistake in error.errors()}
        where = "format" if "format" in mistakes else next(iter(mistakes))
        reason = f"{NAME} is damaged: {where} {mistakes[where]['msg']}"
        if where == "format":
            reason = f"format {mistakes[where]['input']}, and this version of harness reads 4"
        raise CheckpointError(f"checkpoint {directory}: {reason}") from None


def digest(text: str) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def step_directory(parent: Path, step: int, name: str | None = None) -> Path:
    """`parent/step-00001000`, or with a name `parent/step-00001000-NAME`."""
    return parent / (f"step-{step:08d}" + (f"-{name}" if name else ""))


def checkpoints_in(parent: Path) -> list[Path]:
    """The directories that hold a manifest, readable or not, the newest first."""
    directories = [path.parent for path in parent.glob(f"step-*/{NAME}")]
    found = [
        path
        for path in directories
        if re.fullmatch(r"step-\d{8,}(-[\w.-]+)?", path.name) and path.suffix != ".tmp"
    ]
    return sorted(found, key=lambda path: (saved_at(path), path.name), reverse=True)


def saved_at(directory: Path) -> float:
    """When a checkpoint was saved; if its manifest cannot be read, when that was written."""
    try:
        return read_manifest(directory).saved_at
    except CheckpointError:
        return (directory / NAME).stat().st_mtime
