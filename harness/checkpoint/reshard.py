"""The same checkpoint for another number of ranks, another ZeRO stage, or any other layout.

A freshly built engine gives the trees that DeepSpeed would write for it: they say where everything
belongs in the new layout. Filled with what `zero_layout` reads from the old files, they are written
as native files, which DeepSpeed then loads as if they had always been so. A rank reads and writes
the stretches of its own shards only; whole weights are written by the ranks that DeepSpeed has
write them (rank 0 below stage 3).
"""

import logging
import shutil
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch

from harness import distributed
from harness.checkpoint import missing
from harness.checkpoint.completeness import (
    copy_missing_checkpoint,
    copy_missing_files,
    files_read_by,
)
from harness.checkpoint.disks import find_disks
from harness.checkpoint.durable import FileEntry, as_checkpoint_error, write_file
from harness.checkpoint.manifest import EngineManifest, Manifest, step_directory
from harness.checkpoint.save import collect, describe, make_room, shapes_of
from harness.engine import ema
from harness.engine.engine import Engine
from harness.engine.engines import Engines
from harness.errors import CheckpointError
from harness.io.stored import materialize, read
from harness.optim.apollo import named
from harness.optim.apollo.channels import ChannelPlan, matrices_of
from harness.zero.layout import Flat, Shapes, Tree, base_state, flats, is_extra_state
from harness.zero.reader import SavedEngine
from harness.zero.shards import Shard

log = logging.getLogger(__name__)

# What a model file holds besides weights and optimizer, and what is the same in every layout.
_CARRIED = ("lr_scheduler", "global_steps", "global_samples", "skipped_steps")


@contextmanager
def in_current_layout(
    engines: Engines, directory: Path, manifest: Manifest, parent: Path
) -> Iterator[dict[str, Path]]:
    """Where to load each engine from: `directory`, or a copy in its own layout. Collective.

    The copy stands in `parent/step-N.relayout.tmp` while the context lasts, among the run's own
    checkpoints: other runs may read the same checkpoint. Raises CheckpointError, on all ranks, if
    the engine's optimizer cannot be cut anew, its parameters are others, or the copy cannot be
    written.
    """
    described = {engine.name: describe(engine) for engine in engines.trained}
    foreign = [engines[n] for n, here in described.items() if manifest.engines[n] != here]
    if foreign:
        _check_files(directory, manifest, [engine.name for engine in foreign])
    rank, world_size = distributed.global_rank(), distributed.world_size()
    same_world = manifest.world_size == world_size
    copy_missing_checkpoint(
        directory, manifest, files_read_by(rank if same_world else 0, manifest.files)
    )
    if not foreign:
        yield dict.fromkeys(engines, directory)
        return
    staged = step_directory(parent, manifest.step).with_suffix(".relayout.tmp")
    needed = sum(entry.size for entry in manifest.files.values())
    is_leader = find_disks(parent).is_leader
    with (
        distributed.raise_on_all_ranks(f"cannot re-lay {directory}"),
        as_checkpoint_error(f"cannot re-lay checkpoint {directory}"),
    ):
        for engine in foreign:
            _check_optimizer(engine, _told(manifest.world_size, manifest.engines[engine.name]))
        if is_leader:
            make_room(staged, needed)
            for engine in foreign:
                (staged / engine.name).mkdir()
    try:
        places = dict.fromkeys(engines, directory)
        for engine in foreign:
            written = write_resharded(directory, engine, staged)
            copy_missing_files(staged, written, files_read_by(rank, written))
            places[engine.name] = staged
            log.info(
                "re-laid %s/%s from %s to %s",
                directory.name,
                engine.name,
                _told(manifest.world_size, manifest.engines[engine.name]),
                _told(world_size, described[engine.name]),
            )
        yield places
        distributed.barrier()
    finally:
        if is_leader:
            shutil.rmtree(staged, ignore_errors=True)


def _told(world_size: int, engine: EngineManifest) -> str:
    return f"{world_size} ranks, ZeRO {engine.zero_stage}, layout {engine.layout[:6]}"


def _check_files(directory: Path, manifest: Manifest, engines: Collection[str]) -> None:
    """Raises CheckpointError, on all ranks, unless every node has all files of these engines."""
    with distributed.raise_on_all_ranks(f"cannot re-lay {directory}"):
        files = {
            name: manifest.writer(name)
            for name in manifest.files
            if name.partition("/")[0] in engines and not (directory / name).is_file()
        }
    lack = missing.told(directory, files, [socket.gethostname()]) if files else ""
    per_rank = sorted(set(distributed.all_gather(lack)) - {""})
    with distributed.raise_on_all_ranks(f"cannot re-lay {directory}"):
        if per_rank:
            raise CheckpointError(
                "in another layout than the checkpoint's, every node reads all of its files, on a "
                "disk of its own or one that all share:\n  " + "\n  ".join(per_rank)
            )


