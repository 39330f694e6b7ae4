"""Finding the checkpoint to go on from, and going on exactly there."""

import logging
from pathlib import Path
from typing import Any

import torch

from harness import distributed
from harness.checkpoint.manifest import checkpoints_in, read_manifest, verify_files
from harness.checkpoint.rng import set_rng_state
from harness.checkpoint.save import rank_file
from harness.data import Batches
from harness.engines import Engines
from harness.errors import CheckpointError

log = logging.getLogger(__name__)


def find(wanted: str, parent: Path) -> Path | None:
    """The checkpoint that `run.resume` asks for, among those in `parent`; None to start over.

    Raises CheckpointError if "none" is asked for where an earlier run has left checkpoints.
    """
    committed = checkpoints_in(parent)
    match wanted:
        case "latest":
            return committed[0] if committed else None
        case "none":
            if committed:
                raise CheckpointError(
                    f"run.resume = 'none', but {parent} holds {len(committed)} checkpoints of an "
                    "earlier run: choose another run.name, or move that run away"
                )
            return None
        case _:
            return Path(wanted)


def verify(directory: Path, engines: Engines) -> None:
    """Checks that a checkpoint is whole and made for these engines. Collective; loads nothing.

    The ranks share the reading. Raises CheckpointError, on all ranks together.
    """
    with distributed.in_unison(f"cannot read checkpoint {directory}"):
        manifest = read_manifest(directory)
        here: dict[str, Any] = {
            "world size": distributed.world_size(),
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
        verify_files(directory, manifest, distributed.global_rank(), distributed.world_size())


def resume(directory: Path, engines: Engines, batches: Batches) -> None:
    """Puts engines, data position and random generators where a verified checkpoint left them."""
    for name, engine in engines.items():
        engine.ds.load_checkpoint(str(directory), tag=name)
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
