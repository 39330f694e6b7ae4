"""Every claim of README and docs in one run, beside what a user would pick instead.

    python -m bench [SECTION ...] [--skip SECTION ...] [--quick] [--json FILE]

Each section is a benchmark of this folder, in a process of its own with a limit. Prints a table in
Markdown: the claim, ours, what it is compared with, theirs, the ratio of ours to theirs, and its
range over the rounds, where there are any. A section that fails is named, and the others follow.
`--quick` takes at most 10 minutes on two idle cores; without it, ten times as long. Other work on
the machine makes the ranges wide.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.bounded import Ended, run_bounded
from bench.rows import FILE, HEAD, Row, line_of, read_rows


@dataclass(frozen=True)
class Section:
    """A benchmark, as --quick runs it."""

    limit: int
    """Seconds with --quick; else ten times as many."""
    quick: str | None
    """Its options with --quick, None if it is then left out; else it has none."""
    module: str = ""
    """Default: the section's name."""
    always: str = ""
    """Its options in both."""


SECTIONS = {
    "loop": Section(15, "--rounds 5"),
    "start": Section(60, "--rounds 2"),
    "control": Section(30, "--steps 100 --rounds 2"),
    "save": Section(40, "--width 4600 --rounds 2"),
    "resume": Section(30, "--ranks --width 4600 --rounds 2"),
    "memory": Section(25, "--width 4200 --rounds 2"),
    "upload": Section(30, "--width 1800 --rounds 2"),
    "convert": Section(55, "--gigabytes 0.4 --ranks 2 --rounds 1"),
    "waits": Section(30, None),
    "apollo": Section(45, "--steps 5"),
    "muon": Section(50, "--rounds 1 --sizes 256"),
    "offload": Section(15, "--rounds 60"),
    "data": Section(20, "--draws 5000"),
    "tokens": Section(20, "--mb 3 --rounds 3"),
    "metrics": Section(15, "--rounds 3"),
    "trackers": Section(30, None),
    "buffers": Section(20, "--width 8 --layers 20 --steps 5 --rounds 4"),
    "gradients": Section(20, "--parameters 300 --stages 2 --rounds 6"),
    "health": Section(30, "--steps 60 --rounds 2"),
    "pattern": Section(15, ""),
    "report": Section(10, "--steps 30000"),
    "growth": Section(15, "--rounds 1 --only checkpoints"),
    "growth-of-steps": Section(35, "--rounds 2 --block 4 --smaller 10", "loop", "--grow"),
}
"""In the order in which they run."""


def main() -> None:
    """Runs the sections, and prints the table as it grows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--skip", nargs="+", default=[], metavar="SECTION")
    parser.add_argument("--quick", action="store_true", help="at most 10 minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there, too")
    args = parser.parse_args()
    if unknown := {*args.sections, *args.skip} - SECTIONS.keys():
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    found: dict[str, Any] = {"machine": machine(), "sections": {}}
    say(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
    say(f"\n{HEAD}")
    left_out = {name for name, of in SECTIONS.items() if args.quick and of.quick is None}
    for name in args.sections or [name for name in SECTIONS if name not in left_out]:
        if name not in args.skip:
            ended, rows = run(name, args.quick)
            found["sections"][name] = report(name, ended, rows)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(any(section["ended"] != "ok" for section in found["sections"].values()))


def run(name: str, quick: bool) -> tuple[Ended, list[Row]]:
    """Runs a section: how it has ended, and what it has found until then."""
    section = SECTIONS[name]
    words = f"{section.always} {section.quick or '' if quick else ''}".split()
    command = [sys.executable, "-m", f"bench.{section.module or name}", *words]
    limit = section.limit if quick else 10 * section.limit
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        file = Path(directory) / "rows"
        return run_bounded(command, limit, {FILE: str(file)}), read_rows(file)


def report(name: str, ended: Ended, rows: list[Row]) -> dict[str, Any]:
    """Prints the rows of a section, and that it failed if it did; all of it for the file."""
    for row in rows:
        say(line_of(row))
    if ended.how != "ok":
        say(f"| **{name}: {ended.how}** | | | | | | |")
        sys.stderr.write(ended.output)
    found = {"ended": ended.how, "seconds": ended.seconds, "rows": [asdict(row) for row in rows]}
    return found if ended.how == "ok" else found | {"output": ended.output}


def machine() -> dict[str, Any]:
    """What the figures are of."""
    return {
        "date": datetime.now(UTC).strftime("%d %B %Y"),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "Python": platform.python_version(),
        "torch": version("torch"),
        "DeepSpeed": version("deepspeed"),
    }


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