def _check_optimizer(engine: Engine, was: str) -> None:
    """Raises CheckpointError if the optimizer's state cannot be cut. `was`: the layout to keep."""
    if not engine.is_low_rank and not engine.is_elementwise:
        raise CheckpointError(
            f"engine {engine.name!r}: the state of {engine.optimizer} depends on the parameters' "
            f"shapes, and cannot be cut for another layout: resume on {was}, as it was saved"
        )


def write_resharded(directory: Path, engine: Engine, staged: Path) -> dict[str, FileEntry]:
    """Writes this rank's files of an engine in its new layout below `staged`. Collective.

    Returns those of all ranks.
    """
    jobs, written = collect(engine), {}
    shapes = shapes_of(jobs)
    with (
        distributed.raise_on_all_ranks(f"cannot re-lay {directory}"),
        as_checkpoint_error(f"cannot re-lay checkpoint {directory}"),
    ):
        saved = SavedEngine(directory / engine.name)
        if not engine.is_low_rank:
            saved.check_moments()
        _check_names(saved, engine, shapes)
        for path, tree in jobs.items():
            if "module" in tree:
                tree |= _model(tree, saved, engine, shapes)
            else:
                was = tree["optimizer_state_dict"]
                tree |= {"optimizer_state_dict": _optimizer(was, {}, saved, engine, shapes)}
            written[path] = write_file(tree, staged / path)
    return {path: e for share in distributed.all_gather(written) for path, e in share.items()}


def _check_names(saved: SavedEngine, engine: Engine, shapes: list[Shapes]) -> None:
    """Raises CheckpointError unless the optimizer has the same parameters in the same groups."""
    for number, names in enumerate(engine.parameter_names):
        there = {name for name in saved.shapes if saved.group_of(name) == number}
        if odd := {name for group in shapes for name in group if name in names} ^ there:
            raise CheckpointError(
                f"engine {engine.name!r}: parameter group {number} has other parameters than in "
                f"the checkpoint: {', '.join(sorted(odd))}"
            )
    for name, shape in (item for group in shapes for item in group.items()):
        if saved.shapes[name] != shape:
            raise CheckpointError(
                f"engine {engine.name!r}: parameter {name!r} has the shape {tuple(shape)} here, "
                f"and {tuple(saved.shapes[name])} in the checkpoint"
            )


def _model(tree: Tree, saved: SavedEngine, engine: Engine, shapes: list[Shapes]) -> Tree:
    """What changes in a tree of model_states."""
    sharded = engine.zero_stage == 3
    module = type(tree["module"])()
    for name, value in tree["module"].items():
        if is_extra_state(name):
            module[name] = materialize(saved.extra[name])
        else:
            is_placeholder = sharded and name not in tree["buffer_names"]
            module[name] = value if is_placeholder else weight_of(saved, name)
    changed: Tree = {key: materialize(saved.model[key]) for key in _CARRIED}
    changed["module"] = module
    if tree["frozen_param_fragments"] is not None:
        changed["frozen_param_fragments"] = {
            name: shard_of(weight_of(saved, name), fragment.numel(), distributed.global_rank())
            if sharded
            else weight_of(saved, name)
            for name, fragment in tree["frozen_param_fragments"].items()
        }
    if tree["optimizer"] is not None:
        changed["optimizer"] = _optimizer(tree["optimizer"], module, saved, engine, shapes)
    return changed


def weight_of(saved: SavedEngine, name: str) -> torch.Tensor:
    """An entry of the model's state dict, whole and in the dtype that the model computes in."""
    return read(saved.weight(name)).to(getattr(torch, saved.model["module"][name].dtype))


