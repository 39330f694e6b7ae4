"""Directories of checkpoints that are not converted, and files that are only a part of a model:
what each is, and what to do."""

import re
from collections.abc import Collection
from pathlib import Path

from harness.convert.run_checkpoints import MANIFEST, is_step, named_in
from harness.errors import CheckpointError, first_few
from harness.formats import shard_index, suffixes
from harness.zero.reader import is_engine

ADAPTER = "adapter_model.safetensors"

_PIPELINE = re.compile(r"layer_\d+-(.*-)?model_states\.pt")
_SHARD = re.compile(r"(shard-)?.*-\d{5}-of-(\d{5})\.\w+")
"""Of Hugging Face shards; "shard-": of torch's, which have pieces of tensors."""
_SHARDING = "DCP_SHARDING_INFO"
"""Metadata of torch's files: where its pieces of tensors begin."""


def refuse_tag(path: Path) -> None:
    """Raises CheckpointError for files of an engine in a layout that is not read."""
    if (path / "zero").is_dir():
        raise CheckpointError(f"{path}: {_UNIVERSAL}")
    if any(_PIPELINE.fullmatch(found.name) for found in path.glob("layer_*")):
        raise CheckpointError(f"{path}: {_PIPELINED}")


def notes_of_file(path: Path, metadata: Collection[str]) -> list[str]:
    """What the weights of a file are a part of. Raises CheckpointError for pieces of tensors."""
    if _SHARDING in metadata:
        raise CheckpointError(f"{path}: {_PIECES}")
    if path.stem == Path(ADAPTER).stem:
        return ["the tensors of an adapter, without its base model"]
    match = _SHARD.fullmatch(path.name)
    if match and int(match[2]) > 1:
        return [f"one shard of {int(match[2])}: for all tensors give their index or directory"]
    return []


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
    if any(map(_is_saved, [path] if is_step(path) else named_in(path))):
        return _UNFINISHED
    if tags := sorted(found.name for found in path.iterdir() if is_engine(found)):
        return (
            "has no `latest`, which names the newest checkpoint and is written last: give one of "
            f"its tags: {first_few(tags)}"
        )
    names = sorted(found.name for found in path.iterdir() if found.suffix in suffixes.KNOWN)
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    if any(match[1] for match in shards):
        return _PIECES
    if shards:
        return (
            f"shards without the index of their tensors, {shard_index.INDEX}: get it from where "
            f"they are from, or give the path of one of {first_few([m[0] for m in shards])}"
        )
    if files := [name for name in names if not name.endswith("_states.pt")]:
        return f"has no file of a known name: give the path of one of {first_few(files)}"
    return (
        "not a checkpoint or weights: expected latest, manifest.json, DeepSpeed's "
        "*_model_states.pt, model.safetensors or its index"
    )


_UNFINISHED = (
    f"a checkpoint, or a run's, without {MANIFEST}, which is written last: it is not complete"
)
_UNIVERSAL = (
    "a universal checkpoint of DeepSpeed (zero/), in pieces by parameter: convert the checkpoint "
    "that it was made from"
)
_PIECES = (
    "a sharded checkpoint of torch (DCP) in safetensors files, with each rank's pieces of the "
    "tensors: save it with HuggingFaceStorageWriter(..., enable_consolidation=True), or join the "
    "files with torch.distributed.checkpoint's consolidate_safetensors_files"
)
_PIPELINED = (
    "a checkpoint of DeepSpeed's pipeline parallelism (layer_*-model_states.pt), which is not "
    "supported: save the model's state dict with torch.save where it is trained"
)


def _is_saved(step: Path) -> bool:
    """Whether a directory with the name of a checkpoint has files of one: exports have the same
    names."""
    return any(step.glob("rank-*.pt")) or any(map(is_engine, step.iterdir()))


def _sharded(path: Path) -> Path | None:
    """The directory of a DCP checkpoint: this one, or one in it."""
    for found in (path, *sorted(path.iterdir())):
        if found.is_dir() and (any(found.glob("*.distcp")) or (found / ".metadata").is_file()):
            return found
    return None
