"""The command line of a run: `--config FILE.toml --section.key=value ...`, and `--help`."""

import argparse
import contextlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from harness.config.load import load
from harness.config.root import Config
from harness.config.sections import expand_path, merge, section_of
from harness.errors import ConfigError


def parse_args(argv: Sequence[str]) -> Config:
    """The config of a command line; `--help` prints all keys and exits. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="train.py --config FILE.toml [--section.key=value ...]",
        description="Train the models of a task under DeepSpeed.",
        epilog="keys, their types and defaults:\n\n" + "\n".join(_help(Config)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=_path, required=True, help="the run's TOML file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from `deepspeed`
    known, rest = parser.parse_known_args(argv)
    return load(known.config, parse_overrides(rest))


def _path(text: str) -> Path:
    return Path(expand_path(text))


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`["--run.steps=5", "--run.name", "x"]` as nested tables.

    Values are parsed as TOML (numbers, true, lists, inline tables), and kept as strings if they are
    not valid TOML. Raises ConfigError.
    """
    overrides: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        key, has_value, text = word.partition("=")
        if not key.startswith("--") or "." not in key:
            raise ConfigError(f"command line: {word!r}: expected --section.key=value")
        if not has_value:
            if not queue:
                raise ConfigError(f"command line: {word}: missing value")
            text = queue.pop(0)
        path = key.removeprefix("--").split(".")
        nested: Any = _parse_value(path, text)
        for part in reversed(path):
            nested = {part: nested}
        overrides = merge(overrides, nested)
    return overrides


def _parse_value(path: Sequence[str], text: str) -> Any:
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


def _help(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        inner = section_of(field.annotation)
        if inner is not None:
            between = {dict: ".NAME.", list: "[]."}.get(get_origin(field.annotation), ".")
            yield from _help(inner, key + between)
            continue
        default = "required" if field.is_required() else f"default {_as_json(field.default)}"
        yield f"  --{key}  <{_type_name(field.annotation)}>  {default}"
        yield f"      {' '.join((field.description or '').split())}"


def _as_json(value: Any) -> str:
    return json.dumps(value, default=str)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return "|".join(_type_name(arg) for arg in get_args(annotation) if arg is not NoneType)
    return "table" if get_origin(annotation) is dict else annotation.__name__.lower()
