"""The same checkpoint for another number of ranks, another ZeRO stage, or any other layout.

A newly built engine provides the trees that DeepSpeed would write for it: they say where everything
belongs in the new layout. Filled from the old files (`zero.refill`), they are handed to DeepSpeed
in memory, as if it had read them. Of masters and moments a rank reads only the segments of its own
shards, and of the model what DeepSpeed loads on it (below stage 3 all weights). Nodes with their
own disks get the files that they lack first.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness import distributed
from harness.checkpoint.compatible import check_parameters, engine_manifest
from harness.checkpoint.copy_missing import copy_missing_checkpoint, files_read_by
from harness.checkpoint.fit import Fit, fit
from harness.checkpoint.manifest import EngineManifest, Manifest
from harness.checkpoint.written import checkpoint_error_on_all_ranks
from harness.engine.engine import Engine
from harness.engine.engines import Engines
from harness.errors import CheckpointError, counted
from harness.io.stored import materialize
from harness.optim.sharded.optimizer import ShardedOptimizer
from harness.zero import file_trees
from harness.zero.engine_state import shapes_of
from harness.zero.file_trees import FileTrees
from harness.zero.layout import EMA, Flat, Shapes, Tree
from harness.zero.reader import SavedEngine
from harness.zero.refill import FlatsOf, TreeFiller, filled_flat, filled_state
from harness.zero.shards import Shard

log = logging.getLogger(__name__)


def load_engines(
    engines: Engines, directory: Path, manifest: Manifest, changed_models: Collection[str] = ()
) -> dict[str, Fit]:
    """Loads all trained engines from a verified checkpoint, resharded if their layout has changed.

    `changed_models`: names of the engines of which only what fits is loaded; returns what that is.
    Collective. Raises CheckpointError, on all ranks, if an engine's optimizer cannot be resharded,
    or the parameters of another engine are different.
    """
    layouts = {engine.name: engine_manifest(engine) for engine in engines.trained}
    changed = [
        engines[name]
        for name in layouts
        if manifest.engines[name] != layouts[name] or name in changed_models
    ]
    if changed:
        with distributed.raise_on_all_ranks(f"cannot reshard checkpoint {directory}"):
            for engine in changed:
                saved = manifest.engines[engine.name]
                _check_optimizer(engine, _layout_text(manifest.world_size, saved))
    same_world = manifest.world_size == distributed.world_size()
    saved_rank = distributed.global_rank() if same_world else 0
    names = {engine.name for engine in changed}
    wanted = set(files_read_by(saved_rank, manifest.files))
    wanted |= {name for name in manifest.files if name.partition("/")[0] in names}
    copy_missing_checkpoint(directory, manifest, wanted)
    fits: dict[str, Fit] = {}
    for engine in engines.trained:
        if engine not in changed:
            file_trees.load(engine.ds, directory, engine.name)
            continue
        if engine.name in changed_models:
            with checkpoint_error_on_all_ranks(f"cannot fit checkpoint {directory}"):
                fits[engine.name] = fit(engine, SavedEngine(directory / engine.name))
        trees = resharded(directory, engine, fits.get(engine.name))
        file_trees.load_trees(engine.ds, trees, engine.name)
        if manifest.engines[engine.name] == layouts[engine.name]:
            continue
        log.info(
            "resharded %s/%s from %s to %s",
            directory.name,
            engine.name,
            _layout_text(manifest.world_size, manifest.engines[engine.name]),
            _layout_text(distributed.world_size(), layouts[engine.name]),
        )
    return fits


def _layout_text(world_size: int, engine: EngineManifest) -> str:
    return f"{counted(world_size, 'rank')}, ZeRO {engine.zero_stage}, layout {engine.layout[:6]}"


def _check_optimizer(engine: Engine, saved_layout: str) -> None:
    """Raises CheckpointError if the optimizer's state cannot be resharded."""
    if engine.sharded_optimizer is None and not engine.is_elementwise:
        raise CheckpointError(
            f"engine {engine.name!r}: the state of {engine.optimizer_path} depends on the "
            f"parameters' shapes, and cannot be resharded, or fitted to another model: resume with "
            f"{saved_layout}"
        )


