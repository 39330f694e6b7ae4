"""What harness does on this machine's card, in sections, each in a process with a limit.

    python -m bench.gpu [SECTION ...] [--skip SECTION ...] [--quick] [--out gpu-report.json]

Prints a Markdown table, and writes a JSON file that can be sent: it contains the card, versions,
results and errors, and no paths, host or user names. `--quick` takes at most 9 minutes on an H100.
Without a card, `--small` imitates it on a CPU, where the figures say nothing.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.bounded import run_bounded
from bench.gpu.report import machine, table, write

LIMITS = {
    "smoke": 170,
    "tests": 120,
    "waits": 60,
    "apollo": 60,
    "loop": 60,
    "save": 40,
    "offload": 30,
}
"""Seconds of each section with --quick; else, and with --small, four times as many."""


def main() -> None:
    """Runs the sections, and reports after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(LIMITS)}")
    parser.add_argument("--skip", nargs="+", default=[], metavar="SECTION")
    parser.add_argument("--quick", action="store_true", help="at most 9 minutes")
    parser.add_argument("--small", action="store_true", help="imitate it on a CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu-report.json"))
    args = parser.parse_args()
    if unknown := {*args.sections, *args.skip} - LIMITS.keys():
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    if not (torch.cuda.is_available() or args.small):
        parser.error("there is no GPU: --small imitates it on a CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    report: dict[str, Any] = {"machine": machine(), "sections": {}}
    for name, limit in LIMITS.items():
        if name in (args.sections or LIMITS) and name not in args.skip:
            flags = ["--quick"] * args.quick + ["--small"] * args.small
            is_short = args.quick and not args.small
            limit = limit if is_short else 4 * limit
            sys.stderr.write(f"{name}: at most {limit} s\n")
            report["sections"][name] = run([f"bench.gpu.{name}", *flags], limit)
            write(report, args.out)
    sys.stdout.write(f"{table(report)}\n\nwritten: {args.out}\n")
    sys.exit(any(found["ended"] != "ok" for found in report["sections"].values()))


def run(words: list[str], limit: float) -> dict[str, Any]:
    """A section's results, and how it ended. `words`: its module, and its options.

    Nothing is left of it: its processes are its process group, its files below one directory.
    """
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as directory:
        file = Path(directory) / "results.json"
        command = [sys.executable, "-m", *words, str(file)]
        environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TMPDIR": directory}
        ended = run_bounded(command, limit, environment)
        results = json.loads(file.read_text()) if file.exists() else {}
    found = {"ended": ended.how, "seconds": ended.seconds, "results": results}
    return found if ended.how == "ok" else found | {"output": ended.output}


if __name__ == "__main__":
    main()
