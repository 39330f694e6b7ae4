"""Loads a TOML file and overrides into a `Config`, with one error line per mistake."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from harness.config.old_names import current_keys
from harness.config.root import Config
from harness.config.sections import merge, section_of
from harness.errors import ConfigError, did_you_mean


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config in a TOML file, with `overrides` (nested, like the file) merged over it.

    `run.name` defaults to the name of the file. Raises ConfigError with one line per mistake.
    """
    table = _with_current_keys(_read(path), f"config {path}")
    overrides = _with_current_keys(overrides or {}, "command line")
    table = merge(table, overrides)
    if isinstance(run := table.setdefault("run", {}), dict) and not run.get("name"):
        run["name"] = re.sub(r"[^\w.-]+", "-", path.stem).lstrip(".-") or "run"
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        lines = (_explain(dict(mistake), overrides) for mistake in error.errors())
        raise ConfigError(f"config {path}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors add a mark
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"config {path} is not valid TOML: {error}") from None


def _with_current_keys(table: Mapping[str, Any], origin: str) -> dict[str, Any]:
    try:
        return current_keys(table)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None


def _explain(mistake: dict[str, Any], overrides: Mapping[str, Any]) -> str:
    """One line: the key, where it was set, what was found, what is expected."""
    location = mistake["loc"]
    key = ".".join(map(str, location))
    override: Any = overrides
    for part in location:
        override = override.get(part) if isinstance(override, Mapping) else None
    origin = " (command line)" if override is not None and location else ""
    match mistake["type"]:
        case "extra_forbidden":
            known = list(_section_at(location[:-1]).model_fields)
            hint = did_you_mean(str(location[-1]), known)
            return f"{key}{origin}: unknown key{hint}; known: {', '.join(known)}"
        case "missing":
            return f"{key}: missing (required)"
        case "value_error":
            reason = str(mistake["ctx"]["error"])
            return f"{key}{origin}: {reason}" if location else reason
        case _:
            value = mistake["input"]
            reason = mistake["msg"][0].lower() + mistake["msg"][1:]
            return f"{key}{origin}: found {value!r} ({type(value).__name__}): {reason}"


def _section_at(path: Sequence[Any]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for part in path:
        if part in section.model_fields:
            section = section_of(section.model_fields[part].annotation) or section
    return section
