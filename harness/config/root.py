"""`Config`: all tables of a config file, and the rules between them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from harness.config.engine_sections import EngineConfig
from harness.config.old_names import current_keys
from harness.config.sections import (
    CheckpointConfig,
    ControlConfig,
    DataConfig,
    MetricsConfig,
    OptimizationsConfig,
    RunConfig,
    Section,
    TaskConfig,
    TrainerConfig,
    importable,
)
from harness.errors import did_you_mean


class Config(Section):
    """All settings of a run."""

    run: RunConfig = RunConfig()
    """The run."""
    task: TaskConfig
    """The task."""
    engines: dict[str, EngineConfig] = Field(min_length=1)
    """The engines, by name."""
    data: DataConfig = DataConfig()
    """The data."""
    trainer: TrainerConfig = TrainerConfig()
    """The loop."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """The checkpoints."""
    optimizations: OptimizationsConfig = OptimizationsConfig()
    """The optimizations."""
    control: ControlConfig = ControlConfig()
    """The commands."""
    metrics: MetricsConfig = MetricsConfig()
    """The metrics."""

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.run.dir / self.run.name

    @model_validator(mode="before")
    @classmethod
    def _with_current_keys(cls, tables: Any) -> Any:
        return current_keys(tables) if isinstance(tables, Mapping) else tables

    @field_validator("engines")
    @classmethod
    def _are_named_and_trained(cls, engines: dict[str, EngineConfig]) -> dict[str, EngineConfig]:
        for name in engines:
            if not (name.isidentifier() and name.isascii()):
                raise ValueError(f"an engine's name is a plain word, found {name!r}")
        if all(engine.role == "teacher" for engine in engines.values()):
            raise ValueError("no engine has role = 'train': there is nothing to train")
        return engines

    @model_validator(mode="after")
    def _trains_at_every_step(self) -> "Config":
        periods = {n: e.train_every for n, e in self.engines.items() if e.role == "train"}
        if min(periods.values()) > 1:
            raise ValueError(
                f"engines: none is trained at every step, found train_every = {periods}"
            )
        for name, period in periods.items():
            if period > self.run.steps:
                raise ValueError(
                    f"engines.{name}.train_every = {period}: it would never be trained in "
                    f"{self.run.steps} steps"
                )
        return self

    @model_validator(mode="after")
    def _can_compile(self) -> "Config":
        for name, engine in self.engines.items():
            if self.optimizations.compile and engine.zero_stage == 3:
                raise ValueError(
                    f"optimizations.compile: engine {name!r} is at ZeRO stage 3, where torch would "
                    "compile DeepSpeed's gathering as well, for minutes: use stage 0 to 2"
                )
        return self

    @model_validator(mode="after")
    def _can_replace(self) -> "Config":
        folder = Path(self.task.path).parent if self.task.path.endswith(".py") else None
        for number, entry in enumerate(self.optimizations.replace):
            key = f"optimizations.replace.{number}"
            if entry.engine and entry.engine not in self.engines:
                hint = did_you_mean(entry.engine, self.engines)
                raise ValueError(f"{key}.engine: there is no engine {entry.engine!r}{hint}")
            for path in (entry.what, entry.by):
                package = re.split("[.:]", path)[0]
                is_beside_task = folder is not None and (folder / f"{package}.py").is_file()
                if not (is_beside_task or importable(package)):
                    raise ValueError(f"{key}: {path!r}: package {package!r} is not installed")
        return self
