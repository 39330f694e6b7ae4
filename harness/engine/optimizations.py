"""Applies [optimizations] to the models and their engines."""

import logging
from collections.abc import Mapping, Sequence

from torch import nn

from harness import distributed
from harness.config.sections import OffloadConfig, OptimizationsConfig, ReplaceConfig
from harness.engine.engine import Engine
from harness.errors import ConfigError
from harness.offload import attach, available_host_memory
from harness.utils import import_path
from harness.wrapper import compile_model, disable_encoder_fast_path, replace

log = logging.getLogger(__name__)


def change_models(models: Mapping[str, nn.Module], settings: OptimizationsConfig) -> None:
    """Replaces modules and compiles, before the engines are built. Raises ConfigError."""
    _replace(models, settings.replace)
    for model in models.values():
        disable_encoder_fast_path(model)  # a task may have replaced modules itself
    for model in models.values() if settings.compile else ():
        compile_model(model, blocks=settings.compile == "blocks")


def _replace(models: Mapping[str, nn.Module], entries: Sequence[ReplaceConfig]) -> None:
    """Replaces the modules of each entry, in all models or in one, and logs it.

    Raises ConfigError if an entry cannot be imported, or matches no module in any model.
    """
    for entry in entries:
        what, by = import_path(entry.what), import_path(entry.by)
        errors = []
        chosen = [entry.engine] if entry.engine else list(models)
        for name in chosen:
            try:
                changes = replace(
                    models[name], what, by, include=entry.include, exclude=entry.exclude
                )
            except ConfigError as error:
                errors.append(f"engine {name!r}: {error}")
            else:
                log.info("engine %s: replaced %s", name, "; ".join(map(str, changes)))
        if len(errors) == len(chosen):
            raise ConfigError("optimizations.replace:\n" + "\n".join(errors))
        for text in errors:
            log.warning("%s; the model is not changed", text)


def offload_engines(engines: Mapping[str, Engine], settings: OffloadConfig) -> None:
    """Offloads the activations of the trained engines, within a shared limit of host memory.

    Collective. An engine whose model has no blocks is trained without offloading; ConfigError if
    that is true of all of them.
    """
    with distributed.raise_on_all_ranks("optimizations.unsloth"):
        trained = [engine for engine in engines.values() if engine.role == "train"]
        host_bytes = settings.host_bytes or available_host_memory() // 2
        errors: list[str] = []
        for engine in trained:
            try:
                _offload(engine, settings, host_bytes // len(trained))
            except ConfigError as error:
                errors.append(f"engine {engine.name!r}: {error}")
        if len(errors) == len(trained):
            raise ConfigError("optimizations.unsloth:\n" + "\n".join(errors))
        for text in errors:
            log.warning("%s; it is trained without offloading", text)


def _offload(engine: Engine, settings: OffloadConfig, host_bytes: int) -> None:
    """Offloads the activations of an engine's blocks to at most `host_bytes` of host memory.

    Raises ConfigError if the model has no such blocks.
    """
    engine.offloading = attach(
        engine.module,
        settings.match or None,
        mode=settings.mode,
        fraction=settings.fraction,
        keep_last=settings.keep_last,
        min_bytes=settings.min_bytes,
        host_bytes=host_bytes,
        micro_batches=engine.gradient_accumulation,
    )
    blocks = engine.offloading.modules
    log.info(
        "engine %s: offload (mode %s, fraction %s): %d blocks of class %s, at most %.1f GB of host "
        "memory per rank",
        engine.name,
        settings.mode,
        settings.fraction,
        len(blocks),
        "/".join(sorted({type(block).__name__ for block in blocks.values()})),
        host_bytes / 1e9,
    )
