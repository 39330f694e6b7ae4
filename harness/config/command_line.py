"""The command line of a run: `--config FILE.toml --section.key=value ...`, and `--help`."""

import argparse
import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from harness.config.load import load
from harness.config.overrides import VARIABLE, parse_overrides
from harness.config.root import Config
from harness.config.sections import expand_path, section_of


def parse_args(argv: Sequence[str]) -> Config:
    """The config of a command line; `--help` prints all keys and exits. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="train.py --config FILE.toml [--section.key=value ...]",
        description="Train the models of a task under DeepSpeed. --config may be repeated, and a\n"
        "file may begin with `extends = FILE`: of each key the last value counts; over it\n"
        f"the one of the environment, {VARIABLE}SECTION__KEY, and of the command line.",
        epilog="keys, their types and defaults:\n\n" + "\n".join(_help(Config)),
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
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from `deepspeed`
    known, rest = parser.parse_known_args(argv)
    return load(known.config, parse_overrides(rest))


def _path(text: str) -> Path:
    return Path(expand_path(text))


def _help(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        inner = section_of(field.annotation)
        if inner is not None:
            between = {dict: ".NAME.", list: "[]."}.get(get_origin(field.annotation), ".")
            yield from _help(inner, key + between)
            continue
        default = "required" if field.is_required() else f"default {_as_json(field.default)}"
        yield from _wrapped(f"--{key}  <{_type_name(field.annotation)}>  {default}", indent=2)
        yield from _wrapped(" ".join((field.description or "").split()), indent=6)


def _wrapped(text: str, indent: int) -> list[str]:
    """Lines that fit the terminal; the second and later ones are indented by 6."""
    return textwrap.wrap(
        text,
        width=max(40, shutil.get_terminal_size().columns - 2),
        initial_indent=" " * indent,
        subsequent_indent=" " * 6,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _as_json(value: Any) -> str:
    return json.dumps(value, default=str)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return "|".join(_type_name(arg) for arg in get_args(annotation) if arg is not NoneType)
    return "table" if get_origin(annotation) is dict else annotation.__name__.lower()
