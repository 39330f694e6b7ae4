"""What a benchmark has found, as rows of the one table that `python -m bench` prints.

A benchmark prints lines of its own, and tells its rows besides.
"""

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "BENCH_ROWS"
"""The variable with the file that rows are appended to; without it they are not kept."""


@dataclass(frozen=True)
class Row:
    """A claim, measured beside what a user would pick instead."""

    claim: str
    ours: float
    unit: str
    """Of both: "ms", "MB/s", ..."""
    against: str = ""
    """What is compared with; empty: nothing."""
    theirs: float | None = None
    low: float | None = None
    high: float | None = None
    """The range of the ratio, ours to theirs, over the rounds."""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours to theirs."""
        return self.ours / self.theirs if self.theirs else None


def tell(row: Row) -> None:
    """Adds a row to the table, if there is one. Raises ValueError for a claim that it has already,
    of the same unit and comparison: it would not say what it is of."""
    if name := os.environ.get(FILE):
        key = row.claim, row.unit, row.against
        if key in {(other.claim, other.unit, other.against) for other in read_rows(Path(name))}:
            raise ValueError(f"two rows of the same name: {key}")
        with Path(name).open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def tell_pair(
    claim: str, unit: str, ours: Sequence[float], against: str, theirs: Sequence[float]
) -> None:
    """Adds the medians of interleaved rounds, and the range of their ratios."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    medians = statistics.median(ours), statistics.median(theirs)
    tell(Row(claim, medians[0], unit, against, medians[1], min(ratios), max(ratios)))


def read_rows(file: Path) -> list[Row]:
    """The rows that a benchmark has told; none if there is no file."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [Row(**json.loads(line)) for line in lines]


def line_of(row: Row) -> str:
    """A row of the table, in Markdown."""
    theirs = "" if row.theirs is None else number(row.theirs)
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
    spread = "" if row.low is None or row.high is None else f"{row.low:.3g} .. {row.high:.3g}"
    ours = f"{number(row.ours)} {row.unit}"
    cells = (row.claim, ours, row.against, theirs, ratio, spread, row.note)
    return f"| {' | '.join(cells)} |"


HEAD = "| claim | ours | compared with | theirs | ratio | spread | |\n|---|--:|---|--:|--:|---|---|"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