def resharded(directory: Path, engine: Engine, fit: Fit | None = None) -> FileTrees:
    """This rank's trees of an engine in its new layout, filled with what was saved. Collective.

    `fit`: what of it, if not all; the rest stays as it is in the engine. Raises CheckpointError, on
    all ranks.
    """
    trees = engine.collect(for_loading=True)
    shapes = shapes_of(trees)
    with checkpoint_error_on_all_ranks(f"cannot reshard checkpoint {directory}"):
        saved = SavedEngine(directory / engine.name, fit and fit.names)
        kind = engine.sharded_optimizer
        if kind is None or kind.IS_ELEMENTWISE:
            saved.check_moments()
            states = partial(_states, saved)
        else:
            sizes = {name: size for group in shapes for name, size in group.items()}
            states = _MatrixStates(kind, saved, sizes, engine.zero_stage)
        if fit is None:
            check_parameters(saved, engine, shapes)
        else:
            fit.check_groups(saved, engine)
        rank, world = distributed.global_rank(), distributed.world_size()
        filler = TreeFiller(saved, shapes, engine.zero_stage, rank, world, states, fit is not None)
        return {path: filler.fill(tree) for path, tree in trees.items()}


def _states(saved: SavedEngine, flats_of: FlatsOf, groups: list[Tree]) -> dict[int, Tree]:
    """The state of every flat of this rank, for an elementwise optimizer."""
    own = flats_of(distributed.global_rank())
    like = _first_saved(saved, own)
    return {n: filled_state(flat, saved, like.get(flat.group)) for n, flat in enumerate(own)}


def _first_saved(saved: SavedEngine, flats: Sequence[Flat]) -> dict[int, str]:
    """The first parameter of each group that was saved with a state."""
    pairs = [(flat.group, segment.name) for flat in flats for segment in flat.segments]
    return {
        group: name
        for group, name in reversed(pairs)
        if name in saved.shapes and saved.state_keys(name)
    }


@dataclass(frozen=True)
class _MatrixStates:
    """The same for an optimizer that keeps its state of matrices on ranks of its choice."""

    kind: type[ShardedOptimizer]
    saved: SavedEngine
    sizes: Shapes
    """Of all parameters in the new layout."""
    stage: int

    def __call__(self, flats_of: FlatsOf, groups: list[Tree]) -> dict[int, Tree]:
        own, rank = flats_of(distributed.global_rank()), 0
        per_rank = [own]  # at stage 0 every rank has everything
        if self.stage:
            per_rank = [flats_of(rank) for rank in range(distributed.world_size())]
            rank = distributed.global_rank()
        like = _first_saved(self.saved, own)
        load = [0.0] * len(per_rank)
        states = {
            number: self._state(
                [flats[number] for flats in per_rank],
                *(rank, groups[flat.group], load, like.get(flat.group)),
            )
            for number, flat in enumerate(own)
        }
        saved = self.saved.shapes
        grown = {flat.group for flat in own if any(s.name not in saved for s in flat.segments)}
        for number, state in states.items():
            if own[number].group in grown:
                state |= {key: v for key, v in self.kind.RENEWED.items() if key in state}
        return states

    def _state(
        self,
        per_rank: Sequence[Flat],
        rank: int,
        settings: Tree,
        load: list[float],
        like: str | None,
    ) -> Tree:
        """The state of one flat, if of matrices from the flats of the old layout that hold some of
        them. `per_rank`: the flat on each rank. `like`: as in `filled_state`."""
        saved, flat = self.saved, per_rank[rank]
        matrices = self._matrices(flat, self.sizes, settings)
        if not any(matrices.values()):
            return filled_state(flat, saved, like)
        old = [
            flats
            for flats in zip(*saved.flats, strict=True)
            if flats[0].state and not matrices.keys().isdisjoint(s.name for s in flats[0].segments)
        ]
        state: Tree = {}
        if old or like is not None:
            for flats in old:
                groups = saved.groups[flats[0].group]
                matrices = matrices | self._matrices(flats[0], saved.shapes, groups)
            pairs = [(_shards(flats), [flat.state for flat in flats]) for flats in old]
            new = _shards(per_rank)[rank]
            state = self.kind.resharded(pairs, materialize, new, matrices, settings, load)
        names = [s.name for s in flat.segments if s.name in saved.shapes]
        if not old and like is not None:
            scalars, names = materialize(saved.scalars(like)), [like]
            state |= {key: scalars[key] for key in self.kind.COUNTERS if key in scalars}
        if any(EMA in saved.state_keys(name) for name in names):
            state[EMA] = filled_flat(flat, saved, EMA)
        return state

    def _matrices(self, flat: Flat, sizes: Shapes, settings: Tree) -> dict[str, list[Any]]:
        """The matrices of each parameter of a flat."""
        names = [segment.name for segment in flat.segments]
        return {name: self.kind.matrices_in(name, sizes[name], settings) for name in names}


def _shards(per_rank: Sequence[Flat]) -> list[Shard]:
    """A flat on each rank, as its optimizer sees it."""
    segments = tuple(tuple(flat.segments) for flat in per_rank)
    return [Shard(segments, rank) for rank in range(len(per_rank))]
