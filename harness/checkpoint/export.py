"""Exporting plain weights for other tools."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from harness import distributed
from harness.checkpoint.manifest import step_directory
from harness.checkpoint.retention import move_into_place, remove_replaced
from harness.engine.engine import Engine
from harness.engine.engines import Engines
from harness.engine.full_tensors import full_tensors
from harness.engine.lora import merged, save_adapters
from harness.health import phases
from harness.io import save
from harness.task import Export

log = logging.getLogger(__name__)


def export(
    engines: Engines, parent: Path, format: str, between: Callable[[], object] = lambda: None
) -> Path:
    """Writes every trained engine's full weights to `parent/step-N/ENGINE.FORMAT`, and their EMA,
    if one is kept, to `ENGINE.ema.FORMAT`; or by the task's exporter to the folders `ENGINE` and
    `ENGINE.ema`. Collective.

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
            write = engines.task.exporters.get(engine.name)
            _export_weights(engine, staged, engine.name, format, write, between)
            if engine.has_ema:
                with engine.averaged():
                    name = f"{engine.name}.ema"
                    _export_weights(engine, staged, name, format, write, between)
        with distributed.raise_on_all_ranks(f"cannot export to {target}"):
            if distributed.is_global_leader():
                move_into_place(staged, target)
                remove_replaced(target)
    finally:
        engines.train()
        if distributed.is_global_leader():  # a save may need the space
            shutil.rmtree(staged, ignore_errors=True)
    log.info("exported %s", target)
    return target


def _export_weights(
    engine: Engine,
    parent: Path,
    name: str,
    format: str,
    write: Export | None,
    between: Callable[[], object],
) -> None:
    state = {}
    for key, tensor in full_tensors(engine):
        if tensor is not None:
            state[key] = tensor
        between()
        phases.beat()
    path = parent / (f"{name}.{format}" if write is None else name)
    with distributed.raise_on_all_ranks(f"cannot export {path}"):
        if distributed.is_global_leader():
            parent.mkdir(parents=True, exist_ok=True)
            if engine.has_lora:
                save_adapters(engine.module, state, parent / f"{name}.lora")
                state = merged(engine.module, state)
            if write is None:
                save(state, path)
            else:
                write(engine.module, state, path)
