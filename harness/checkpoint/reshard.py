"""The same checkpoint for another number of ranks, another ZeRO stage, or any other layout.

A newly built engine provides the trees that DeepSpeed would write for it: they say where everything
belongs in the new layout. Filled from the old files (`zero.refill`), they are handed to DeepSpeed
in memory, as if it had read them. Of masters and moments a rank reads only the segments of its own
shards, and of the model what DeepSpeed loads on it (below stage 3 all weights).
"""

import logging
import socket
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import distributed
from harness.checkpoint.compatible import check_parameters
from harness.checkpoint.copy_missing import copy_missing_checkpoint, files_read_by
from harness.checkpoint.manifest import EngineManifest, Manifest
from harness.checkpoint.save import engine_manifest
from harness.checkpoint.written import checkpoint_error_on_all_ranks
from harness.engine.engine import Engine
from harness.engine.engines import Engines
from harness.errors import CheckpointError, missing_files
from harness.io.stored import materialize
from harness.optim.sharded.optimizer import ShardedOptimizer
from harness.zero import file_trees
from harness.zero.engine_state import shapes_of
from harness.zero.file_trees import FileTrees
from harness.zero.layout import EMA, Flat, Tree
from harness.zero.reader import SavedEngine
from harness.zero.refill import FlatsOf, TreeFiller, filled_flat, filled_state
from harness.zero.shards import Shard

log = logging.getLogger(__name__)


def load_engines(engines: Engines, directory: Path, manifest: Manifest) -> None:
    """Loads all trained engines from a verified checkpoint, resharded if their layout has changed.

    Collective. Raises CheckpointError, on all ranks, if an engine's optimizer cannot be resharded,
    or its parameters are different.
    """
    layouts = {engine.name: engine_manifest(engine) for engine in engines.trained}
    changed = [engines[name] for name in layouts if manifest.engines[name] != layouts[name]]
    if changed:
        _check_files(directory, manifest, [engine.name for engine in changed])
        with distributed.raise_on_all_ranks(f"cannot reshard checkpoint {directory}"):
            for engine in changed:
                saved = manifest.engines[engine.name]
                _check_optimizer(engine, _layout_text(manifest.world_size, saved))
    same_world = manifest.world_size == distributed.world_size()
    saved_rank = distributed.global_rank() if same_world else 0
    copy_missing_checkpoint(directory, manifest, files_read_by(saved_rank, manifest.files))
    for engine in engines.trained:
        if engine not in changed:
            file_trees.load(engine.ds, directory, engine.name)
            continue
        file_trees.load_trees(engine.ds, resharded(directory, engine), engine.name)
        log.info(
            "resharded %s/%s from %s to %s",
            directory.name,
            engine.name,
            _layout_text(manifest.world_size, manifest.engines[engine.name]),
            _layout_text(distributed.world_size(), layouts[engine.name]),
        )


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
    report = missing_files(directory, files, [socket.gethostname()]) if files else ""
    reports = sorted(set(distributed.all_gather(report)) - {""})
    with distributed.raise_on_all_ranks(f"cannot reshard checkpoint {directory}"):
        if reports:
            raise CheckpointError(
                "to reshard a checkpoint, every node needs all of its files, on its own disk or a "
                "shared one:\n  " + "\n  ".join(reports)
            )


def _check_optimizer(engine: Engine, saved_layout: str) -> None:
    """Raises CheckpointError if the optimizer's state cannot be resharded."""
    if engine.sharded_optimizer is None and not engine.is_elementwise:
        raise CheckpointError(
            f"engine {engine.name!r}: the state of {engine.optimizer_path} depends on the "
            f"parameters' shapes, and cannot be resharded: resume with {saved_layout}"
        )


def resharded(directory: Path, engine: Engine) -> FileTrees:
    """This rank's trees of an engine in its new layout, filled with what was saved. Collective.

    Raises CheckpointError, on all ranks.
    """
    trees = engine.collect(for_loading=True)
    shapes = shapes_of(trees)
    with checkpoint_error_on_all_ranks(f"cannot reshard checkpoint {directory}"):
        saved = SavedEngine(directory / engine.name)
        kind = engine.sharded_optimizer
        if kind is None or kind.IS_ELEMENTWISE:
            saved.check_moments()
            states = partial(_states, saved, engine)
        else:
            states = partial(_matrix_states, kind, saved, engine)
        check_parameters(saved, engine, shapes)
        rank, world = distributed.global_rank(), distributed.world_size()
        filler = TreeFiller(saved, shapes, engine.zero_stage, rank, world, states)
        return {path: filler.fill(tree) for path, tree in trees.items()}


def _states(saved: SavedEngine, engine: Engine, flats_of: FlatsOf) -> dict[int, Tree]:
    """The state of every flat of this rank, for an elementwise optimizer."""
    own = flats_of(distributed.global_rank())
    return {number: filled_state(flat, saved) for number, flat in enumerate(own)}


def _matrix_states(
    kind: type[ShardedOptimizer], saved: SavedEngine, engine: Engine, flats_of: FlatsOf
) -> dict[int, Tree]:
    """The same for an optimizer that keeps its state of matrices on ranks of its choice."""
    own, rank = flats_of(distributed.global_rank()), 0
    per_rank = [own]  # at stage 0 every rank has everything
    if engine.zero_stage:
        per_rank = [flats_of(rank) for rank in range(distributed.world_size())]
        rank = distributed.global_rank()
    load = [0.0] * len(per_rank)
    return {
        number: _matrix_state(kind, [flats[number] for flats in per_rank], rank, saved, load)
        for number in range(len(own))
    }


def _matrix_state(
    kind: type[ShardedOptimizer],
    per_rank: Sequence[Flat],
    rank: int,
    saved: SavedEngine,
    load: list[float],
) -> Tree:
    """The state of one flat, if of matrices from the flats of the old layout that hold some of
    them. `per_rank`: the flat on each rank."""
    matrices = _matrices(kind, per_rank[0], saved)
    if not any(matrices.values()):
        return filled_state(per_rank[rank], saved)
    old = [
        flats
        for flats in zip(*saved.flats, strict=True)
        if flats[0].state and not matrices.keys().isdisjoint(s.name for s in flats[0].segments)
    ]
    state: Tree = {}
    if old:
        for flats in old:
            matrices |= _matrices(kind, flats[0], saved)
        shards_and_states = [(_shards(flats), [flat.state for flat in flats]) for flats in old]
        settings = saved.groups[old[0][0].group]
        new = _shards(per_rank)[rank]
        state = kind.resharded(shards_and_states, materialize, new, matrices, settings, load)
    if any(EMA in saved.state_keys(segment.name) for segment in per_rank[0].segments):
        state[EMA] = filled_flat(per_rank[rank], saved, EMA)
    return state


def _matrices(kind: type[ShardedOptimizer], flat: Flat, saved: SavedEngine) -> dict[str, list[Any]]:
    """The matrices of each parameter of a flat."""
    group = saved.groups[flat.group]
    names = [segment.name for segment in flat.segments]
    return {name: kind.matrices_in(name, saved.shapes[name], group) for name in names}


def _shards(per_rank: Sequence[Flat]) -> list[Shard]:
    """A flat on each rank, as its optimizer sees it."""
    segments = tuple(tuple(flat.segments) for flat in per_rank)
    return [Shard(segments, rank) for rank in range(len(per_rank))]
