"""The same checkpoint for another number of ranks, another ZeRO stage, or any other layout.

A freshly built engine gives the trees that DeepSpeed would write for it: they say where everything
belongs in the new layout. Refilled from the old files (`zero.refill`), they are written as
DeepSpeed's own files, which it then loads like any others. A rank reads and writes the segments of
its own shards only; complete weights are written by the ranks that DeepSpeed has write them (rank 0
below stage 3).
"""

import logging
import shutil
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from harness import distributed
from harness.checkpoint.completeness import (
    copy_missing_checkpoint,
    copy_missing_files,
    files_read_by,
)
from harness.checkpoint.disks import find_disks
from harness.checkpoint.files import FileEntry, checkpoint_error_on_all_ranks, write_file
from harness.checkpoint.manifest import EngineManifest, Manifest, step_directory
from harness.checkpoint.save import engine_manifest, make_room
from harness.engine.engine import Engine
from harness.engine.engines import Engines
from harness.errors import CheckpointError, missing_files
from harness.io.stored import materialize
from harness.optim.apollo import named_state
from harness.optim.apollo.channels import ChannelPlan, matrices_of
from harness.zero.layout import EMA, Flat, Shapes, Tree
from harness.zero.live import shapes_of
from harness.zero.reader import SavedEngine
from harness.zero.refill import FlatsOf, Refill, filled_flat, filled_state
from harness.zero.shards import Shard

log = logging.getLogger(__name__)


@contextmanager
def in_current_layout(
    engines: Engines, directory: Path, manifest: Manifest, parent: Path
) -> Iterator[dict[str, Path]]:
    """Where to load each engine from: `directory`, or a copy in its own layout. Collective.

    The copy is in `parent/step-N.reshard.tmp` while the context lasts, among the run's own
    checkpoints: other runs may read the same checkpoint. Raises CheckpointError, on all ranks, if
    the engine's optimizer cannot be resharded, its parameters are different, or the copy cannot be
    written.
    """
    current = {engine.name: engine_manifest(engine) for engine in engines.trained}
    foreign = [engines[n] for n, layout in current.items() if manifest.engines[n] != layout]
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
    staged = step_directory(parent, manifest.step).with_suffix(".reshard.tmp")
    needed = sum(entry.size for entry in manifest.files.values())
    is_leader = find_disks(parent).is_leader
    with checkpoint_error_on_all_ranks(f"cannot reshard checkpoint {directory}"):
        for engine in foreign:
            _check_optimizer(
                engine, _layout_text(manifest.world_size, manifest.engines[engine.name])
            )
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
                "resharded %s/%s from %s to %s",
                directory.name,
                engine.name,
                _layout_text(manifest.world_size, manifest.engines[engine.name]),
                _layout_text(world_size, current[engine.name]),
            )
        yield places
        distributed.barrier()
    finally:
        if is_leader:
            shutil.rmtree(staged, ignore_errors=True)


def _layout_text(world_size: int, engine: EngineManifest) -> str:
    return f"{world_size} ranks, ZeRO {engine.zero_stage}, layout {engine.layout[:6]}"


def _check_files(directory: Path, manifest: Manifest, engines: Collection[str]) -> None:
    """Raises CheckpointError, on all ranks, unless every node has all files of these engines."""
    with distributed.raise_on_all_ranks(f"cannot reshard checkpoint {directory}"):
        files = {
            name: manifest.writer(name)
            for name in manifest.files
            if name.partition("/")[0] in engines and not (directory / name).is_file()
        }
    lack = missing_files(directory, files, [socket.gethostname()]) if files else ""
    per_rank = sorted(set(distributed.all_gather(lack)) - {""})
    with distributed.raise_on_all_ranks(f"cannot reshard checkpoint {directory}"):
        if per_rank:
            raise CheckpointError(
                "in another layout than the checkpoint's, every node reads all of its files, on a "
                "disk of its own or one that all share:\n  " + "\n  ".join(per_rank)
            )


def _check_optimizer(engine: Engine, was: str) -> None:
    """Raises CheckpointError if the optimizer's state cannot be cut. `was`: the layout to keep."""
    if not engine.is_low_rank and not engine.is_elementwise:
        raise CheckpointError(
            f"engine {engine.name!r}: the state of {engine.optimizer_path} depends on the "
            f"parameters' shapes, and cannot be resharded: resume on {was}, as it was saved"
        )


