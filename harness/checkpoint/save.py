"""Writing a checkpoint of all engines and ranks, and exporting plain weights. Collective."""

import logging
import shutil
from pathlib import Path

import torch

from harness import distributed
from harness.checkpoint.manifest import (
    EngineManifest,
    Manifest,
    files_in,
    step_directory,
    versions,
)
from harness.checkpoint.rng import rng_state
from harness.data import Batches
from harness.engines import Engines
from harness.io import save as save_state_dict
from harness.io import write_atomically

log = logging.getLogger(__name__)


def save(engines: Engines, batches: Batches, parent: Path) -> Path:
    """Writes `parent/step-N/`, whole or not at all: staged beside it, then renamed.

    It holds a folder of DeepSpeed's files for each engine, a file with each rank's own state, and
    the manifest.
    """
    target = step_directory(parent, engines.global_step)
    staged = target.with_name(f"{target.name}.tmp")
    with distributed.in_unison(f"cannot make {staged}"):
        if distributed.is_global_leader():
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
    for name, engine in engines.items():
        engine.ds.save_checkpoint(str(staged), tag=name, save_latest=False)
    with distributed.in_unison(f"cannot write {staged}"):
        mine = {
            "rng": rng_state(),
            "engines": engines.state_dict(),
            "batches": batches.state_dict(),
        }
        write_atomically(
            staged / rank_file(distributed.global_rank()), lambda path: torch.save(mine, path)
        )
    with distributed.in_unison(f"cannot commit {target}"):
        if distributed.is_global_leader():
            _commit(engines, staged, target)
    log.info("saved %s", target)
    return target


def rank_file(rank: int) -> str:
    """The name of a rank's own file in a checkpoint."""
    return f"rank-{rank:05d}.pt"


def _commit(engines: Engines, staged: Path, target: Path) -> None:
    Manifest(
        step=engines.global_step,
        world_size=distributed.world_size(),
        engines={
            name: EngineManifest(zero_stage=engine.zero_stage, dtype=str(engine.dtype))
            for name, engine in engines.items()
        },
        files=files_in(staged),
        versions=versions(),
    ).write(staged)
    if target.exists():  # the same step again, after a command changed something
        replaced = target.with_name(f"{target.name}.replaced.tmp")
        target.rename(replaced)
        staged.rename(target)
        shutil.rmtree(replaced)
    else:
        staged.rename(target)


def export(engines: Engines, parent: Path) -> Path:
    """Writes every trained engine's whole weights as `parent/step-N/ENGINE.sft`."""
    target = step_directory(parent, engines.global_step)
    for engine in engines.trained:
        state = engine.full_state_dict()
        with distributed.in_unison(f"cannot export to {target}"):
            if distributed.is_global_leader():
                target.mkdir(parents=True, exist_ok=True)
                save_state_dict(state, target / f"{engine.name}.sft")
    log.info("exported %s", target)
    return target
