"""Exporting plain weights for other tools."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from harness import distributed
from harness.checkpoint.manifest import step_directory
from harness.checkpoint.retention import delete_replaced, move_into_place
from harness.engine.engine import Engine
from harness.engine.engines import Engines
from harness.engine.full_tensors import full_tensors
from harness.engine.lora import merged, save_adapters
from harness.health import phases
from harness.io import save

log = logging.getLogger(__name__)


def export(
    engines: Engines, parent: Path, format: str, between: Callable[[], object] = lambda: None
) -> Path:
    """Writes every trained engine's full weights to `parent/step-N/ENGINE.FORMAT`, and their EMA,
    if one is kept, to `ENGINE.ema.FORMAT`. Collective.

    The engines are in evaluation mode meanwhile (schedule-free optimizers swap weights). If
    adapters are trained, they are merged into the weights; `ENGINE.lora/` has only the adapters, as
    peft loads them.

    `format`: "sft" or "pt". `between` is called, on every rank, after each tensor. Raises
    HarnessError, on all ranks, if a file cannot be written.
    """
    target = step_directory(parent, engines.global_step)
    staged = target.with_name(f"{target.name}.tmp")
    if distributed.is_global_leader():
        shutil.rmtree(staged, ignore_errors=True)
    engines.sync_buffers(search=True)
    engines.log_own_buffers("exports rank 0's own buffers")
    engines.eval()
    try:
        for engine in engines.trained:
            _export_weights(engine, staged / f"{engine.name}.{format}", between)
            if engine.has_ema:
                with engine.averaged():
                    _export_weights(engine, staged / f"{engine.name}.ema.{format}", between)
        with distributed.raise_on_all_ranks(f"cannot export to {target}"):
            if distributed.is_global_leader():
                move_into_place(staged, target)
                delete_replaced(target)
    finally:
        engines.train()
        if distributed.is_global_leader():  # a save may need the space
            shutil.rmtree(staged, ignore_errors=True)
    log.info("exported %s", target)
    return target


def _export_weights(engine: Engine, path: Path, between: Callable[[], object]) -> None:
    state = {}
    for name, tensor in full_tensors(engine):
        if tensor is not None:
            state[name] = tensor
        between()
        phases.beat()
    with distributed.raise_on_all_ranks(f"cannot export {path}"):
        if distributed.is_global_leader():
            path.parent.mkdir(parents=True, exist_ok=True)
            if engine.has_lora:
                save_adapters(engine.module, state, path.with_suffix(".lora"))
                state = merged(engine.module, state)
            save(state, path)
