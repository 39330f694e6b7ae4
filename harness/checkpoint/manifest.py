"""The manifest, written last into a checkpoint: a directory without one is no checkpoint."""

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from harness.errors import CheckpointError
from harness.io import json_write

NAME = "manifest.json"


class EngineManifest(BaseModel):
    """How an engine's state is laid out."""

    model_config = ConfigDict(extra="forbid")
    zero_stage: int
    dtype: str


class Manifest(BaseModel):
    """What a checkpoint holds."""

    model_config = ConfigDict(extra="forbid")
    format: int = 1
    step: int
    world_size: int
    engines: dict[str, EngineManifest]
    files: dict[str, int]
    """Size in bytes of every file, by its path below the checkpoint."""
    versions: dict[str, str]

    def write(self, directory: Path) -> None:
        """Makes the directory a checkpoint."""
        json_write(self.model_dump(), directory / NAME)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError if there is none that can be read."""
    try:
        return Manifest.model_validate_json((directory / NAME).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{directory} is no checkpoint: {NAME}: {error.strerror}") from None
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise CheckpointError(f"checkpoint {directory}: {NAME} is damaged: {reason}") from None


def step_directory(parent: Path, step: int) -> Path:
    """`parent/step-00001000`: where a step's checkpoint or export stands."""
    return parent / f"step-{step:08d}"


def checkpoints_in(directory: Path) -> list[Path]:
    """The committed checkpoints in a directory, the newest first."""
    found = [path.parent for path in directory.glob(f"step-*/{NAME}")]
    return sorted(p for p in found if re.fullmatch(r"step-\d{8,}", p.name))[::-1]


def files_in(directory: Path) -> dict[str, int]:
    """Size in bytes of every file below a directory, by its path there."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.stat().st_size for path in files}


def verify_files(directory: Path, manifest: Manifest, part: int, parts: int) -> None:
    """Checks size and checksums of every `parts`-th file, beginning with number `part`.

    torch's files are zip archives with a CRC-32 for every tensor. Raises CheckpointError that
    names the file.
    """
    for name, expected in list(manifest.files.items())[part::parts]:
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(
                f"checkpoint {directory} is damaged: {name} {state}, expected {expected} bytes"
            )
        if path.suffix == ".pt":
            _verify_archive(path, directory, name)


def _verify_archive(path: Path, directory: Path, name: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        raise CheckpointError(f"checkpoint {directory} is damaged: {name}: {error}") from None
    if damaged:
        raise CheckpointError(f"checkpoint {directory} is damaged: {name}: wrong CRC of {damaged}")


def versions() -> dict[str, str]:
    """The versions that a checkpoint was written with."""
    import deepspeed

    from harness import __version__

    found: dict[str, Any] = {
        "harness": __version__,
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
    return {name: str(version) for name, version in found.items()}
