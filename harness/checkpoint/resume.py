"""Finding the checkpoint to resume from, verifying it, and resuming exactly there."""

import logging
from operator import or_
from pathlib import Path
from typing import Any

import torch

from harness import distributed
from harness.callbacks.moments import Callbacks
from harness.checkpoint.compatible import changed_models, check_compatible
from harness.checkpoint.completeness import (
    Verify,
    common_manifest,
    remove_outdated,
    verify_checkpoint,
)
from harness.checkpoint.disks import Disks, list_saves
from harness.checkpoint.dropped import read_dropped
from harness.checkpoint.files import verify_file
from harness.checkpoint.fit import Fit
from harness.checkpoint.manifest import Manifest, digest, is_unreadable
from harness.checkpoint.memory import Memory
from harness.checkpoint.reshard import load_engines
from harness.checkpoint.resume_source import find_source
from harness.checkpoint.retention import clean
from harness.checkpoint.save import rank_file
from harness.control.live import LiveConfig
from harness.convert.dropped_saves import Dropped
from harness.convert.run_checkpoints import told_time
from harness.data.step_batches import StepBatches
from harness.data.train_batches import mixture_weights
from harness.distributed.rng import set_rng_state
from harness.engine.engines import Engines
from harness.errors import CheckpointError, ConfigError, UnreadableCheckpoint

log = logging.getLogger(__name__)
log_warning = distributed.global_leader_only(log.warning)


def choose_checkpoint(
    wanted: str,
    parent: Path,
    engines: Engines,
    disks: Disks,
    verify: Verify = verify_file,
    may_change: bool = False,
    memory: Memory | None = None,
) -> Path | None:
    """The checkpoint to resume from, verified; None to start from step 0. Collective.

    `wanted`: `run.resume` (`resume_source`). "latest" is the newest one in `parent` that is
    complete over all `disks` together, or in `memory`, with finite weights; others are logged and
    skipped.
    `verify`: checks a file. `may_change`: the models may be others than the saved ones. Raises, on
    all ranks, CheckpointError if there are checkpoints and none is, or the requested one is not
    complete; UnreadableCheckpoint if a newer one than those cannot be judged; ConfigError if it
    does not match this run, or if "none" is requested and an earlier run has left checkpoints.
    """
    names, everywhere = list_saves(parent, disks)
    unreadable = {name for name in names if disks.is_leader and is_unreadable(parent / name)}
    unreadable = distributed.all_reduce(unreadable, or_)
    places = [(parent, disks)]
    if memory is not None and wanted == "latest":
        places.append((memory.directory, memory.disks))
    with distributed.raise_on_all_ranks(f"cannot list {parent}"):
        if disks.is_leader:
            clean(parent, set(names) - everywhere - unreadable, unreadable)
    for each, its_disks in places:
        remove_outdated(each, its_disks)
    saves, _ = list_saves(parent, disks)
    with distributed.raise_on_all_ranks(f"cannot start over in {parent}"):
        if saves and wanted == "none":
            raise ConfigError(
                f"run.resume = 'none', but {parent} has {len(saves)} checkpoints of an earlier "
                "run: choose another run.name, or move that run away"
            )
    if wanted not in ("latest", "none"):
        parent, is_parent = find_source(wanted, parent)
        if not is_parent:
            check_compatible(parent, verify_checkpoint(parent, verify), engines, may_change)
            return parent
        places = [(parent, Disks(tuple(range(distributed.world_size()))))]
    times: dict[Path, float] = {}
    for each, its_disks in places:
        saves, _ = list_saves(each, its_disks)
        times |= {each / name: at for name, at in saves.items()}
    dropped = read_dropped(*places[0])
    failures = []
    for directory in sorted(times, key=lambda path: (times[path], path), reverse=True):
        try:
            manifest = _verified(directory, verify, dropped)
        except UnreadableCheckpoint as error:
            with distributed.raise_on_all_ranks(f"cannot resume from {parent}"):
                raise UnreadableCheckpoint(
                    f"{error}; it may be complete, so it is not passed over: to resume from "
                    "another checkpoint, set run.resume to its path"
                ) from None
        except CheckpointError as error:
            failures.append(str(error))
            log_warning("skipped: %s", error)
        else:
            check_compatible(directory, manifest, engines, may_change)
            return directory
    with distributed.raise_on_all_ranks(f"cannot resume from {parent}"):
        if failures:
            text = "\n  ".join(failures)
            raise CheckpointError(f"no checkpoint is complete:\n  {text}")
    return None


