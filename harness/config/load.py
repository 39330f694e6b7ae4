"""Loads TOML files and overrides into a `Config`, with one error line per mistake."""

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from harness.config.old_names import current_keys
from harness.config.overrides import UNSET, VARIABLE, environment_overrides, without_unset
from harness.config.paths import expand_path
from harness.config.root import Config
from harness.config.sections import merge, section_of
from harness.errors import ConfigError, did_you_mean

EXTENDS = "extends"
"""The key of a file, above all tables, that names what it extends: a path, or several."""
LENGTHS = ("steps", "epochs")
"""The keys of `run` of which a run has one."""


@dataclass(frozen=True)
class Layer:
    """Some of the settings, and where they come from."""

    table: Mapping[str, Any]
    origin: str
    """For messages: the file, "environment", "command line"."""


def load(
    paths: Path | Sequence[Path],
    overrides: Mapping[str, Any] | None = None,
    needs_task: bool = True,
) -> Config:
    """The config in TOML files: of each key the last file's value, over that the environment's,
    and over that the one of `overrides`, which are nested like a file.

    `run.name` defaults to the name of the last file. Raises ConfigError with one line per mistake.
    """
    paths = [paths] if isinstance(paths, Path) else list(paths)
    layers = [layer for path in paths for layer in read(path)]
    over = Layer(overrides or {}, "command line")
    config = resolve(layers, f"config {paths[-1]}", over, name_of(paths[-1]))
    if needs_task and not config.task.path:
        raise ConfigError(f"config {paths[-1]}:\n  task.path: missing (required)")
    return config


def name_of(path: Path) -> str:
    """The name of a run that has none of its own, from its file's."""
    return re.sub(r"[^\w.-]+", "-", path.stem).lstrip(".-") or "run"


def resolve(layers: Sequence[Layer], title: str, over: Layer, name: str = "") -> Config:
    """The config of some layers, the later over the earlier; over all of them the environment, and
    over that `over`. `title`: of messages; `name`: of a run without one. Raises ConfigError.
    """
    below = _merged(layers)
    environment = _current(environment_overrides(os.environ, below), "environment")
    over = Layer(_current(over.table, over.origin), over.origin)
    layers = [*layers, Layer(environment, "environment"), over]
    table = without_unset(_merged(layers))
    run = table.get("run", {})
    if name and isinstance(run, Mapping) and not run.get("name"):
        table = merge(table, {"run": {"name": name}})
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        lines = [f"  {_explain(dict(mistake), layers, title)}" for mistake in error.errors()]
        raise ConfigError("\n".join([f"{title}:", *lines])) from None


def read(path: Path, within: Sequence[Path] = ()) -> Iterator[Layer]:
    """A file, after those that it extends, whose paths are relative to its own. `within`: the files
    that extend it. Raises ConfigError."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors add a mark
    except OSError as error:
        by = f", which {within[-1]} extends" if within else ""
        raise ConfigError(f"config {path}{by}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"config {path} is not valid TOML: {error}") from None
    if path.resolve() in [other.resolve() for other in within]:
        chain = " -> ".join(map(str, [*within, path]))
        raise ConfigError(f"config {path}: extends itself: {chain}")
    extends = table.pop(EXTENDS, [])
    for name in extends if isinstance(extends, list) else [extends]:
        if not isinstance(name, str):
            raise ConfigError(
                f"config {path}: extends: found {name!r}, expected the path of a file"
            )
        yield from read(path.parent / _expanded(name, path), [*within, path])
    yield Layer(_current(table, f"config {path}"), str(path))


def _expanded(name: str, path: Path) -> str:
    try:
        return expand_path(name)
    except ValueError as error:
        raise ConfigError(f"config {path}: extends: {error}") from None


def _merged(layers: Sequence[Layer]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for layer in layers:
        table = merge(_without_length(table, layer.table), layer.table)
    return table


def _without_length(table: Mapping[str, Any], over: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table without the length of the run, if `over` has one: steps replace epochs."""
    run, given = table.get("run"), over.get("run")
    if not (isinstance(run, Mapping) and isinstance(given, Mapping)):
        return table
    if all(given.get(key) in (None, UNSET) for key in LENGTHS):
        return table
    return {**table, "run": {key: run[key] for key in run if key not in LENGTHS}}


def _current(table: Mapping[str, Any], origin: str) -> dict[str, Any]:
    try:
        return current_keys(table)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None


def _explain(mistake: dict[str, Any], layers: Sequence[Layer], title: str) -> str:
    """One line: the key, where it was set, what was found, what is expected."""
    location = mistake["loc"]
    key = ".".join(map(str, location))
    origin = _origin(location, layers)
    origin = f" ({origin})" if origin and not f" {title}".endswith(f" {origin}") else ""
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
            if mistake["type"] in ("model_type", "dict_type"):  # pydantic names its classes
                reason = "input should be a table"
            return f"{key}{origin}: found {value!r} ({type(value).__name__}): {reason}"


def _origin(location: Sequence[Any], layers: Sequence[Layer]) -> str:
    """Where a key was set: in the last layer that has it; empty if in none."""
    for layer in reversed(layers):
        value: Any = layer.table
        for part in location:
            value = value.get(part) if isinstance(value, Mapping) else None
        if location and value is not None:
            if layer.origin == "environment":
                return VARIABLE + "__".join(map(str, location)).upper()
            return layer.origin
    return ""


def _section_at(path: Sequence[Any]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for part in path:
        if part in section.model_fields:
            section = section_of(section.model_fields[part].annotation) or section
    return section
