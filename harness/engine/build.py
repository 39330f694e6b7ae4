"""Builds the engines of a task."""

import math
from collections.abc import Mapping
from contextlib import ExitStack

from torch import nn

from harness import distributed
from harness.config import Config
from harness.config.engine_sections import EngineConfig
from harness.engine import trainable
from harness.engine.alike import check_alike
from harness.engine.engine import Engine
from harness.engine.engines import Engines
from harness.engine.models import build_models, check_engines
from harness.engine.optimizations import change_models, offload_engines
from harness.errors import ConfigError, TaskError, did_you_mean
from harness.optim.param_groups import with_groups
from harness.task import Task


def build_engines(task: Task, config: Config) -> Engines:
    """An engine for every model of the task. Collective.

    What has been done to the models is undone by `Engines.close`, and if one of them fails.
    Raises TaskError if the task's models do not match the config's engines, differ between the
    ranks, or share a parameter, and ConfigError if [optimizations] or an engine's section cannot be
    applied.
    """
    check_engines(config.engines, config.data.micro_batch_size)
    with distributed.raise_on_all_ranks(f"task {config.task.path}"):
        if set(task.models) != set(config.engines):
            raise TaskError(
                f"task {config.task.path} has the models {sorted(task.models)}, but the config has "
                f"the engines {sorted(config.engines)}: they must have the same names"
            )
    models = build_models(task.models, config)
    with distributed.raise_on_all_ranks(f"task {config.task.path}"):
        owners: dict[nn.Parameter, str] = {}
        for name, model in models.items():
            trainable.check_initialized(name, model)
            trainable.check_hooked(name, model, config.engines[name])
            for path, parameter in model.named_parameters():
                if (owner := owners.setdefault(parameter, name)) != name:
                    raise TaskError(
                        f"task {config.task.path}: the models {owner!r} and {name!r} share the "
                        f"parameter {path!r}, which only one engine can train: give each its own"
                    )
        change_models(models, config.optimizations)
        tables = _with_task_groups(config.engines, task)
    check_alike(models)
    trained = [engine for engine in config.engines.values() if engine.role == "train"]
    micro_batches = math.lcm(*(engine.gradient_accumulation for engine in trained))
    engines = {}
    with ExitStack() as stack:
        for model in models.values():
            stack.callback(_restore, {p: p.requires_grad for p in model.parameters()})
        for name, settings in tables.items():
            steps = (
                config.run.steps
                // settings.train_every
                * micro_batches
                // settings.gradient_accumulation
            )
            engines[name] = Engine(
                name,
                models[name],
                settings,
                micro_batch_size=config.data.micro_batch_size,
                total_steps=steps,
            )
            stack.callback(engines[name].close)
        if config.optimizations.unsloth:
            offload_engines(engines, config.optimizations.offload)
        return Engines(engines, task, stack.pop_all())


def _restore(trained: Mapping[nn.Parameter, bool]) -> None:
    """Parameters that were trained before the run, and frozen or a teacher's in it, are again."""
    for parameter, requires_grad in trained.items():
        parameter.requires_grad_(requires_grad)


def _with_task_groups(tables: Mapping[str, EngineConfig], task: Task) -> dict[str, EngineConfig]:
    """The engines' configs with the task's parameter groups. Raises TaskError."""
    changed = dict(tables)
    for name, groups in task.parameter_groups.items():
        key = f"Task.parameter_groups[{name!r}]"
        trained = [each for each, table in tables.items() if table.role == "train"]
        if name not in trained:
            raise TaskError(
                f"{key}: no engine of that name is trained{did_you_mean(name, trained)}"
            )
        try:
            changed[name] = with_groups(tables[name], groups)
        except (ConfigError, TypeError, ValueError) as error:
            raise TaskError(f"{key}: {error}") from None
    return changed
