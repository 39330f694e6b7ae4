"""What the documentation tells one to write and to type exists: keys, options, live commands.

Nothing is started, so that this costs no second; the jobs themselves run in tests/launch.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_origin

import pytest
from pydantic import BaseModel

from harness.cli import command_line
from harness.config.engine_sections import EngineConfig
from harness.config.overrides import parse_overrides
from harness.config.root import Config
from harness.config.sections import section_of
from harness.control.grammar import Grammar
from tests.support.helpers import ROOT
from tests.support.pages import PAGES, Block, blocks_of

OF_THE_READER = {"my.toml", "adder.toml"}
"""Configs that the pages have the reader write."""
COMMANDS_OF_TASKS = {"generate": "of launch/tasks/hf.py"}


def blocks(language: str) -> list[Any]:
    """The blocks of code in a language, each as a parameter named by its page and line."""
    return [
        pytest.param(match[1], id=f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}")
        for page in PAGES
        for text in [page.read_text()]
        for match in re.finditer(rf"^ *```{language}\n(.*?)^ *```$", text, re.M | re.S)
    ]


def unknown_keys(section: type[BaseModel], table: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """The keys of a table, and of those in it, that a config does not have."""
    for key, value in table.items():
        if key not in section.model_fields:
            if section.model_config.get("extra") != "allow":
                yield at + key
            continue
        annotation = section.model_fields[key].annotation
        inner = section_of(annotation)
        if inner is None:
            continue
        tables = list(value.values()) if get_origin(annotation) is dict else value
        for one in tables if isinstance(tables, list) else [tables]:
            yield from unknown_keys(inner, one, f"{at}{key}.")


@pytest.mark.parametrize("block", blocks("toml"))
def test_toml_has_keys_of_a_config(block: str) -> None:
    table = tomllib.loads(block)
    section = EngineConfig if set(table) <= set(EngineConfig.model_fields) else Config
    assert list(unknown_keys(section, table)) == []


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a block, as words; those of a pipe are separate."""
    for line in block.replace("\\\n", " ").splitlines():
        if "$(" in line:  # is no plain list of words
            continue
        words = [word for word in shlex.split(line, comments=True) if word != "..."]
        while "|" in words:
            yield words[: words.index("|")]
            words = words[words.index("|") + 1 :]
        if words:
            yield words


def after(name: str, words: Sequence[str]) -> list[str] | None:
    """The arguments of a program, also where another one starts it."""
    return list(words[words.index(name) + 1 :]) if name in words else None


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=b.place) for page in PAGES for b in blocks_of(page)]
)
def test_commands_have_options_that_exist(block: Block) -> None:
    for words in commands(block.commands):
        if words[0] != "docker" and (given := after("harness", words)):  # not an image's name
            args = command_line().parse_args(given)  # exits if an option is unknown
            if args.command == "ctl" and args.words:
                Grammar(["net"], COMMANDS_OF_TASKS).parse(" ".join(args.words))
        if given := after("launch/train.py", words):
            check_train(given)


def check_train(given: list[str]) -> None:
    """Raises AssertionError unless the config files exist, and the keys too."""
    given = shlex.split(shlex.join(given).replace("--config=", "--config "))
    while given[:1] == ["--config"]:
        assert given[1] in OF_THE_READER or (ROOT / given[1]).is_file()
        given = given[2:]
    if given not in (["--help"], ["--dry-run"]):
        assert list(unknown_keys(Config, parse_overrides(given))) == []