def shard_of(weight: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """A rank's shard of a frozen parameter at stage 3, padded with zeros: (size,)."""
    shard = torch.zeros(size, dtype=weight.dtype)
    part = weight.reshape(-1)[rank * size : (rank + 1) * size]
    shard[: part.numel()] = part
    return shard


def _optimizer(
    tree: Tree, module: Tree, saved: SavedEngine, engine: Engine, shapes: list[Shapes]
) -> Tree:
    """DeepSpeed's optimizer state of this rank, filled. `module`: as for `zero_layout.flats`."""
    rank, world = distributed.global_rank(), distributed.world_size()
    new = flats(tree, module, shapes, rank, world)
    masters = [filled_flat(flat, saved, None) for flat in new]
    per_rank, place = [new], 0  # at stage 0 every rank has all
    if engine.is_low_rank and engine.zero_stage:
        per_rank, place = [flats(tree, module, shapes, r, world) for r in range(world)], rank
    states = {
        number: _low_rank_state([flats[number] for flats in per_rank], place, saved)
        if engine.is_low_rank and saved.groups[flat.group]["rank"]
        else filled_state(flat, saved)
        for number, flat in enumerate(new)
    }
    groups = [
        group
        | materialize(saved.groups[number])
        | {key: group[key] for key in ("params", "param_names") if key in group}
        for number, group in enumerate(base_state(tree)["param_groups"])
    ]
    base = {"state": {k: v for k, v in states.items() if v}, "param_groups": groups}
    if "single_partition_of_fp32_groups" in tree:
        lean = [m[: m.numel() - flat.padding] for m, flat in zip(masters, new, strict=True)]
        filled = {"base_optimizer_state": base, "single_partition_of_fp32_groups": lean}
    elif "fp32_flat_groups" in tree:
        filled = {"optimizer_state_dict": base, "fp32_flat_groups": masters}
    elif "fp32_groups_flat" in tree:
        filled = {"optimizer_state_dict": base, "fp32_groups_flat": masters}
    elif "fp32_groups" in tree:
        grouped = [
            [m for m, flat in zip(masters, new, strict=True) if flat.group == number]
            for number in range(len(groups))
        ]
        filled = {"optimizer_state_dict": base, "fp32_groups": grouped}
    else:
        return base
    scale = saved.loss_scale()
    if "loss_scaler" in tree:
        scaler: Any = copy(tree["loss_scaler"])
        vars(scaler).update({key: scale[key] for key in scale.keys() & vars(scaler).keys()})
        return tree | filled | {"loss_scaler": scaler}
    return tree | filled | {key: scale[key] for key in scale.keys() & tree.keys()}


def filled_state(flat: Flat, saved: SavedEngine) -> Tree:
    """The optimizer's state of one flat: moments cut anew, and scalars as they were.

    Scalars are read anew: two flats that shared a `step` tensor would count every step twice.
    """
    state: Tree = {}
    for segment in flat.segments:
        for key, value in materialize(saved.scalars(segment.name)).items():
            if state.setdefault(key, value) != value:
                raise CheckpointError(
                    f"optimizer state {key!r} of parameter {segment.name!r} is {value}, and "
                    f"{state[key]} of {flat.segments[0].name!r}, which ZeRO keeps in one group"
                )
    keys = {key for segment in flat.segments for key in saved.state_keys(segment.name)}
    return state | {key: filled_flat(flat, saved, key) for key in sorted(keys)}


def _low_rank_state(per_rank: Sequence[Flat], rank: int, saved: SavedEngine) -> Tree:
    """APOLLO's state of one flat of low-rank matrices, from those of the old layout that have any
    of them. `per_rank`: the flat as the ranks have it."""
    new = _plan(per_rank, rank, saved)
    names = {segment.name for segment in per_rank[0].segments}
    state: Tree = {}
    for old in zip(*saved.flats, strict=True):
        if names.isdisjoint(segment.name for segment in old[0].segments) or not old[0].state:
            continue
        if not state:
            group = saved.groups[old[0].group]
            state = named.first_state(new, 0, group) | {"step": torch.zeros(())}
        plans = [_plan(old, number, saved) for number in range(len(old))]
        named.relay(plans, [materialize(flat.state) for flat in old], new, state)
    if any(ema.KEY in saved.state_keys(name) for name in names):
        state[ema.KEY] = filled_flat(per_rank[rank], saved, ema.KEY)
    return state


def _plan(per_rank: Sequence[Flat], rank: int, saved: SavedEngine) -> ChannelPlan:
    """Which of APOLLO's channels a rank has the state of. `per_rank`: a flat by rank."""
    segments = tuple(tuple(flat.segments) for flat in per_rank)
    is_stacked = saved.groups[per_rank[0].group]["stacked"]
    matrices = {
        piece.name: matrices_of(piece.name, saved.shapes[piece.name], is_stacked)
        for piece in segments[0]
    }
    return ChannelPlan([Shard(segments, rank)], matrices)


def filled_flat(flat: Flat, saved: SavedEngine, key: str | None) -> torch.Tensor:
    """A flat's master (key None) or moment from the checkpoint, on the CPU; padding is 0."""
    filled: torch.Tensor | None = None
    for segment in flat.segments:
        if not segment.length:
            continue
        if key is not None and key not in saved.state_keys(segment.name):
            continue  # never had a gradient
        stop = segment.start + segment.length
        name = segment.name
        tensor = saved.master(name) if key is None else saved.moment(name, key)
        part = read(tensor, segment.start, stop)
        if filled is None:
            filled = torch.zeros(flat.shape, dtype=part.dtype)
        filled.view(-1)[segment.offset : segment.offset + segment.length] = part
    return torch.zeros(flat.shape) if filled is None else filled