def write_resharded(directory: Path, engine: Engine, staged: Path) -> dict[str, FileEntry]:
    """Writes this rank's files of an engine in its new layout below `staged`. Collective.

    Returns those of all ranks.
    """
    jobs, written = engine.collect(), {}
    shapes = shapes_of(jobs)
    with checkpoint_error_on_all_ranks(f"cannot reshard checkpoint {directory}"):
        saved = SavedEngine(directory / engine.name)
        if not engine.is_low_rank:
            saved.check_moments()
        _check_names(saved, engine, shapes)
        rank, world = distributed.global_rank(), distributed.world_size()
        states = _low_rank_states if engine.is_low_rank else _states
        refill = Refill(
            saved, shapes, engine.zero_stage, rank, world, partial(states, saved, engine)
        )
        for path, tree in jobs.items():
            if "module" in tree:
                tree |= refill.model(tree)
            else:
                optimizer = refill.optimizer(tree["optimizer_state_dict"], {})
                tree |= {"optimizer_state_dict": optimizer}
            written[path] = write_file(tree, staged / path)
    return {path: e for share in distributed.all_gather(written) for path, e in share.items()}


def _check_names(saved: SavedEngine, engine: Engine, shapes: list[Shapes]) -> None:
    """Raises CheckpointError unless the optimizer has the same parameters in the same groups."""
    for number, names in enumerate(engine.parameter_names):
        expected = {name for name in saved.shapes if saved.group_of(name) == number}
        if odd := {name for group in shapes for name in group if name in names} ^ expected:
            raise CheckpointError(
                f"engine {engine.name!r}: parameter group {number} has other parameters than in "
                f"the checkpoint: {', '.join(sorted(odd))}"
            )
    for name, shape in (item for group in shapes for item in group.items()):
        if saved.shapes[name] != shape:
            raise CheckpointError(
                f"engine {engine.name!r}: parameter {name!r} has the shape {tuple(shape)} in this "
                f"run, and {tuple(saved.shapes[name])} in the checkpoint"
            )


def _states(saved: SavedEngine, engine: Engine, flats_of: FlatsOf) -> dict[int, Tree]:
    """The state of every flat of this rank, for an optimizer that treats every element alone."""
    own = flats_of(distributed.global_rank())
    return {number: filled_state(flat, saved) for number, flat in enumerate(own)}


def _low_rank_states(saved: SavedEngine, engine: Engine, flats_of: FlatsOf) -> dict[int, Tree]:
    """The same of APOLLO, whose state of matrices is cut by their channels."""
    own, place = flats_of(distributed.global_rank()), 0
    per_rank = [own]  # at stage 0 every rank has everything
    if engine.zero_stage:
        per_rank = [flats_of(rank) for rank in range(distributed.world_size())]
        place = distributed.global_rank()
    return {
        number: _low_rank_state([flats[number] for flats in per_rank], place, saved)
        if saved.groups[flat.group]["rank"]
        else filled_state(flat, saved)
        for number, flat in enumerate(own)
    }


def _low_rank_state(per_rank: Sequence[Flat], rank: int, saved: SavedEngine) -> Tree:
    """APOLLO's state of one flat of low-rank matrices, from the flats of the old layout that have
    any of them. `per_rank`: the flat on each rank."""
    new = _plan(per_rank, rank, saved)
    names = {segment.name for segment in per_rank[0].segments}
    state: Tree = {}
    for old in zip(*saved.flats, strict=True):
        if names.isdisjoint(segment.name for segment in old[0].segments) or not old[0].state:
            continue
        if not state:
            group = saved.groups[old[0].group]
            state = named_state.initial_state(new, 0, group) | {"step": torch.zeros(())}
        plans = [_plan(old, number, saved) for number in range(len(old))]
        named_state.reshard(plans, [materialize(flat.state) for flat in old], new, state)
    if any(EMA in saved.state_keys(name) for name in names):
        state[EMA] = filled_flat(per_rank[rank], saved, EMA)
    return state


def _plan(per_rank: Sequence[Flat], rank: int, saved: SavedEngine) -> ChannelPlan:
    """Which of APOLLO's channels a rank has the state of. `per_rank`: a flat by rank."""
    segments = tuple(tuple(flat.segments) for flat in per_rank)
    is_stacked = saved.groups[per_rank[0].group]["stacked"]
    matrices = {
        segment.name: matrices_of(segment.name, saved.shapes[segment.name], is_stacked)
        for segment in segments[0]
    }
    return ChannelPlan([Shard(segments, rank)], matrices)
