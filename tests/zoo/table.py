"""The table of docs/zoo.md: the largest differences by entry, precision and ZeRO stage."""

from collections.abc import Iterable, Iterator

from tests.support.helpers import ROOT
from tests.zoo.entry import STAGES, Entry
from tests.zoo.models import ZOO
from tests.zoo.runner import Outcome

DOCS = ROOT / "docs/zoo.md"
COLUMNS = [(precision, stage) for precision in ("fp32", "bf16", "autocast") for stage in STAGES]
HEAD = "| entry | tolerance | " + " | ".join(f"{p} {stage}" for p, stage in COLUMNS) + " |"


def row(entry: Entry, outcomes: Iterable[Outcome]) -> str:
    """A line of the table."""
    worst: dict[tuple[str, int], float] = {}
    for outcome in outcomes:
        found = outcome.difference.largest if outcome.difference else float("inf")
        column = outcome.layout.precision, outcome.layout.stage
        worst[column] = max(worst.get(column, 0.0), found)
    cells = [f"{worst[column]:.0e}" if column in worst else "" for column in COLUMNS]
    return f"| {entry.name} | {_tolerance(entry)} | {' | '.join(cells)} |"


def _tolerance(entry: Entry) -> str:
    return f"{entry.fp32:.0e}, {entry.bf16:.0e}"


def rows() -> dict[str, str]:
    """The table's lines by entry."""
    return {line.split(" | ")[0].removeprefix("| "): line for line in _lines() if " | " in line}


def write(new: dict[str, str]) -> None:
    """Puts these lines into the table, by entry, in place of those that it had."""
    text, mark, _ = DOCS.read_text().partition(HEAD)
    known = rows() | new
    lines = [HEAD, "|---" * (len(COLUMNS) + 2) + "|", *(known[n] for n in ZOO if n in known)]
    DOCS.write_text(text + "\n".join(lines) + "\n")
    assert mark, f"{DOCS} has no table with the head {HEAD!r}"


def _lines() -> Iterator[str]:
    _, _, table = DOCS.read_text().partition(HEAD)
    return iter(table.splitlines()[2:])
