"""The typed configuration: a TOML file and overrides, checked before any work.

Nothing here imports torch, so that a mistake in the config is reported within a second.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from harness.config.engine_sections import EngineConfig
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
    merge,
)
from harness.errors import ConfigError, did_you_mean


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

    @field_validator("engines")
    @classmethod
    def _names(cls, engines: dict[str, EngineConfig]) -> dict[str, EngineConfig]:
        for name in engines:
            if not (name.isidentifier() and name.isascii()):
                raise ValueError(f"an engine's name is a plain word, found {name!r}")
        if all(engine.role == "teacher" for engine in engines.values()):
            raise ValueError("no engine has role = 'train': there is nothing to train")
        return engines

    @model_validator(mode="after")
    def _all_are_trained(self) -> "Config":
        periods = {n: e.every for n, e in self.engines.items() if e.role == "train"}
        if min(periods.values()) > 1:
            raise ValueError(f"engines: none is trained at every step, found every = {periods}")
        for name, every in periods.items():
            if every > self.run.steps:
                raise ValueError(
                    f"engines.{name}.every = {every}: it would never be trained in "
                    f"{self.run.steps} steps"
                )
        return self

    @model_validator(mode="after")
    def _can_optimize(self) -> "Config":
        folder = Path(self.task.path).parent if self.task.path.endswith(".py") else None
        for name, engine in self.engines.items():
            if self.optimizations.compile and engine.zero_stage == 3:
                raise ValueError(
                    f"optimizations.compile: engine {name!r} is at ZeRO stage 3, where torch would "
                    "compile DeepSpeed's gathering as well, for minutes: use stage 0 to 2"
                )
        for number, entry in enumerate(self.optimizations.replace):
            key = f"optimizations.replace.{number}"
            if entry.engine and entry.engine not in self.engines:
                hint = did_you_mean(entry.engine, self.engines)
                raise ValueError(f"{key}.engine: there is no engine {entry.engine!r}{hint}")
            for path in (entry.what, entry.by):
                package = re.split("[.:]", path)[0]
                beside = folder is not None and (folder / f"{package}.py").is_file()
                if not (beside or importable(package)):
                    raise ValueError(f"{key}: {path!r}: package {package!r} is not installed")
        return self

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.run.dir / self.run.name


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads and checks a TOML file with `overrides` (nested, like the file) merged over it.

    Raises ConfigError with one line for every mistake.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"config {path} is not valid TOML: {error}") from None
    table = merge(table, overrides or {})
    if isinstance(run := table.setdefault("run", {}), dict) and not run.get("name"):
        run["name"] = re.sub(r"[^\w.-]+", "-", path.stem).lstrip(".-") or "run"
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        lines = (_explain(dict(mistake), overrides or {}) for mistake in error.errors())
        raise ConfigError(f"config {path}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _explain(mistake: dict[str, Any], overrides: Mapping[str, Any]) -> str:
    """One line for one mistake: the key, where it stands, what was found, what is allowed."""
    *parents, last = mistake["loc"] or ("",)
    key = ".".join(map(str, mistake["loc"]))
    where: Any = overrides
    for part in mistake["loc"]:
        where = where.get(part) if isinstance(where, Mapping) else None
    origin = " (command line)" if where is not None and mistake["loc"] else ""
    match mistake["type"]:
        case "extra_forbidden":
            known = list(_section_at(parents).model_fields)
            hint = did_you_mean(str(last), known)
            return f"{key}{origin}: unknown key{hint}; known: {', '.join(known)}"
        case "missing":
            return f"{key}: missing; it has no default"
        case "value_error":
            return f"{key}{origin}: {mistake['ctx']['error']}"
        case _:
            found = mistake["input"]
            reason = mistake["msg"][0].lower() + mistake["msg"][1:]
            return f"{key}{origin}: found {found!r} ({type(found).__name__}): {reason}"


def _section_at(path: Sequence[Any]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for part in path:
        if part in section.model_fields:
            section = section_of(section.model_fields[part].annotation) or section
    return section


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds: directly, optionally, or as a table's values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)
