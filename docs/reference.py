"""A hook of MkDocs (mkdocs.yml): the reference, made from the code whenever the site is built."""

import argparse
import html
import os
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from harness.cli import command_line
from harness.config.command_line import Key, keys
from harness.control.commands import COMMANDS

API = {
    "A run from Python": [
        "harness.api.train",
        "harness.local_ranks.launch",
        "harness.control.client.command",
        "harness.result.Result",
    ],
    "A task": ["harness.task.Task", "harness.callbacks"],
    "Optimizers": [
        "harness.optim.apollo.Apollo",
        "harness.optim.apollo.ApolloMini",
        "harness.optim.apollo.apollo_param_groups",
        "harness.optim.matrices.Muon",
        "harness.optim.matrices.Soap",
        "harness.optim.matrices.matrix_param_groups",
    ],
    "Schedules": ["harness.optim.schedules", "harness.optim.plateau.Plateau"],
    "Samplers": [
        "harness.data.sampler.OrderedSampler",
        "harness.data.sampler.RandomSampler",
        "harness.data.sampler.PoolSampler",
        "harness.data.batched_sampler.BatchedOrderedSampler",
        "harness.data.sampler.Sampler",
    ],
    "Files of tensors": ["harness.io"],
    "Codebook patterns": ["harness.pattern"],
}
"""What code outside of harness imports, under the headings of its page."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages of the reference."""
    pages = {"config": config_page, "cli": cli_page, "commands": commands_page, "api": api_page}
    for name, page in pages.items():
        content = "\n".join(page())
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def config_page() -> Iterator[str]:
    """All keys of a config, a table for each of its tables."""
    yield "# Keys of a config\n"
    yield "In a TOML file, or as `--KEY=value` on the command line. NAME is the name of an engine,"
    yield "or of a source of a mixture; `[]` is each of several tables.\n"
    tables: dict[str, list[Key]] = {}
    for key in keys():
        tables.setdefault(key.name.rpartition(".")[0], []).append(key)
    for table, members in tables.items():
        yield f"\n## {table}\n\n| key | type | default | |\n|---|---|---|---|"
        for key in members:
            default = code(key.default) if key.default else "required"
            name = key.name.rpartition(".")[2]
            yield f"| {code(name)} | {code(key.type)} | {default} | {cell(key.text)} |"


def cli_page() -> Iterator[str]:
    """`--help` of every command."""
    os.environ["COLUMNS"] = "90"  # what argparse wraps at
    yield "# The command harness"
    for parser in parsers(command_line()):
        yield f"\n## {parser.prog}\n\n```text\n{parser.format_help()}```"


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser, and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def commands_page() -> Iterator[str]:
    """What a running job can be told."""
    yield "# Live commands\n\nHow they are sent: [Commanding a running job](../control.md).\n"
    yield "| command | what it does |\n|---|---|"
    for command in COMMANDS:
        forms = "<br>".join(map(code, command.forms))
        yield f"| {forms} | {cell(' '.join((command.__doc__ or '').split()))} |"


def api_page() -> Iterator[str]:
    """Directives of mkdocstrings, which reads the sources."""
    yield "# From Python\n"
    yield "How a run is started: [From Python](../python.md). What is measured in each step:"
    yield "[What a record holds](../report.md#what-a-record-holds)."
    for heading, names in API.items():
        yield f"\n## {heading}\n"
        yield from (f"::: {name}\n" for name in names)


def code(text: str) -> str:
    return f"<code>{cell(html.escape(text))}</code>"


def cell(text: str) -> str:
    return text.replace("|", "&#124;")
