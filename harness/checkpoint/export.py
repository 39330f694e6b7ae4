"""Exporting plain weights for other tools."""

import logging
from pathlib import Path

from harness import distributed
from harness.checkpoint.manifest import step_directory
from harness.engines import Engines
from harness.io import save

log = logging.getLogger(__name__)


def export(engines: Engines, parent: Path) -> Path:
    """Writes every trained engine's whole weights as `parent/step-N/ENGINE.sft`. Collective.

    Raises HarnessError, on all ranks, if it cannot be written.
    """
    target = step_directory(parent, engines.global_step)
    for engine in engines.trained:
        state = engine.full_state_dict()
        with distributed.in_unison(f"cannot export to {target}"):
            if distributed.is_global_leader():
                target.mkdir(parents=True, exist_ok=True)
                save(state, target / f"{engine.name}.sft")
    log.info("exported %s", target)
    return target
