"""The command line of a run: `--config FILE.toml --section.key=value ...`, and `--help`."""

import argparse
import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from harness.config.load import load
from harness.config.overrides import VARIABLE, parse_overrides
from harness.config.paths import expand_path
from harness.config.root import Config
from harness.config.sections import section_of

DESCRIPTION = (
    "Train the models of a task under DeepSpeed. Of several files, and of a file "
    f"and what it `extends`, the later one counts; then {VARIABLE}SECTION__KEY in the "
    "environment; then the command line. The value null unsets a key."
)


def parse_args(argv: Sequence[str]) -> Config:
    """The config of a command line; `--help` prints all keys and exits. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="train.py --config FILE.toml [--config ...] [--section.key=value ...]",
        description="\n".join(_wrapped(DESCRIPTION, later=0)),
        epilog="keys, their types and defaults:\n\n" + "\n".join(_help()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=_path,
        action="append",
        required=True,
        help="the run's TOML file; may be repeated",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build it, take one step, and write nothing"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from `deepspeed`
    known, rest = parser.parse_known_args(argv)
    return load(known.config, parse_overrides(rest))


def _path(text: str) -> Path:
    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@dataclass(frozen=True)
class Key:
    """A key of the config, as `--help` and the reference show it."""

    name: str
    """With its tables: `engines.NAME.optimizer.lr`."""
    type: str
    default: str
    """As JSON; empty if the key is required."""
    text: str


def keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[Key]:
    """All keys of a table, and of those in it."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        inner = section_of(field.annotation)
        if inner is not None:
            between = {dict: ".NAME.", list: "[]."}.get(get_origin(field.annotation), ".")
            yield from keys(inner, key + between)
            continue
        default = "" if field.is_required() else json.dumps(field.default, default=str)
        text = " ".join((field.description or "").split())
        yield Key(key, _type_name(field.annotation), default, text)


def _help() -> Iterator[str]:
    for key in keys():
        default = f"default {key.default}" if key.default else "required"
        yield from _wrapped(f"--{key.name}  <{key.type}>  {default}", indent=2)
        yield from _wrapped(key.text, indent=6)


def _wrapped(text: str, indent: int = 0, later: int = 6) -> list[str]:
    """Lines that fit the terminal; the second and later ones are indented by `later`."""
    return textwrap.wrap(
        text,
        width=max(40, shutil.get_terminal_size().columns - 2),
        initial_indent=" " * indent,
        subsequent_indent=" " * later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return "|".join(_type_name(arg) for arg in get_args(annotation) if arg is not NoneType)
    return "table" if get_origin(annotation) is dict else annotation.__name__.lower()
