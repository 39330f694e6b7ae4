"""`Config`: all tables of a config file, and the constraints between them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from harness.config.engine_sections import EngineConfig
from harness.config.health_section import HealthConfig
from harness.config.metrics_section import MetricsConfig
from harness.config.old_names import current_keys
from harness.config.sections import (
    CheckpointConfig,
    ControlConfig,
    DataConfig,
    EventConfig,
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
    """Run settings."""
    task: TaskConfig = TaskConfig()
    """Task settings."""
    engines: dict[str, EngineConfig] = Field(min_length=1)
    """Engine settings, by name."""
    data: DataConfig = DataConfig()
    """Data settings."""
    trainer: TrainerConfig = TrainerConfig()
    """Training loop settings."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoint settings."""
    optimizations: OptimizationsConfig = OptimizationsConfig()
    """Optimizations."""
    control: ControlConfig = ControlConfig()
    """Live command settings."""
    events: list[EventConfig] = Field(default=[])
    """Live commands that are executed at some steps."""
    metrics: MetricsConfig = MetricsConfig()
    """Metrics settings."""
    health: HealthConfig = HealthConfig()
    """What is watched, and what follows trouble of a rank."""

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
                raise ValueError(f"the name {name!r}: expected letters, digits and _")
        if all(engine.role == "teacher" for engine in engines.values()):
            raise ValueError("no engine has role = 'train'")
        return engines

    @model_validator(mode="after")
    def _trains_at_every_step(self) -> "Config":
        periods = {n: e.train_every for n, e in self.engines.items() if e.role == "train"}
        if min(periods.values()) > 1:
            raise ValueError(
                f"engines: train_every = {periods}: at least one must be trained at every step"
            )
        for name, period in periods.items():
            if period > self.run.steps:
                raise ValueError(
                    f"engines.{name}.train_every = {period}: expected at most "
                    f"run.steps = {self.run.steps}"
                )
        return self

    @model_validator(mode="after")
    def _evaluates_for_schedules(self) -> "Config":
        for name, engine in self.engines.items():
            needs = engine.scheduler is not None and engine.scheduler.name == "plateau"
            if needs and not self.trainer.eval_every:
                raise ValueError(
                    f"engines.{name}.scheduler: 'plateau' needs evaluations: set trainer.eval_every"
                )
        return self

    @model_validator(mode="after")
    def _keeps_what_to_return_to(self) -> "Config":
        if self.health.spike == "rollback" and self.checkpoint.keep_last == 1:
            raise ValueError(
                "health.spike = 'rollback' needs checkpoint.keep_last = 0, or at least 2: a spike "
                "is known some steps later, and the newest checkpoint may be of a step after it"
            )
        return self

    @model_validator(mode="after")
    def _can_compile(self) -> "Config":
        for name, engine in self.engines.items():
            if self.optimizations.compile and engine.zero_stage == 3:
                raise ValueError(
                    f"optimizations.compile: engine {name!r} is at ZeRO stage 3, where torch would "
                    "spend minutes compiling DeepSpeed's gathering too: use stage 0 to 2"
                )
        return self

    @model_validator(mode="after")
    def _can_replace(self) -> "Config":
        folder = Path(self.task.path).parent if self.task.path.endswith(".py") else None
        for number, entry in enumerate(self.optimizations.replace):
            key = f"optimizations.replace.{number}"
            if entry.engine and entry.engine not in self.engines:
                hint = did_you_mean(entry.engine, self.engines)
                raise ValueError(f"{key}.engine: no engine is named {entry.engine!r}{hint}")
            for path in (entry.what, entry.by):
                package = re.split("[.:]", path)[0]
                is_next_to_task = folder is not None and (folder / f"{package}.py").is_file()
                if not (is_next_to_task or importable(package)):
                    raise ValueError(f"{key}: {path!r}: package {package!r} is not installed")
        return self
