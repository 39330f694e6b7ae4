"""The documentation as what a reader does with it: files that are written, commands that are typed.

A block of code whose first line is a comment with a file's name (`# my_task.py`) is that file. A
comment above a block of commands says how it is run:

    <!-- not run: REASON -->    it cannot run in a test
    <!-- beside: COMMAND -->    it runs beside COMMAND, of which it commands the run
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^ *```(sh|console)\n(.*?)^ *```$", re.M | re.S)
FILE = re.compile(r"^```\w+\n(# ([\w-]+\.\w+)\n.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """Commands of a page, as one types them."""

    page: Path
    line: int
    commands: str
    not_run: str
    """Why; empty if it is run."""
    beside: str
    """The command of the job that runs meanwhile; empty: none."""

    @property
    def place(self) -> str:
        """As an error names it."""
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """Its blocks of commands, in order."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        kind, _, rest = (match[1] or "").partition(": ")
        line = text.count("\n", 0, match.start(2)) + 1
        commands = match[3] if match[2] == "sh" else typed(match[3])
        not_run, beside = (rest if kind == way else "" for way in ("not run", "beside"))
        yield Block(page, line, commands, not_run, beside)


def typed(console: str) -> str:
    """What is typed at the prompts of a console, without the output."""
    return "".join(re.findall(r"^\$ ((?:.*\\\n)*.*\n)", console, re.M))


def files_of(page: Path) -> dict[str, str]:
    """The files that it has the reader write, by name."""
    return {match[2]: match[1] for match in FILE.finditer(page.read_text())}


def examples(page: Path) -> list[str]:
    """Its blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
