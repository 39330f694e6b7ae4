"""Directories of checkpoints that are not converted: what each is, and what to do."""

import re
from pathlib import Path

from harness.errors import CheckpointError, first_few
from harness.formats import suffixes
from harness.zero.reader import is_engine

ADAPTER = "adapter_model.safetensors"

_PIPELINE = re.compile(r"layer_\d+-(.*-)?model_states\.pt")


def refuse_tag(path: Path) -> None:
    """Raises CheckpointError for files of an engine in a layout that is not read."""
    if (path / "zero").is_dir():
        raise CheckpointError(f"{path}: {_UNIVERSAL}")
    if any(_PIPELINE.fullmatch(found.name) for found in path.glob("layer_*")):
        raise CheckpointError(f"{path}: {_PIPELINED}")


def explain(path: Path) -> str:
    """What a directory is in which nothing was found that could be converted, and what to do."""
    if found := _sharded(path):
        return (
            "a sharded checkpoint of torch (DCP, FSDP): first write it as one file, with `python "
            f"-m torch.distributed.checkpoint.format_utils dcp_to_torch {found} FILE.pt`"
        )
    if (path / "zero").is_dir():
        return _UNIVERSAL
    if any(_PIPELINE.fullmatch(found.name) for found in path.glob("layer_*")):
        return _PIPELINED
    if tags := sorted(found.name for found in path.iterdir() if is_engine(found)):
        return (
            "has no `latest`, which names the newest checkpoint and is written last: give one of "
            f"its tags: {first_few(tags)}"
        )
    names = sorted(found.name for found in path.iterdir() if found.suffix in suffixes.KNOWN)
    if files := [name for name in names if not name.endswith("_states.pt")]:
        return f"has no file of a known name: give the path of one of {first_few(files)}"
    return (
        "not a checkpoint or weights: expected latest, manifest.json, DeepSpeed's "
        "*_model_states.pt, model.safetensors or its index"
    )


_UNIVERSAL = (
    "a universal checkpoint of DeepSpeed (zero/), in pieces by parameter: convert the checkpoint "
    "that it was made from"
)
_PIPELINED = (
    "a checkpoint of DeepSpeed's pipeline parallelism (layer_*-model_states.pt), which is not "
    "supported: save the model's state dict with torch.save where it is trained"
)


def _sharded(path: Path) -> Path | None:
    """The directory of a DCP checkpoint: this one, or one in it."""
    for found in (path, *sorted(path.iterdir())):
        if found.is_dir() and (any(found.glob("*.distcp")) or (found / ".metadata").is_file()):
            return found
    return None
