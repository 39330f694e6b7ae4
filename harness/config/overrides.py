"""Settings from outside of a file: words of the command line, variables of the environment."""

import contextlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel

from harness.config.root import Config
from harness.config.sections import merge, section_of
from harness.errors import ConfigError

UNSET: Any = object()
"""The value of a key that is set to `null`: what files say of it does not count."""
VARIABLE = "HARNESS__"
"""How the names of variables begin that set a key: `HARNESS__RUN__STEPS=5` is `run.steps`."""
_LISTS = {key for key, field in Config.model_fields.items() if get_origin(field.annotation) is list}
"""Keys that are no section: `events`."""


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`["--run.steps=5", "--run.name", "x"]` as nested tables.

    Values are parsed as TOML (numbers, true, lists, inline tables), and kept as strings if they are
    not valid TOML; `null` is UNSET. Raises ConfigError.
    """
    overrides: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        key, has_value, text = word.partition("=")
        name = key.removeprefix("--")
        if name == key or ("." not in name and name not in _LISTS):
            raise ConfigError(f"command line: {word!r}: expected --section.key=value")
        if not has_value:
            if not queue:
                raise ConfigError(f"command line: {word}: missing value")
            text = queue.pop(0)
        path = name.split(".")
        overrides = merge(overrides, nested(path, _parse_value(path, text)))
    return overrides


def environment_overrides(environ: Mapping[str, str], tables: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in variables like `HARNESS__RUN__STEPS`, as nested tables.

    Names are in lower case, except for those that `tables`, read from files, has in another one.
    Raises ConfigError for a variable that names no key.
    """
    overrides: dict[str, Any] = {}
    for name in sorted(environ):
        if not name.startswith(VARIABLE):
            continue
        path, table = [], tables
        parts = name.removeprefix(VARIABLE).split("__")
        if not all(parts):
            raise ConfigError(f"environment: {name} names no key: expected {VARIABLE}SECTION__KEY")
        for part in parts:
            known = (key for key in table if key.lower() == part.lower())
            path.append(next(known, part.lower()))
            inner = table.get(path[-1])
            table = inner if isinstance(inner, Mapping) else {}
        overrides = merge(overrides, nested(path, _parse_value(path, environ[name])))
    return overrides


def dotted_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables of a mapping whose keys may be dotted: `{"run.steps": 5}`."""
    overrides: dict[str, Any] = {}
    for key, value in given.items():
        overrides = merge(overrides, nested(key.split("."), value))
    return overrides


def nested(path: Sequence[str], value: Any) -> Any:
    """A value in tables: `{"mix": {"code": {"weight": 2.0}}}`."""
    for part in reversed(path):
        value = {part: value}
    return value


def without_unset(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table without its keys that are UNSET, also in its tables."""
    return {
        key: without_unset(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not UNSET
    }


def _parse_value(path: Sequence[str], text: str) -> Any:
    if text == "null":
        return UNSET
    if not _is_text(path):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            return tomllib.loads(f"value = {text}")["value"]
    return text


def _is_text(path: Sequence[str]) -> bool:
    """Whether a key is a string or a path: its value is not parsed as TOML."""
    section: type[BaseModel] | None = Config
    for position, part in enumerate(path):
        if section is None:
            return False
        if part in section.model_fields:
            annotation = section.model_fields[part].annotation
            if annotation in (str, Path):
                return position == len(path) - 1
            section = section_of(annotation)
    return False
