"""Finding the checkpoint to go on from, and going on exactly there. Nothing is trusted unseen."""

import logging
from pathlib import Path
from typing import Any

import torch

from harness import distributed
from harness.checkpoint.files import verify_file
from harness.checkpoint.manifest import checkpoints_in, read_manifest
from harness.checkpoint.retain import clean
from harness.checkpoint.rng import set_rng_state
from harness.checkpoint.save import rank_file
from harness.data import Batches
from harness.engines import Engines
from harness.errors import CheckpointError

log = logging.getLogger(__name__)
tell = distributed.global_leader_only(log.warning)


def choose(wanted: str, parent: Path, engines: Engines) -> Path | None:
    """The checkpoint that `run.resume` asks for, verified; None to start over. Collective.

    "latest" is the newest one in `parent` that is whole; those that are not are named and passed
    over. Raises CheckpointError, on all ranks, if there are some and none is whole, if the one that
    was asked for is not, or if "none" is asked for where an earlier run has left checkpoints.
    """
    found: list[Path] = []
    with distributed.in_unison(f"cannot look into {parent}"):
        if distributed.is_global_leader():
            clean(parent)
            found = checkpoints_in(parent)
            if found and wanted == "none":
                raise CheckpointError(
                    f"run.resume = 'none', but {parent} holds {len(found)} checkpoints of an "
                    "earlier run: choose another run.name, or move that run away"
                )
    found = distributed.broadcast(found)
    if wanted not in ("latest", "none"):
        verify(Path(wanted), engines)
        return Path(wanted)
    failures = []
    for directory in found:
        try:
            verify(directory, engines)
            return directory
        except _Damaged as error:
            failures.append(str(error))
            tell("passed over: %s", error)
    if failures:
        raise CheckpointError("no checkpoint is whole:\n  " + "\n  ".join(failures))
    return None


class _Damaged(CheckpointError):
    """A checkpoint that is not whole, as opposed to one that does not fit this run."""


def verify(directory: Path, engines: Engines) -> None:
    """Checks that a checkpoint is whole and made for these engines. Collective; loads nothing.

    The ranks share the reading. Raises CheckpointError, on all ranks together.
    """
    with distributed.in_unison(f"cannot read checkpoint {directory}"):
        try:
            manifest = read_manifest(directory)
            rank, world_size = distributed.global_rank(), distributed.world_size()
            for name, entry in list(manifest.files.items())[rank::world_size]:
                verify_file(directory / name, entry)
        except CheckpointError as error:
            raise _Damaged(str(error)) from None
        here: dict[str, Any] = {
            "world size": world_size,
            "engines": sorted(engines),
            **{f"engine {n!r}: ZeRO stage": e.zero_stage for n, e in engines.items()},
            **{f"engine {n!r}: dtype": str(e.dtype) for n, e in engines.items()},
        }
        saved: dict[str, Any] = {
            "world size": manifest.world_size,
            "engines": sorted(manifest.engines),
            **{f"engine {n!r}: ZeRO stage": e.zero_stage for n, e in manifest.engines.items()},
            **{f"engine {n!r}: dtype": e.dtype for n, e in manifest.engines.items()},
        }
        for what, found in here.items():
            if saved[what] != found:
                raise CheckpointError(
                    f"checkpoint {directory} does not fit this run: {what} is {found} here, and "
                    f"{saved[what]} in the checkpoint"
                )


def resume(directory: Path, engines: Engines, batches: Batches) -> None:
    """Puts engines, data position and random generators where a verified checkpoint left them."""
    for engine in engines.trained:
        engine.ds.load_checkpoint(str(directory), tag=engine.name)
    with distributed.in_unison(f"cannot resume from {directory}"):
        path = directory / rank_file(distributed.global_rank())
        mine = torch.load(path, weights_only=True)
        engines.load_state_dict(mine["engines"])
        try:
            batches.load_state_dict(mine["batches"])
        except ValueError as error:
            raise CheckpointError(f"checkpoint {directory}: other data: {error}") from None
        set_rng_state(mine["rng"])
    log.info("resumed from %s", directory)