def _verified(directory: Path, verify: Verify, dropped: Dropped) -> Manifest:
    """The manifest of a checkpoint that "latest" may mean. Collective. Raises CheckpointError."""
    told = distributed.all_reduce({told_time(directory)}, or_) - {None}
    is_dropped = bool(told) and all(map(dropped.has, told))
    manifest = None if is_dropped else verify_checkpoint(directory, verify)
    if manifest is None or manifest.finite is False:
        why = "a rollback has dropped it" if manifest is None else manifest.fault
        raise CheckpointError(f"{directory}: {why}: to resume from it, set run.resume to its path")
    return manifest


def last_good(parent: Path, disks: Disks, before: int, passed_over: Dropped) -> Path | None:
    """The newest checkpoint in `parent` of a step before `before` that is complete, and whose
    weights are finite, verified; none that is `passed_over`. None if there is none. Collective."""
    saves, everywhere = list_saves(parent, disks)
    for directory in [parent / name for name in saves if name in everywhere]:
        try:
            manifest = common_manifest(directory)
            if passed_over.has(manifest.saved_at):
                continue
            if manifest.step < before and manifest.finite is not False:
                verify_checkpoint(directory)
                return directory
        except CheckpointError as error:
            log_warning("skipped: %s", error)
    return None


def restore(
    directory: Path,
    engines: Engines,
    batches: StepBatches,
    live: LiveConfig,
    callbacks: Callbacks,
    may_change: bool = False,
) -> str:
    """Restores engines, data position, random generators, live changes and the state of callbacks
    from a verified checkpoint.

    `may_change`: models and data may be others than those of the checkpoint; what fits is restored.
    Returns what was kept and what was not, or "" if all was. Collective. With another number of
    ranks the generators cannot continue: each rank seeds them from the run's seed, the step and its
    rank. Raises CheckpointError, on all ranks, if the data differs, or an optimizer's state cannot
    be resharded.
    """
    manifest = common_manifest(directory)
    same_world = manifest.world_size == distributed.world_size()
    rank = distributed.global_rank()
    changed = changed_models(directory, manifest, engines) if may_change else ()
    fits = load_engines(engines, directory, manifest, changed)
    with distributed.raise_on_all_ranks(f"cannot resume from {directory}"):
        # The states of engines and data are the same on every rank.
        file = directory / rank_file(rank if same_world else 0)
        state = torch.load(file, map_location="cpu", weights_only=True)
        live.load_state_dict(state["live"], manifest.step)
        callbacks.load_state_dict(state.get("callbacks", []))
        if may_change:
            for engine in engines.trained:
                fit = fits.setdefault(engine.name, Fit(engine.name))
                fit.fit_state(state["engines"]["engines"][engine.name], engine)
        engines.load_state_dict(state["engines"])
        engines.set_total_steps(live.config.run.steps)
    position = state["batches"] | {"world_size": manifest.world_size}
    data = _restore_data(directory, batches, position, may_change)
    if mixture := mixture_weights(live.config.data):  # those of the step, whatever came after it
        batches.set_weights(mixture)
    with distributed.raise_on_all_ranks(f"cannot resume from {directory}"):
        if same_world:
            set_rng_state(state["rng"])
        else:
            seed = digest(f"{live.config.run.seed} {manifest.step} {rank}")
            distributed.seed_everything(int(seed[:15], 16))
    log.info("resumed from %s%s", directory, manifest.note and f", {manifest.note}")
    for engine in engines.trained:
        for text in engine.overrides.differs_from_saved():
            log.info("engine %s: %s (run.steps = %d)", engine.name, text, live.config.run.steps)
    if manifest.fault:
        log_warning(
            "%s: %s: to resume from an earlier checkpoint, set run.resume to its path",
            directory,
            manifest.fault,
        )
    for text in filter(None, [*(fit.text(most=6) for fit in fits.values()), data]):
        log_warning("%s does not match this run; what fits is kept: %s", directory, text)
    return "\n".join(filter(None, [*(fit.text() for fit in fits.values()), data]))


def _restore_data(
    directory: Path, batches: StepBatches, position: dict[str, Any], may_change: bool
) -> str:
    """Continues at a position in the data. Returns what has become of it, if the data has changed
    and it `may_change`. Collective. Raises CheckpointError, on all ranks."""
    with distributed.raise_on_all_ranks(f"cannot resume from {directory}"):
        try:
            if may_change:
                return batches.fit_state_dict(position)
            batches.load_state_dict(position)
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {directory}: the data has changed: {error}: restore it, or set "
                "run.resume_changed = 'fit' to continue with it, or start a new run under another "
                "run.name, with engines.NAME.init_from to begin with the saved weights"
            ) from None
    return ""
